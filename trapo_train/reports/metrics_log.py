"""`metrics.jsonl`: its rows, written so that a killed run loses at most one, and read back; the groups in that of an evaluation."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trapo_train.files import replace_text
from trapo_train.schema import UserError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


def _plain(key: str, value: Any, non_finite: list[str]) -> Any:
    """`value` as JSON can hold it; a NaN or infinity, which it cannot, becomes null and its key is noted."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a 0-d tensor or numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        non_finite.append(key)
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(key, item, non_finite) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"metrics: values must be numbers, strings or lists of them, got {type(value).__name__} for {key!r}. "
        "Convert it before reporting, for example with .tolist()."
    )


def metrics_row(kind: str, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """One row of `metrics.jsonl`; values that are not finite are null, with their names under "non_finite"."""
    non_finite: list[str] = []
    row = {"kind": kind, "step": step}
    row |= {key: _plain(key, value, non_finite) for key, value in metrics.items() if key not in row}
    if non_finite:
        row["non_finite"] = sorted(set(non_finite))
    return row


def _parse_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a metrics file and the number of bytes of a torn last line (0 when the file ends cleanly)."""
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # empty when the file ends with a newline, as every complete row does
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}: every line must be one JSON object, line {number} is not ({error}). Delete that line."
            ) from error
    return rows, len(torn)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete rows of a `metrics.jsonl`; `path` is the file or the run directory that holds it.

    A last line without its newline is what a killed run leaves: it is left out, with a warning that says so.
    Raises FileNotFoundError where there is no such file, UserError for a damaged line anywhere else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: no metrics here. Give the output directory of a run that has started.")
    rows, torn = _parse_metrics(path)
    if torn:
        logger.warning("%s: left out 1 torn last line (%d bytes) after %d complete rows", path, torn, len(rows))
    return rows


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, written row by row, so that a killed run loses at most one row, and those that
    wait where the file takes none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.waiting: list[bytes] = []
        """Lines that could not be written so far."""
        self._file: Any = None

    def append(self, row: dict[str, Any]) -> None:
        """Add one row, after those that wait; a torn line left by a killed run is cut off first. Raises OSError where they cannot
        all be written: the others wait for the next call."""
        self.waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self.write_waiting()

    def write_waiting(self) -> None:
        """Try again to write what waits. Raises OSError as `append`."""
        try:
            while self.waiting:
                self._write(self.waiting[0])
                del self.waiting[0]
        except OSError:
            self.close()  # a part of a line may be there, which is cut off when the file is opened again
            raise

    def rewind(self, step: int, evaluated: bool = True) -> int:
        """Drop every row after `step`, and its evaluation unless it was `evaluated`; return how many. The file is replaced in
        one move, or not at all. With a `step` below 0 nothing of the run is left: its rows are added to a file <name>.old."""
        self.close()
        if not self.path.exists():
            return 0
        rows, _ = _parse_metrics(self.path)
        if step < 0 and rows:  # nothing of that run is left but these
            with self.path.with_name(f"{self.path.name}.old").open("a", encoding="utf-8") as old:
                old.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        kept = [row for row in rows if row["step"] < step or (row["step"] == step and (evaluated or row["kind"] != "eval"))]
        replace_text(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
        return len(rows) - len(kept)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # of a row that could not be written, which `append` has told
                file.close()

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_torn_line()
            self._file = self.path.open("ab", buffering=0)  # a buffer would write what failed once more
        while line:
            line = line[self._file.write(line) :]

    def _cut_torn_line(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            complete = content.rfind(b"\n") + 1
            if complete < len(content):
                os.truncate(self.path, complete)


def group_accuracies(row: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Accuracy and its standard error by group, such as depth_3, of an evaluation's metrics; those that are null are left out."""
    groups = {key.partition("/")[2]: value for key, value in row.items() if key.startswith("accuracy/")}
    return {name: (value, row.get(f"accuracy_stderr/{name}")) for name, value in groups.items() if value is not None}


def group_label(group: str) -> str:
    """`depth_3` → `depth 3`."""
    return str(group).replace("_", " ")


def group_order(group: str) -> tuple[Any, ...]:
    """Sort key that puts `depth_10` after `depth_9`."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(group)))
