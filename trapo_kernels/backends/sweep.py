"""The chunked path: logits of some rows at a time, never all of them; the row operations come from a backend.

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
from trapo_kernels.backends.gemm import Head, HeadGemm, Operands, chunk_bounds, chunk_rows
from trapo_kernels.backends.logits import LogitTransform, RowStatistics, statistics_dtype
from trapo_kernels.backends.vocab_parallel import VocabShard, nan_where_unknown, target_for_statistics
from trapo_kernels.objective import Objective
from trapo_kernels.roles import IGNORE_INDEX, Role


class Needs(NamedTuple):
    """Which gradients are wanted; the GEMMs of the others are skipped."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool = False
    lora_b: bool = False


class Mode(NamedTuple):
    """How the sweep runs, beyond what it computes; plain values, so that they pass through a `torch.library` op."""

    logits_dtype: torch.dtype
    batch_invariant: bool
    group_name: str  # of the process group that the vocabulary is sharded over; "" for a whole head

    def shard(self, where: str, weight: Tensor, target: Tensor) -> VocabShard | None:
        """This rank's shard of the vocabulary, or None."""
        return VocabShard(where, self.group_name, weight.shape[0], target) if self.group_name else None


class Gradients(NamedTuple):
    """None where not wanted; that of hidden in its dtype, those of the head in fp32 (fp64)."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [R, D]
    lora_b: Tensor | None  # [V, R]


def score(
    rows: ModuleType,
    head: Head,
    target: Tensor,
    active_rows: Tensor | None,
    scored_rows: Tensor | None,
    transform: LogitTransform,
    with_entropy: bool,
    mode: Mode,
) -> RowStatistics:
    """logprob, entropy and the parts of logsumexp [N]; zeros where target is -100, and outside `active_rows` and `scored_rows`
    where given; only the former take part in `score_backward`."""
    gemm = HeadGemm(head, mode.logits_dtype, mode.batch_invariant)
    shard = mode.shard("linear_logprob", head.weight, target)
    target = target if shard is None else shard.local_target(target)
    out = _empty_statistics(target.shape[0], gemm.statistics_dtype, target.device)
    active_rows = _active_rows(target != IGNORE_INDEX) if active_rows is None else active_rows
    for which in (active_rows, scored_rows) if scored_rows is not None else (active_rows,):
        _score_rows(rows, gemm, head, target, which, transform, with_entropy, shard, out)
    return out


def _score_rows(
    rows: ModuleType,
    gemm: HeadGemm,
    head: Head,
    target: Tensor,
    which: Tensor | None,
    transform: LogitTransform,
    with_entropy: bool,
    shard: VocabShard | None,
    out: RowStatistics,
) -> None:
    """Statistics of the rows `which` (None: all) into `out`, one GEMM."""
    for index, _, buffer in _chunks(gemm, target.shape[0], which, shard is not None):
        logits = gemm.logits(_operands(gemm, head, index, target[index] != IGNORE_INDEX), buffer)
        if shard is None:
            stats = rows.statistics(logits, target[index], transform.rows(index), with_entropy)
        else:
            stats = _sharded_statistics(rows, logits, target[index], transform.rows(index), shard, keep_logits=False)
        _put(out, index, stats)


def score_on_chip(
    rows: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    active_rows: Tensor | None,
    scored_rows: Tensor | None,
    transform: LogitTransform,
) -> RowStatistics:
    """`score` of a whole head by a kernel whose logits stay on the chip, in one launch."""
    if active_rows is None:
        return rows.fused_scoring(hidden, weight, target, transform)
    which = active_rows if scored_rows is None else torch.cat([active_rows, scored_rows])
    out = _empty_statistics(target.shape[0], statistics_dtype(hidden), target.device)
    _put(out, which, rows.fused_scoring(hidden[which], weight, target[which], transform.rows(which)))
    return out


def score_backward(
    rows: ModuleType,
    head: Head,
    target: Tensor,
    active_rows: Tensor | None,
    transform: LogitTransform,
    stats: RowStatistics,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    needs: Needs,
    mode: Mode,
) -> Gradients:
    """Gradients of Σ grad_logprob · logprob + Σ grad_entropy · entropy, logits recomputed chunk by chunk, and their statistics too
    where the entropy has a gradient.

    Rows whose both gradients are zero are left out: on a CPU they are found here, on a GPU `active_rows` names the others.
    """
    gemm = HeadGemm(head, mode.logits_dtype, mode.batch_invariant)
    shard = mode.shard("linear_logprob", head.weight, target)
    target = target if shard is None else shard.local_target(target)
    if target.device.type == "cpu":
        wanted = [grad != 0 for grad in (grad_logprob, grad_entropy) if grad is not None]
        active_rows = _active_rows((target != IGNORE_INDEX) & torch.stack(wanted).any(0))
    grads = _empty_gradients(head, gemm, needs, shard, active_rows)
    policy_rows = rows.policy if shard is None else partial(_sharded_policy, rows, shard)
    given = None if grad_entropy is None else terms.streams_from_gradients(grad_logprob, grad_entropy, target != IGNORE_INDEX)
    for number, (index, count, buffer) in enumerate(_chunks(gemm, target.shape[0], active_rows, shard is not None)):
        operands = _operands(gemm, head, index, target[index] != IGNORE_INDEX)
        logits = gemm.logits(operands, buffer)
        if given is None:
            c, known = grad_logprob[index], RowStatistics(*(part[index] for part in stats))
            c = c if shard is None else nan_where_unknown(c, known)
            grad_logits = rows.logprob_gradient(logits, target[index], transform.rows(index), known, c, None, gemm.operand_dtype)
        else:  # p (log p + H) cancels where p → 1, so with the statistics of these logits: another GEMM has other last bits
            streams, objective = _streams_of_rows(given[0], index), given[1]
            _, grad_logits = policy_rows(logits, target[index], transform.rows(index), streams, objective, True, gemm.operand_dtype)
        del logits
        _accumulate(gemm, grads, grad_logits[:count], operands, _first(index, count), first=number == 0)
        del grad_logits  # before the next chunk's logits, not after
    return _reduced(grads, shard, head.hidden.dtype)


def policy(
    rows: ModuleType,
    head: Head,
    target: Tensor,
    streams: terms.Streams,
    active_rows: Tensor | None,
    scored_rows: Tensor | None,
    objective: Objective,
    transform: LogitTransform,
    with_entropy_gradient: bool,
    needs: Needs,
    mode: Mode,
) -> tuple[RowStatistics, Gradients]:
    """Statistics and the gradients of a policy loss from one sweep: three GEMMs, no recomputation; one GEMM for `scored_rows`."""
    gemm = HeadGemm(head, mode.logits_dtype, mode.batch_invariant)
    shard = mode.shard("linear_policy_loss", head.weight, target)
    target = target if shard is None else shard.local_target(target)
    out = _empty_statistics(target.shape[0], gemm.statistics_dtype, target.device)
    active_rows = _active_rows(streams.role != Role.IGNORED) if active_rows is None else active_rows
    grads = _empty_gradients(head, gemm, needs, shard, active_rows)
    grad_dtype = gemm.operand_dtype if any(needs) else None
    scored, target = target, torch.where(streams.role != Role.IGNORED, target, IGNORE_INDEX)
    policy_rows = rows.policy if shard is None else partial(_sharded_policy, rows, shard)
    for number, (index, count, buffer) in enumerate(_chunks(gemm, target.shape[0], active_rows, shard is not None)):
        streams_chunk = _streams_of_rows(streams, index)
        operands = _operands(gemm, head, index, streams_chunk.role != Role.IGNORED)
        stats, grad_logits = policy_rows(
            gemm.logits(operands, buffer),
            target[index],
            transform.rows(index),
            streams_chunk,
            objective,
            with_entropy_gradient,
            grad_dtype,
        )
        _put(out, index, stats)
        if grad_logits is not None:
            _accumulate(gemm, grads, grad_logits[:count], operands, _first(index, count), first=number == 0)
        del grad_logits  # before the next chunk's logits, not after
    if scored_rows is not None:  # after the sweep, which may have put zeros there
        _score_rows(rows, gemm, head, scored, scored_rows, transform, True, shard, out)
    return out, _reduced(grads, shard, head.hidden.dtype)


def _streams_of_rows(streams: terms.Streams, index: Tensor | slice) -> terms.Streams:
    return replace(streams, **{k: v[index] for k, v in vars(streams).items() if v is not None})


def _sharded_statistics(
    rows: ModuleType, logits: Tensor, target: Tensor, transform: LogitTransform, shard: VocabShard, keep_logits: bool
) -> RowStatistics:
    logits = logits.clone() if keep_logits and rows.statistics_overwrite(logits) else logits
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
    c = nan_where_unknown(terms.coefficients(stats.logprob, streams, objective), stats)
    e = streams.grad_entropy if with_entropy_gradient else None
    return stats, rows.logprob_gradient(logits, target, transform, stats, c, e, grad_dtype)


def _active_rows(active: Tensor) -> Tensor | None:
    """Indices of the active rows on a CPU; None on a GPU, where finding them would stall the host."""
    return active.nonzero().squeeze(1) if active.device.type == "cpu" else None


def _chunks(gemm: HeadGemm, num_rows: int, active: Tensor | None, sharded: bool) -> Iterator[tuple[Tensor | slice, int, Tensor]]:
    """(which rows, how many of them count, buffer for their logits); slices where all rows are active, so that nothing is copied.

    In batch-invariant mode a short chunk is filled up by repeating its last row: row operations then run on one shape, too.
    """
    total = num_rows if active is None else active.shape[0]
    if total == 0:
        return
    vocab_size, hidden_size = gemm.weight.shape
    size = chunk_rows(total, hidden_size, vocab_size, gemm.weight.device.type, gemm.batch_invariant, sharded, gemm.operand_dtype)
    if gemm.batch_invariant:
        buffer = gemm.buffer(size)
        for start in range(0, total, size):
            end = min(start + size, total)
            places = torch.arange(start, start + size, device=gemm.weight.device).clamp(max=end - 1)
            yield (places if active is None else active[places]), end - start, buffer
        return
    bounds = chunk_bounds(total, size)
    buffer = gemm.buffer(max(end - start for start, end in bounds))
    for start, end in bounds:
        rows = slice(start, end)
        yield (rows if active is None or total == num_rows else active[rows]), end - start, buffer


def _first(index: Tensor | slice, count: int) -> Tensor | slice:
    return index if isinstance(index, slice) else index[:count]


def _operands(gemm: HeadGemm, head: Head, index: Tensor | slice, active: Tensor) -> Operands:
    """The rows [C] of a chunk. On a GPU, where inactive rows may still pass through the GEMMs, zeros take the place of their hidden
    states, so that NaN in them reaches no gradient."""
    hidden = head.hidden[index]
    if hidden.device.type != "cpu":
        hidden = torch.where(active[:, None], hidden, 0)
    return gemm.operands(hidden)


def _empty_statistics(num_rows: int, dtype: torch.dtype, device: torch.device) -> RowStatistics:
    return RowStatistics(*(torch.zeros(num_rows, dtype=dtype, device=device) for _ in RowStatistics._fields))


def _put(out: RowStatistics, index: Tensor | slice, chunk: RowStatistics) -> None:
    for whole, part in zip(out, chunk, strict=True):
        whole[index] = part


def _empty_gradients(head: Head, gemm: HeadGemm, needs: Needs, shard: VocabShard | None, active_rows: Tensor | None) -> Gradients:
    """Room for the gradients; those of the head are uninitialised on a GPU where a first chunk will overwrite them.

    On a CPU zeros cost less than they save: two threads that clear pages map them faster than a GEMM which runs into them
    (dWeight of 512 rows, D = 896, V = 151936: 676 ms in fresh memory, 621 with the zeros, 499 in memory that is there).
    """
    rows_dtype = head.hidden.dtype if shard is None else gemm.statistics_dtype  # the ranks' parts are summed, then rounded
    no_chunk = (head.hidden.shape[0] if active_rows is None else active_rows.shape[0]) == 0
    new_factor = torch.zeros_like if no_chunk or head.hidden.device.type == "cpu" else torch.empty_like

    def factor(like: Tensor | None, needed: bool) -> Tensor | None:
        return new_factor(like, dtype=gemm.statistics_dtype, memory_format=torch.contiguous_format) if needed else None

    return Gradients(
        hidden=torch.zeros_like(head.hidden, dtype=rows_dtype, memory_format=torch.contiguous_format) if needs.hidden else None,
        weight=factor(head.weight, needs.weight),
        bias=head.weight.new_zeros(head.weight.shape[0], dtype=gemm.statistics_dtype) if needs.bias else None,
        lora_a=factor(head.lora_a, needs.lora_a),
        lora_b=factor(head.lora_b, needs.lora_b),
    )


def _reduced(grads: Gradients, shard: VocabShard | None, hidden_dtype: torch.dtype) -> Gradients:
    """What all ranks hold whole, hidden and lora_a, summed over them; that of hidden rounded to its dtype."""
    if shard is None:
        return grads
    for grad in (grads.hidden, grads.lora_a):
        if grad is not None:
            shard.sum_over_ranks(grad)
    return grads._replace(hidden=None if grads.hidden is None else grads.hidden.to(hidden_dtype))


def _accumulate(
    gemm: HeadGemm, grads: Gradients, grad_logits: Tensor, operands: Operands, index: Tensor | slice, first: bool
) -> None:
    """Add what a chunk's dLogits [C, V] contribute to every gradient wanted."""
    count = grad_logits.shape[0]
    through_a = gemm.has_lora and (grads.hidden is not None or grads.lora_a is not None)
    grad_low_rank = gemm.grad_low_rank(grad_logits) if through_a else None
    if grads.hidden is not None:
        _put_rows(grads.hidden, index, gemm.grad_hidden(grad_logits, grad_low_rank))
    if grads.lora_a is not None:
        gemm.add_grad_factor(grad_low_rank, operands.hidden[:count], grads.lora_a, first)
    if grads.weight is not None:
        gemm.add_grad_factor(grad_logits, operands.hidden[:count], grads.weight, first)
    if grads.lora_b is not None:
        gemm.add_grad_factor(grad_logits, operands.low_rank[:count, : grads.lora_b.shape[1]], grads.lora_b, first)
    if grads.bias is not None:
        gemm.add_grad_bias(grads.bias, grad_logits)


def _put_rows(out: Tensor, index: Tensor | slice, values: Tensor) -> None:
    """out[index] = values, rounded to the dtype of `out`: on the way where `index` is a slice, in a pass of its own otherwise."""
    out[index] = values if isinstance(index, slice) else values.to(out.dtype)


def score_logits(rows: ModuleType, logits: Tensor, target: Tensor, transform: LogitTransform, with_entropy: bool) -> RowStatistics:
    """`score` for logits [N, V] that exist already; they are left as they are, copied chunk by chunk where they would not be."""
    dtype = statistics_dtype(logits)
    out = _empty_statistics(logits.shape[0], dtype, logits.device)
    for index in _logit_chunks(logits):
        readable = not rows.statistics_overwrite(logits) and logits.stride(1) == 1
        chunk = logits[index] if readable else _own_copy(logits[index], dtype)
        _put(out, index, rows.statistics(chunk, target[index], transform.rows(index), with_entropy))
        del chunk  # before the next one, not after
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
    in_place = logits.dtype == stats.logprob.dtype
    for index in _logit_chunks(logits):
        room = grad[index]
        result = rows.logprob_gradient(
            room.copy_(logits[index]) if in_place else _own_copy(logits[index], stats.logprob.dtype),
            target[index],
            transform.rows(index),
            RowStatistics(*(part[index] for part in stats)),
            None if grad_logprob is None else grad_logprob[index],
            None if grad_entropy is None else grad_entropy[index],
            logits.dtype,
        )
        if result.data_ptr() != room.data_ptr():
            room.copy_(result)
    return grad


def _own_copy(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with the unit stride that row operations need; that of transposed logits would be transposed, too."""
    return logits.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _logit_chunks(logits: Tensor) -> Iterator[slice]:
    size = chunk_rows(logits.shape[0], 0, logits.shape[1], logits.device.type)  # no head, so no hidden size
    return (slice(start, end) for start, end in chunk_bounds(logits.shape[0], size))
