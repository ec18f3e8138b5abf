"""Scalar schedules: a number as a function of the rollout step, as data, for any scalar of an objective or a plan.

    {schedule: cosine, start: 0.9, end: 0.05, steps: 200}  →  Cosine(0.9, 0.05, 200)  →  schedule(step)

The first step is step 0. Schedules have no state, so a resumed run continues them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trapo_train.schema import UserError, build, check


class Schedule:
    """A number per rollout step; `bounds` are the smallest and the largest value that it takes."""

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        finite = [(name, math.isfinite(value), "a finite number") for name, value in numbers.items()]
        check(self, *finite, ("steps", getattr(self, "steps", 1) >= 1, "at least 1"))

    def __call__(self, step: int) -> float:
        """The value at `step` ≥ 0."""
        raise NotImplementedError(f"{type(self).__name__} must implement __call__(step).")

    @property
    def bounds(self) -> tuple[float, float]:
        """Two numbers between which every value lies, ends included."""
        raise NotImplementedError(f"{type(self).__name__} must implement bounds.")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step."""

    value: float
    """The value."""

    def __call__(self, step: int) -> float:
        return self.value

    @property
    def bounds(self) -> tuple[float, float]:
        return self.value, self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """From `start` at step 0 to `end` at step `steps` on a straight line, then `end`."""

    start: float
    """Value at step 0."""
    end: float
    """Value from step `steps` on."""
    steps: int
    """Steps from start to end, at least 1."""

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` at step 0 to `end` at step `steps` on half a cosine, flat at both ends, then `end`, or `after` if given."""

    start: float
    """Value at step 0."""
    end: float
    """Value that the curve reaches at step `steps`."""
    steps: int
    """Steps from start to end, at least 1."""
    after: float | None = None
    """Value from step `steps` on; null for `end`. UFT, for one, drops from 0.05 to 0 there."""

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end if self.after is None else self.after
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * step / self.steps)) / 2.0

    @property
    def bounds(self) -> tuple[float, float]:
        values = [self.start, self.end, *([] if self.after is None else [self.after])]
        return min(values), max(values)


@dataclass(frozen=True)
class WarmUp(Schedule):
    """From `start` on a straight line to where `after` begins, which it reaches at step `steps`; then `after`, from its step 0."""

    start: float
    """Value at step 0."""
    steps: int
    """Steps of the warm-up, at least 1."""
    after: Any
    """What follows, a number or a schedule of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "after", build_schedule(self.after))

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.after(step - self.steps)
        return self.start + (self.after(0) - self.start) * step / self.steps

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = self.after.bounds
        return min(self.start, low), max(self.start, high)


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "warm_up": WarmUp,
}


def is_schedule(value: Any) -> bool:
    """Whether a value of a configuration describes a schedule: a mapping with the key "schedule"."""
    return isinstance(value, Mapping) and "schedule" in value


def build_schedule(value: Any) -> Schedule:
    """Build a schedule from a number, a mapping such as {schedule: linear, start: 0, end: 1, steps: 100}, or a schedule.

    Raises: UserError for an unknown schedule, an argument that is unknown, missing or out of range, or any other value.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return Constant(float(value))
    if not is_schedule(value):
        raise UserError(
            f"A schedule must be a finite number or a mapping with the key schedule, one of {', '.join(SCHEDULES)}, got {value!r}."
        )
    name = value["schedule"]
    arguments = {key: entry for key, entry in value.items() if key != "schedule"}
    if not isinstance(name, str) or name not in SCHEDULES:
        raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}.")
    return build(SCHEDULES[name], arguments, lambda path: "schedule", (name,))
