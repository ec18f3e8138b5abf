"""Numbers of several calls, rewards and ranks become one by a single rule, whatever their names."""

import pickle

import pytest

from trapo_train.metrics import Mean, merge_metrics
from trapo_train.rewards import WeightedSum, take_metrics


def test_means_of_several_calls_are_weighted_by_their_counts_whatever_their_names():
    parts = [
        {"reward/word_count": Mean(value, count), "reward/none_count": none} for value, count, none in ((1, 8, 3.0), (0, 4, 1.0))
    ]
    merged = merge_metrics(pickle.loads(pickle.dumps(parts)))  # as they travel between ranks
    assert merged == {"reward/word_count": pytest.approx(8 / 12), "reward/none_count": 4.0}
    assert (type(merged["reward/word_count"]), merged["reward/word_count"].count) == (Mean, 12)  # so that it can be merged again


class Counting:
    """A reward of one's own that reports numbers."""

    def __init__(self, **found):
        self.found = found

    def __call__(self, completions, **columns):
        return [1.0] * len(completions)

    def take_metrics(self):
        return self.found


@pytest.mark.parametrize("name", ["api_errors", "api_count", "judge_tokens_per_s"])
def test_a_plain_number_of_a_reward_adds_up_whatever_its_name_and_a_mean_stays_one(name):
    first, second = ({name: number, "delay": Mean(delay, count)} for number, delay, count in ((3, 1.0, 1), (5, 4.0, 2)))
    ranks = merge_metrics([first, second])
    rewards = take_metrics(WeightedSum([("a", Counting(**first), 1.0), ("b", Counting(**second), 1.0)]))
    assert ranks == rewards == {name: 8.0, "delay": 3.0} and rewards["delay"].count == 3
    assert type(ranks[name]) is float
