"""Host tensors onto a GPU without waiting for it: from pinned memory, as from any other the driver may wait for the stream."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from trapo_kernels import TokenBatch

_PINNED_FOR = "cuda"


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; the copy of a host tensor is queued behind what a GPU computes."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def upload_batch(batch: TokenBatch, device: torch.device | str) -> TokenBatch:
    """`batch` on `device`, in the same way."""
    if torch.device(device).type == _PINNED_FOR:
        streams = {stream.name: getattr(batch, stream.name) for stream in fields(batch)}
        pinned = {name: _pinned(tensor, device) for name, tensor in streams.items() if tensor is not None}
        rows = batch.active_rows
        batch = replace(batch, **pinned).with_active_rows(None if rows is None else _pinned(rows, device))
    return batch.to(device)


def _pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.pin_memory() if torch.device(device).type == _PINNED_FOR and tensor.device.type == "cpu" else tensor
