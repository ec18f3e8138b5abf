"""The supervisor of a run: contenders that crash or hang cost themselves, what was known of the others is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import measure, provenance, runner, store
from benchmarks.cell import DEVICE_LOST, Bench
from benchmarks.contenders import BY_NAME
from benchmarks.journal import Journal

ROOT = Path(__file__).parents[1]
WORKER = """
import os, sys, time
from benchmarks import contenders, questions, runner
from benchmarks.questions import trapo

def kills_its_process(problem):
    os.kill(os.getpid(), 9)

def hangs(problem):
    while True:  # as native code does that never returns to Python: no signal gets through
        try:
            time.sleep(60)
        except BaseException:
            continue

eager = contenders.BY_NAME["eager"]
named = {name: contenders.BY_NAME[name] for name in ("floor, 1 GEMM", "floor, 3 GEMMs", "eager")}
named["guilty"] = eager._replace(name="guilty", prepare=PREPARE)
named["ours (torch)"] = contenders.BY_NAME["ours (torch)"]
runner.CONTENDERS, runner.BY_NAME = list(named.values()), named
questions.NAMES = ("grpo", "scoring")
sys.exit(runner.main(["--small", "--device", "cpu", "--rounds", "2", "--out", sys.argv[1], *sys.argv[2:]]))
"""


def recorded(tmp_path):
    return store.read(tmp_path / provenance.folder("cpu") / "results.jsonl")


def supervise(tmp_path, prepare, seconds):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})" + WORKER.replace("PREPARE", prepare)
    worker = [sys.executable, "-c", code, str(tmp_path)]
    assert runner.supervise(worker, Journal(tmp_path / "cpu.running.json"), seconds) == 0
    return {(row["case"]["question"], row["contender"]): row for row in recorded(tmp_path)}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [120, 400])
def test_a_contender_that_kills_its_process_is_recorded_and_the_others_are_measured(tmp_path, monkeypatch, seconds, capfd):
    monkeypatch.setattr(runner, "BY_NAME", BY_NAME | {"guilty": BY_NAME["eager"]})
    rows = supervise(tmp_path, "kills_its_process", seconds)
    again = seconds > runner.SHORT_SECONDS  # in a short run once is enough
    assert (("scoring", "guilty") in rows) == again
    for question in ("grpo", "scoring") if again else ("grpo",):
        assert rows[question, "guilty"]["status"] == "crashed" and "SIGKILL" in rows[question, "guilty"]["reason"]
    for question in ("grpo", "scoring"):
        assert rows[question, "ours (torch)"]["status"] == "ok" and rows[question, "ours (torch)"]["ratio"] > 0
    if not again:
        eager = [row for row in recorded(tmp_path) if row["contender"] == "eager" and row["case"]["question"] == "grpo"]
        assert eager[0]["partial"] and eager[0]["errors"], "what was checked before the crash"
        assert "partial" not in eager[1]
    assert "nothing is left to measure" in capfd.readouterr().err


@pytest.mark.slow
def test_a_contender_that_never_returns_is_killed_after_the_budget_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_SECONDS", 2)
    rows = supervise(tmp_path, "hangs", 25)
    assert rows["grpo", "guilty"]["status"] == "crashed" and "did not return" in rows["grpo", "guilty"]["reason"]


def test_a_call_that_hangs_ends_its_worker_long_before_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "HUNG_SECONDS", 0.5)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.1)
    journal = Journal(tmp_path / "running.json")
    on_gpu = {"environment": {"driver": "1.2"}, "case": {"measure": "time"}}
    journal.begin(tmp_path / "results.jsonl", on_gpu, {}, {})
    journal.enter("ours (native)")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        code, death = runner._watch(process, journal, time.monotonic() + 30)
    finally:
        process.kill()
        process.wait()
    assert code is None and death == "hung: one call did not return within 0.5 s."
    for row in (on_gpu | {"contender": "torch.compile"}, {"environment": {"driver": None}, "contender": "eager"}):
        assert runner._patience(row) == runner.LONGEST_CALL_SECONDS
    longest = on_gpu | {"contender": "ours (native)", "case": {"measure": "longest"}}
    for row in (on_gpu | {"contender": "Liger fused GRPO"}, longest):
        assert runner._patience(row) == runner.HUNG_PEER_SECONDS
    done = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    done.wait()  # a busy machine starts Python in more than HUNG_SECONDS
    assert runner._watch(done, journal, time.monotonic() + 30) == (3, "ended its process with exit code 3.")


def test_a_backend_is_what_the_ways_of_a_contender_share():
    names = ("ours (native)", "ours, two-phase (native)", "ours (native_fused)", "floor, 3 GEMMs", "Liger FLCE, fp32 dWeight")
    assert [*map(runner._backend, names)] == ["native", "native", "native_fused", "floor, 3 GEMMs", "Liger FLCE, fp32 dWeight"]


@pytest.mark.slow
def test_a_supervisor_that_is_told_to_stop_takes_its_worker_along():
    worker = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from benchmarks import runner, journal
runner.supervise({worker!r}, journal.Journal(None), 60)"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker_id = int(supervisor.stdout.readline())
    supervisor.terminate()
    assert supervisor.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(worker_id, 0)


def test_an_error_that_breaks_the_cuda_context_ends_the_worker_and_leaves_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "context_is_lost", lambda: True)
    journal = Journal(tmp_path / "cuda.running.json")
    rows = {"eager": {"status": "ok", "errors": {}}, "verl": {"status": "absent", "reason": "no."}, "peer": None}
    journal.begin(tmp_path / "results.jsonl", {"case": {}, "title": "t", "environment": {}}, rows, {"partial": True})
    with pytest.raises(SystemExit) as ended:
        Bench("cuda", 3, small=False, journal=journal)._failure("peer", RuntimeError("an illegal memory access"))
    assert ended.value.code == DEVICE_LOST
    journal.blame("ended its process with exit code 3.")
    checked, row = store.read(tmp_path / "results.jsonl")
    assert (checked["contender"], checked["status"], checked["partial"]) == ("eager", "ok", True)
    assert (row["contender"], row["status"], row["reason"]) == ("peer", "crashed", "RuntimeError: an illegal memory access")
    assert journal.blame("again") is None


def test_a_contender_that_hangs_after_it_was_timed_keeps_its_figures(tmp_path):
    journal = Journal(tmp_path / "cuda.running.json")
    rows = {"eager": {"status": "ok", "median_ms": 2.0, "note": ""}}
    journal.begin(tmp_path / "results.jsonl", {"case": {}, "title": "t", "environment": {}}, rows, {"partial": True})
    journal.enter("eager")
    journal.blame("hung: one call did not return within 30 s.")
    (row,) = store.read(tmp_path / "results.jsonl")
    assert (row["status"], row["median_ms"]) == ("ok", 2.0) and row["note"].startswith("after it was timed: hung")
