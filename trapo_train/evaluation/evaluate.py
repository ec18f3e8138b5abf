"""Evaluation: accuracy of the model on named sets of held-out problems, without guidance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from trapo_train.engines.engine import Engine
from trapo_train.evaluation.eval_sets import EvalConfig, EvalSet
from trapo_train.metrics import merge_metrics
from trapo_train.parallel.world import World, interleave
from trapo_train.records import Request, Sample
from trapo_train.reports.status import silent
from trapo_train.rewards.functions import RewardFn, take_metrics
from trapo_train.rewards.judging import judge_samples
from trapo_train.rollouts.rollout import RolloutConfig, complete, draft
from trapo_train.rollouts.samples import sample_record, write_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_Found = TypeVar("_Found")


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
    progress: Callable[[float], None] = silent,
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
        progress: told before each engine call what share of this rank's calls is done.

    Returns:
        "accuracy" (mean over problems of the share of correct responses, avg@k) and "accuracy_stderr" (its standard error
        over problems, NaN for one problem); "pass@k" (unbiased) as configured; both accuracies for each group,
        such as "accuracy/depth_3"; "reward/mean", "completion_tokens_mean", "finished_share", "num_problems" and
        "samples_per_problem", their mean.

    Raises: EvaluationStopped, or what sampling or a reward raises, of any rank on every rank.
    """
    world = world or World.alone()
    mine = world.share(list(engine_calls(eval_set.samples, config.responses_per_call, world.size)))

    def answers_to(positions: Sequence[int]) -> _Answers:
        return _answers(engine, eval_set, positions, reward, tokenizer, config, rollout)

    parts = world.attempt(lambda: in_turn(mine, answers_to, progress, stopped), Exception)
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


def engine_calls(samples: Sequence[int], most: int, ranks: int) -> Iterator[list[int]]:
    """The positions of each engine call's problems, which have so many `samples` each, in order: of at most `most` responses or one
    problem, and as far as problems divide as many calls for every rank, of as many responses, so that none waits long for the
    others."""
    total, largest = sum(samples), max(samples)
    fitting = max(most // largest, 1) * largest  # responses of whole problems
    calls = math.ceil(total / (fitting * ranks)) * ranks
    positions: list[int] = []
    before, responses, made = 0, 0, 0
    for position, count in enumerate(samples):
        if positions and ((before + responses) * calls >= total * (made + 1) or responses + count > most):
            yield positions
            positions, before, responses, made = [], before + responses, 0, made + 1
        positions.append(position)
        responses += count
    yield positions


def in_turn(
    calls: Sequence[Sequence[int]],
    ask: Callable[[Sequence[int]], _Found],
    progress: Callable[[float], None],
    stopped: Callable[[], bool] = never,
) -> list[_Found]:
    """What `ask` finds with each of this rank's engine calls. `progress` is told what share of them is done, before each, and
    EvaluationStopped raised where it is `stopped` by then."""
    found: list[_Found] = []
    for positions in calls:
        if stopped():
            raise EvaluationStopped
        progress(len(found) / len(calls))
        found.append(ask(positions))
    return found


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
