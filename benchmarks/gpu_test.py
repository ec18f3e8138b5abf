"""The kernel tests on a GPU, under nine minutes, with a record of what passed.

    python -m benchmarks.gpu_test           # writes benchmarks/results/<gpu>/tests.md

Without a CUDA device it says so and exits with 2; with failures it exits with 1.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import provenance

SECONDS = 520  # of the nine minutes; a test that has begun may still end
TESTS = "tests/trapo_kernels"


class Recorder:
    """A pytest plugin that counts outcomes and ends the run when its time is over."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.failures: list[tuple[str, str]] = []
        self.slowest: list[tuple[float, str]] = []
        self.collected = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """How many tests there are."""
        self.collected = len(items)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """No further test once the time is over."""
        if time.monotonic() > self._end:
            pytest.exit("out of time", returncode=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a finished test: its call, or the setup or teardown that went wrong."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            self.slowest = sorted([*self.slowest, (report.duration, report.nodeid)], reverse=True)[:5]
        if report.failed:
            last = report.longreprtext.strip().splitlines()[-1] if report.longreprtext else ""
            self.failures.append((report.nodeid, last))


def main() -> int:
    """Run the tests and write the record; the exit status says whether all of them passed."""
    if not torch.cuda.is_available():
        print("gpu_test: needs a CUDA device, and torch sees none; `make test` runs the same tests on a CPU.", file=sys.stderr)
        return 2
    recorder = Recorder(SECONDS)
    started = time.monotonic()
    pytest.main([str(provenance.ROOT / TESTS), "-q", "--rootdir", str(provenance.ROOT)], plugins=[recorder])
    path = provenance.ROOT / "benchmarks" / "results" / provenance.folder("cuda") / "tests.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record(recorder, provenance.environment("cuda"), time.monotonic() - started))
    print(f"gpu_test: {path.relative_to(provenance.ROOT)}")
    unfinished = recorder.collected == 0 or sum(recorder.counts.values()) < recorder.collected
    return 1 if recorder.failures or unfinished else 0


def record(recorder: Recorder, environment: dict, seconds: float) -> str:
    """The Markdown record of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(recorder.counts.items())) or "none ran"
    missing = recorder.collected - sum(recorder.counts.values())
    lines = [
        f"# Kernel tests on {environment['device']}",
        "",
        f"- {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, driver {environment['driver']}, revision {environment['revision']}, "
        f"{versions}",
        f"- command: `python -m benchmarks.gpu_test` ({TESTS}), {seconds:.0f} s",
        f"- {recorder.collected} collected: {counts}" + (f", **{missing} not reached**" if missing > 0 else ""),
        "",
        "## Failures",
        "",
        *([f"- `{test}`: {reason}" for test, reason in recorder.failures] or ["None."]),
        "",
        "## Slowest",
        "",
        *(f"- {duration:.1f} s `{Path(test).name}`" for duration, test in recorder.slowest),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
