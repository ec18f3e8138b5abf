"""The kernel tests on a GPU, then the native kernels under compute-sanitizer, under nine minutes, with a record of what passed.

    python -m benchmarks.gpu_test           # writes benchmarks/results/<gpu>/tests.md, sanitizer.txt

Every test file is a process of its own, a few at a time, and every outcome is on disk when its test ends: a crash costs one test.
Without a CUDA device it says so and exits with 2; with failures it exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import provenance
from trapo_kernels.backends import native

SECONDS = 500.0  # of nine minutes; a compute-sanitizer that is being killed takes a while
TESTS = provenance.ROOT / "tests" / "trapo_kernels"
FIRST = ("ops", "equality", "linear_policy_loss", "linear_logprob", "native_gpu", "accuracy", "upstream", "row_selection")
AT_ONCE = 8  # processes; compiling kernels keeps a core busy each
ON_THE_CPU = ("native_on_host", "native_cuda", "off_the_cpu", "memory")  # files that say nothing of a GPU
DOCTOR_SECONDS = 60.0
RESTARTS = 4  # of a file whose tests break the CUDA context, before the rest of it is given up
SANITIZER_SHARE = 0.4  # of the time, where there is something to sanitize
SANITIZED = {  # tool and kernels: which tests of test_native_gpu.py, and which share of the sanitizer's time
    "memcheck, rows": ("4099 or 57000", 0.35),
    "racecheck, rows": ("57000 and bfloat16 and plain", 0.2),
    "memcheck, scoring": ("scoring", 0.25),
    "racecheck, scoring": ("scoring and flat", 0.2),  # not known to understand wgmma and setmaxnreg: look before believing it
}


class Job(NamedTuple):
    """A test file and the tests of it that `match` selects, as pytest's -k does."""

    file: Path
    match: str


class Outcome(NamedTuple):
    """How a test went: pytest's outcome, or "crashed", or "not reached"."""

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
    started = time.monotonic()
    folder = options.out / provenance.folder("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    tool = _sanitizer() if native.why_not("cuda") is None else None
    report = Report(folder, provenance.environment("cuda"))
    report.write()
    until = started + options.seconds * (1.0 - SANITIZER_SHARE if tool else 1.0)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in as_completed([pool.submit(run, job, until) for job in jobs(TESTS)]):
            report.outcomes += done.result()
            report.write()
    report.doctor_lines = ask_doctor([sys.executable, "-m", "trapo_kernels.doctor"], DOCTOR_SECONDS)
    report.write()
    if tool is None:
        report.sanitized["none"] = native.why_not("cuda") or "compute-sanitizer was not found on PATH or beside nvcc."
    for name, (match, share) in SANITIZED.items() if tool else ():
        end = time.monotonic() + (started + options.seconds - time.monotonic()) * share / sum(s for _, s in _from(name))
        report.sanitized[name] = sanitize(tool, name.partition(",")[0], match, end, folder / "sanitizer.txt")
        report.write()
    print(f"gpu_test: {folder / 'tests.md'}")
    return 0 if report.passed() else 1


def _from(name: str) -> list[tuple[str, float]]:
    """The tools from `name` on."""
    return list(SANITIZED.values())[list(SANITIZED).index(name) :]


def jobs(folder: Path) -> list[Job]:
    """Every test file that a GPU matters to, the most telling first; what has never run on one, native, after everything else."""
    first = [folder / f"test_{name}.py" for name in FIRST]
    left_out = [*first, *(folder / f"test_{name}.py" for name in ON_THE_CPU)]
    files = [*first, *(path for path in sorted(folder.glob("test_*.py")) if path not in left_out)]
    native_alone = folder / "test_native_gpu.py"
    return [Job(path, "not native") for path in files if path != native_alone] + [Job(path, "native") for path in files]


def run(job: Job, until: float) -> list[Outcome]:
    """The outcomes of a job's tests, those that `until` cut off included; a process that its tests break is started again."""
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "record.jsonl"
        code = None
        for _ in range(1 + RESTARTS):
            known = [o.test for o in read(record) if o.outcome != "not reached"]
            command = [sys.executable, "-m", "pytest", str(job.file), "-k", job.match, "-p", "benchmarks.gpu_record", "-q"]
            command += ["-m", "not slow"]
            command += ["--rootdir", str(provenance.ROOT), *(f"--deselect={test}" for test in known)]
            code = _run(command, until, os.environ | {"TRAPO_GPU_RECORD": str(record)})
            hung = code == 1 and any(o.outcome == "crashed" and o.test not in known for o in read(record))
            if code in (0, 1, 2, 4, 5, None) and not hung:  # passed, failed, not to be collected, nothing selected, out of time
                break
        unseen = [] if code == 5 else [Outcome(f"{job.file.name} -k '{job.match}'", "not reached")]
        return read(record) or unseen


def _run(command: list[str], until: float, environment: dict[str, str], output: Path | None = None) -> int | None:
    """Exit code of a command; None where `until` came first, and it was killed."""
    if until <= time.monotonic():
        return None
    with output.open("a") if output else open(os.devnull, "w") as file:
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


def ask_doctor(command: list[str], seconds: float) -> list[str]:
    """What `command` prints, in a process of its own: it runs kernels that may hang or crash."""
    try:
        found = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return [f"did not return within {seconds:g} s"]
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


def sanitize(tool: str, name: str, match: str, until: float, output: Path) -> str:
    """What one tool of compute-sanitizer says of the native kernels, in a sentence; its whole output goes to a file.

    Without the caching allocator every tensor is an allocation of its own, beyond whose end memcheck looks.
    """
    command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20", *_only_ours(tool)]
    command += [sys.executable, "-m", "pytest", "-q"]
    command += ["--rootdir", str(provenance.ROOT), str(TESTS / "test_native_gpu.py"), "-k", match]
    code = _run(command, until, os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, output)
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    summary = next((line.strip("= ") for line in reversed(text.splitlines()) if "SUMMARY" in line), "no summary")
    return {0: f"clean ({summary})", None: "out of time"}.get(code, f"**failed**, exit code {code} ({summary})")


class Report:
    """The Markdown record of a run, written anew whenever something is known."""

    def __init__(self, folder: Path, environment: dict):
        self.path, self.environment = folder / "tests.md", environment
        self.doctor_lines = ["not asked yet: it runs every backend, and comes after the tests"]
        self.outcomes: list[Outcome] = []
        self.sanitized: dict[str, str] = {}
        self._started = time.monotonic()

    def passed(self) -> bool:
        """Whether tests ran and none of them, nor a sanitizer, found anything."""
        bad = any(o.outcome not in ("passed", "skipped") for o in self.outcomes)
        return bool(self.outcomes) and not bad and not any("failed" in text for text in self.sanitized.values())

    def write(self) -> None:
        """Write the file."""
        self.path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The record so far."""
        environment = self.environment
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        counts = Counter(o.outcome for o in self.outcomes)
        bad = [o for o in self.outcomes if o.outcome in ("failed", "crashed")]
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
            *([f"- {o.outcome} `{o.test}`: {o.reason}" for o in bad] or ["None."]),
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
