"""Evaluation: accuracy of the model on held-out problems, without guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from trapo_train.engine import Engine
from trapo_train.records import Problem, Request
from trapo_train.rewards import RewardFn, take_metrics
from trapo_train.rollout import RolloutConfig, complete, draft, judge_samples


@dataclass(frozen=True)
class EvalConfig:
    """When and how to evaluate."""

    every: int = 0
    """Optimizer steps between evaluations, at least 0; 0 evaluates only at the end."""
    samples_per_prompt: int = 1
    """Responses sampled for each problem, at least 1; accuracy is their mean (avg@k)."""
    temperature: float = 1.0
    """Sampling temperature, at least 0; 0 is greedy and takes one sample per prompt."""
    num_problems: int | None = None
    """The first so many problems of the evaluation set, at least 1; null takes all."""
    group_by: str | None = None
    """Dataset column whose values get an accuracy each, such as depth; null for none."""
    seed: int = 0
    """Seed of the samples, the same at every evaluation, so that checkpoints are compared on equal draws."""

    def __post_init__(self) -> None:
        checks = [
            ("every", self.every >= 0, "at least 0"),
            ("samples_per_prompt", self.samples_per_prompt >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number of at least 0"),
            ("num_problems", self.num_problems is None or self.num_problems >= 1, "null or at least 1"),
        ]
        for name, holds, rule in checks:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}.")
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"samples_per_prompt must be 1 at temperature 0, got {self.samples_per_prompt}: greedy samples are "
                "all the same. Set temperature above 0, or samples_per_prompt to 1."
            )


def evaluate(
    engine: Engine,
    problems: Sequence[Problem],
    reward: RewardFn,
    tokenizer: Any,
    config: EvalConfig,
    rollout: RolloutConfig,
) -> dict[str, float]:
    """Sample every problem without a prefix, in one engine call, and return what share of the responses is correct.

    The engine's own random state is left alone, so evaluating does not change the training that follows.

    Args:
        rollout: its max_response_tokens, top_p and correct_at; the temperature is the evaluation's own.

    Returns:
        "accuracy" (mean over problems of the share of correct samples, avg@k) and "accuracy_stderr" (its standard error
        over problems, NaN for one problem); "pass@k" for k = 2, 4, 8 … samples (unbiased); both accuracies for each group,
        such as "accuracy/depth_3"; "reward/mean", "completion_tokens_mean", "finished_share" and "num_problems".

    Raises:
        ValueError: no problems; a problem without the column `group_by`.
    """
    if not problems:
        raise ValueError("evaluate: needs at least 1 problem, got none. Give the evaluation a data set, or turn it off.")
    chosen = problems[: config.num_problems]
    groups = group_problems(chosen, config.group_by)
    request = Request(config.samples_per_prompt)
    drafts = [draft(problem, request, 1, tokenizer, rollout) for problem in chosen]
    samples = [sample for group in drafts for sample in group]
    complete(samples, engine, rollout, temperature=config.temperature, seed=config.seed)
    judge_samples(samples, reward, tokenizer, rollout)

    num_correct = [sum(sample.reward >= rollout.correct_at for sample in group) for group in drafts]
    rates = [correct / config.samples_per_prompt for correct in num_correct]
    metrics = {"accuracy": fmean(rates), "accuracy_stderr": standard_error(rates)}
    k = 2
    while k <= config.samples_per_prompt:
        metrics[f"pass@{k}"] = fmean(pass_at_k(config.samples_per_prompt, correct, k) for correct in num_correct)
        k *= 2
    for name, positions in groups.items():
        group_rates = [rates[i] for i in positions]
        metrics[f"accuracy/{name}"] = fmean(group_rates)
        metrics[f"accuracy_stderr/{name}"] = standard_error(group_rates)
    return metrics | {
        "reward/mean": fmean(sample.reward for sample in samples),
        "completion_tokens_mean": fmean(len(sample.completion_ids) for sample in samples),
        "finished_share": fmean(sample.finish_reason == "stop" for sample in samples),
        "num_problems": float(len(chosen)),
        **take_metrics(reward),  # or they would show up in the next training step
    }


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the chance that at least one of k samples is correct, drawn from these without replacement.

    Source: arXiv 2107.03374, equation 1 (the unbiased estimator of pass@k).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of `values`; NaN for a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def group_problems(problems: Sequence[Problem], group_by: str | None) -> dict[str, list[int]]:
    """Return the positions of the problems of each group, named like depth_3, in the order of the column's values."""
    if group_by is None:
        return {}
    positions: dict[Any, list[int]] = {}
    for i, problem in enumerate(problems):
        if group_by not in problem.columns:
            raise ValueError(
                f"group_by must name a column of the data set, got {group_by!r}; problem {problem.index} has "
                f"{sorted(problem.columns)}. Name one of these, or null."
            )
        positions.setdefault(problem.columns[group_by], []).append(i)
    ordered = sorted(positions, key=lambda value: (0, value, "") if isinstance(value, int | float) else (1, 0, str(value)))
    return {f"{group_by}_{value}": positions[value] for value in ordered}
