"""Worker programs that hang, crash and eat memory: every request gets an answer, and the pool goes on."""

import os
import time

import pytest

from trapo_train.workers import Answer, WorkerError, WorkerPool

WORKER = """
import os, sys, time
from trapo_train.workers import serve

def work(what, value):
    print("noise on standard output")
    if what == "hang":
        time.sleep(600)
    if what == "exit":
        os._exit(3)
    if what == "raise":
        raise ValueError("no")
    if what == "memory":
        bytearray(64 * 2**30)
    return [value, os.getpid()]

sys.exit(serve(work))
"""


@pytest.fixture
def pool(tmp_path, monkeypatch):
    (tmp_path / "some_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.getcwd()}")
    pool = WorkerPool("some_worker", num_workers=2, time_limit_s=1.0)
    yield pool
    pool.close()


def test_answers_come_in_order_from_workers_that_stay(pool):
    answers = pool.map([("echo", i) for i in range(20)])
    assert [answer.value[0] for answer in answers] == list(range(20))
    assert 1 <= len({answer.value[1] for answer in answers}) <= 2


@pytest.mark.parametrize(("fault", "outcome"), [("hang", "timeout"), ("exit", "crash"), ("raise", "crash"), ("memory", "crash")])
def test_a_faulty_request_is_told_and_the_others_are_answered(pool, fault, outcome):
    started = time.monotonic()
    answers = pool.map([("echo", 1), (fault, 0), ("echo", 2), (fault, 0), ("echo", 3)])
    assert [answer.outcome for answer in answers] == ["ok", outcome, "ok", outcome, "ok"]
    assert answers[1] == Answer(outcome)
    assert time.monotonic() - started < 60
    assert pool.map([("echo", 4)])[0].value[0] == 4


def test_closing_leaves_no_process(pool):
    pid = pool.map([("echo", 0)])[0].value[1]
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    pool = WorkerPool("no_such_module_anywhere", num_workers=1, time_limit_s=1.0)
    with pytest.raises(WorkerError, match="No module named"):
        pool.map([("x",)])
    pool.close()
