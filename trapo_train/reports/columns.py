"""The columns of the progress table: which metrics a run shows while it trains, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One column of the progress table: the metric it shows, its heading and how a value is written."""

    metric: str
    heading: str
    write: Callable[[float], str]
    style: str = ""
    dispensable: int = 0
    """Columns with larger numbers are left out first where a terminal is too narrow; 0 always stays."""
    also: str = ""  # a metric that is added to it; such a column appears once the sum is not 0

    @property
    def width(self) -> int:
        """Characters, including the gap to the column before."""
        return max(len(self.heading), 6) + 2


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS = (
    Column("reward/mean", "reward", _fixed(3)),
    Column("reward/unguided", "unguided", _fixed(3), "bold"),
    Column("guided_share", "guided", _percent),
    Column("finished_share", "finished", _percent, dispensable=2),
    Column("loss", "loss", _fixed(4)),
    Column("expert/logprob", "expert logp", _fixed(3)),
    Column("entropy/rollout", "entropy", _fixed(3)),
    Column("entropy/expert", "expert entropy", _fixed(3), dispensable=3),
    Column("rollout/kl_ref", "KL", _fixed(4), dispensable=2),
    Column("rollout/clip_low", "clipped", _percent, dispensable=3, also="rollout/clip_high"),
    Column("grad_norm", "grad norm", _fixed(2), "dim", dispensable=1),
    Column("tokens_per_s", "tokens/s", _count, "dim", dispensable=4),
    Column("peak_memory_mib", "peak MiB", _count, "dim", dispensable=5),
)


def written(column: Column, metrics: dict[str, Any]) -> str:
    """What stands in the column; a dash where its metric is missing."""
    value = value_of(column, metrics)
    return "–" if value is None else column.write(float(value))


def value_of(column: Column, metrics: dict[str, Any]) -> float | None:
    """The metric of the column, with the one that is added to it."""
    value = metrics.get(column.metric)
    return value if value is None else value + (metrics.get(column.also) or 0)
