"""Who is running now: written before every call of a contender, so that a process that dies leaves its culprit's name behind, and
what it knew of the others.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks import store


class Journal:
    """One small file; empty-handed (`path` None) it notes nothing."""

    def __init__(self, path: Path | None):
        self._path = path
        self._case: dict[str, object] | None = None
        self._rows: dict[str, store.Row | None] = {}

    def begin(self, results: Path, shared: store.Row, rows: dict[str, store.Row | None], partial: store.Row) -> None:
        """A case begins: `shared` is what its rows share, `results` the file that they go to; `rows`, by contender, will be filled,
        and `partial` marks them where they are written before the case is whole."""
        self._case, self._rows = {"results": str(results), "shared": shared, "partial": partial}, rows

    def enter(self, contender: str, reason: str = "") -> None:
        """`contender` runs from now on; `reason` is why it is about to take the process down, where that is known."""
        if self._path is not None and self._case is not None:
            known = {name: row for name, row in store.ran(self._rows).items() if name != contender}
            said = {
                "contender": contender,
                "reason": reason,
                "since": time.time(),
                "known": known,
                "own": self._rows.get(contender),
            }
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_suffix(".new")
            written.write_text(json.dumps(self._case | said))
            written.replace(self._path)  # whole at any time

    def leave(self) -> None:
        """Nobody runs."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def running(self) -> tuple[store.Row, float] | None:
        """The row of the contender that runs, and for how many seconds it has; None where none does."""
        found = self._read()
        return None if found is None else (_crash(found, ""), time.time() - found["since"])

    def blame(self, reason: str) -> tuple[Path, store.Row] | None:
        """Write the row of the contender that was running into its results file, beside those of the others as far as they were
        known; returns file and row, None where nobody was running."""
        found = self._read()
        self.leave()
        if found is None:
            return None
        row, path = _crash(found, reason), Path(found["results"])
        known = [
            {"contender": name, "note": "", **row, **found["shared"], **found["partial"]} for name, row in found["known"].items()
        ]
        store.append(path, [*known, row])
        return path, row

    def _read(self) -> dict | None:
        try:
            return json.loads(self._path.read_text()) if self._path is not None else None
        except FileNotFoundError:
            return None


def _crash(found: dict, reason: str) -> store.Row:
    """The row of a contender that has taken its process along; figures that it had by then stay."""
    own, reason = found.get("own") or {}, found["reason"] or reason
    crashed = {"status": "crashed", "reason": reason, "note": ""}
    what = own | {"reason": reason, "note": f"after it was timed: {reason}"} if "median_ms" in own else crashed
    return {"contender": found["contender"], **what, **found["shared"]}
