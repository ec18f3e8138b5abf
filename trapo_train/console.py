"""The console of a command, whose reader may leave before it ends: `tee` after Ctrl-C, `head`, a terminal that is closed."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from rich.console import Console


def stdout_console() -> Console:
    """A console on stdout that outlives its reader: what is printed later is lost, and the command goes on."""
    return Console(file=None if sys.stdout is None else _Output(sys.stdout))  # None: a process without stdout, where rich is silent


class _Output:
    """A stream that, once it takes nothing more, leads to /dev/null, whoever writes to it, which is said on stderr.

    A broken pipe is not all: a closed terminal gives EIO, a full disk ENOSPC.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lead_nowhere(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lead_nowhere(error)

    def _lead_nowhere(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what the stream still holds goes there, too, or its end would raise again
        said = f"trapo-train: stdout takes nothing more ({error.strerror}); the command goes on without it\n"
        try:
            os.write(2, said.encode())
        except OSError:  # it has left, too, as with 2>&1
            os.dup2(nowhere, 2)
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
