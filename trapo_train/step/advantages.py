"""Advantages and prefix weights: how the samples of one problem compare, and how they share an expert prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from trapo_train.records import Sample
from trapo_train.schema import UserError, check


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages: what is subtracted, over which samples, and what it is divided by.

    The defaults are those of TRAPO and Dr.GRPO; `trapo_kernels.objectives.PUBLISHED` has what other methods take. REINFORCE++ with
    a baseline centres at the mean.
    """

    normalise: Literal["none", "group_std", "batch_std", "batch"] = "none"
    """Divisor: none; group_std or batch_std, the deviation of the rewards of the problem or of the step, with baseline=unguided of
    unguided samples alone; batch, whitening: minus the mean, then divided by the deviation, of all advantages of the step."""
    baseline: Literal["all", "unguided", "same_prefix"] = "all"
    """Which samples of the problem a sample is compared with: all (guided and expert ones too), the unguided ones, or
    those that start from the same prefix."""
    center: Literal["mean", "leave_one_out", "none"] = "mean"
    """What is subtracted: the mean reward of the baseline samples, that of the others among them, or nothing."""

    def __post_init__(self) -> None:
        check(self)
        if self.center == "none" and self.normalise in ("group_std", "batch_std"):
            raise UserError(
                f'center "none" goes with normalise "none" or "batch", got {self.normalise!r}: a deviation is no scale for '
                'rewards that are not centred. Use center="mean".'
            )
        if self.center == "none" and self.baseline != "all":
            raise UserError(f'center "none" subtracts no baseline, got baseline {self.baseline!r}. Leave baseline out.')


def assign_advantages(groups: list[list[Sample]], config: AdvantageConfig) -> None:
    """Set `advantage` of every sample; each group holds all samples of one problem, and all groups are one step.

    Deviations are those of a sample (n - 1), over the samples that the mean is over. Nothing is ever divided by zero: where there
    is nothing to compare, the centred advantage is exactly 0. That is a sample whose baseline has no (other) sample, such as a
    group of one, and a group (with baseline="same_prefix": the samples of one prefix) whose rewards are all equal. A guided sample
    beside unguided ones that are all equal keeps its difference from them undivided. With center="none" the advantage is the
    reward, of single samples too. With normalise="batch" a step whose advantages are all equal gets 0; advantages of 0 from before
    count in its mean and deviation. Whitening weighs samples equally, whatever their length.

    Raises:
        UserError: if a group mixes problems, because its baseline would then mean nothing.
    """
    samples = [sample for group in groups for sample in group]
    batch_scale = _deviation(_baseline(samples, config)) if config.normalise == "batch_std" else 1.0
    for group in groups:
        indices = {sample.problem.index for sample in group}
        if len(indices) > 1:
            raise UserError(
                f"assign_advantages: a group must hold the samples of one problem, got problems {sorted(indices)}. "
                "Group the samples by problem.index."
            )
        for peers in _peers(group, config):
            scale = _deviation(_baseline(peers, config)) if config.normalise == "group_std" else batch_scale
            for sample, value in zip(peers, _centred(peers, config), strict=True):
                sample.advantage = value / scale
    if config.normalise == "batch":
        _whiten(samples)


def assign_prefix_weights(group: list[Sample]) -> None:
    """Set `prefix_weight` of the samples of one problem: 1/k for each of k samples with the same prefix, else 1."""
    copies = Counter(sample.prefix_ids for sample in group if sample.guided)
    for sample in group:
        sample.prefix_weight = 1.0 / copies[sample.prefix_ids] if sample.guided else 1.0


def _peers(group: list[Sample], config: AdvantageConfig) -> list[list[Sample]]:
    """The samples of a problem that are compared with each other."""
    if config.baseline != "same_prefix":
        return [group] if group else []
    by_prefix: dict[tuple[int, ...], list[Sample]] = {}
    for sample in group:
        by_prefix.setdefault(sample.prefix_ids, []).append(sample)
    return list(by_prefix.values())


def _baseline(samples: list[Sample], config: AdvantageConfig) -> list[float]:
    """The rewards among those of `samples` that the others are compared with."""
    return [sample.reward for sample in samples if config.baseline != "unguided" or not sample.guided]


def _centred(peers: list[Sample], config: AdvantageConfig) -> list[float]:
    """Reward minus baseline of each of the peers, exactly 0 where all rewards are equal."""
    rewards = [sample.reward for sample in peers]
    if config.center == "none":
        return rewards
    if equal_rewards(rewards):
        return [0.0] * len(peers)
    baseline = _baseline(peers, config)
    of_all = fmean(baseline) if baseline else None
    centred = []
    for sample, reward in zip(peers, rewards, strict=True):
        mean = of_all
        if config.center == "leave_one_out" and _baseline([sample], config):
            others = list(baseline)
            others.remove(reward)
            mean = fmean(others) if others else None
        centred.append(0.0 if mean is None else reward - mean)
    return centred


def _whiten(samples: list[Sample]) -> None:
    values = [sample.advantage for sample in samples]
    if not values:
        return
    mean, scale = fmean(values), _deviation(values)
    if abs(mean) <= 1e-12 * scale:  # what rounding leaves of centred advantages; subtracted, it would make tokens of 0 count
        mean = 0.0
    equal = equal_rewards(values)
    for sample in samples:
        sample.advantage = 0.0 if equal else (sample.advantage - mean) / scale


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation (n - 1); 1 where there is none, as among equal rewards, which differ from their mean by 0."""
    return 1.0 if len(values) < 2 or equal_rewards(values) else stdev(values)


def equal_rewards(values: Sequence[float]) -> bool:
    """Whether `values`, at least one, leave nothing to compare: sums of the same weights in another order differ in their last
    digits."""
    return max(values) - min(values) <= 1e-9 * max(map(abs, values))
