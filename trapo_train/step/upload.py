"""From the host onto a GPU without waiting for it: out of pinned memory, as from any other the driver may wait for the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from trapo_kernels import TokenBatch

_PINNED_FOR = "cuda"


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; the copy is queued behind what a GPU computes."""
    source = tensor.pin_memory() if _should_pin(tensor, device) else tensor
    return source.to(device, non_blocking=True)


def upload_batch(batch: TokenBatch, device: torch.device | str) -> TokenBatch:
    """`batch` on `device`, in the same way."""
    source = batch.pin_memory() if _should_pin(batch.target, device) else batch
    return source.to(device)


def _should_pin(tensor: Tensor, device: torch.device | str) -> bool:
    return torch.device(device).type == _PINNED_FOR and tensor.device.type == "cpu"
