"""How many worker programs grade, and what they are sent."""

import os

import pytest

from trapo_train import grading
from trapo_train.grading import num_processors


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
