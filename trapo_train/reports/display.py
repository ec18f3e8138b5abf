"""What a run writes while it trains: `metrics.jsonl`, always, and progress on the console.

On a terminal a bar moves at the bottom and a table row is kept now and then; elsewhere (a log file, CI) only the rows
are printed. Both come from the same metrics dictionary.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column as TableColumn
from rich.text import Text

from trapo_train.reports.columns import COLUMNS, Column, value_of, written
from trapo_train.reports.metrics_log import METRICS_FILE, MetricsLog, group_accuracies, group_label, metrics_row
from trapo_train.reports.status import StatusLine
from trapo_train.reports.trackers import Trackers

if TYPE_CHECKING:
    from trapo_train.config import RunConfig
    from trapo_train.data.dataset import DataReport
    from trapo_train.train import RunSummary

logger = logging.getLogger(__name__)


_STEP_WIDTH, _ETA_WIDTH = 6, 9
ROWS_PER_RUN = 20
ROWS_PER_HEADER = 25


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text as it is, on one line however long: square brackets and colons of a path are no markup."""
    console.print(Text(text, style=style), soft_wrap=True)


class NullReporter:
    """What a trainer may tell a reporter; this one says nothing: for tests, and for ranks other than the first."""

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        """Whatever it is."""

    start = doing = progress = step = evaluation = event = finish = rewind = _ignore


def format_seconds(seconds: float) -> str:
    """`75` → `1:15`, `3700` → `1:01:40`."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Reporter:
    """Writes `metrics.jsonl` under `output_dir` and shows progress on `console`.

    A table row is kept for every twentieth part of the run, at the first and last step, and after `row_seconds` without
    one. Use it as a context manager, or call `close`, so that an interrupted run leaves a usable terminal.
    """

    def __init__(self, output_dir: str | Path, console: Console | None = None, row_seconds: float = 30.0) -> None:
        self.log = MetricsLog(Path(output_dir) / METRICS_FILE)
        self.console = console or Console()
        self.row_seconds = row_seconds
        self._steps = 0
        self._last_step = 0
        self._resumed_at: int | None = None
        self._recorded: set[str] = set()
        self._columns: list[Column] = []
        self._rows_shown = 0
        self._steps_seen = 0
        self._live = "starting"  # what stands beside the bar between steps
        self._started = self._last_row = time.monotonic()
        self._progress: Progress | None = None
        self._status = StatusLine(self.console, row_seconds)
        self._output_dir = Path(output_dir)
        self._trackers: Trackers | None = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, config: RunConfig, report: DataReport) -> None:
        """Begin a run of `config.steps` steps; `report` is what loading the data found, printed as it says itself.

        Raises: UserError for a tracker that refuses the run.
        """
        self._steps = config.steps
        self._trackers = Trackers(config.tracking, self._output_dir, asdict(config), self._resumed_at)
        for note in self._trackers.notes:
            self.event(note)
        self._started = self._last_row = time.monotonic()
        self._status.close()
        self._say(str(report), "dim")
        if self.console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn(
                    "{task.description}", table_column=TableColumn(no_wrap=True, ratio=1)
                ),  # which gives way, not the others
                console=self.console,
                transient=True,
                expand=True,
            )
            self._progress.add_task(self._live, total=self._steps, completed=self._last_step)
            self._progress.start()

    def doing(self, text: str) -> None:
        """Say what takes a while: beside the bar if there is one, else as a line, before the first step, where no rows come."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=text)
        elif not self._steps_seen:
            self._say(text, "dim")

    def progress(self, text: str) -> None:
        """Say how far it is with that, as often as it changes."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=text)
        else:
            self._status(text)

    def step(self, metrics: dict[str, Any]) -> None:
        """Record one training step; `metrics` holds at least "step" (counted from 1)."""
        step = int(metrics["step"])
        self._record(metrics_row("train", step, metrics))
        self._track(step, metrics, "")
        self._last_step = step
        self._steps_seen += 1
        self._choose_columns(metrics)
        if self._wants_row(step):
            self._print_row(step, metrics)
        if self._progress is not None:
            self._live = self._live_line(step, metrics)
            self._progress.update(self._progress.task_ids[0], completed=step, description=self._live)

    def evaluation(self, metrics: dict[str, Any], name: str = "") -> None:
        """Record one evaluation and print its accuracy, with the standard error, pass@k and each group where they are given.

        With several sets `name` says which one this is: "set" in its row, eval/<name>/ for the trackers.
        """
        step = int(metrics.get("step", self._last_step))
        row = metrics_row("eval", step, {"set": name, **metrics} if name else metrics)
        self._record(row)
        self._track(step, metrics, f"eval/{name}/" if name else "eval/")
        self._say(f"{step:>6}  {name or 'held-out'} {evaluation_line(row)}", "cyan")
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=self._live)

    def event(self, text: str) -> None:
        """Record something worth reading later: a checkpoint, a skipped step, a resume."""
        self._record(metrics_row("event", self._last_step, {"text": text}))
        self._say(text, "dim")

    def finish(self, summary: RunSummary) -> None:
        """End the display; `summary` is printed as it says itself."""
        self.close()
        elapsed = format_seconds(time.monotonic() - self._started)
        self._say(f"{self._steps_seen} steps in {elapsed}, metrics in {self.log.path}", "dim")
        self._say(str(summary))

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drop what was recorded after `step`, and its evaluation unless it was `evaluated`, before training goes on from there."""
        dropped = self.log.rewind(step, evaluated)
        self._resumed_at, self._last_step = step, max(step, 0)  # below 0 for a run that begins anew
        if dropped and step < 0:
            self._say(f"metrics: the {dropped} rows of before are in {self.log.path}.old", "dim")
        elif dropped:
            self._say(f"metrics: dropped {dropped} rows after step {step}, they are computed again", "dim")

    def close(self) -> None:
        """Restore the terminal and close the file; rows that it still does not take are told."""
        self._status.close()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._trackers is not None:
            self._trackers.close()
        try:
            self.log.write_waiting()
        except OSError as error:
            self._say(f"metrics: {len(self.log.waiting)} rows could not be written to {self.log.path} and are lost: {error}")
            self.log.waiting.clear()
        self.log.close()

    def _record(self, row: dict[str, Any]) -> None:
        """Write a row; where that fails, it is told once, and the row waits for the next: the training is worth more."""
        try:
            self.log.append(row)
        except OSError as error:
            if len(self.log.waiting) == 1:
                self.event(
                    f"metrics: {self.log.path} must take a row for every step, got {error}. Free space or make it writable: until "
                    "then training goes on, and rows wait in memory"
                )

    def _track(self, step: int, metrics: dict[str, Any], prefix: str) -> None:
        if self._trackers is not None:
            self._trackers.log(step, {f"{prefix}{name}": value for name, value in metrics.items() if name != "step"})

    def _say(self, text: str, style: str = "") -> None:
        say(self.console, text, style)

    def _wants_row(self, step: int) -> bool:
        every = max(1, math.ceil(self._steps / ROWS_PER_RUN))
        overdue = time.monotonic() - self._last_row >= self.row_seconds
        return self._steps_seen == 1 or step == self._steps or step % every == 0 or overdue

    def _choose_columns(self, metrics: dict[str, Any]) -> None:
        """A column for every metric recorded so far, as far as a terminal is wide; a file takes all. Others need a new heading."""
        self._recorded |= {c.metric for c in COLUMNS if c.metric in metrics and not (c.also and value_of(c, metrics) == 0)}
        sampled = "finished_share" in self._recorded  # or the loss alone would tell how well the traces are learned
        columns = [c for c in COLUMNS if c.metric in self._recorded and not (sampled and c.metric == "expert/logprob")]
        width = self.console.width if self.console.is_terminal else math.inf
        while _STEP_WIDTH + sum(c.width for c in columns) + _ETA_WIDTH > width and any(c.dispensable for c in columns):
            columns.remove(max(columns, key=lambda column: column.dispensable))
        if columns != self._columns:
            self._columns, self._rows_shown = columns, 0

    def _print_row(self, step: int, metrics: dict[str, Any]) -> None:
        if self._rows_shown % ROWS_PER_HEADER == 0:
            headings = "".join(f"{column.heading:>{column.width}}" for column in self._columns)
            self._say(f"{'step':>{_STEP_WIDTH}}{headings}{'ETA':>{_ETA_WIDTH}}", "bold")
        line = Text(f"{step:>{_STEP_WIDTH}}")
        for column in self._columns:
            line.append(f"{written(column, metrics):>{column.width}}", style=column.style)
        line.append(f"{self._eta(step):>{_ETA_WIDTH}}", style="dim")
        self.console.print(line, soft_wrap=True)
        self._rows_shown += 1
        self._last_row = time.monotonic()

    def _live_line(self, step: int, metrics: dict[str, Any]) -> str:
        shown = [column for column in self._columns if column.style != "dim"]
        values = "  ".join(f"{column.heading} {written(column, metrics)}" for column in shown)
        return f"ETA {self._eta(step)}  {values}"

    def _eta(self, step: int) -> str:
        per_step = (time.monotonic() - self._started) / self._steps_seen
        return format_seconds(per_step * (self._steps - step))


def evaluation_line(row: dict[str, Any]) -> str:
    """`accuracy 0.450 ± 0.031  pass@8 0.600  depth 3 0.470  expert nll 0.9120` from an evaluation's metrics; of pass@k the last."""
    parts, pass_at = [], [key for key, value in row.items() if key.startswith("pass@") and value is not None]
    if row.get("accuracy") is not None:
        error = row.get("accuracy_stderr")
        parts.append(f"accuracy {row['accuracy']:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
        if pass_at:
            parts.append(f"{pass_at[-1]} {row[pass_at[-1]]:.3f}")
    parts += [f"{group_label(group)} {value:.3f}" for group, (value, _) in group_accuracies(row).items()]
    if row.get("expert_nll") is not None:
        parts.append(f"expert nll {row['expert_nll']:.4f}")
    return "  ".join(parts) or "no accuracy reported"
