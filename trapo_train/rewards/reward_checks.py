"""What a reward takes, and whether it fits the data: asked before anything is sampled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trapo_train.schema import UserError


def takes(reward: Callable[..., Any], name: str) -> bool:
    """Whether the reward has an argument of this name, or takes whatever there is."""
    parameters = _parameters(reward)
    return not parameters or name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def names(reward: Callable[..., Any], name: str) -> bool:
    """Whether the reward has an argument of just this name, not **columns alone, which take what it may leave alone, too."""
    return name in _parameters(reward)


def check_is_no_class(name: str, reward: Callable[..., Any]) -> None:
    """Raise UserError for a class, whose call makes an instance and judges nothing."""
    if isinstance(reward, type):
        raise UserError(
            f"reward {name!r} must be a function or an object that can be called, got the class {reward.__name__}. Make an "
            f"instance in the module, my_reward = {reward.__name__}(…), and name that."
        )


def check_takes(
    rewards: Mapping[str, Callable[..., Any]],
    columns: Mapping[str, Iterable[str]],
    passed_as: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Raise UserError for a reward with an argument that it must get and does not.

    Args:
        rewards: by name.
        columns: what a reward is called with, by the section of the data that it comes from.
        passed_as: by section the columns that a reward gets under another name, and that name.
    """
    for name, reward in rewards.items():
        needed = [
            parameter.name
            for parameter in _parameters(reward).values()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        ]
        for section, given in columns.items():
            missing = [argument for argument in needed if argument not in given]
            if not missing:
                continue
            names_here = (passed_as or {}).get(section, {})
            renamed = [f"the column {column!r} arrives as {names_here[column]!r}" for column in missing if column in names_here]
            if "solution" in missing:
                remedy = f"Set {section}.solution_column to the column that holds the solutions, or give the argument a default."
            elif renamed:
                remedy = f"Rename the argument: {', '.join(renamed)}."
            else:
                remedy = "Give these arguments defaults, or take **columns in their place."
            raise UserError(
                f"reward {name!r} must take what it is called with, got one that needs {', '.join(missing)} as well; for "
                f"{section} it is called with {', '.join(given)}. {remedy}"
            )


def _parameters(reward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(reward).parameters
    except (TypeError, ValueError):  # of something that is not written in Python
        return {}
