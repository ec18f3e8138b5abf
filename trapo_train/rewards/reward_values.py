"""What a reward may return, in this process or in a worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any


class RewardError(RuntimeError):
    """A reward function raised, or returned something that is not one finite number (or None) per row."""


def one_per_completion(values: Any, name: str, count: int) -> Sequence[Any]:
    """What reward `name` returned for `count` completions, whatever the values are.

    Raises: RewardError for what is no list, and for one of another length.
    """
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise RewardError(
            f"Reward {name} must return a list with one number per completion, got {type(values).__name__}. Return a list as long "
            "as the completions it is called with."
        )
    if len(values) != count:
        raise RewardError(
            f"Reward {name} must return one number per completion = {count}, got {len(values)}. Return a list as long as the "
            "completions it is called with."
        )
    return values


def number(value: Any, name: str, where: str) -> float | None:
    """The value of one row as a number, one of numpy or torch, or a truth value, included; None where it has none. `where`, such as
    " on row 3", is in the errors.

    Raises: RewardError for anything else, and for what is not finite.
    """
    value = plain(value)
    if value is None:
        return None
    if not isinstance(value, Real):
        raise RewardError(f"Reward {name} must return numbers or None, got {value!r} ({type(value).__name__}){where}.")
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf
    if not math.isfinite(found):
        raise RewardError(f"Reward {name} must return finite numbers, got {found}{where}. Return None where it has no opinion.")
    return found


def plain(value: Any) -> Any:
    """A value of numpy or torch without dimensions as Python's own; any other as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value
