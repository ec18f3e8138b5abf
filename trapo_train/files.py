"""Text files that are whole or what they were, whatever ends the program or the disk's space; locked files."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

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


def lock(file: TextIO) -> str | None:
    """Lock a file, open for reading and appending, until it is closed or this process ends, whatever that has forked. Where another
    has it, what that signed with.

    Raises: OSError where its disk takes no locks.
    """
    os.register_at_fork(after_in_child=file.close)  # or the lock would last as long as a child, which shares it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    return None


def sign(file: TextIO) -> None:
    """Write which process it is that has locked a file into it."""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
