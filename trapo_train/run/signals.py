"""Signals that ask a run to stop: they are noted, and acted upon where a step ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from trapo_train.parallel.world import World


class StopSignal:
    """Catches SIGTERM, SIGHUP (a closed terminal) and the first SIGINT (Ctrl-C) while it is entered, so that a run can save at the
    next step boundary.

    `received` is the name of the first one. A second SIGINT is handled as if nothing had been entered: it interrupts at once.

    Args:
        notice: what the first SIGINT writes to stderr, because nothing else seems to happen.
    """

    def __init__(self, notice: str = "") -> None:
        self.received: str | None = None
        self._notice = notice
        self._previous: dict[int, Any] = {}

    def agree(self, world: World) -> str | None:
        """The signal that any rank has received, the same on all of them, which must all call this."""
        received = next((name for name in world.gather(self.received) if name is not None), None)
        if received is not None:  # or one that arrived meanwhile would be forgotten
            self.received = received
        return received

    def __enter__(self) -> StopSignal:
        # Only the main thread may install handlers; elsewhere signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if number != signal.SIGTERM and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # a background job, whose Ctrl-C is meant for another, or nohup
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            if previous is not None:
                signal.signal(number, previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT:
            previous = self._previous[number]
            signal.signal(number, previous if callable(previous) else signal.default_int_handler)
            with contextlib.suppress(OSError):
                os.write(2, self._notice.encode())  # print could be in the middle of a line of its own
