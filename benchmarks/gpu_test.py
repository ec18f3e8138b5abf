"""The kernel tests on a GPU, the native kernels under compute-sanitizer beside them, in under nine minutes, with a record of both.

    python -m benchmarks.gpu_test           # writes benchmarks/results/<gpu>/tests.md, sanitizer.txt

Every test file is a process of its own, and so is every tool of compute-sanitizer: nothing here is timed, so they run beside each
other. Every few seconds what has ended is in the files. A crash costs one test; a backend that crashes twice in a file is left
out of the rest of it. Without a CUDA device it says so and exits with 2; with failures it exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import provenance
from trapo_kernels.backends import native

SECONDS = 500.0  # of nine minutes; a compute-sanitizer that is being killed takes a while
WRITE_SECONDS = 5.0  # between two writings of the record
TESTS = provenance.ROOT / "tests" / "trapo_kernels"
FIRST = ("ops", "equality", "linear_policy_loss", "linear_logprob", "accuracy", "upstream", "row_selection")
NATIVE = TESTS / "test_native_gpu.py"
AT_ONCE = 16  # processes; compiling kernels keeps a core busy each
# Files and tests that say nothing of a GPU.
ON_THE_CPU = (
    *("native_on_host", "native_cuda", "off_the_cpu", "gpu_tests"),
    *("memory", "native", "cpu_gemm", "checks", "corrections", "dispatch"),
)
MATCH = "not sharded_equals_whole"
DOCTOR_SECONDS = 60.0
RESTARTS = 8  # of a file whose tests take their process along, before the rest of it is given up
BACKENDS, MOST_CRASHES = ("triton", "native"), 2  # after so many crashes of a backend in a file its other tests there are left out
# Plugins of the machine's own stay out, and so does TF32, which some images let cuBLAS take for fp32.
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
TAIL_LINES = 20  # of the output of a process that did not end well
SANITIZED = {  # tool and kernels: which tests of NATIVE
    "memcheck, rows": "4099 or 57000",
    "racecheck, rows": "57000 and bfloat16 and plain",
    "memcheck, scoring": "scoring",
    "racecheck, scoring": "scoring and flat",  # not known to understand wgmma and setmaxnreg: look before believing it
    "synccheck, rows": "57000 and bfloat16 and plain",
    "synccheck, scoring": "scoring and flat",
}


class Job(NamedTuple):
    """A test file and the tests of it that `match` selects, as pytest's -k does."""

    file: Path
    match: str = MATCH

    def __str__(self) -> str:
        return f"{self.file.name} -k '{self.match}'"


class Outcome(NamedTuple):
    """How a test went: pytest's outcome, "crashed" (with its process or the CUDA context), "running" when the time was over, or
    "not reached"."""

    test: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Run the tests and write the record; the exit status says whether all of them passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_test", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=provenance.ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="ends by then with what it has")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_test: needs a CUDA device, and torch sees none; `make test` runs the same tests on a CPU.", file=sys.stderr)
        return 2
    until = time.monotonic() + options.seconds
    os.environ.setdefault("TRAPO_GPU_TEST_SECONDS", f"{max(20.0, options.seconds / 6):.0f}")
    folder = options.out / provenance.folder("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, provenance.environment("cuda"))
    report.write()
    with tempfile.TemporaryDirectory() as scratch:
        everything(report, until, Path(scratch))
    print(f"gpu_test: {report.path}")
    return 0 if report.passed() else 1


def everything(report: Report, until: float, scratch: Path) -> None:
    """All tests, the sanitizers and the doctor until then, the report written anew every few seconds."""
    records = {job: scratch / f"{number}.jsonl" for number, job in enumerate(jobs(TESTS))}
    why_not = native.why_not("cuda") or native.why_no_code(torch.device("cuda"))
    tool = None if why_not else _sanitizer()
    outputs = {name: scratch / f"{name}.txt" for name in SANITIZED} if tool else {}
    if tool is None:
        report.sanitized["none"] = why_not or "compute-sanitizer was not found on PATH or beside nvcc."
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tests = [pool.submit(run, job, until, record) for job, record in records.items() if job.file == NATIVE]
        sanitized: dict[str, Future] = {}
        for name, output in outputs.items():
            sanitized[name] = pool.submit(sanitize, tool, name.partition(",")[0], SANITIZED[name], until, output)
        doctor = pool.submit(ask_doctor, [sys.executable, "-m", "trapo_kernels.doctor"], until)
        tests += [pool.submit(run, job, until, record) for job, record in records.items() if job.file != NATIVE]
        left = True
        while left:
            _, left = wait([*tests, *sanitized.values(), doctor], WRITE_SECONDS)
            report.outcomes = [outcome for record in records.values() for outcome in read(record)]
            report.sanitized |= {name: future.result() if future.done() else "running" for name, future in sanitized.items()}
            report.doctor_lines = doctor.result() if doctor.done() else report.doctor_lines
            report.write(outputs.values())
    for future in tests:
        future.result()  # an error of ours ends this program


def jobs(folder: Path) -> list[Job]:
    """Every test file that a GPU matters to: first the native kernels by themselves, then the most telling."""
    first = [folder / f"test_{name}.py" for name in FIRST]
    left_out = [NATIVE, *first, *(folder / f"test_{name}.py" for name in ON_THE_CPU)]
    files = [*first, *(path for path in sorted(folder.glob("test_*.py")) if path not in left_out)]
    return [Job(NATIVE, "scoring"), Job(NATIVE, "not scoring"), *map(Job, files)]


def run(job: Job, until: float, record: Path) -> None:
    """Write the outcomes of a job's tests to `record`; a process that a test takes along is started again without it."""
    output = record.with_suffix(".txt")
    for _ in range(1 + RESTARTS):
        known = [o for o in read(record) if o.outcome != "not reached"]
        crashed = [o.test.rpartition("::")[2] for o in known if o.outcome == "crashed"]
        left_out = [word for word in BACKENDS if sum(word in test for test in crashed) >= MOST_CRASHES]
        match = " and ".join([f"({job.match})", *(f"not {word}" for word in left_out)])
        command = [sys.executable, "-m", "pytest", str(job.file), "-k", match, "-m", "not slow"]
        command += ["-qs", "--rootdir", str(provenance.ROOT)]  # -s: last words are not captured
        command += ["-p", "benchmarks.gpu_record", "-p", "no:cacheprovider"]
        code = _run(command, until, output, TRAPO_GPU_RECORD=str(record))
        if code is None:
            if not read(record):
                _note(record, Outcome(str(job), "not reached", reason=_tail("There was no time left.", output)))
            return
        for running in [o for o in read(record) if o.outcome == "running"]:
            _note(record, running._replace(outcome="crashed", reason=_tail(f"Its process ended with exit code {code}.", output)))
        if all(o in known for o in read(record) if o.outcome == "crashed"):
            if code not in (0, 1, 5) or not read(record):  # 5: nothing was left to run
                _note(record, Outcome(str(job), "failed", reason=_tail(f"pytest ended with exit code {code}.", output)))
            return


def _note(record: Path, outcome: Outcome) -> None:
    with record.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(outcome._asdict()) + "\n")  # the last line of a process that died may be half a line


def _tail(sentence: str, output: Path) -> str:
    """A sentence, and what the process said last, without pytest's own frames and the paths of this machine."""
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    for folder in (provenance.ROOT, sys.prefix):
        text = text.replace(f"{folder}/", "")
    lines = [line.rstrip()[:200] for line in text.splitlines() if line.strip() and not re.search("/_pytest/|/pluggy/", line)]
    return "\n".join([sentence, *lines[-TAIL_LINES:]])


def _run(command: list[str], until: float, output: Path, **variables: str) -> int | None:
    """Exit code of a command; None where `until` came first, and it was killed. What it says is added to `output`."""
    if until <= time.monotonic():
        return None
    environment = os.environ | ENVIRONMENT | variables
    with output.open("a") as file:
        process = subprocess.Popen(
            command, cwd=provenance.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(until - time.monotonic())
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started as well
            process.wait()


def ask_doctor(command: list[str], until: float) -> list[str]:
    """What `command` prints, in a process of its own: it runs kernels that may hang or crash."""
    seconds = max(0.0, min(DOCTOR_SECONDS, until - time.monotonic()))
    try:
        found = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return [f"did not return within {seconds:.1f} s"]
    return [*found.stdout.splitlines(), *([f"exit code {found.returncode}"] if found.returncode else [])]


def read(record: Path) -> list[Outcome]:
    """The last word on every test of a record."""
    if not record.exists():
        return []
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    last: dict[str, Outcome] = {}
    for line in lines:
        if line["outcome"] != "not reached" or line["test"] not in last:
            last[line["test"]] = Outcome(**line)
    return list(last.values())


def _sanitizer() -> str | None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(nvcc).resolve().parent))


def _only_ours(tool: str) -> list[str]:
    """The option that leaves PyTorch's kernels alone, whose spelling differs between releases; none where it is not found."""
    known = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False).stdout
    return next(([option, "kns=trapo"] for option in ("--kernel-regex", "--kernel-name") if option in known), [])


_FOUND = 9  # exit code of a sanitizer that has found something; a program's own is pytest's


def sanitize(tool: str, name: str, match: str, until: float, output: Path) -> str:
    """What one tool of compute-sanitizer says of the native kernels, in a sentence; its whole output goes to a file.

    Without the caching allocator every tensor is an allocation of its own, beyond whose end memcheck looks.
    """
    command = [tool, "--tool", name, "--error-exitcode", str(_FOUND), "--print-limit", "20", *_only_ours(tool)]
    command += [sys.executable, "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(provenance.ROOT), str(NATIVE), "-k", match]
    code = _run(command, until, output, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    summary = next((line.strip("= ") for line in reversed(text.splitlines()) if "SUMMARY" in line), "no summary")
    last = (text.strip().splitlines() or ["no output"])[-1]
    if "Device not supported" in text:  # by a driver inside gVisor; the program's own first allocation fails then
        return "cannot run on this machine: Device not supported"
    known = {
        0: f"clean ({summary})",
        None: "out of time",
        _FOUND: f"**found errors** ({summary})",
        1: f"**a test failed** under it ({summary})",
    }
    return known.get(code, f"did not run, exit code {code}: {last}")


def _item(o: Outcome) -> list[str]:
    """A list item: the first line of the reason beside the test, the others as code below it."""
    first, *rest = o.reason.splitlines() or [""]
    return [f"- {o.outcome} `{o.test}`: {first}", *(f"      {line}" for line in rest)]


class Report:
    """The Markdown record of a run, written anew whenever something is known."""

    def __init__(self, folder: Path, environment: dict):
        self.path, self.environment = folder / "tests.md", environment
        self.doctor_lines = ["no answer yet"]
        self.outcomes: list[Outcome] = []
        self.sanitized: dict[str, str] = {}
        self._started = time.monotonic()

    def passed(self) -> bool:
        """Whether tests ran and none of them, nor a sanitizer, found anything."""
        bad = any(o.outcome not in ("passed", "skipped") for o in self.outcomes)
        return bool(self.outcomes) and not bad and not any(text.startswith("**") for text in self.sanitized.values())

    def write(self, outputs: Iterable[Path] = ()) -> None:
        """Write the file, and beside it what the sanitizers' `outputs` hold, if anything."""
        self.path.write_text(self.text(), encoding="utf-8")
        texts = [f"== {path.stem}\n{path.read_text(encoding='utf-8', errors='replace')}" for path in outputs if path.exists()]
        if texts:
            self.path.with_name("sanitizer.txt").write_text("\n".join(texts), encoding="utf-8")

    def text(self) -> str:
        """The record so far."""
        environment = self.environment
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        counts = Counter(o.outcome for o in self.outcomes)
        bad = [
            o for o in self.outcomes if o.outcome in ("failed", "crashed", "running") or (o.outcome == "not reached" and o.reason)
        ]
        skips = Counter(o.reason for o in self.outcomes if o.outcome == "skipped")
        slowest = sorted(self.outcomes, key=lambda o: -o.seconds)[:5]
        lines = [
            f"# Kernel tests on {environment['device']}",
            "",
            f"- {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, driver {environment['driver']}, revision {environment['revision']}",
            f"- {versions}",
            f"- command: `python -m benchmarks.gpu_test`, {time.monotonic() - self._started:.0f} s",
            f"- {len(self.outcomes)} tests: " + (", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "none so far"),
            *(f"- compute-sanitizer, {name}: {text}" for name, text in self.sanitized.items()),
            "",
            "## Failures",
            "",
            *([line for o in bad for line in _item(o)] or ["None."]),
            "",
            "## Skipped",
            "",
            *([f"- {count}: {reason}" for reason, count in skips.most_common()] or ["None."]),
            "",
            "## Slowest",
            "",
            *(f"- {o.seconds:.1f} s `{o.test.rpartition('/')[2]}`" for o in slowest),
            "",
            "## `python -m trapo_kernels.doctor`",
            "",
            "```",
            *self.doctor_lines,
            "```",
            "",
        ]
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
