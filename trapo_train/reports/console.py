"""stdout and stderr of a command, whose reader may leave before it ends: `tee` after Ctrl-C, `head`, a terminal that is closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def outlived_readers() -> Iterator[None]:
    """Inside, sys.stdout and sys.stderr outlive their readers: what anyone prints later is lost, and the command goes on.

    Nothing that was printed inside is left to be written outside.
    """
    before = sys.stdout, sys.stderr  # either is None in a process that was started without it
    stderr = None if sys.stderr is None else _Output(sys.stderr)
    stdout = None if sys.stdout is None else _Output(sys.stdout, told=stderr)
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield
    finally:
        for output in (stdout, stderr):
            if output is not None:
                output.flush()
        sys.stdout, sys.stderr = before


class _Output:
    """A stream that, once it takes nothing more, leads to /dev/null, which is said to `told`.

    A broken pipe is not all: a closed terminal gives EIO, a full disk ENOSPC.
    """

    def __init__(self, stream: TextIO, told: _Output | None = None) -> None:
        self._stream = stream
        self._told = told

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lead_nowhere(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lead_nowhere(error)

    def _lead_nowhere(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != self._stream.fileno():  # equal where that was closed: its number is the next to be given out
            os.dup2(nowhere, self._stream.fileno())  # what the stream still holds goes there, too, or its end would raise again
            os.close(nowhere)
        else:
            os.set_inheritable(nowhere, True)  # as dup2 makes it: for what is started from here
        if self._told is not None:
            self._told.write(f"trapo-train: stdout takes nothing more ({error.strerror}); the command goes on without it\n")
            self._told.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
