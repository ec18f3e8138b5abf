"""Rollouts: run the plan of every problem, sample what the plans ask for, score it and report the rewards back."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Literal

from trapo_train.engines.engine import Engine, SamplingParams, Stream
from trapo_train.engines.vllm_engine import VllmConfig
from trapo_train.engines.vllm_server import VllmServerConfig
from trapo_train.metrics import Mean, merge_metrics
from trapo_train.parallel.world import interleave
from trapo_train.records import Completion, Problem, Request, Sample
from trapo_train.rewards.functions import RewardFn, take_metrics, without_rewards
from trapo_train.rewards.judging import Judging
from trapo_train.rollouts.plans import Outcome, Plan, PlanSteps
from trapo_train.rollouts.prefix import cut_prefix
from trapo_train.schema import UserError, check
from trapo_train.step.advantages import equal_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MOST_SAMPLES = 2**20  # of one problem, so that every sample of a call has a key of its own


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled and judged."""

    temperature: float = 1.0
    """Sampling temperature, from 1e-6 to 1e6; the training loss divides the logits by the same value."""
    top_p: float = 1.0
    """Samples from the smallest set of tokens whose probabilities sum to at least top_p, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Samples from the k most likely tokens, before top_p, at least 0; 0 keeps all."""
    max_response_tokens: int = 1024
    """Longest response in tokens, at least 1: expert prefix, completion and end-of-sequence token together."""
    paragraph_break: str = "\n\n"
    """Text after which an expert trace may be cut; not empty."""
    snap_window: float = 0.3
    """How far the cut may move forward to a paragraph break, as a share of the trace in [0, 1]; 0 cuts exactly, as the plans
    prefix_rft and uft do whatever this says: their ratio is drawn, and guidance and longest_prefix bound it."""
    verify: Literal["response", "completion"] = "response"
    """What the reward sees: the response, or the completion alone so that an answer in the prefix earns nothing."""
    on_truncated: Literal["keep", "mask"] = "keep"
    """A completion that its budget cuts off: keep trains on it with the reward it got; mask takes its tokens out of the loss, the
    entropy bonus and every denominator, while its reward stays in the baseline and its expert prefix in TrSFT (DAPO's overlong
    filtering, TRL's mask_truncated_completions)."""
    correct_at: float = 1.0
    """Smallest reward that counts as correct where pass rates are measured: in evaluation (accuracy and pass@k), in headroom and in
    reward/all_correct_share and reward/none_correct_share."""
    correct_by: str | None = None
    """Name of the one of several rewards that says what is correct, unweighted: correct_at is compared with it, and plans decide by
    it on guidance (thresholds of rungs, plan.unsolved_at) and on which problems teach (plan.refill); advantages are of the weighted
    sum. Null for the sum in all of these."""
    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    """What generates: transformers or vllm, in this process, or vllm_server, a vLLM server that runs already."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """vLLM in this process, with engine: vllm."""
    vllm_server: VllmServerConfig = field(default_factory=VllmServerConfig)
    """The vLLM server, with engine: vllm_server."""
    max_batch_tokens: int = 131072
    """Most tokens that engine: transformers holds at once, prompts and budgets of all rows with padding, at least 2."""

    def __post_init__(self) -> None:
        check(
            self,
            ("temperature", 1e-6 <= self.temperature <= 1e6, "from 1e-6 to 1e6"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("max_response_tokens", self.max_response_tokens >= 1, "at least 1"),
            ("paragraph_break", self.paragraph_break != "", "a text that is not empty"),
            ("snap_window", 0 <= self.snap_window <= 1, "in [0, 1]"),
            ("correct_at", self.correct_at == self.correct_at, "a number"),
            ("max_batch_tokens", self.max_batch_tokens >= 2, "at least 2"),
        )


@dataclass(frozen=True)
class RolloutResult:
    """The samples of one training step: one group per problem, in the order of the problems, and what they show."""

    groups: list[list[Sample]]
    metrics: dict[str, float]
    seconds: float = 0.0
    """How long the sampling took; of several ranks the longest."""
    sampled: list[list[Sample]] = field(default_factory=list)
    """The groups with the samples that their plans dropped; the metrics describe these."""
    deferred: tuple[int, ...] = ()
    """Which of the problems, counted from 0, their plans put off to a step on expert traces."""


@dataclass
class _ProblemProgress:
    """One problem on its way through its plan; `request` is what the plan waits for, None when it is done, `group` the samples for
    it, of which `missing` are being generated, and `samples` those of earlier requests."""

    problem: Problem
    plan: PlanSteps
    position: int
    request: Request | None = None
    group: list[Sample] = field(default_factory=list)
    missing: int = 0
    samples: list[Sample] = field(default_factory=list)
    micro_group: int = 0
    outcome: Outcome = field(default_factory=Outcome)

    def advance(self, verdicts: list[float] | None) -> None:
        """Send the verdicts on the last request (None at the start) and take the next request."""
        try:
            self.request = self.plan.send(verdicts)
        except StopIteration as end:
            self.request = None
            self.outcome = end.value or Outcome()
        self.micro_group += 1

    @property
    def kept(self) -> list[Sample]:
        """The samples to train on."""
        return [sample for sample in self.samples if sample.micro_group not in self.outcome.dropped]


class _RolloutLoop:
    """All problems of a step on their way, one stream between them."""

    def __init__(self, stream: Stream, judging: Judging, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig) -> None:
        self.stream, self.judging, self.tokenizer, self.config = stream, judging, tokenizer, config
        self.open: dict[int, tuple[_ProblemProgress, Sample]] = {}  # by the stream's ticket

    def run(self, under_way: Sequence[_ProblemProgress]) -> float:
        """Until every plan has ended; returns the seconds that plans waited for rewards and nothing was handed in."""
        waited_s = 0.0
        for progress in under_way:
            self.go_on(progress, None)
        while self.open or self.judging:
            if self.judging and self.stream.hungry:
                since = time.perf_counter()
                judged = self.judging.take(wait=self.stream.in_order)
                waited_s += time.perf_counter() - since
                for progress in sorted(judged, key=lambda progress: progress.position):
                    progress.samples.extend(progress.group)
                    self.go_on(progress, [sample.verdict for sample in progress.group])
                if judged:
                    continue
            for ticket, completion in self.stream.advance(self.judging.futures):
                progress, sample = self.open.pop(ticket)
                _fill(sample, completion, self.config)
                progress.missing -= 1
                if progress.missing == 0:
                    self.judging.start(progress, progress.group)
        return waited_s

    def go_on(self, progress: _ProblemProgress, verdicts: list[float] | None) -> None:
        """Take the plan's next request and hand it in."""
        progress.advance(verdicts)
        if progress.request is None:
            return
        progress.group = draft(progress.problem, progress.request, progress.micro_group, self.tokenizer, self.config)
        if progress.request.prefix_ratio == 1.0:
            self.judging.start(progress, progress.group)
            return
        progress.missing = len(progress.group)
        for number, sample in enumerate(progress.group, start=len(progress.samples)):
            budget = self.config.max_response_tokens - len(sample.prefix_ids)
            ticket = self.stream.submit(_prompt(sample), budget, key=progress.position * _MOST_SAMPLES + number)
            self.open[ticket] = progress, sample


def run_plans(
    problems: Sequence[Problem],
    plan: Plan,
    engine: Engine,
    reward: RewardFn | None,
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
) -> RolloutResult:
    """Run the plan of each problem to its end and return its samples, with rewards; those that the plan drops only count in
    the metrics.

    There are no rounds. A problem's samples are judged once the last of a request is there, its plan answers with the next
    request, and that joins what the engine is generating for other problems. Requests for full expert traces need no engine.

    When rewards are awaited depends on the engine. With the embedded one (`Stream.in_order`) they are awaited whenever further
    prompts would join, and only then, all that are under way: what is generated together then follows from the samples alone,
    however long a reward takes, so that an interrupted run resumes to the same bits. With vLLM a plan goes on as soon as its own
    rewards are there. Asynchronous rewards and those in workers run beside the generation (see `Judging`).

    Without a reward every sample has reward 0, and no metric speaks of rewards.

    The metrics say what it took: "rollout/tokens_per_s" (generated tokens over the whole time), "rollout/rows_in_flight" (mean over
    the engine's steps, or over time for a server), "rollout/engine_steps" where the engine is in this process, and "time/reward_s",
    the seconds in which the plans waited for rewards and nothing was handed in.

    Every expert trace must fit into max_response_tokens. A prefix ends before its trace does, so it leaves a budget of at
    least one token: max_response_tokens - prefix.

    Raises:
        UserError: an expert trace longer than max_response_tokens, before anything is sampled; a request that names no
            expert trace of its problem.
        RewardError: see `rewards.judge`.
        EngineError: see `vllm_server`.
    """
    _check_experts_fit(problems, config)
    under_way = [_ProblemProgress(problem, plan(problem), position) for position, problem in enumerate(problems)]
    params = SamplingParams(config.max_response_tokens, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)
    started = time.perf_counter()
    with engine.stream(params) as stream, Judging(reward, tokenizer, config) as judging:
        reward_s = _RolloutLoop(stream, judging, tokenizer, config).run(under_way)
        # Counts and speeds add up over ranks; what each has of the same time is averaged.
        shared = {"time/reward_s": reward_s, **stream.metrics()}
        measured = {"reward/none_count": float(judging.none_count), **{name: Mean(value, 1) for name, value in shared.items()}}
    sampled = [progress.samples for progress in under_way]
    generated = sum(len(sample.completion_ids) for group in sampled for sample in group)
    seconds = time.perf_counter() - started
    measured["rollout/tokens_per_s"] = generated / seconds
    deferred = tuple(i for i, progress in enumerate(under_way) if progress.outcome.deferred)
    metrics = take_metrics(reward) | _metrics(sampled) | measured
    metrics = without_rewards(metrics) if reward is None else metrics
    return RolloutResult([progress.kept for progress in under_way], metrics, seconds, sampled, deferred)


def merge_results(parts: Sequence[RolloutResult]) -> RolloutResult:
    """The results of all ranks as one, problems in the order that one process would have them in."""
    sampled = interleave([part.sampled for part in parts])
    metrics = _joint_metrics(sampled, parts)
    metrics |= merge_metrics(_further(parts, metrics))
    put_off = interleave([[i in part.deferred for i in range(len(part.groups))] for part in parts])
    deferred = tuple(i for i, deferred in enumerate(put_off) if deferred)
    seconds = max(part.seconds for part in parts)
    return RolloutResult(interleave([part.groups for part in parts]), metrics, seconds, sampled, deferred)


def chain_results(rounds: Sequence[RolloutResult]) -> RolloutResult:
    """The results of rounds that were sampled one after the other as one."""
    if len(rounds) == 1:
        return rounds[0]
    sampled, seconds = [group for part in rounds for group in part.sampled], [part.seconds for part in rounds]
    metrics = _joint_metrics(sampled, rounds)
    further = _further(rounds, metrics)
    metrics |= merge_metrics(further)
    steps = [part.get("rollout/engine_steps", 0.0) for part in further]
    for name in metrics.keys() & {"time/reward_s", "rollout/engine_steps"}:
        metrics[name] = sum(part.get(name, 0.0) for part in further)
    for name, weights in (("rollout/tokens_per_s", seconds), ("rollout/rows_in_flight", steps if any(steps) else seconds)):
        if name in metrics:
            metrics[name] = sum(part.get(name, 0.0) * weight for part, weight in zip(further, weights, strict=True)) / sum(weights)
    starts = accumulate((len(part.groups) for part in rounds), initial=0)
    deferred = tuple(start + i for start, part in zip(starts, rounds, strict=False) for i in part.deferred)
    return RolloutResult([group for part in rounds for group in part.groups], metrics, sum(seconds), sampled, deferred)


def _joint_metrics(sampled: list[list[Sample]], parts: Sequence[RolloutResult]) -> dict[str, float]:
    """`_metrics` of what the parts sampled, without those of rewards where nothing was judged."""
    judged = any("reward/none_count" in part.metrics for part in parts)
    return _metrics(sampled) if judged else without_rewards(_metrics(sampled))


def _further(parts: Sequence[RolloutResult], known: Collection[str]) -> list[dict[str, float]]:
    """The metrics of each part without those that are `known`."""
    return [{name: value for name, value in part.metrics.items() if name not in known} for part in parts]


def draft(
    problem: Problem, request: Request, micro_group: int, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig
) -> list[Sample]:
    """Return the samples of a request, which share one prefix and have no completion yet."""
    prefix: tuple[int, ...] = ()
    if request.prefix_ratio > 0:
        if not 0 <= request.expert_index < len(problem.experts):
            raise UserError(
                f"rollout: expert_index must name one of the {len(problem.experts)} expert traces of problem "
                f"{problem.index}, got {request.expert_index}. A plan must look at problem.experts before it asks."
            )
        prefix = cut_prefix(
            problem.experts[request.expert_index],
            request.prefix_ratio,
            tokenizer,
            paragraph_break=config.paragraph_break,
            snap_window=config.snap_window if request.snap else 0.0,
        )
    sample = Sample(problem, micro_group, request.prefix_ratio, prefix, (), (), "expert")
    return [replace(sample) for _ in range(request.num_samples)]


def complete(
    samples: Sequence[Sample],
    engine: Engine,
    config: RolloutConfig,
    *,
    temperature: float,
    seed: int | None = None,
    first_key: int = 0,
) -> None:
    """Generate the completion of each sample in one engine call (see `SamplingParams`); full expert traces have none."""
    open_samples = [sample for sample in samples if sample.prefix_ratio < 1.0]
    if not open_samples:
        return
    params = SamplingParams(
        max_new_tokens=tuple(config.max_response_tokens - len(sample.prefix_ids) for sample in open_samples),
        temperature=temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=seed,
        first_key=first_key,
    )
    prompts = [_prompt(sample) for sample in open_samples]
    for sample, completion in zip(open_samples, engine.generate(prompts, params), strict=True):
        _fill(sample, completion, config)


def _prompt(sample: Sample) -> list[int]:
    """What the engine continues."""
    return [*sample.problem.prompt_ids, *sample.prefix_ids]


def _fill(sample: Sample, completion: Completion, config: RolloutConfig) -> None:
    sample.completion_ids = completion.token_ids
    sample.completion_logprobs = completion.logprobs
    sample.finish_reason = completion.finish_reason
    sample.masked = config.on_truncated == "mask" and completion.finish_reason == "length"


def _check_experts_fit(problems: Sequence[Problem], config: RolloutConfig) -> None:
    for problem in problems:
        longest = max((len(expert.token_ids) for expert in problem.experts), default=0)
        if longest > config.max_response_tokens:
            raise UserError(
                f"rollout: expert traces must fit into max_response_tokens = {config.max_response_tokens}, got {longest} "
                f"tokens in problem {problem.index}. Raise max_response_tokens, or drop such traces with "
                "ProblemSet.without_long_experts."
            )


def _metrics(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Summarise a step; a mean over no samples is left out.

    reward/mean             all samples
    reward/std              of all samples
    reward/equal_share      share of the problems whose samples all have one reward, so that a group's own advantages are 0
    reward/all_correct_share, reward/none_correct_share
                            share of the problems whose samples are all correct (rollout.correct_at), and of those that have no
                            correct one; where rewards are 0 and 1 the two add up to equal_share
    reward/unguided         unguided samples of micro-group 1 (those of later ones come from problems that failed before)
    accuracy/unguided       share of the same samples that are correct: what held-out accuracy is on the problems of training
    accuracy/expert         share of the whole expert traces that the reward calls correct
    reward/micro_group_k    samples of micro-group k; guided_share and guided_share/micro_group_k likewise
    answer_in_prefix        share of the guided completions whose prefix already states the solution
    num_samples             all samples
    response_tokens         sum over all samples, prefixes included
    completion_tokens_mean  per completion, _p95 and _max likewise
    finished_share          completions that end with a token that ends a response (model.eos_token)
    entropy/sampled         mean of -logprob over all completion tokens, nats, as the sampler reported them: with top_p = 1 and
                            top_k = 0 an unbiased estimate of the policy's entropy at rollout.temperature where these tokens stand,
                            those without a gradient included, which entropy/rollout leaves out
    """
    samples = [sample for group in groups for sample in group]
    first = [sample for sample in samples if sample.micro_group == 1 and not sample.guided]
    completed = [sample for sample in samples if sample.finish_reason != "expert"]
    means = {
        "reward/mean": [sample.reward for sample in samples],
        "reward/equal_share": [equal_rewards([sample.reward for sample in group]) for group in groups if group],
        "reward/all_correct_share": [all(sample.correct for sample in group) for group in groups if group],
        "reward/none_correct_share": [not any(sample.correct for sample in group) for group in groups if group],
        "reward/unguided": [sample.reward for sample in first],
        "accuracy/unguided": [sample.correct for sample in first],
        "accuracy/expert": [sample.correct for sample in samples if sample.finish_reason == "expert"],
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
    if samples:
        metrics["reward/std"] = pstdev(means["reward/mean"])
    if completed:
        lengths = sorted(means["completion_tokens_mean"])
        metrics["completion_tokens_p95"] = float(lengths[math.ceil(0.95 * len(lengths)) - 1])
        metrics["completion_tokens_max"] = float(lengths[-1])
        metrics["entropy/sampled"] = -sum(math.fsum(sample.completion_logprobs) for sample in completed) / max(1, sum(lengths))
    response_tokens = sum(len(sample.prefix_ids) + len(sample.completion_ids) for sample in samples)
    return metrics | {"num_samples": float(len(samples)), "response_tokens": float(response_tokens)}
