"""Numbers of several calls, rewards and ranks become one by a single rule, whatever their names."""

import pickle

import pytest

from tests.trapo_train.test_train import EVALUATED, build_config, rows, train_to_end
from trapo_train.metrics import Mean, merge_metrics
from trapo_train.rewards.functions import RewardError, WeightedSum, take_metrics


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


class Faulty(Counting):
    """One whose own counting is wrong."""

    def take_metrics(self):
        return {"judge_seconds": 1.0 / len(self.found)}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Faulty(), r"Reward 'Faulty' raised in take_metrics: ZeroDivisionError"),
        (Counting(delay="slow"), r"take_metrics of reward 'Counting' must return numbers by their names, got {'delay': 'slow'}"),
        (Counting(delay=None), "must return numbers by their names, got {'delay': None}"),
    ],
)
def test_what_take_metrics_gets_wrong_is_an_error_of_the_reward(reward, message):
    for asked in (reward, WeightedSum([("mine", reward, 1.0)])):
        with pytest.raises(RewardError, match=message):
            take_metrics(asked)
    reward.take_metrics = lambda: [1.0]
    with pytest.raises(RewardError, match=r"must return numbers by their names, got \[1.0\]"):
        take_metrics(reward)
    with pytest.raises(ValueError, match="count must be at least 1, got 0. Leave out a mean of nothing"):
        Mean(0.0, 0)


intruder = Counting(step=7, loss=99.0, accuracy=99.0, num_problems=99.0, judged=1.0, **{"reward/mean": 99.0})
faulty = Faulty()


def test_what_the_run_reports_itself_wins_over_a_rewards_own_numbers(tmp_path):
    config = build_config(tmp_path, "run", "steps=2", f"reward={__name__}:intruder", *EVALUATED, "evaluation.every=1")
    train_to_end(config)
    found = rows(config)
    assert [row["step"] for row in found if row["kind"] == "train"] == [1, 2]
    assert [row["step"] for row in found if row["kind"] == "eval"] == [0, 1, 2]
    assert all(row["judged"] >= 1.0 for row in found)
    names = {"train": ("loss", "reward/mean"), "eval": ("accuracy", "num_problems", "reward/mean")}
    assert not [(row, name) for row in found for name in names[row["kind"]] if row[name] == 99.0]


def test_a_run_whose_reward_cannot_count_any_more_ends_with_a_checkpoint(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(faulty, "take_metrics", lambda: {} if calls.append(1) or len(calls) < 3 else {"a": "b"})
    config = build_config(tmp_path, "run", f"reward={__name__}:faulty")
    with pytest.raises(RewardError, match="must return numbers"):
        train_to_end(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
