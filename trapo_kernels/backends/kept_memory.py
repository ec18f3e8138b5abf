"""On a CPU the memory of the last dWeight and of the last chunk of logits is kept, and used again once nobody holds it.

A CPU has no caching allocator as a GPU has. The system maps a large tensor's pages one by one, clears them and takes them back with
the tensor: 2 to 20 % of a forward and backward in fp32 of 256 to 2048 rows, a third of one of 64 (Intel Xeon, 2 cores).
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, UntypedStorage

LEAST_BYTES = 2**25  # what is smaller malloc keeps by itself: glibc's largest threshold for memory of its own
_COUNT = "_storage_Use_Count"  # no public name; torch's own CUDA graph trees use it


class KeptMemory:
    """The memory of the last large tensor of one kind."""

    def __init__(self, exact: bool):
        self._exact = exact  # whether a tensor gets memory of its size alone, as one that is handed to the caller must
        self._lock = threading.Lock()
        self._storage: UntypedStorage | None = None
        self._alone = 0, 0  # its holders while no tensor is among them

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor that may hold anything: in kept memory that fits and that nobody holds, else in new memory, kept from
        now on. On a GPU, where it is small, and where torch does not count holders, an ordinary one."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if device.type == "cpu":
            self.trim(num_bytes)
        if device.type != "cpu" or num_bytes < LEAST_BYTES or not hasattr(torch._C, _COUNT):
            return torch.empty(shape, dtype=dtype, device=device)
        with self._lock:
            if not self._is_free(num_bytes):
                self._storage = None  # before there is more
                # Two threads that clear pages map them faster than a GEMM that runs into them.
                self._storage = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu").untyped_storage()
                self._alone = self._holders()
            return torch.empty(0, dtype=dtype, device="cpu").set_(self._storage, 0, tuple(shape))

    def _is_free(self, num_bytes: int) -> bool:
        if self._storage is None:
            return False
        held = self._storage.nbytes()
        fits = held == num_bytes if self._exact else held >= num_bytes
        return fits and not self._storage.is_shared() and self._holders() == self._alone

    def _holders(self) -> tuple[int, int]:
        """How many tensors hold the storage, and how many Python variables."""
        return getattr(torch._C, _COUNT)(self._storage._cdata), sys.getrefcount(self._storage)

    def trim(self, num_bytes: int) -> None:
        """Give back what is over twice as large as the next tensor will be."""
        with self._lock:
            if self._storage is not None and self._storage.nbytes() > 2 * num_bytes:
                self._storage = None

    def free(self) -> None:
        """Give the memory back, as soon as nobody holds it."""
        with self._lock:
            self._storage = None


GRADIENT, LOGITS = KeptMemory(exact=True), KeptMemory(exact=False)
