"""The chunked path: logits of a few thousand rows at a time, never all of them; the row operations come from a backend.

    hidden[C, D] ──GEMM──▶ logits[C, V] ──rows──▶ logprob, entropy [C]
                                  └──────rows──▶ grad_logits[C, V] ──GEMM──▶ grad_hidden[C, D]
                                                                   └─GEMM──▶ grad_weight[V, D] +=

Memory: one chunk of logits beside the results (three with `rows_torch`). Order: chunks ascend and every sum has a fixed order,
so results are bitwise repeatable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from trapo_kernels import terms
from trapo_kernels.backends.gemm import HeadGemm, chunk_rows
from trapo_kernels.backends.logits import LogitTransform, RowStatistics, statistics_dtype
from trapo_kernels.backends.vocab_parallel import VocabShard, target_for_statistics
from trapo_kernels.objective import Objective


class Needs(NamedTuple):
    """Which gradients are wanted; the GEMMs of the others are skipped."""

    hidden: bool
    weight: bool
    bias: bool


class Mode(NamedTuple):
    """How the sweep runs, beyond what it computes; plain values, so that they pass through a `torch.library` op."""

    logits_dtype: torch.dtype
    batch_invariant: bool
    group_name: str  # of the process group that the vocabulary is sharded over; "" for a whole head

    def shard(self, weight: Tensor) -> VocabShard | None:
        """This rank's shard of the vocabulary, or None."""
        return VocabShard(self.group_name, weight.shape[0], weight.device) if self.group_name else None


class Gradients(NamedTuple):
    """hidden [N, D] in its dtype, weight [V, D] and bias [V] in fp32 (fp64); None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def score(
    rows: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: LogitTransform,
    with_entropy: bool,
    mode: Mode,
) -> RowStatistics:
    """logprob, entropy and the parts of logsumexp [N]; zeros where target is -100."""
    gemm = HeadGemm(hidden, weight, mode.logits_dtype, mode.batch_invariant)
    shard = mode.shard(weight)
    target = target if shard is None else shard.local_target(target)
    out = _empty_statistics(hidden.shape[0], gemm.statistics_dtype, hidden.device)
    for index, _, buffer in _chunks(gemm, hidden.shape[0], _active_rows(target != -100)):
        logits = gemm.logits(gemm.operand(_zeroed(hidden[index], target[index] != -100)), buffer)
        if shard is None:
            stats = rows.statistics(logits, target[index], transform.rows(index), with_entropy)
        else:
            stats = _sharded_statistics(rows, logits, target[index], transform.rows(index), shard, keep_logits=False)
        _put(out, index, stats)
    return out


def score_backward(
    rows: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: LogitTransform,
    stats: RowStatistics,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    needs: Needs,
    mode: Mode,
) -> Gradients:
    """Gradients of Σ grad_logprob · logprob + Σ grad_entropy · entropy, logits recomputed chunk by chunk."""
    gemm = HeadGemm(hidden, weight, mode.logits_dtype, mode.batch_invariant)
    shard = mode.shard(weight)
    target = target if shard is None else shard.local_target(target)
    active_rows = _active_rows(target != -100)
    grads = _empty_gradients(hidden, weight, gemm, needs, shard, active_rows)
    for number, (index, count, buffer) in enumerate(_chunks(gemm, hidden.shape[0], active_rows)):
        hidden_chunk = gemm.operand(_zeroed(hidden[index], target[index] != -100))
        grad_logits = rows.logprob_gradient(
            gemm.logits(hidden_chunk, buffer),
            target[index],
            transform.rows(index),
            RowStatistics(*(part[index] for part in stats)),
            None if grad_logprob is None else grad_logprob[index],
            None if grad_entropy is None else grad_entropy[index],
            gemm.operand_dtype,
        )
        _accumulate(gemm, grads, grad_logits[:count], hidden_chunk[:count], _first(index, count), first=number == 0)
        del grad_logits  # before the next chunk's logits, not after
    return _reduced(grads, shard, hidden.dtype)


def policy(
    rows: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    streams: terms.Streams,
    active_rows: Tensor | None,
    objective: Objective,
    transform: LogitTransform,
    with_entropy_gradient: bool,
    needs: Needs,
    mode: Mode,
) -> tuple[RowStatistics, Gradients]:
    """Statistics and the gradients of a policy loss from one sweep: three GEMMs, no recomputation."""
    gemm = HeadGemm(hidden, weight, mode.logits_dtype, mode.batch_invariant)
    shard = mode.shard(weight)
    target = torch.where(streams.role != 0, target, -100)
    target = target if shard is None else shard.local_target(target)
    out = _empty_statistics(hidden.shape[0], gemm.statistics_dtype, hidden.device)
    active_rows = _active_rows(streams.role != 0) if active_rows is None else active_rows
    grads = _empty_gradients(hidden, weight, gemm, needs, shard, active_rows)
    grad_dtype = gemm.operand_dtype if any(needs) else None
    policy_rows = rows.policy if shard is None else partial(_sharded_policy, rows, shard)
    for number, (index, count, buffer) in enumerate(_chunks(gemm, hidden.shape[0], active_rows)):
        streams_chunk = replace(streams, **{k: v[index] for k, v in vars(streams).items() if v is not None})
        hidden_chunk = gemm.operand(_zeroed(hidden[index], streams_chunk.role != 0))
        stats, grad_logits = policy_rows(
            gemm.logits(hidden_chunk, buffer),
            target[index],
            transform.rows(index),
            streams_chunk,
            objective,
            with_entropy_gradient,
            grad_dtype,
        )
        _put(out, index, stats)
        if grad_logits is not None:
            _accumulate(gemm, grads, grad_logits[:count], hidden_chunk[:count], _first(index, count), first=number == 0)
        del grad_logits  # before the next chunk's logits, not after
    return out, _reduced(grads, shard, hidden.dtype)


def _sharded_statistics(
    rows: ModuleType, logits: Tensor, target: Tensor, transform: LogitTransform, shard: VocabShard, keep_logits: bool
) -> RowStatistics:
    logits = logits.clone() if keep_logits and rows.STATISTICS_OVERWRITE else logits
    local = rows.statistics(logits, target_for_statistics(target), transform, True)
    return shard.combine(local, target)


def _sharded_policy(
    rows: ModuleType,
    shard: VocabShard,
    logits: Tensor,
    target: Tensor,
    transform: LogitTransform,
    streams: terms.Streams,
    objective: Objective,
    with_entropy_gradient: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[RowStatistics, Tensor | None]:
    """`rows.policy` in two launches, because the ranks must agree on the statistics between them."""
    stats = _sharded_statistics(rows, logits, target, transform, shard, keep_logits=grad_dtype is not None)
    if grad_dtype is None:
        return stats, None
    c = terms.coefficients(stats.logprob, streams, objective).grad_logprob
    e = streams.grad_entropy if with_entropy_gradient else None
    return stats, rows.logprob_gradient(logits, target, transform, stats, c, e, grad_dtype)


def _active_rows(active: Tensor) -> Tensor | None:
    """Indices of the active rows on a CPU; None on a GPU, where finding them would stall the host."""
    return active.nonzero().squeeze(1) if active.device.type == "cpu" else None


def _chunks(gemm: HeadGemm, num_rows: int, active: Tensor | None) -> Iterator[tuple[Tensor | slice, int, Tensor]]:
    """(which rows, how many of them count, buffer for their logits); slices where all rows are active, so that nothing is copied.

    In batch-invariant mode a short chunk is filled up by repeating its last row: row operations then run on one shape, too.
    """
    total = num_rows if active is None else active.shape[0]
    if total == 0:
        return
    size = chunk_rows(total, gemm.weight.shape[0], gemm.weight.device.type, gemm.batch_invariant)
    buffer = gemm.buffer(size if gemm.batch_invariant else min(size, total))
    for start in range(0, total, size):
        end = min(start + size, total)
        if gemm.batch_invariant:
            places = torch.arange(start, start + size, device=gemm.weight.device).clamp(max=end - 1)
            yield (places if active is None else active[places]), end - start, buffer
        else:
            rows = slice(start, end)
            yield (rows if active is None or total == num_rows else active[rows]), end - start, buffer


def _first(index: Tensor | slice, count: int) -> Tensor | slice:
    return index if isinstance(index, slice) else index[:count]


def _zeroed(hidden_chunk: Tensor, active: Tensor) -> Tensor:
    """On a GPU, where inactive rows still pass through the GEMMs: zeros in their place, so that their NaNs reach no gradient."""
    return hidden_chunk if hidden_chunk.device.type == "cpu" else torch.where(active[:, None], hidden_chunk, 0)


def _empty_statistics(num_rows: int, dtype: torch.dtype, device: torch.device) -> RowStatistics:
    return RowStatistics(*(torch.zeros(num_rows, dtype=dtype, device=device) for _ in RowStatistics._fields))


def _put(out: RowStatistics, index: Tensor | slice, chunk: RowStatistics) -> None:
    for whole, part in zip(out, chunk, strict=True):
        whole[index] = part


def _empty_gradients(
    hidden: Tensor, weight: Tensor, gemm: HeadGemm, needs: Needs, shard: VocabShard | None, active_rows: Tensor | None
) -> Gradients:
    """Room for the gradients; dWeight is uninitialised where a first chunk will overwrite it."""
    if shard is not None:
        gemm.grad_hidden_dtype = gemm.statistics_dtype  # the ranks' parts are summed before they are rounded
    no_chunk = (hidden.shape[0] if active_rows is None else active_rows.shape[0]) == 0
    new_weight = torch.zeros_like if no_chunk else torch.empty_like
    return Gradients(
        hidden=torch.zeros_like(hidden, dtype=gemm.grad_hidden_dtype) if needs.hidden else None,
        weight=new_weight(weight, dtype=gemm.statistics_dtype, memory_format=torch.contiguous_format) if needs.weight else None,
        bias=weight.new_zeros(weight.shape[0], dtype=gemm.statistics_dtype) if needs.bias else None,
    )


def _reduced(grads: Gradients, shard: VocabShard | None, hidden_dtype: torch.dtype) -> Gradients:
    if shard is None or grads.hidden is None:
        return grads
    shard.sum_over_ranks(grads.hidden)
    return grads._replace(hidden=grads.hidden.to(hidden_dtype))


def _accumulate(
    gemm: HeadGemm, grads: Gradients, grad_logits: Tensor, hidden_chunk: Tensor, index: Tensor | slice, first: bool
) -> None:
    if grads.hidden is not None:
        grads.hidden[index] = gemm.grad_hidden(grad_logits)
    if grads.weight is not None:
        gemm.add_grad_weight(grad_logits, hidden_chunk, grads.weight, first)
    if grads.bias is not None:
        grads.bias.add_(grad_logits.sum(0, dtype=grads.bias.dtype))


def score_logits(rows: ModuleType, logits: Tensor, target: Tensor, transform: LogitTransform, with_entropy: bool) -> RowStatistics:
    """`score` for logits [N, V] that exist already; they are copied chunk by chunk and left as they are."""
    dtype = statistics_dtype(logits)
    out = _empty_statistics(logits.shape[0], dtype, logits.device)
    for index in _logit_chunks(logits):
        _put(
            out,
            index,
            rows.statistics(logits[index].to(dtype, copy=True), target[index], transform.rows(index), with_entropy),
        )
    return out


def score_logits_backward(
    rows: ModuleType,
    logits: Tensor,
    target: Tensor,
    transform: LogitTransform,
    stats: RowStatistics,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """dL/dlogits [N, V] in the dtype of logits."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for index in _logit_chunks(logits):
        grad[index] = rows.logprob_gradient(
            logits[index].to(stats.logprob.dtype, copy=True),
            target[index],
            transform.rows(index),
            RowStatistics(*(part[index] for part in stats)),
            None if grad_logprob is None else grad_logprob[index],
            None if grad_entropy is None else grad_entropy[index],
            logits.dtype,
        )
    return grad


def _logit_chunks(logits: Tensor) -> Iterator[slice]:
    size = chunk_rows(logits.shape[0], logits.shape[1], logits.device.type)
    for start in range(0, logits.shape[0], size):
        yield slice(start, min(start + size, logits.shape[0]))
