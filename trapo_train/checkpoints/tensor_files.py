"""How weights and optimizer state lie in the files of a checkpoint: in several, of which a rank has one in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

FILE_BYTES = 2**31  # of a rank's part of a file. The writer holds up to three times as much, on the host.


def tensor_writer(directory: Path, tensors: Mapping[str, Tensor], ranks: int) -> dcp.HuggingFaceStorageWriter:
    """What saves `tensors`, of which each of the `ranks` has its shards, as safetensors files."""
    writer = dcp.HuggingFaceStorageWriter(str(directory), _file_of_each(tensors, ranks), save_distributed=True)
    # Copying ahead goes through pinned memory, where CUDA is: each tensor rounded up to a power of two and kept by torch for good.
    # Without, the copies are pageable and freed.
    writer.per_thread_copy_ahead = 0
    return writer


def _file_of_each(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """The number of its file, from 1, for every name, the same on all ranks."""
    files: dict[str, int] = {}
    file, filled = 1, 0
    for name, tensor in tensors.items():
        part = tensor.numel() * tensor.element_size() // ranks
        if filled and filled + part > FILE_BYTES:
            file, filled = file + 1, 0
        files[name], filled = file, filled + part
    return files
