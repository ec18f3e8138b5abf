"""Counting the memory of tensors while they live, operation by operation; fake tensors count as what they stand for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """While it is entered, counts the bytes of what operations allocate until it is freed; views and known tensors do not count.

    Memory that an operation takes inside itself is not seen.

    Args:
        known: tensors that are not to count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now_bytes = 0
        self.peak_bytes = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, or another storage might take one's address
        self._live = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.now_bytes

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.now_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now_bytes -= size
