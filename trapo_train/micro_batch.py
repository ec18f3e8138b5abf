"""A packed row of sequences as the model runs it, and how it gets from the host onto a GPU without a wait for it: out of pinned
memory, as from any other the driver may wait for the stream."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trapo_kernels import TokenBatch

_PINNED_FOR = "cuda"


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One packed row of T tokens and its N loss rows.

    `input_ids` and `position_ids` are [1, T]; `segment_lengths` are the tokens of each sequence, summing to T.
    `loss_positions` [N] are the positions in the row whose next token is scored; `batch` holds those N tokens. With a head sharded
    over the vocabulary it holds those of all ranks, `rows_per_rank` of each (see `vocab_parallel`). `correction`: what
    updates.correction found and did, [N] each: log_ratio (trainer's logprob less the sampler's), factor, and capped, 1 where the
    factor is less than the ratio because of a cap, else 0; all of the `counted` tokens alone, those of rollouts in the loss.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_lengths: tuple[int, ...]
    loss_positions: Tensor
    batch: TokenBatch
    rows_per_rank: tuple[int, ...] | None = None
    correction: dict[str, Tensor] | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on `device`."""
        return replace(
            self,
            input_ids=upload(self.input_ids, device),
            position_ids=upload(self.position_ids, device),
            loss_positions=upload(self.loss_positions, device),
            batch=upload_batch(self.batch, device),
            correction=self.correction and {name: upload(x, device) for name, x in self.correction.items()},
        )


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
