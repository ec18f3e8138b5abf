"""One run at a time in an output_dir, where two would overwrite each other's metrics and checkpoints; locked files."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from trapo_train.parallel.world import World
from trapo_train.schema import UserError, refused

LOCK_FILE = ".lock"


@contextmanager
def held(output_dir: Path, world: World) -> Iterator[str | None]:
    """Inside, no other run can begin in `output_dir`; every rank enters. Gives a note where the disk takes no locks. The lock ends
    with the process, whatever ends that and whatever it has forked.

    Raises: UserError, on every rank, where another run writes there or the directory cannot be written to.
    """
    writable = f"output_dir must be a directory that can be written to, got {output_dir}. Choose another, or mend what it lacks"
    with ExitStack() as files:

        def take() -> str | None:
            note = None
            with refused(writable, OSError):
                output_dir.mkdir(parents=True, exist_ok=True)
                file = files.enter_context((output_dir / LOCK_FILE).open("a+", encoding="utf-8"))
                try:
                    other = lock(file)
                except OSError as error:  # as of some network disks
                    note, other = f"nothing keeps a second run out of output_dir: its disk takes no locks ({error})", None
                if other is None:
                    sign(file)
            if other is not None:
                raise UserError(
                    f"output_dir must belong to one run at a time, got {output_dir}, to which {other} writes. Wait for its end, "
                    "stop it, or choose another output_dir."
                )
            return note

        yield world.attempt(take if world.first else lambda: None, UserError)[0]


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
