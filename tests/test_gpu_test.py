"""`make gpu-test` where there is no GPU: what a crash, a hang and the end of the time leave behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_test, provenance

ROOT = Path(__file__).parents[1]
TESTS = """
import os, time

def test_passes():
    pass

def test_fails():
    assert 1 == 2

def test_takes_its_process_along():
    os.write(2, b"last words")
    os._exit(9)

def test_passes_after_the_crash():
    pass

def test_native_kernel():
    pass

def test_slow_one_hangs():
    time.sleep(600)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "test_sample.py"
    path.write_text(TESTS)
    return path


def _outcomes(outcomes):
    return {o.test.rpartition("::")[2].removeprefix("test_"): o.outcome for o in outcomes}


def _run(file, match, seconds=60.0):
    """The outcomes of a job with so much time."""
    record = file.with_suffix(".jsonl")
    gpu_test.run(gpu_test.Job(file, match), time.monotonic() + seconds, record)
    return gpu_test.read(record)


@pytest.mark.slow
def test_a_crash_costs_one_test(file):
    outcomes = _run(file, "not native and not slow_one")
    assert _outcomes(outcomes) == {
        "passes": "passed",
        "fails": "failed",
        "takes_its_process_along": "crashed",
        "passes_after_the_crash": "passed",
    }
    assert "assert 1 == 2" in next(o.reason for o in outcomes if o.outcome == "failed")
    (crash,) = (o.reason for o in outcomes if o.outcome == "crashed")
    assert crash.startswith("Its process ended with exit code 9.\n") and "last words" in crash


@pytest.mark.slow
def test_a_hanging_test_ends_with_the_time(file):
    outcomes = _run(file, "slow_one", 3)
    assert set(_outcomes(outcomes).values()) in ({"running"}, {"not reached"})  # the latter where pytest took all the time to start


@pytest.mark.slow
def test_tests_are_chosen_by_name_and_none_are_begun_without_time(file):
    assert _outcomes(_run(file, "native")) == {"native_kernel": "passed"}
    file.with_suffix(".jsonl").unlink()
    (unseen,) = _run(file, "native", 0)
    assert unseen.outcome == "not reached" and "-k 'native'" in unseen.test


@pytest.mark.slow
def test_a_hanging_test_costs_itself_alone_and_says_where(file, monkeypatch):
    monkeypatch.setenv("TRAPO_GPU_TEST_SECONDS", "2")
    outcomes = _run(file, "slow_one or after_the")
    assert _outcomes(outcomes) == {"slow_one_hangs": "crashed", "passes_after_the_crash": "passed"}
    (hang,) = (o.reason for o in outcomes if o.outcome == "crashed")
    assert "Timeout" in hang and "in test_slow_one_hangs" in hang


@pytest.mark.slow
def test_a_backend_that_crashes_twice_is_left_out_and_comes_last(tmp_path):
    file = tmp_path / "test_backends.py"
    file.write_text(
        'import os, pytest\n\n\n@pytest.mark.parametrize("number", range(3))\n'
        '@pytest.mark.parametrize("backend", ["native", "torch"])\n'
        'def test_kernel(backend, number):\n    assert backend == "torch" or os._exit(9)\n'
    )
    outcomes = _run(file, "kernel")
    assert [o.test.rpartition("-")[0].rpartition("[")[2] for o in outcomes] == ["torch"] * 3 + ["native"] * 3
    assert [o.outcome for o in outcomes] == ["passed"] * 3 + ["crashed"] * 2 + ["not reached"]


@pytest.mark.parametrize(
    ("text", "match", "said"),
    [
        ("import no_such_module_anywhere\n", "native", "No module named 'no_such_module_anywhere'"),
        pytest.param(TESTS, "no_such_test", "6 deselected", marks=pytest.mark.slow),
        pytest.param(TESTS, "not (", "Wrong expression", marks=pytest.mark.slow),
    ],
    ids=["a file that cannot be imported", "nothing selected", "usage"],
)
def test_a_process_that_runs_no_test_is_a_failure_with_its_output(tmp_path, text, match, said):
    file = tmp_path / "test_broken.py"
    file.write_text(text)
    *_, outcome = _run(file, match)
    assert outcome.outcome == "failed" and said in outcome.reason and "exit code" in outcome.reason


@pytest.mark.slow
def test_everything_is_written_as_it_ends(tmp_path, file, monkeypatch):
    """Two jobs, one of which hangs until the time is over, and no native kernels."""
    jobs = [gpu_test.Job(file, "passes and not after"), gpu_test.Job(file, "slow_one")]
    monkeypatch.setattr(gpu_test, "jobs", lambda folder: jobs)
    monkeypatch.setattr(gpu_test.native, "why_not", lambda device: "it was not built.")
    monkeypatch.setattr(gpu_test, "ask_doctor", lambda *_: ["fine"])
    monkeypatch.setattr(gpu_test, "WRITE_SECONDS", 0.5)
    report, written = gpu_test.Report(tmp_path, provenance.environment("cpu") | {"driver": "1.2"}), []
    monkeypatch.setattr(report, "write", lambda outputs: written.append(report.text()))
    gpu_test.everything(report, time.monotonic() + 12, tmp_path)
    assert _outcomes(report.outcomes) == {"passes": "passed", "slow_one_hangs": "running"} and not report.passed()
    assert sum("1 passed" in text for text in written) > 2, "long before the end"
    assert "compute-sanitizer, none: it was not built." in written[-1] and "fine" in written[-1]


def test_the_doctor_is_asked_in_a_process_of_its_own():
    def ask(code, seconds=30.0):
        return gpu_test.ask_doctor([sys.executable, "-c", code], time.monotonic() + seconds)

    assert ask("print('fine')") == ["fine"]
    assert ask("print('ill'); raise SystemExit(1)") == ["ill", "exit code 1"]
    assert ask("import time; time.sleep(60)", 0.5) == ["did not return within 0.5 s"]


def test_what_was_never_reached_is_counted(tmp_path):
    record = tmp_path / "record.jsonl"
    record.write_text(
        '{"test": "a", "outcome": "not reached"}\n{"test": "b", "outcome": "not reached"}\n'
        '{"test": "a", "outcome": "crashed", "reason": "x"}\n{"test": "a", "outcome": "passed", "seconds": 0.1}\n'
        '{"test": "b", "outco'
    )
    assert _outcomes(gpu_test.read(record)) == {"a": "passed", "b": "not reached"}


def test_every_file_that_a_gpu_matters_to_is_run_the_native_kernels_first():
    jobs = gpu_test.jobs(gpu_test.TESTS)
    assert [job.file for job in jobs[:2]] == [gpu_test.NATIVE] * 2 and len({job.match for job in jobs[:2]}) == 2
    on_the_cpu = {gpu_test.TESTS / f"test_{name}.py" for name in gpu_test.ON_THE_CPU}
    assert all(path.is_file() for path in on_the_cpu)
    files = [job.file for job in jobs[1:]]
    assert len(files) == len(set(files)) and set(files) == set(gpu_test.TESTS.glob("test_*.py")) - on_the_cpu


def test_every_tool_of_the_sanitizer_looks_at_rows_and_at_scoring_barriers_last():
    tools = [name.split(", ") for name in gpu_test.SANITIZED]
    assert sorted(tools) == [[tool, kernels] for tool in ("memcheck", "racecheck", "synccheck") for kernels in ("rows", "scoring")]
    assert [tool for tool, _ in tools[-2:]] == ["synccheck"] * 2


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, "clean (ERROR SUMMARY: 0 errors)"),
        (9, "**found errors** (ERROR SUMMARY: 0 errors)"),
        (1, "**a test failed** under it (ERROR"),
        (255, "did not run, exit code 255: 1 --tool memcheck"),
    ],
)
def test_the_sanitizer_is_believed(tmp_path, code, said):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --help ] && echo "  --kernel-regex arg" && exit 0\n'
        f'echo "========= ERROR SUMMARY: 0 errors"\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"\nexit {code}\n'
    )
    tool.chmod(0o755)
    output = tmp_path / "sanitizer.txt"
    text = gpu_test.sanitize(str(tool), "memcheck", "4099", time.monotonic() + 30, output)
    assert text.startswith(said)
    assert "1 --tool memcheck --error-exitcode 9" in output.read_text() and "-k 4099" in output.read_text()
    assert "--kernel-regex kns=trapo" in output.read_text()


def test_a_machine_that_hides_its_gpu_from_the_sanitizer_is_no_failed_test(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= Device not supported. Please refer to the documentation."\nexit 1\n')
    tool.chmod(0o755)
    text = gpu_test.sanitize(str(tool), "memcheck", "4099", time.monotonic() + 30, tmp_path / "sanitizer.txt")
    assert text == "cannot run on this machine: Device not supported"


def test_the_record_names_failures_skips_and_the_sanitizer(tmp_path):
    report = gpu_test.Report(tmp_path, provenance.environment("cpu") | {"driver": "1.2"})
    report.outcomes = [
        gpu_test.Outcome("tests/x.py::test_y", "failed", 0.1, "assert 1 == 2"),
        gpu_test.Outcome("tests/x.py::test_z", "passed", 3.0),
        gpu_test.Outcome("tests/x.py::test_s", "skipped", 0.0, "needs two GPUs"),
        gpu_test.Outcome("tests/x.py::test_c", "crashed", 0.0, "Its process ended with exit code -6.\nlast words"),
    ]
    report.sanitized["memcheck"] = "clean (ERROR SUMMARY: 0 errors)"
    (tmp_path / "memcheck, rows.txt").write_text("0 errors")
    report.write([tmp_path / "memcheck, rows.txt", tmp_path / "racecheck, rows.txt"])
    assert (tmp_path / "sanitizer.txt").read_text() == "== memcheck, rows\n0 errors"
    text = (tmp_path / "tests.md").read_text()
    for part in (
        "4 tests: 1 crashed, 1 failed, 1 passed, 1 skipped",
        "- crashed `tests/x.py::test_c`: Its process ended with exit code -6.\n      last words\n",
        "failed `tests/x.py::test_y`: assert 1 == 2",
        "1: needs two GPUs",
        "memcheck: clean",
    ):
        assert part in text
    assert not report.passed()
    report.outcomes = report.outcomes[1:3]
    assert report.passed()
    report.sanitized["racecheck"] = "**failed**, exit code 9"
    assert not report.passed()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_make_targets_reach_their_programs(tmp_path):
    """With the results of earlier calls beside them; without a GPU the programs then say so."""
    for target, path in (("gpu-test", "benchmarks.gpu_test"), ("gpu-bench", "benchmarks")):
        command = ["make", "-n", target, f"OUT={tmp_path}", "GPU_SECONDS=60", "QUESTIONS=trapo"]
        printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
        assert f"-m {path} " in printed and f"--out {tmp_path}" in printed
        assert "PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} " in printed, "what the caller brings along stays importable"


def test_paths_of_this_machine_stay_out_of_the_recorded_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "trapo", "--device", "cuda", "--out", "/somewhere/out", "--no-report"])
    assert provenance.command() == "python -m benchmarks trapo --device cuda --no-report"
    monkeypatch.setattr("sys.argv", ["x", "--out", "benchmarks/results"])
    assert provenance.command() == "python -m benchmarks --out benchmarks/results"
