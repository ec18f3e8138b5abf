"""A pytest plugin (`-p benchmarks.gpu_record`) that writes a line per test as it ends, so that a process that dies loses nothing.

The file is $TRAPO_GPU_RECORD. A failure that has broken the CUDA context ends the process: every later test in it would fail too.
"""

from __future__ import annotations

import faulthandler
import json
import os
from pathlib import Path

import pytest

CONTEXT_LOST = 70  # exit code; pytest has 0 to 5
# A kernel that hangs holds the process; a C thread ends it then, with exit code 1.
LONGEST_TEST_S = float(os.environ.get("TRAPO_GPU_TEST_SECONDS", "120"))


def _write(**line: object) -> None:
    with Path(os.environ["TRAPO_GPU_RECORD"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The kernels that are most likely to hang or crash come last; what an earlier process has begun is left out."""
    from benchmarks.gpu_test import read

    begun = {known.test for known in read(Path(os.environ["TRAPO_GPU_RECORD"])) if known.outcome != "not reached"}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in begun])
    items[:] = sorted((item for item in items if item.nodeid not in begun), key=lambda item: "native" in item.name)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Name every test, so that those which are never reached can be counted."""
    for item in session.items:
        _write(test=item.nodeid, outcome="not reached")


def pytest_runtest_logstart(nodeid: str) -> None:
    """What is left of a test that takes its process with it."""
    _write(test=nodeid, outcome="running")
    faulthandler.dump_traceback_later(LONGEST_TEST_S, exit=True)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """It has ended."""
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The outcome: that of the call, or of a setup or teardown that did not pass."""
    if report.when != "call" and report.outcome == "passed":
        return
    reason = ""
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        lines = report.longreprtext.strip().splitlines() or [""]
        reason = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])
    lost = report.failed and _context_is_lost()
    outcome = "crashed" if lost else report.outcome
    _write(test=report.nodeid, outcome=outcome, seconds=round(report.duration, 2), reason=reason[:400])
    if lost:
        os._exit(CONTEXT_LOST)


def _context_is_lost() -> bool:
    import torch

    from benchmarks import measure

    return torch.cuda.is_available() and measure.context_is_lost()
