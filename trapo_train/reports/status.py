"""How far something is that takes long, said while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.status import Status
from rich.text import Text

Tell = Callable[[str], None]


def silent(what: object) -> None:
    """A `Tell` that says nothing."""


class StatusLine:
    """On a terminal a line that changes, and goes when it is over; elsewhere a line whenever `seconds` have passed since the last.

    Called with a text, as often as one likes. Use it as a context manager, or call `close`, so that the terminal is left usable.
    """

    def __init__(self, console: Console, seconds: float = 30.0) -> None:
        self._console = console
        self._seconds = seconds
        self._status: Status | None = None
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        """Say how far it is."""
        shown = Text(text, style="dim")
        if not self._console.is_terminal:
            if time.monotonic() - self._last >= self._seconds:
                self._console.print(shown, soft_wrap=True)
                self._last = time.monotonic()
        elif self._status is None:
            self._status = self._console.status(shown)
            self._status.start()
        else:
            self._status.update(shown)

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away; the next text begins another."""
        if self._status is not None:
            self._status.stop()
            self._status = None
