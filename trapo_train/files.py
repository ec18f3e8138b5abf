"""Text files that are whole or what they were, whatever ends the program or the disk's space."""

from __future__ import annotations

import os
from pathlib import Path

UNFINISHED = ".unfinished_"


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`, in UTF-8, durable on disk before it takes the place of what was there; makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
