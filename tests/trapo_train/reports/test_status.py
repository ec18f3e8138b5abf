"""How far something is: one line that changes on a terminal, lines now and then elsewhere."""

import io

import pytest
from rich.console import Console

from tests.trapo_train.reports.test_display import REPORT, config_of, reporter_to
from trapo_train.reports import status
from trapo_train.reports.status import StatusLine


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    seconds = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_file_gets_a_line_now_and_then(clock):
    file = io.StringIO()
    with StatusLine(Console(file=file, width=40), seconds=30) as progress:
        for second in range(0, 100, 10):
            clock[0] = 100.0 + second
            progress(f"data: read {second} rows [of] {'many' * 20}")
    assert [line.split("rows")[0] for line in file.getvalue().splitlines()] == [f"data: read {n} " for n in (30, 60, 90)]


def test_a_terminal_has_one_line_that_goes():
    file = io.StringIO()
    with StatusLine(Console(file=file, force_terminal=True, width=80, color_system=None)) as progress:
        progress("data: read 10 rows")
        progress("data: read 20 rows")
    shown = file.getvalue()
    assert "read 20 rows" in shown
    assert shown.endswith("\x1b[2K"), repr(shown[-40:])  # the line is gone


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reporter_says_it_before_its_bar_begins_and_in_it(terminal, tmp_path, clock):
    reporter = reporter_to(tmp_path, terminal=terminal)
    clock[0] += 40
    reporter.progress("data: read 10 rows")
    reporter.start(config_of(tmp_path, steps=2), REPORT)  # one live display at a time
    clock[0] += 40
    reporter.progress("evaluating: 50%")
    reporter.close()
    shown = reporter.console.file.getvalue()
    assert "data: read 10 rows" in shown and "evaluating: 50%" in shown
