"""A head sharded over the vocabulary: rank r holds rows [offset_r, offset_r + V_r) of the weight, shards may be uneven.

Every rank computes the statistics of its own columns; five numbers per row and rank then meet in one all-gather per chunk, and each
rank derives the same global statistics from them. dWeight stays local; dHidden and the gradient of a LoRA's `a` are summed over the
ranks once per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trapo_kernels import checks
from trapo_kernels.backends.logits import RowStatistics
from trapo_kernels.roles import IGNORE_INDEX

_ELSEWHERE = -1  # the target's column lies on another rank


class VocabShard:
    """This rank's part of the vocabulary, and the collectives that make the parts one softmax. No host sync."""

    def __init__(self, where: str, group_name: str, local_vocab_size: int, target: Tensor):
        from torch.distributed.distributed_c10d import _resolve_process_group  # absent where torch has no torch.distributed

        self.group = _resolve_process_group(group_name)
        checksum = (target * torch.arange(1, len(target) + 1, device=target.device)).sum()
        own = torch.stack([torch.full_like(checksum, size) for size in (local_vocab_size, len(target))] + [checksum])
        every = self._gather(own)  # [world, 3]
        sizes, marks = every[:, 0], every[:, 1:]
        checks.shared_target(where, target, sizes, marks)
        self.discord = torch.where((marks == marks[0]).all(), 0.0, float("nan"))  # NaN where the ranks' targets differ
        rank = torch.distributed.get_rank(self.group)
        self.offset = sizes[:rank].sum()
        self.end = self.offset + sizes[rank]

    def local_target(self, target: Tensor) -> Tensor:
        """[C] the column within this shard; -1 where another rank has it, -100 where the row is ignored."""
        here = (target >= self.offset) & (target < self.end)
        return torch.where(here, target - self.offset, torch.where(target == IGNORE_INDEX, IGNORE_INDEX, _ELSEWHERE))

    def combine(self, local: RowStatistics, local_target: Tensor) -> RowStatistics:
        """Global statistics [C] from the local ones; identical on every rank, zeros on ignored rows.

        A target that no rank has makes its row's logprob NaN; targets that differ between the ranks make everything NaN.
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
        global_log_sum = total.log()
        # p → 1 keeps its digits: the owner's logprob is exact there, and the other shards enter through log(1 + their mass).
        owner_mass = torch.where(owner > 0, mass, 0.0).sum(0)
        nothing = (owner > 0) | (mass == float("-inf"))
        others = torch.where(nothing, float("-inf"), mass - owner_mass).logsumexp(0)
        global_logprob = logprob.sum(0) - torch.logaddexp(torch.zeros_like(others), others)
        global_logprob = torch.where(owner.sum(0) == 1, global_logprob, float("nan"))
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


def target_for_statistics(local_target: Tensor) -> Tensor:
    """A valid column for every row that is not ignored; the logprob of a column that is not the target's goes unused."""
    return torch.where(local_target == _ELSEWHERE, 0, local_target)


def nan_where_unknown(grad_logprob: Tensor, stats: RowStatistics) -> Tensor:
    """grad_logprob [C], NaN where the logprob is: no shard has a column for a target outside the vocabulary that would carry it."""
    return torch.where(stats.logprob.isnan(), stats.logprob, grad_logprob)
