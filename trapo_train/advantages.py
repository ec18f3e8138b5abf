"""Advantages and prefix weights: how the samples of one problem compare, and how they share an expert prefix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from trapo_train.records import Sample


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages."""

    normalise: Literal["none", "group_std"] = "none"
    """none: reward − baseline (TRAPO, Dr.GRPO); group_std: divided by the deviation of the problem's rewards (GRPO)."""
    baseline: Literal["all", "unguided"] = "all"
    """The samples of the problem whose mean reward is subtracted: all (guided and expert ones too) or unguided."""

    def __post_init__(self) -> None:
        if self.normalise not in ("none", "group_std"):
            raise ValueError(f'normalise must be "none" or "group_std", got {self.normalise!r}.')
        if self.baseline not in ("all", "unguided"):
            raise ValueError(f'baseline must be "all" or "unguided", got {self.baseline!r}.')


def assign_advantages(groups: list[list[Sample]], config: AdvantageConfig) -> None:
    """Set `advantage` of every sample; each group holds all samples of one problem.

    advantage = reward − mean reward of the baseline samples, with `group_std` divided by the standard deviation
    (n − 1) of all rewards of the group. It is exactly 0 where there is nothing to compare: a group whose rewards are
    all equal, a group of one sample, and with baseline="unguided" a group without unguided sample.

    Raises:
        ValueError: if a group mixes problems, because its baseline would then mean nothing.
    """
    for group in groups:
        indices = {sample.problem.index for sample in group}
        if len(indices) > 1:
            raise ValueError(
                f"assign_advantages: a group must hold the samples of one problem, got problems {sorted(indices)}. "
                "Group the samples by problem.index."
            )
        rewards = [sample.reward for sample in group]
        baseline = [sample.reward for sample in group if config.baseline == "all" or not sample.guided]
        if not baseline or min(rewards) == max(rewards):
            for sample in group:
                sample.advantage = 0.0
            continue
        mean = fmean(baseline)
        scale = stdev(rewards) if config.normalise == "group_std" else 1.0
        for sample in group:
            sample.advantage = (sample.reward - mean) / scale


def assign_prefix_weights(group: list[Sample]) -> None:
    """Set `prefix_weight` of the samples of one problem: 1/k for each of k samples with the same prefix, else 1."""
    copies = Counter(sample.prefix_ids for sample in group if sample.guided)
    for sample in group:
        sample.prefix_weight = 1.0 / copies[sample.prefix_ids] if sample.guided else 1.0
