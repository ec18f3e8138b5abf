"""A worker program for `workers.py` that computes a user's reward: `python -m trapo_train.rewards.reward_worker MIB PATH`."""

from __future__ import annotations

import math
import sys
from typing import Any

from trapo_train.rewards.functions import RewardFn, called, load_reward
from trapo_train.rewards.reward_values import RewardError, number, one_per_completion, plain


def reward_of_one(reward: RewardFn, name: str, arguments: dict[str, list[Any]]) -> list[float | str | None] | str:
    """The reward of a single row, in a list; as a text, what is wrong with it. `arguments` are the columns, lists of one value.

    A text and a number that is not finite go back as they are: who knows the row refuses them.
    """
    values = called(reward, arguments)
    try:
        (value,) = map(plain, one_per_completion(values, repr(name), 1))  # iterated, as outside: a pandas Series may have no [0]
        is_left = isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value))
        return [value if is_left else number(value, repr(name), "")]
    except RewardError as error:
        return str(error)


if __name__ == "__main__":
    from trapo_train.rewards.workers import serve

    path = sys.argv[2]
    function = load_reward(path)
    sys.exit(serve(lambda arguments: reward_of_one(function, path, arguments)))
