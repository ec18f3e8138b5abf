"""A worker program for `workers.py` that computes a user's reward: `python -m trapo_train.rewards.reward_worker MIB PATH`."""

from __future__ import annotations

import sys
from typing import Any

from trapo_train.rewards.functions import RewardFn, called, load_reward


def reward_of_one(reward: RewardFn, arguments: dict[str, list[Any]]) -> float | None:
    """The reward of a single row; `arguments` are the columns, each a list of one value.

    Raises: ValueError unless the reward returns a list of one value.
    """
    values = called(reward, arguments)
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != 1:
        raise ValueError(f"a reward must return a list with one number per completion = 1, got {values!r}")
    return None if values[0] is None else float(values[0])


if __name__ == "__main__":
    from trapo_train.rewards.workers import serve

    function = load_reward(sys.argv[2])
    sys.exit(serve(lambda arguments: reward_of_one(function, arguments)))
