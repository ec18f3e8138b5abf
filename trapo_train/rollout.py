"""Rollouts: run the plan of every problem, sample what the plans ask for, score it and report the rewards back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from trapo_train.engine import Engine, SamplingParams
from trapo_train.parallel import interleave
from trapo_train.plans import Outcome, Plan, PlanSteps
from trapo_train.prefix import answer_in_prefix, cut_prefix
from trapo_train.records import Problem, Request, Sample
from trapo_train.rewards import RewardFn, judge, merge_metrics, take_metrics
from trapo_train.vllm_server import VllmConfig

ENGINES = ("transformers", "vllm_server")
VERIFICATIONS = ("response", "completion")


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled and judged."""

    temperature: float = 1.0
    """Sampling temperature, above 0; the training loss divides the logits by the same value."""
    top_p: float = 1.0
    """Samples from the smallest set of tokens whose probabilities sum to at least top_p, in (0, 1]; 1 keeps all."""
    max_response_tokens: int = 1024
    """Longest response in tokens, at least 1: expert prefix, completion and end-of-sequence token together."""
    paragraph_break: str = "\n\n"
    """Text after which an expert trace may be cut; not empty."""
    snap_window: float = 0.3
    """How far the cut may move forward to a paragraph break, as a share of the trace in [0, 1]; 0 cuts exactly."""
    verify: Literal["response", "completion"] = "response"
    """What the reward sees: the response, or the completion alone so that an answer in the prefix earns nothing."""
    correct_at: float = 1.0
    """Smallest reward that counts as correct where pass rates are measured (evaluation and headroom)."""
    engine: Literal["transformers", "vllm_server"] = "transformers"
    """What generates: transformers, in this process, or vllm_server, a vLLM server that runs already."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """The vLLM server, with engine: vllm_server."""
    max_batch_tokens: int = 131072
    """Most tokens that the engine holds at once, prompts and budgets of all rows with padding, at least 2."""

    def __post_init__(self) -> None:
        checks = [
            ("temperature", 0 < self.temperature < float("inf"), "a finite number above 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("max_response_tokens", self.max_response_tokens >= 1, "at least 1"),
            ("paragraph_break", self.paragraph_break != "", "a text that is not empty"),
            ("snap_window", 0 <= self.snap_window <= 1, "in [0, 1]"),
            ("verify", self.verify in VERIFICATIONS, f"one of {', '.join(VERIFICATIONS)}"),
            ("correct_at", self.correct_at == self.correct_at, "a number"),
            ("engine", self.engine in ENGINES, f"one of {', '.join(ENGINES)}"),
            ("max_batch_tokens", self.max_batch_tokens >= 2, "at least 2"),
        ]
        for name, holds, rule in checks:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class RolloutResult:
    """The samples of one training step: one group per problem, in the order of the problems, and what they show."""

    groups: list[list[Sample]]
    metrics: dict[str, float]
    sampled: list[list[Sample]] = field(default_factory=list)
    """The groups with the samples that their plans dropped; the metrics describe these."""
    deferred: tuple[int, ...] = ()
    """Which of the problems, counted from 0, their plans put off to a step on expert traces."""


@dataclass
class _Climb:
    """One problem on its way through its plan; `request` is what the plan waits for, None when it is done."""

    problem: Problem
    plan: PlanSteps
    request: Request | None = None
    samples: list[Sample] = field(default_factory=list)
    micro_group: int = 0
    outcome: Outcome = field(default_factory=Outcome)

    def advance(self, rewards: list[float] | None) -> None:
        """Send the rewards of the last request (None at the start) and take the next request."""
        try:
            self.request = self.plan.send(rewards)
        except StopIteration as end:
            self.request = None
            self.outcome = end.value or Outcome()
        self.micro_group += 1

    @property
    def kept(self) -> list[Sample]:
        """The samples to train on."""
        return [sample for sample in self.samples if sample.micro_group not in self.outcome.dropped]


def run_plans(
    problems: Sequence[Problem], plan: Plan, engine: Engine, reward: RewardFn, tokenizer: Any, config: RolloutConfig
) -> RolloutResult:
    """Run the plan of each problem to its end and return its samples, with rewards; those that the plan drops only count in
    the metrics.

    The work goes in rounds. A round samples and scores the outstanding request of every problem that is not done, in one
    engine call and one reward call, and each plan answers with its next request. Requests for full expert traces need no
    engine, so they are settled first and no problem waits for another one's generation to move past one.

    Every expert trace must fit into max_response_tokens. A prefix ends before its trace does, so it leaves a budget of at
    least one token: max_response_tokens - prefix.

    Raises:
        ValueError: an expert trace longer than max_response_tokens, before anything is sampled; a request that names no
            expert trace of its problem.
        RewardError: see `rewards.judge`.
    """
    _check_experts_fit(problems, config)
    climbs = [_Climb(problem, plan(problem)) for problem in problems]
    for climb in climbs:
        climb.advance(None)
    none_count = 0
    while live := [climb for climb in climbs if climb.request is not None]:
        batch = [climb for climb in live if climb.request.prefix_ratio == 1.0] or live
        drafts = [draft(climb.problem, climb.request, climb.micro_group, tokenizer, config) for climb in batch]
        samples = [sample for group in drafts for sample in group]
        complete(samples, engine, config, temperature=config.temperature)
        none_count += judge_samples(samples, reward, tokenizer, config)
        for climb, group in zip(batch, drafts, strict=True):
            climb.samples.extend(group)
            climb.advance([sample.reward for sample in group])
    sampled = [climb.samples for climb in climbs]
    metrics = _metrics(sampled) | {"reward/none_count": float(none_count)} | take_metrics(reward)
    deferred = tuple(i for i, climb in enumerate(climbs) if climb.outcome.deferred)
    return RolloutResult([climb.kept for climb in climbs], metrics, sampled, deferred)


def merge_results(parts: Sequence[RolloutResult]) -> RolloutResult:
    """The results of all ranks as one, problems in the order that one process would have them in."""
    if len(parts) == 1:
        return parts[0]
    sampled = interleave([part.sampled for part in parts])
    # What the samples do not tell: counts add up, means of single rewards are averaged over the ranks.
    metrics = _metrics(sampled)
    metrics |= merge_metrics([{name: value for name, value in part.metrics.items() if name not in metrics} for part in parts])
    put_off = interleave([[i in part.deferred for i in range(len(part.groups))] for part in parts])
    deferred = tuple(i for i, deferred in enumerate(put_off) if deferred)
    return RolloutResult(interleave([part.groups for part in parts]), metrics, sampled, deferred)


def drop_long_experts(problems: Sequence[Problem], max_response_tokens: int) -> tuple[list[Problem], int]:
    """Return the problems without expert traces longer than `max_response_tokens`, and how many traces that were.

    Such a trace is no model for a response: the policy may not write one as long, and cut short it has no answer.
    """
    kept = []
    for problem in problems:
        experts = tuple(expert for expert in problem.experts if len(expert.token_ids) <= max_response_tokens)
        kept.append(replace(problem, experts=experts) if len(experts) < len(problem.experts) else problem)
    dropped = sum(len(old.experts) - len(new.experts) for old, new in zip(problems, kept, strict=True))
    return kept, dropped


def draft(problem: Problem, request: Request, micro_group: int, tokenizer: Any, config: RolloutConfig) -> list[Sample]:
    """Return the samples of a request, which share one prefix and have no completion yet."""
    prefix: tuple[int, ...] = ()
    if request.prefix_ratio > 0:
        if not 0 <= request.expert_index < len(problem.experts):
            raise ValueError(
                f"rollout: expert_index must name one of the {len(problem.experts)} expert traces of problem "
                f"{problem.index}, got {request.expert_index}. A plan must look at problem.experts before it asks."
            )
        prefix = cut_prefix(
            problem.experts[request.expert_index],
            request.prefix_ratio,
            tokenizer,
            paragraph_break=config.paragraph_break,
            snap_window=config.snap_window,
        )
    sample = Sample(problem, micro_group, request.prefix_ratio, prefix, (), (), "expert")
    return [replace(sample) for _ in range(request.num_samples)]


def complete(
    samples: Sequence[Sample], engine: Engine, config: RolloutConfig, *, temperature: float, seed: int | None = None
) -> None:
    """Generate the completion of each sample in one engine call; full expert traces have none."""
    open_samples = [sample for sample in samples if sample.prefix_ratio < 1.0]
    if not open_samples:
        return
    params = SamplingParams(
        max_new_tokens=tuple(config.max_response_tokens - len(sample.prefix_ids) for sample in open_samples),
        temperature=temperature,
        top_p=config.top_p,
        seed=seed,
    )
    prompts = [[*sample.problem.prompt_ids, *sample.prefix_ids] for sample in open_samples]
    for sample, completion in zip(open_samples, engine.generate(prompts, params), strict=True):
        sample.completion_ids = completion.token_ids
        sample.completion_logprobs = completion.logprobs
        sample.finish_reason = completion.finish_reason


def judge_samples(samples: Sequence[Sample], reward: RewardFn, tokenizer: Any, config: RolloutConfig) -> int:
    """Set `reward` and `answer_in_prefix` of each sample in one reward call; return how many rewards were None.

    With verify="completion" the reward sees the completion alone, except for full expert traces: there the model has
    written nothing, so there is nothing it could get for free. No opinion (None) counts as 0.
    """
    texts = []
    for sample in samples:
        alone = config.verify == "completion" and sample.prefix_ratio < 1.0
        texts.append(_decode(tokenizer, sample.completion_ids if alone else sample.prefix_ids + sample.completion_ids))
    rewards = judge(reward, [sample.problem for sample in samples], texts)
    for sample, value in zip(samples, rewards, strict=True):
        sample.reward = 0.0 if value is None else value
        if sample.guided:
            prefix_text = _decode(tokenizer, sample.prefix_ids)
            sample.answer_in_prefix = answer_in_prefix(prefix_text, sample.problem.solution)
    return sum(value is None for value in rewards)


def _decode(tokenizer: Any, token_ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _check_experts_fit(problems: Sequence[Problem], config: RolloutConfig) -> None:
    for problem in problems:
        longest = max((len(expert.token_ids) for expert in problem.experts), default=0)
        if longest > config.max_response_tokens:
            raise ValueError(
                f"rollout: expert traces must fit into max_response_tokens = {config.max_response_tokens}, got {longest} "
                f"tokens in problem {problem.index}. Raise max_response_tokens, or drop such traces with "
                "drop_long_experts."
            )


def _metrics(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Summarise a step; a mean over no samples is left out.

    reward/mean             all samples
    reward/unguided         unguided samples of micro-group 1 (those of later ones come from problems that failed before)
    reward/micro_group_k    samples of micro-group k; guided_share and guided_share/micro_group_k likewise
    answer_in_prefix        share of the guided completions whose prefix already states the solution
    response_tokens         sum over all samples, prefixes included
    completion_tokens_mean  per completion; finished_share: completions that end with the end-of-sequence token
    """
    samples = [sample for group in groups for sample in group]
    first = [sample for sample in samples if sample.micro_group == 1 and not sample.guided]
    completed = [sample for sample in samples if sample.finish_reason != "expert"]
    means = {
        "reward/mean": [sample.reward for sample in samples],
        "reward/unguided": [sample.reward for sample in first],
        "guided_share": [sample.guided for sample in samples],
        "answer_in_prefix": [sample.answer_in_prefix for sample in completed if sample.guided],
        "completion_tokens_mean": [len(sample.completion_ids) for sample in completed],
        "finished_share": [sample.finish_reason == "stop" for sample in completed],
    }
    for k in sorted({sample.micro_group for sample in samples}):
        micro_group = [sample for sample in samples if sample.micro_group == k]
        means[f"reward/micro_group_{k}"] = [sample.reward for sample in micro_group]
        means[f"guided_share/micro_group_{k}"] = [sample.guided for sample in micro_group]
    metrics = {name: fmean(values) for name, values in means.items() if values}
    response_tokens = sum(len(sample.prefix_ids) + len(sample.completion_ids) for sample in samples)
    return metrics | {"response_tokens": float(response_tokens)}
