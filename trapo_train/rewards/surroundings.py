"""What a reward finds around it where it is called: no autocast, and this rank's GPU as the current one.

torch is not imported for it: a worker program that does without starts in a moment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def no_autocast() -> Iterator[None]:
    """Inside, a reward computes in its own dtypes, not in that of the model which generates around it."""
    torch = sys.modules.get("torch")
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda") if torch else ():
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def current_gpu() -> int | None:
    """That of this thread; None where CUDA is not in use."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def use_gpu(index: int | None) -> None:
    """Make a GPU the current one of this thread, which may be new, as `current_gpu` found it in another."""
    if index is not None:
        sys.modules["torch"].cuda.set_device(index)
