"""A head sharded over the vocabulary: rank r holds rows [offset_r, offset_r + V_r) of the weight, shards may be uneven.

Every rank computes the statistics of its own columns; five numbers per row and rank then meet in one all-gather per chunk, and each
rank derives the same global statistics from them. dWeight stays local; dHidden and the gradient of a LoRA's `a` are summed over the
ranks once per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trapo_kernels import rank_checks
from trapo_kernels.backends.logits import RowStatistics
from trapo_kernels.roles import IGNORE_INDEX

_ELSEWHERE = -1  # the target's column lies on another rank
# How far the checksums of the ranks' gradients may lie apart, relative to those of their absolute values: a loss that sums with
# atomics, or on another number of threads, has other last digits on each rank.
_NEAR = 1e-3


class VocabShard:
    """This rank's part of the vocabulary, and the collectives that make the parts one softmax. No host sync.

    Target [N] and the gradients [N] that backward begins with must be the same on all ranks; a missing gradient is zeros.
    """

    def __init__(self, where: str, group_name: str, local_vocab_size: int, target: Tensor, *grads: Tensor | None):
        from torch.distributed.distributed_c10d import _resolve_process_group  # absent where torch has no torch.distributed

        self.group = _resolve_process_group(group_name)
        checksum = (target * torch.arange(1, len(target) + 1, device=target.device)).sum()
        own = torch.stack([torch.full_like(checksum, size) for size in (local_vocab_size, len(target))] + [checksum])
        every = self._gather(torch.cat([own, *(_bits_of_sums(grad, target) for grad in grads)]))  # [world, 3 + 2 per gradient]
        sizes, marks, sums = every[:, 0], every[:, 1:3], every[:, 3:].contiguous().view(torch.float64).unflatten(1, (len(grads), 2))
        rank_checks.shared_target(where, target, sizes, marks)
        same = _near(sums)
        rank_checks.shared_gradients(where, same, sums[:, :, 1].sum(1))
        # NaN where the ranks' targets or gradients differ
        self.discord = torch.where((marks == marks[0]).all() & same, 0.0, float("nan"))
        rank = torch.distributed.get_rank(self.group)
        self.offset = sizes[:rank].sum()
        self.end = self.offset + sizes[rank]

    def local_target(self, target: Tensor) -> Tensor:
        """[C] the column within this shard; -1 where another rank has it, -100 where the row is ignored."""
        here = (target >= self.offset) & (target < self.end)
        return torch.where(here, target - self.offset, torch.where(target == IGNORE_INDEX, IGNORE_INDEX, _ELSEWHERE))

    def combine(self, local: RowStatistics, local_target: Tensor) -> RowStatistics:
        """Global statistics [C] from the local ones; identical on every rank, zeros on ignored rows.

        A target that no rank has makes its row's logprob NaN; what differs between the ranks makes everything NaN.
        """
        owns = local_target >= 0
        mean = local.log_sum - local.entropy  # E[z - row_max] over the local columns
        # In a shard without a possible column the local logprob would be -inf - -inf.
        own_logprob = torch.where(owns, torch.where(local.log_sum == float("-inf"), float("-inf"), local.logprob), 0.0)
        payload = torch.stack([local.row_max, local.log_sum, mean, own_logprob, owns.to(mean.dtype)])
        row_max, log_sum, mean, logprob, owner = self._gather(payload).unbind(1)  # [world, C] each
        global_max = row_max.amax(0) + self.discord
        shift = row_max - global_max  # apart: beside a large maximum the small numbers would lose their digits
        mass = shift + log_sum
        share = mass.exp()  # Σ exp(z - global_max) of each shard
        total = share.sum(0)
        # p → 1 keeps its digits: logprob and sum of the owner are exact there, the other shards enter through log(1 + their mass).
        known = owner.sum(0) == 1
        owner_mass = torch.where(owner > 0, mass, 0.0).sum(0)
        nothing = (owner > 0) | (mass == float("-inf"))
        others = torch.where(nothing, float("-inf"), mass - owner_mass).logsumexp(0)
        beyond_owner = torch.logaddexp(torch.zeros_like(others), others)
        global_logprob = torch.where(known, logprob.sum(0) - beyond_owner, float("nan"))
        global_log_sum = torch.where(known & (others < 0), owner_mass + beyond_owner, total.log())
        moment = torch.where(share > 0, share * (mean + shift), 0.0).sum(0)
        stats = RowStatistics(global_logprob, global_log_sum - moment / total, global_max, global_log_sum)
        return RowStatistics(*(torch.where(local_target == IGNORE_INDEX, 0.0, value) for value in stats))

    def sum_over_ranks(self, grad_hidden: Tensor) -> None:
        """Add up the ranks' partial dHidden in place."""
        torch.distributed.all_reduce(grad_hidden, group=self.group)

    def _gather(self, value: Tensor) -> Tensor:
        out = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size(self.group))]
        torch.distributed.all_gather(out, value, group=self.group)
        return torch.stack(out)


def _bits_of_sums(grad: Tensor | None, target: Tensor) -> Tensor:
    """[2] the sums of grad [N] and of its absolute value over the rows with a target, each row with a factor of its place; the bits
    of fp64 as int64, to travel with the checksum of the targets."""
    if grad is None:
        return target.new_zeros(2)
    place = 1 + torch.arange(len(target), dtype=torch.float64, device=target.device) / max(1, len(target))
    grad = torch.where(target == IGNORE_INDEX, 0.0, grad.double()) * place
    return torch.stack([grad.sum(), grad.abs().sum()]).view(torch.int64)


def _near(sums: Tensor) -> Tensor:
    """Whether all ranks have the same gradients, as a 0-d bool, from their sums [ranks, gradients, 2]; NaN and inf are the same
    where every rank has some."""
    apart = (sums - sums[0]).abs() > _NEAR * sums[:, :, 1:].amax(0)
    return ~apart.any() & (sums.isfinite() == sums[0].isfinite()).all()


def target_for_statistics(local_target: Tensor) -> Tensor:
    """A valid column for every row that is not ignored; the logprob of a column that is not the target's goes unused."""
    return torch.where(local_target == _ELSEWHERE, 0, local_target)


def nan_where_unknown(grad_logprob: Tensor, stats: RowStatistics) -> Tensor:
    """grad_logprob [C], NaN where the logprob is: no shard has a column for a target outside the vocabulary that would carry it."""
    return torch.where(stats.logprob.isnan(), stats.logprob, grad_logprob)
