"""Who is running now: written before every call of a contender, so that a process that dies leaves its culprit's name behind."""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks import store


class Journal:
    """One small file; empty-handed (`path` None) it notes nothing."""

    def __init__(self, path: Path | None):
        self._path = path
        self._results: Path | None = None
        self._row: store.Row = {}

    def begin(self, results: Path, row: store.Row) -> None:
        """A case begins: `row` holds what its rows share, `results` is the file that they go to."""
        self._results, self._row = results, row

    def enter(self, contender: str, reason: str = "") -> None:
        """`contender` runs from now on; `reason` is why it is about to take the process down, where that is known."""
        if self._path is not None and self._results is not None:
            row = {"contender": contender, "status": "crashed", "reason": reason, "note": "", **self._row}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"results": str(self._results), "row": row, "since": time.time()}))

    def leave(self) -> None:
        """Nobody runs."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def running(self) -> tuple[store.Row, float] | None:
        """The row of the contender that runs, and for how many seconds it has; None where none does."""
        try:
            found = json.loads(self._path.read_text()) if self._path is not None else None
        except (FileNotFoundError, ValueError):  # gone, or just being written
            return None
        return None if found is None else (found["row"], time.time() - found["since"])

    def blame(self, reason: str) -> tuple[Path, store.Row] | None:
        """Write the row of the contender that was running into its results file and return both; None where none was."""
        if self._path is None or not self._path.exists():
            return None
        found = json.loads(self._path.read_text())
        self.leave()
        row = found["row"] | {"reason": found["row"]["reason"] or reason}
        store.append(Path(found["results"]), [row])
        return Path(found["results"]), row
