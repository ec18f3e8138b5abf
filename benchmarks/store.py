"""Results files: JSON lines, appended case by case, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.problem import Case

Row = dict[str, object]


def read(path: Path) -> list[Row]:
    """Every row of a results file; [] where there is none. A half-written last line, of a run that was killed, is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error}). Repair or delete that line.") from None
    return rows


def append(path: Path, rows: list[Row]) -> None:
    """Write the rows of one case at once; a half-written last line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        text = path.read_text()
        if text and not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1])
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def ran(rows: dict[str, Row | None]) -> dict[str, Row]:
    """By contender, the rows of those that were tried."""
    return {name: row for name, row in rows.items() if row is not None and row["status"] not in ("absent", "cannot")}


SAME = ("device", "revision", "versions", "threads", "wait_policy")  # of two environments whose rows are one measurement


def whole(rows: list[Row], case: Case, environment: Row) -> dict[str, Row]:
    """By contender, the whole rows of this case at the same revision, on the same device, with the same versions and threads."""
    return {
        row["contender"]: row
        for row in rows
        if not row.get("partial")
        and row["case"] == case.key
        and all(row["environment"].get(name) == environment[name] for name in SAME)
    }


def latest(rows: list[Row]) -> list[list[Row]]:
    """Rows grouped by case, in order of first appearance; of each contender's rows the last one written, but for a partial one
    after a whole one of the same revision."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        group = groups.setdefault(json.dumps(row["case"], sort_keys=True), {})
        before = group.get(row["contender"], {"partial": True})
        if not row.get("partial") or before.get("partial") or before["environment"]["revision"] != row["environment"]["revision"]:
            group[row["contender"]] = row
    return [list(group.values()) for group in groups.values()]
