"""How many worker programs grade, and what they are sent."""

import os
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import SimpleNamespace

import pytest

from trapo_train.checks.preflight import check_reward
from trapo_train.rewards import grading
from trapo_train.rewards.grading import WorkerReward, num_processors
from trapo_train.schema import UserError


@pytest.fixture
def bound(monkeypatch):
    """Binds this process to as many processors of a machine with 128."""

    def bind(processors):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 128)

    return bind


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"": "max 100000"}, 16),
        ("0::/\n", {"": "250000 100000"}, 2.5),  # in a container
        ("0::/\n", {"": "6400000 100000"}, 16),
        ("5:cpu:/a\n0::/job/step\n", {"job": "400000 100000", "job/step": "max 100000"}, 4),  # of SLURM
        ("0::/job/step\n", {"job": "max 100000", "job/step": "50000 100000", "other": "1 100000"}, 0.5),
        ("5:cpu:/a\n", {"": "100000 100000"}, 16),  # no cgroup of version 2
        (None, {}, 16),
    ],
)
def test_processors_are_those_that_the_process_may_use(own, files, expected, bound, tmp_path):
    bound(16)
    if own is not None:
        (tmp_path / "own").write_text(own)
    for group, text in files.items():
        (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / group / "cpu.max").write_text(f"{text}\n")
    assert num_processors(tmp_path / "own", tmp_path / "groups") == expected


def test_a_process_that_may_use_few_processors_has_few_workers(monkeypatch):
    for processors, ranks, workers in ((0.5, 1, 1), (2, 1, 1), (9.5, 1, 4), (64, 1, 8), (64, 8, 4), (4, 8, 1)):
        monkeypatch.setattr(grading, "num_processors", lambda processors=processors: processors)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert grading._num_workers() == workers


def _of_all(prompts, completions, **columns):
    return [0.0 for _ in completions]


def _of_day(completions, day, finish_reasons):
    return [0.0 for _ in completions]


def _worker(reward):
    return WorkerReward("odd:reward", reward, time_limit_s=1.0, memory_limit_mib=1024)


def test_dates_and_decimals_reach_a_worker_as_text():
    row = {
        "day": date(2021, 5, 4),
        "nested": [{"at": datetime(2021, 5, 4, 10), "of": None}, time(7, 30)],
        "price": Decimal("1.50"),
        "length": timedelta(hours=2),
        "plain": [1, 0.5, True, "ü"],
    }
    assert _worker(_of_all).sent(row) == {
        "day": "2021-05-04",
        "nested": [{"at": "2021-05-04T10:00:00", "of": None}, "07:30:00"],
        "price": "1.50",
        "length": "2:00:00",
        "plain": [1, 0.5, True, "ü"],
    }


def test_a_worker_is_sent_the_columns_that_its_reward_takes():
    columns = {"prompts": ["p", "q"], "completions": ["a", "b"], "day": [date(2021, 5, 4), None], "image": [b"", b""]}
    reward, asked = _worker(_of_day), []
    reward.ask = lambda requests: asked.extend(requests) or []
    reward(**columns, finish_reasons=["stop", "length"])
    assert asked == [
        ({"completions": ["a"], "day": ["2021-05-04"], "finish_reasons": ["stop"]},),
        ({"completions": ["b"], "day": [None], "finish_reasons": ["length"]},),
    ]
    assert _worker(max).sent({"completions": "a", "day": 1}) == {"completions": "a", "day": 1}  # whose arguments nobody knows


def test_a_column_that_no_worker_can_be_sent_is_named_before_anything_is_sampled():
    problem = SimpleNamespace(columns={"day": date(2021, 5, 4), "image": b"GIF"})

    class Problems(list):
        report, has_solutions, passed_as = SimpleNamespace(unread_columns=()), True, {}

    check_reward(_worker(_of_day), {"data": Problems([problem])})
    with pytest.raises(UserError, match=r"reward 'odd:reward' with in_worker must .* column 'image' cannot be sent: got bytes"):
        check_reward(_worker(_of_all), {"data": Problems([problem])})
