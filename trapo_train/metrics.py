"""How a number that several calls, rewards, ranks or rounds report becomes one: a plain number adds up, a `Mean` says how it does.

That is the rule for what a reward of your own reports by `take_metrics`, whatever the names:

    def take_metrics(self):
        errors, self.errors = self.errors, 0
        seconds, self.seconds = self.seconds, []  # one number per call: a rank that judged nothing has none
        means = {"judge_seconds": Mean(fmean(seconds), len(seconds))} if seconds else {}
        return {"api_errors": errors, **means}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Mean(float):
    """A mean that knows of how many numbers: merged with others it is weighted by that `count`, at least 1."""

    count: int

    def __new__(cls, value: float, count: int) -> Mean:
        if count < 1:
            raise ValueError(f"Mean: count must be at least 1, got {count}. Leave out a mean of nothing.")
        mean = super().__new__(cls, value)
        mean.count = count
        return mean

    def __getnewargs__(self) -> tuple[float, int]:
        return float(self), self.count


def merge_metrics(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What several reported as one: `Mean`s of a name are one, all other numbers of a name add up."""
    found: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.items():
            found.setdefault(name, []).append(value if isinstance(value, Mean) else float(value))
    return {name: _merged(values) for name, values in found.items()}


def _merged(values: list[float]) -> float:
    if not all(isinstance(value, Mean) for value in values):
        return sum(values)
    count = sum(value.count for value in values)
    return Mean(sum(value * value.count for value in values) / count, count)
