"""The chunked path: logits of some rows at a time, never all of them; the row operations come from a backend.

    hidden[C, D] ──GEMM──▶ logits[C, V] ──rows──▶ logprob, entropy [C]
                                  └──────rows──▶ grad_logits[C, V] ──GEMM──▶ grad_hidden[C, D]
                                                                   └─GEMM──▶ grad_weight[V, D] +=

Memory: one chunk of logits beside the results (three with `rows_torch`, four with its softcap), or an eighth of all (`in_weight`);
on a CPU some of it serves the next call (`kept_memory`).
Order: chunks ascend and every sum has a fixed order, so results are bitwise repeatable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from trapo_kernels import terms
from trapo_kernels.backends import in_weight, kept_memory
from trapo_kernels.backends.gemm import Head, HeadGemm, Operands, chunk_bounds, chunk_rows, grad_weight_dtype
from trapo_kernels.backends.gradients import Gradients, Needs, accumulate, empty_gradients, reduced
from trapo_kernels.backends.logits import LogitTransform, RowStatistics, statistics_dtype
from trapo_kernels.backends.vocab_parallel import VocabShard, nan_where_unknown, target_for_statistics
from trapo_kernels.objective import Objective
from trapo_kernels.roles import IGNORE_INDEX, Role


class Mode(NamedTuple):
    """How the sweep runs, beyond what it computes; plain values, so that they pass through a `torch.library` op."""

    logits_dtype: torch.dtype
    batch_invariant: bool
    group_name: str  # of the process group that the vocabulary is sharded over; "" for a whole head

    def shard(self, where: str, weight: Tensor, target: Tensor, *grads: Tensor | None) -> VocabShard | None:
        """This rank's shard of the vocabulary, or None."""
        return VocabShard(where, self.group_name, weight.shape[0], target, *grads) if self.group_name else None


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

    Rows whose both gradients are zero are left out: on a CPU they are found here, on a GPU `active_rows` names the others; so it
    does on ranks that share the vocabulary, whose gradients may differ in the last digit, and whose chunks must not.
    """
    gemm = HeadGemm(head, mode.logits_dtype, mode.batch_invariant)
    shard = mode.shard("linear_logprob", head.weight, target, grad_logprob, grad_entropy)
    target = target if shard is None else shard.local_target(target)
    if shard is not None:
        active_rows = _active_rows(target != IGNORE_INDEX) if active_rows is None else active_rows
    elif target.device.type == "cpu":
        wanted = [grad != 0 for grad in (grad_logprob, grad_entropy) if grad is not None]
        active_rows = _active_rows((target != IGNORE_INDEX) & torch.stack(wanted).any(0))
    count = target.shape[0] if active_rows is None else active_rows.shape[0]
    what = (*head.weight.shape[::-1], head.weight.dtype, gemm.operand_dtype, head.weight.device.type)
    weight_dtype = grad_weight_dtype(count, *what, mode.batch_invariant, shard is not None)
    grads = _room(rows, head, gemm, needs, weight_dtype, shard, active_rows)
    policy_rows = rows.policy if shard is None else partial(_sharded_policy, rows, shard)
    given = None if grad_entropy is None else terms.streams_from_gradients(grad_logprob, grad_entropy, target != IGNORE_INDEX)

    def gradient(index: Tensor | slice, logits: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        which = target[index], transform.rows(index)
        if given is None:
            c, known = grad_logprob[index], RowStatistics(*(part[index] for part in stats))
            c = c if shard is None else nan_where_unknown(c, known) + shard.discord
            return rows.logprob_gradient(logits, *which, known, c, None, gemm.operand_dtype)
        # p (log p + H) cancels where p → 1, so with the statistics of these logits: another GEMM has other last bits
        return policy_rows(logits, *which, _streams_of_rows(given[0], index), given[1], True, gemm.operand_dtype)[1]

    _sweep_gradients(rows, gemm, head, grads, target != IGNORE_INDEX, active_rows, shard, gradient)
    return reduced(grads, shard, head.hidden.dtype)


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
    weight_dtype: torch.dtype,
    mode: Mode,
) -> tuple[RowStatistics, Gradients]:
    """Statistics and the gradients of a policy loss from one sweep: three GEMMs, no recomputation; one GEMM for `scored_rows`."""
    gemm = HeadGemm(head, mode.logits_dtype, mode.batch_invariant)
    shard = mode.shard("linear_policy_loss", head.weight, target)
    target = target if shard is None else shard.local_target(target)
    out = _empty_statistics(target.shape[0], gemm.statistics_dtype, target.device)
    active = streams.role != Role.IGNORED
    active_rows = _active_rows(active) if active_rows is None else active_rows
    grads = _room(rows, head, gemm, needs, weight_dtype, shard, active_rows)
    grad_dtype = gemm.operand_dtype if any(needs) else None
    scored, target = target, torch.where(active, target, IGNORE_INDEX)
    policy_rows = rows.policy if shard is None else partial(_sharded_policy, rows, shard)

    def gradient(index: Tensor | slice, logits: Tensor | list[Tensor]) -> Tensor | list[Tensor] | None:
        which = target[index], transform.rows(index), _streams_of_rows(streams, index)
        stats, grad_logits = policy_rows(logits, *which, objective, with_entropy_gradient, grad_dtype)
        _put(out, index, stats)
        return grad_logits

    _sweep_gradients(rows, gemm, head, grads, active, active_rows, shard, gradient)
    if scored_rows is not None:  # after the sweep, which may have put zeros there
        _score_rows(rows, gemm, head, scored, scored_rows, transform, True, shard, out)
    return out, reduced(grads, shard, head.hidden.dtype)


def _room(
    rows: ModuleType,
    head: Head,
    gemm: HeadGemm,
    needs: Needs,
    weight_dtype: torch.dtype,
    shard: VocabShard | None,
    active_rows: Tensor | None,
) -> Gradients:
    """Room for the gradients; a first pass may have left more logits than a sweep whose logits lie in dWeight needs beside it."""
    count = head.hidden.shape[0] if active_rows is None else active_rows.shape[0]
    if needs.weight and in_weight.applies(rows, gemm, shard, count, weight_dtype):
        spare = in_weight.spare_logits(count, *head.weight.shape[::-1], weight_dtype)
        kept_memory.LOGITS.trim(spare * torch.float32.itemsize)
    return empty_gradients(head, gemm, needs, weight_dtype, shard, active_rows)


def _sweep_gradients(
    rows: ModuleType,
    gemm: HeadGemm,
    head: Head,
    grads: Gradients,
    active: Tensor,
    active_rows: Tensor | None,
    shard: VocabShard | None,
    gradient: Callable[[Tensor | slice, Tensor | list[Tensor]], Tensor | list[Tensor] | None],
) -> None:
    """Adds to `grads` what all rows contribute. `gradient` turns the logits of the rows `index` into dLogits, or into nothing where
    none is wanted; they come as one tensor, or in parts from a sweep whose logits lie in dWeight."""
    num_rows = active.shape[0]
    num_active = num_rows if active_rows is None else active_rows.shape[0]
    if grads.weight is not None and in_weight.applies(rows, gemm, shard, num_active, grads.weight.dtype):
        index = slice(0, num_rows) if num_active == num_rows else active_rows
        in_weight.add_gradients(gemm, head.hidden[index], grads, index, partial(gradient, index))
        return
    at_once = grads.weight is not None and grads.weight.dtype != gemm.statistics_dtype
    for number, (index, count, buffer) in enumerate(_chunks(gemm, num_rows, active_rows, shard is not None, at_once)):
        operands = _operands(gemm, head, index, active[index])
        grad_logits = gradient(index, gemm.logits(operands, buffer))
        if grad_logits is not None:
            grad_logits[count:] = 0.0  # what a short chunk was filled up with
            accumulate(gemm, grads, grad_logits, operands, _first(index, count), count, first=number == 0)
        del grad_logits  # before the next chunk's logits, not after


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


def _chunks(
    gemm: HeadGemm, num_rows: int, active: Tensor | None, sharded: bool, at_once: bool = False
) -> Iterator[tuple[Tensor | slice, int, Tensor]]:
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
    bounds = [(0, total)] if at_once else chunk_bounds(total, size)
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


def score_logits(rows: ModuleType, logits: Tensor, target: Tensor, transform: LogitTransform, with_entropy: bool) -> RowStatistics:
    """`score` for logits [N, V] that exist already; they are left as they are, copied chunk by chunk where they would not be."""
    dtype = statistics_dtype(logits)
    out = _empty_statistics(logits.shape[0], dtype, logits.device)
    as_they_are = _takes_as_they_are(rows, logits)
    for index in _logit_chunks(logits):
        chunk = logits[index] if as_they_are else _own_copy(logits[index], dtype)
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
    as_they_are, in_place = _takes_as_they_are(rows, logits), logits.dtype == stats.logprob.dtype
    for index in _logit_chunks(logits):
        room = grad[index]
        known = (
            target[index],
            transform.rows(index),
            RowStatistics(*(part[index] for part in stats)),
            None if grad_logprob is None else grad_logprob[index],
            None if grad_entropy is None else grad_entropy[index],
            logits.dtype,
        )
        if as_they_are:
            rows.logprob_gradient(logits[index], *known, out=room)
            continue
        copy = room.copy_(logits[index]) if in_place else _own_copy(logits[index], stats.logprob.dtype)
        result = rows.logprob_gradient(copy, *known)
        if result.data_ptr() != room.data_ptr():
            room.copy_(result)
    return grad


def _takes_as_they_are(rows: ModuleType, logits: Tensor) -> bool:
    """Whether these row operations read such logits where they lie, and leave them."""
    return not rows.statistics_overwrite(logits) and logits.stride(1) == 1


def _own_copy(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with the unit stride that row operations need; that of transposed logits would be transposed, too."""
    return logits.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _logit_chunks(logits: Tensor) -> Iterator[slice]:
    size = chunk_rows(logits.shape[0], 0, logits.shape[1], logits.device.type)  # no head, so no hidden size
    return (slice(start, end) for start, end in chunk_bounds(logits.shape[0], size))
