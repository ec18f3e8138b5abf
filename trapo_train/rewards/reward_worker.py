"""A worker program for `workers.py` that computes a user's reward: `python -m trapo_train.rewards.reward_worker MIB PATH`."""

from __future__ import annotations

import json
import sys
from typing import Any

from trapo_train.rewards.functions import RewardFn, called, load_reward
from trapo_train.rewards.reward_values import RewardError, one_per_completion, plain


def reward_of_one(reward: RewardFn, name: str, arguments: dict[str, list[Any]]) -> list[Any] | str:
    """What the reward returns for a single row, as JSON can say it; where that is no list of one, what is wrong with it, as a text.

    `arguments` are the columns, each a list of one value.
    """
    values = called(reward, arguments)
    try:
        (value,) = one_per_completion(values, repr(name), 1)
    except RewardError as error:
        return str(error)
    return [json.loads(json.dumps(plain(value), default=repr))]


if __name__ == "__main__":
    from trapo_train.rewards.workers import serve

    path = sys.argv[2]
    function = load_reward(path)
    sys.exit(serve(lambda arguments: reward_of_one(function, path, arguments)))
