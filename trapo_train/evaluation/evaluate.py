"""Evaluation: accuracy of the model on named sets of held-out problems, without guidance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.data.problems import identity
from trapo_train.engines.engine import Engine
from trapo_train.metrics import merge_metrics
from trapo_train.parallel.world import World, interleave
from trapo_train.records import Problem, Request, Sample
from trapo_train.rewards.functions import RewardFn, take_metrics
from trapo_train.rewards.judging import judge_samples
from trapo_train.rollouts.rollout import SAMPLING_ERRORS, RolloutConfig, complete, draft
from trapo_train.rollouts.samples import sample_record, write_lines
from trapo_train.schema import UserError, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

UNNAMED = ""  # the only set, where eval_data is one data section


@dataclass(frozen=True)
class EvalConfig:
    """When and how to evaluate."""

    every: int = 0
    """Rollout steps between evaluations, at least 0; 0 evaluates only at the end."""
    samples_per_prompt: int | dict[str, int] = 1
    """Responses sampled for each problem, at least 1: one number, or one for each set by name; accuracy is their mean (avg@k).
    Equal rows are one problem, which gets so many for each of its rows."""
    pass_at: list[int] | None = None
    """k of every pass@k to report, each at least 1, on the sets with that many samples; null for 2, 4, 8 … as far as they reach."""
    temperature: float = 1.0
    """Sampling temperature, 0 or from 1e-6 to 1e6; 0 is greedy and takes one sample per problem."""
    top_p: float | None = None
    """As rollout.top_p, in (0, 1]; null for that of the rollouts."""
    top_k: int | None = None
    """As rollout.top_k, at least 0; null for that of the rollouts."""
    max_response_tokens: int | None = None
    """Longest response in tokens, at least 1; null for that of the rollouts."""
    num_problems: int | None = None
    """The first so many problems of each set, at least 1; null takes all."""
    group_by: str | None = None
    """Dataset column whose values get an accuracy each, such as depth, on the sets that have it; null for none."""
    responses_per_call: int = 256
    """Most responses that one engine call samples, at least 1, or those of one problem where these are more. Ranks share the calls,
    which are made smaller if some ranks would otherwise get none. Samples do not depend on the call size or the rank."""
    sample: bool = True
    """Whether responses are sampled and judged; false reports expert_nll alone, of sets with expert traces, and needs no reward.
    Nothing reads the settings of responses then, and the run notes those that are set."""
    save_samples: bool = False
    """Whether each evaluation writes its responses to output_dir/samples, as JSON lines with the whole texts."""
    seed: int = 0
    """Seed of the samples, at least 0 and below 2^63: the same at every evaluation, so that checkpoints are compared on equal
    draws."""

    def __post_init__(self) -> None:
        samples = self.samples_per_prompt
        counts = list(samples.values()) if isinstance(samples, dict) else [samples]
        check(
            self,
            ("every", self.every >= 0, "at least 0"),
            ("samples_per_prompt", all(count >= 1 for count in counts), "at least 1"),
            ("pass_at", self.pass_at is None or all(k >= 1 for k in self.pass_at), "null or numbers of at least 1"),
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "0 or from 1e-6 to 1e6"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "null or in (0, 1]"),
            ("top_k", self.top_k is None or self.top_k >= 0, "null or at least 0"),
            ("max_response_tokens", self.max_response_tokens is None or self.max_response_tokens >= 1, "null or at least 1"),
            ("num_problems", self.num_problems is None or self.num_problems >= 1, "null or at least 1"),
            ("responses_per_call", self.responses_per_call >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63"),
        )
        if self.temperature == 0 and any(count > 1 for count in counts):
            raise UserError(
                f"samples_per_prompt must be 1 at temperature 0, got {samples}: greedy samples are "
                "all the same. Set temperature above 0, or samples_per_prompt to 1."
            )
        if self.save_samples and not self.sample:
            raise UserError(
                "save_samples must not be set where sample is false, got True: there are no responses. Leave it out, or set "
                "sample=true."
            )

    @property
    def ignored(self) -> list[str]:
        """The settings of responses that are not at their defaults, where no responses are sampled; else none."""
        named = [entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default]
        return [name for name in named if not self.sample and name not in ("sample", "every", "num_problems")]

    def sampling(self, rollout: RolloutConfig) -> RolloutConfig:
        """How an evaluation samples and judges responses, but for the temperature: as `rollout`, unless it is set here."""
        own = {name: getattr(self, name) for name in ("top_p", "top_k", "max_response_tokens")}
        own = {name: value for name, value in own.items() if value is not None}
        return replace(rollout, **own, on_truncated="keep")  # there is no loss to leave a completion out of

    def check_names(self, names: Sequence[str]) -> None:
        """Raise UserError unless `samples_per_prompt` is one number or names exactly these sets."""
        samples = self.samples_per_prompt
        if isinstance(samples, dict) and set(samples) != set(names):
            raise UserError(
                f"evaluation.samples_per_prompt must name the sets of eval_data, {', '.join(names) or 'which has no names'}, got "
                f"{', '.join(samples)}. Give one number for all, or one for each."
            )


@dataclass(frozen=True)
class EvalSet:
    """The problems of one set without repetitions, and how many responses each of them gets.

    A problem that the dataset holds several times (AIME is published with every row 32 times) is one problem with that many times
    the samples: its rows are no independent problems in a standard error, and pass@k may draw from all of their responses.
    """

    problems: Sequence[Problem]
    rows: tuple[int, ...]
    """Where in `problems` each problem stands first."""
    samples: tuple[int, ...]
    """Responses of each problem; 1 if greedy, however often it is repeated."""
    groups: dict[str, list[int]]
    """Positions in `rows` by value of the column group_by, named like depth_3; empty where the set has no such column."""
    members: tuple[int, ...] = ()
    """Every row of these problems, repetitions included: they may differ in their expert traces."""

    @classmethod
    def of(cls, problems: Sequence[Problem], config: EvalConfig, name: str = UNNAMED) -> EvalSet:
        """The set of this name, from its rows."""
        rows: dict[Any, int] = {}
        repeats: dict[Any, int] = {}
        values: list[Any] = []
        members: list[int] = []
        for row, problem in enumerate(problems):
            key = identity(problem)
            if key not in rows and len(rows) != config.num_problems:
                rows[key], repeats[key] = row, 0
                values.append(problem.columns.get(config.group_by))
            if key in rows:
                repeats[key] += 1
                members.append(row)
        grouped = bool(problems) and config.group_by in problems[0].columns
        each = config.samples_per_prompt
        each = each[name] if isinstance(each, dict) else each
        samples = [1 if config.temperature == 0 else each * count for count in repeats.values()]
        groups = _group(values, config.group_by) if grouped else {}
        return cls(problems, tuple(rows.values()), tuple(samples), groups, tuple(members))

    @property
    def most_samples(self) -> int:
        """Responses that every problem has at least: the largest k of pass@k."""
        return min(self.samples)


def section_of(name: str) -> str:
    """What a set is called in the configuration and in what is said of it: eval_data.aime."""
    return f"eval_data.{name}" if name else "eval_data"


def load_eval_sets(
    data: DataConfig | Mapping[str, DataConfig] | None,
    config: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int] | None = None,
    world: World | None = None,
) -> dict[str, EvalSet]:
    """The configured sets by name, their expert traces ending with one of `end_ids`; one without a name is called UNNAMED. `world`:
    the ranks that load them together.

    Raises: UserError for data that cannot be used (see `load_problems`), a k of pass@k beyond the samples of every set, a
        column group_by that no set has, or a set that has nothing to report.
    """
    named = data if isinstance(data, Mapping) else {} if data is None else {UNNAMED: data}
    sets: dict[str, EvalSet] = {}
    for name, entry in named.items():
        problems = load_problems(entry, tokenizer, None, end_ids=end_ids, world=world, section=section_of(name))
        sets[name] = EvalSet.of(problems, config, name)
    if not sets:
        return sets
    for entry in sets.values():
        if not config.sample and not any(entry.problems[row].experts for row in entry.members):
            raise UserError(
                f"evaluation.sample=false reports the loss of expert traces alone, and {entry.problems.section} has none. Set its "
                "expert_column to the column that holds them, or evaluation.sample=true."
            )
    if not config.sample:
        return sets
    most = max(entry.most_samples for entry in sets.values())
    if max(config.pass_at or [1]) > most:
        raise UserError(
            f"evaluation.pass_at must be at most {most}, the samples of a problem, got {max(config.pass_at)}. "
            "Raise evaluation.samples_per_prompt."
        )
    if config.group_by is not None and not any(entry.groups for entry in sets.values()):
        columns = sorted({column for entry in sets.values() for column in entry.problems[0].columns})
        raise UserError(
            f"evaluation.group_by must name a column of the data set, got {config.group_by!r}; it has {columns}. "
            "Name one of these, or null."
        )
    return sets


class EvaluationStopped(Exception):
    """An evaluation that was given up, as the run is to stop; nothing of it is kept."""


def never() -> bool:
    """What an evaluation asks that nothing stops."""
    return False


class _Response(NamedTuple):
    reward: float
    correct: bool
    num_tokens: int
    finished: bool
    record: dict[str, Any] | None = None


class _Answers(NamedTuple):
    """What one engine call came to: the responses of each of its problems, and what the reward counted besides."""

    problems: list[list[_Response]]
    reward_metrics: dict[str, float]


def evaluate(
    engine: Engine,
    eval_set: EvalSet,
    reward: RewardFn,
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    rollout: RolloutConfig,
    world: World | None = None,
    save_to: Path | None = None,
    stopped: Callable[[], bool] = never,
) -> dict[str, float]:
    """Sample every problem without a prefix and return what share of the responses is correct.

    Ranks share the engine calls and exchange what they found: every rank returns the same. What a response draws depends on its
    place in the set alone, so that a single process would return that, too, but for a draw that the last bits of a logit decide.
    The engine's own random state is left alone, so evaluating does not change the training that follows.

    Args:
        rollout: its correct_at and correct_by, and what the evaluation has no top_p, top_k or max_response_tokens of its own for;
            the temperature is the evaluation's.
        world: the ranks that call this together; None for a single process.
        save_to: where the first rank writes all responses (see `samples.sample_record`), with config.save_samples; None: nowhere.
        stopped: asked before each engine call; once it is true the evaluation is given up.

    Returns:
        "accuracy" (mean over problems of the share of correct responses, avg@k) and "accuracy_stderr" (its standard error
        over problems, NaN for one problem); "pass@k" (unbiased) as configured; both accuracies for each group,
        such as "accuracy/depth_3"; "reward/mean", "completion_tokens_mean", "finished_share", "num_problems" and
        "samples_per_problem", their mean.

    Raises: EngineError, RewardError or EvaluationStopped of any rank, on every rank.
    """
    world = world or World.alone()
    calls = list(_calls(eval_set, config.responses_per_call, world.size))

    def answers_to(positions: Sequence[int]) -> _Answers:
        if stopped():
            raise EvaluationStopped
        return _answers(engine, eval_set, positions, reward, tokenizer, config, rollout)

    parts = world.attempt(lambda: [answers_to(positions) for positions in world.share(calls)], *SAMPLING_ERRORS, EvaluationStopped)
    found: list[_Answers] = interleave(parts)
    problems = [problem for answers in found for problem in answers.problems]
    responses = [response for problem in problems for response in problem]
    if config.save_samples and save_to is not None and world.first:
        try:
            write_lines(save_to, (response.record for response in responses))
        except OSError as error:  # the evaluation is worth more
            logger.warning("the responses of the evaluation could not be written: %s", error)
    reward_metrics = merge_metrics(answers.reward_metrics for answers in found)
    return {
        **{name: float(value) for name, value in reward_metrics.items()},  # a reward's own: all that follows wins
        **_accuracies(eval_set, problems, config),
        "reward/mean": fmean(response.reward for response in responses),
        "completion_tokens_mean": fmean(response.num_tokens for response in responses),
        "finished_share": fmean(response.finished for response in responses),
        "num_problems": float(len(problems)),
        "samples_per_problem": len(responses) / len(problems),
    }


def _calls(eval_set: EvalSet, most: int, ranks: int) -> Iterator[list[int]]:
    """The positions of each engine call's problems, in order: of at most `most` responses or one problem, and as far as problems
    divide as many calls for every rank, of as many responses, so that none waits long for the others."""
    total, largest = sum(eval_set.samples), max(eval_set.samples)
    fitting = max(most // largest, 1) * largest  # responses of whole problems
    calls = math.ceil(total / (fitting * ranks)) * ranks
    positions: list[int] = []
    before, responses, made = 0, 0, 0
    for position, samples in enumerate(eval_set.samples):
        if positions and ((before + responses) * calls >= total * (made + 1) or responses + samples > most):
            yield positions
            positions, before, responses, made = [], before + responses, 0, made + 1
        positions.append(position)
        responses += samples
    yield positions


def _answers(
    engine: Engine,
    eval_set: EvalSet,
    positions: Sequence[int],
    reward: RewardFn,
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    rollout: RolloutConfig,
) -> _Answers:
    rollout = config.sampling(rollout)
    drafts = [draft(eval_set.problems[eval_set.rows[i]], Request(eval_set.samples[i]), 1, tokenizer, rollout) for i in positions]
    samples = [sample for group in drafts for sample in group]
    before = sum(eval_set.samples[: positions[0]])
    complete(samples, engine, rollout, temperature=config.temperature, seed=config.seed, first_key=before)
    none_count = judge_samples(samples, reward, tokenizer, rollout)

    def response(sample: Sample) -> _Response:
        record = sample_record(sample, tokenizer) if config.save_samples else None
        return _Response(sample.reward, sample.correct, len(sample.completion_ids), sample.finish_reason == "stop", record)

    found = [[response(sample) for sample in group] for group in drafts]
    # Taken, or they would show up in the next training step.
    return _Answers(found, take_metrics(reward) | {"reward/none_count": float(none_count)})


def _accuracies(eval_set: EvalSet, problems: Sequence[Sequence[_Response]], config: EvalConfig) -> dict[str, float]:
    num_correct = [sum(response.correct for response in responses) for responses in problems]
    rates = [correct / samples for correct, samples in zip(num_correct, eval_set.samples, strict=True)]
    metrics = {"accuracy": fmean(rates), "accuracy_stderr": standard_error(rates)}
    powers = [2**i for i in range(1, eval_set.most_samples.bit_length())]
    for k in powers if config.pass_at is None else [k for k in config.pass_at if k <= eval_set.most_samples]:
        pairs = zip(eval_set.samples, num_correct, strict=True)
        metrics[f"pass@{k}"] = fmean(pass_at_k(samples, correct, k) for samples, correct in pairs)
    for name, positions in eval_set.groups.items():
        group_rates = [rates[i] for i in positions]
        metrics[f"accuracy/{name}"] = fmean(group_rates)
        metrics[f"accuracy_stderr/{name}"] = standard_error(group_rates)
    return metrics


def evaluation_score(evaluations: Mapping[str, Mapping[str, float]]) -> float | None:
    """How good a model is by its evaluations, higher is better: the mean accuracy of the sets, or minus their mean expert_nll where
    nothing was sampled; None without either."""
    for name, sign in (("accuracy", 1.0), ("expert_nll", -1.0)):
        values = [metrics[name] for metrics in evaluations.values() if name in metrics]
        if values:
            return sign * fmean(values)
    return None


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the chance that at least one of k samples is correct, drawn from these without replacement.

    Source: arXiv 2107.03374, equation 1 (the unbiased estimator of pass@k).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of `values`; NaN for a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def group_problems(problems: Sequence[Problem], group_by: str | None) -> dict[str, list[int]]:
    """Return the positions of the problems of each group, at least one, named like depth_3, in the order of the column's values.

    Raises: UserError for problems without the column.
    """
    if group_by is None:
        return {}
    first = problems[0]  # all rows of a set have the same columns
    if group_by not in first.columns:
        raise UserError(
            f"group_by must name a column of the data set, got {group_by!r}; problem {first.index} has {sorted(first.columns)}. "
            "Name one of these, or null."
        )
    return _group([problem.columns[group_by] for problem in problems], group_by)


def _group(values: Sequence[Any], group_by: str | None) -> dict[str, list[int]]:
    positions: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        positions.setdefault(value if isinstance(value, Hashable) else str(value), []).append(i)
    ordered = sorted(positions, key=lambda value: (0, value, "") if isinstance(value, int | float) else (1, 0, str(value)))
    return {f"{group_by}_{value}": positions[value] for value in ordered}
