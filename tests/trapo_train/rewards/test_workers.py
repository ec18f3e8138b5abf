"""Worker programs that hang, crash and eat memory: every request gets an answer, and the pool goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trapo_train.rewards.workers import Answer, WorkerError, WorkerPool
from trapo_train.user_code import in_words

WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from trapo_train.rewards.workers import OutOfTime, serve

def work(what, value):
    print("noise on standard output")
    if what == "hang":
        time.sleep(600)
    if what == "exit":
        os._exit(3)
    if what == "raise":
        raise ValueError("no")
    if what == "out of time":
        raise OutOfTime
    if what == "memory":
        bytearray(64 * 2**30)
    if what == "c output":
        os.write(1, b"not from Python\\n")
    if what == "half a line":
        # The stream of the answers is private; this is what a worker stopped in the middle of writing looks like.
        for number in range(3, 20):
            try:
                os.write(number, b"{")
            except OSError:
                pass
        time.sleep(600)
    if what == "child":
        Path(value).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        Path(value + ".done").touch()
        time.sleep(600)
    if what == "kill" and not (value and Path(value).exists()):
        if value:
            Path(value).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "slow and killed once":
        time.sleep(0.6)
        if not Path(value).exists():
            Path(value).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if what == "forks and programs end":
        at_work, write = os.pipe()
        forked = os.fork()
        if not forked:
            os.write(write, b"!")
            time.sleep(600)
        program = subprocess.Popen(["sleep", "600"])
        os.read(at_work, 1)
        os.kill(forked, signal.SIGTERM)
        program.terminate()
        return [os.waitpid(forked, 0)[1], program.wait()]
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


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "outcome"), [("hang", "timeout"), ("exit", "crash"), ("memory", "crash")])
def test_a_faulty_request_is_told_and_the_others_are_answered(pool, fault, outcome):
    started = time.monotonic()
    answers = pool.map([("echo", 1), (fault, 0), ("echo", 2), (fault, 0), ("echo", 3)])
    assert [answer.outcome for answer in answers] == ["ok", outcome, "ok", outcome, "ok"]
    assert answers[1] == Answer(outcome)
    assert time.monotonic() - started < 60
    assert pool.map([("echo", 4)])[0].value[0] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_every_process_of_the_job_costs_no_answer_and_no_worker(pool, number):
    pids = {answer.value[1] for answer in pool.map([("echo", i) for i in range(20)])}
    for pid in pids:
        os.kill(pid, number)
    time.sleep(0.3)
    assert {answer.value[1] for answer in pool.map([("echo", i) for i in range(20)])} <= pids
    assert pool.map([("forks and programs end", 0)])[0].value == [signal.SIGTERM, -signal.SIGTERM]


def test_a_worker_that_died_while_it_was_idle_costs_no_answer(pool):
    pids = {answer.value[1] for answer in pool.map([("echo", i) for i in range(20)])}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    while any(_alive(pid) for pid in pids):
        time.sleep(0.02)
    answers = pool.map([("echo", i) for i in range(20)])
    assert [answer.value[0] for answer in answers] == list(range(20))
    assert not {answer.value[1] for answer in answers} & pids


def test_a_request_whose_worker_is_killed_is_asked_once_more_and_no_oftener(pool, tmp_path):
    once = pool.map([("kill", str(tmp_path / "once")), ("echo", 1)])
    assert [answer.value[0] for answer in once] == [str(tmp_path / "once"), 1]
    assert pool.map([("kill", ""), ("echo", 2)])[0] == Answer("crash")
    assert pool.map([("echo", 3)])[0].value[0] == 3


def test_a_request_that_is_asked_once_more_has_what_is_left_of_its_time(pool, tmp_path):
    assert pool.map([("slow and killed once", str(tmp_path / "once"))]) == [Answer("timeout")]
    assert (tmp_path / "once").exists()


def test_closing_leaves_no_process(pool):
    pid = pool.map([("echo", 0)])[0].value[1]
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_cannot_start_says_why():
    pool = WorkerPool("no_such_module_anywhere", num_workers=1, time_limit_s=1.0)
    with pytest.raises(WorkerError, match="No module named"):
        pool.map([("x",)])
    pool.close()


def test_an_exception_is_an_answer_and_costs_no_worker(pool):
    answers = pool.map([("echo", 0), ("raise", 0), ("echo", 1)] * 3)
    assert [answer.outcome for answer in answers] == ["ok", "error", "ok"] * 3
    assert answers[1].value == "ValueError('no')"
    assert len({answer.value[1] for answer in answers if answer.outcome == "ok"}) <= 2


def test_a_limit_of_its_own_is_a_timeout_and_costs_no_worker(pool):
    answers = pool.map([("echo", 0), ("out of time", 0), ("echo", 1)] * 3)
    assert [answer.outcome for answer in answers] == ["ok", "timeout", "ok"] * 3
    assert len({answer.value[1] for answer in answers if answer.outcome == "ok"}) <= 2


def test_output_from_c_is_no_answer_and_half_an_answer_is_a_timeout(pool):
    answers = pool.map([("c output", 7), ("half a line", 0), ("echo", 8)])
    assert [answer.outcome for answer in answers] == ["ok", "timeout", "ok"]
    assert answers[0].value[0] == 7


def test_a_request_larger_than_any_pipe(pool):
    text = "x" * 2**22
    pool._time_limit_s = 60.0
    assert pool.map([("echo", text)])[0].value[0] == text


def test_closing_ends_busy_workers_and_what_they_started(pool, tmp_path):
    caller = threading.Thread(target=lambda: pool.map([("child", str(tmp_path / "pid"))]), daemon=True)
    pool._time_limit_s = 600.0
    caller.start()
    while not (tmp_path / "pid.done").exists():
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    started = time.monotonic()
    pool.close()
    caller.join(30)
    assert not caller.is_alive() and time.monotonic() - started < 30
    while _alive(child) and time.monotonic() - started < 30:  # killed, it may take a moment to go
        time.sleep(0.02)
    assert not _alive(child)


def test_busy_workers_end_when_the_process_that_asked_is_killed(tmp_path, monkeypatch):
    (tmp_path / "some_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.getcwd()}")
    program = (
        "from trapo_train.rewards.workers import WorkerPool\n"
        "pool = WorkerPool('some_worker', num_workers=1, time_limit_s=600)\n"
        f"pool.map([('child', {str(tmp_path / 'pid')!r})])"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "pid.done").exists():
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_error_is_told_in_a_line():
    error = ValueError("no\nnumber")
    error.add_note("at mine.py:3\n  while grading")
    assert in_words(error) == "ValueError('no\\nnumber') at mine.py:3 while grading"
