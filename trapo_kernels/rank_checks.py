"""What must be the same on all ranks of a process group; looked at on the CPU only, where that costs no sync."""

from __future__ import annotations

from torch import Tensor

from trapo_kernels import checks


def shared_target(where: str, value: Tensor, vocab_sizes: Tensor, marks: Tensor) -> None:
    """All ranks must pass the same target [N], in the vocabulary of them all. `vocab_sizes` [ranks] are those of their shards,
    `marks` [ranks, 2] the N and a checksum of their targets."""
    if not checks.may_look(value):
        return
    if len(marks.unique(dim=0)) > 1:
        raise ValueError(
            f"{where}: all ranks of process_group must pass the same hidden and target, got targets that differ, of N = "
            f"{marks[:, 0].tolist()} rows on its ranks. Gather the rows first; or, where each rank has rows of its own as in FSDP, "
            "pass the whole weight without process_group."
        )
    checks.target(where, value, len(value), int(vocab_sizes.sum()), value.device)


def shared_gradients(where: str, same: Tensor, sizes: Tensor) -> None:
    """The gradients of logprob and entropy must be the same on all ranks, as the 0-d bool `same` says; `sizes` [ranks] are the sums
    of their absolute values."""
    if checks.may_look(same) and not bool(same):
        raise ValueError(
            f"{where}: all ranks of process_group must have the same loss, got gradients of logprob and entropy that differ, of "
            f"{', '.join(f'{size:.4g}' for size in sizes.tolist())} in all on its ranks. Compute the loss of all rows on every "
            "rank, and divide it by no number of ranks."
        )
