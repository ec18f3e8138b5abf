"""The gradients of a sweep: which are wanted, room for them, and what a chunk's dLogits [C, V] add to each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trapo_kernels.backends import kept_memory
from trapo_kernels.backends.gemm import Head, HeadGemm, Operands
from trapo_kernels.backends.vocab_parallel import VocabShard


class Needs(NamedTuple):
    """Which gradients are wanted; the GEMMs of the others are skipped."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool = False
    lora_b: bool = False


class Gradients(NamedTuple):
    """None where not wanted; that of hidden in its dtype, those of the head in fp32 (fp64), but see `grad_weight_dtype`."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [R, D]
    lora_b: Tensor | None  # [V, R]


def empty_gradients(
    head: Head, gemm: HeadGemm, needs: Needs, weight_dtype: torch.dtype, shard: VocabShard | None, active_rows: Tensor | None
) -> Gradients:
    """Room for the gradients; those of the head's matrices hold anything where a first chunk will overwrite them."""
    rows_dtype = head.hidden.dtype if shard is None else gemm.statistics_dtype  # the ranks' parts are summed, then rounded
    no_chunk = (head.hidden.shape[0] if active_rows is None else active_rows.shape[0]) == 0

    def factor(like: Tensor | None, needed: bool) -> Tensor | None:
        new = torch.zeros_like if no_chunk else torch.empty_like
        return new(like, dtype=gemm.statistics_dtype, memory_format=torch.contiguous_format) if needed else None

    weight = kept_memory.GRADIENT.empty(head.weight.shape, weight_dtype, head.weight.device) if needs.weight else None
    if weight is not None and no_chunk:
        weight.zero_()

    return Gradients(
        hidden=torch.zeros_like(head.hidden, dtype=rows_dtype, memory_format=torch.contiguous_format) if needs.hidden else None,
        weight=weight,
        bias=head.weight.new_zeros(head.weight.shape[0], dtype=gemm.statistics_dtype) if needs.bias else None,
        lora_a=factor(head.lora_a, needs.lora_a),
        lora_b=factor(head.lora_b, needs.lora_b),
    )


def reduced(grads: Gradients, shard: VocabShard | None, hidden_dtype: torch.dtype) -> Gradients:
    """What all ranks hold whole, hidden and lora_a, summed over them; that of hidden rounded to its dtype."""
    if shard is None:
        return grads
    for grad in (grads.hidden, grads.lora_a):
        if grad is not None:
            shard.sum_over_ranks(grad)
    return grads._replace(hidden=None if grads.hidden is None else grads.hidden.to(hidden_dtype))


def accumulate(
    gemm: HeadGemm, grads: Gradients, grad_logits: Tensor, operands: Operands, index: Tensor | slice, count: int, first: bool
) -> None:
    """Add what a chunk's dLogits [C, V] contribute to every gradient wanted. Those beyond the first `count`, which are those of the
    rows `index`, are zeros."""
    through_a = gemm.has_lora and (grads.hidden is not None or grads.lora_a is not None)
    grad_low_rank = gemm.grad_low_rank(grad_logits) if through_a else None
    if grads.hidden is not None:
        put_rows(grads.hidden, index, gemm.grad_hidden(grad_logits, grad_low_rank)[:count])
    if grads.lora_a is not None:
        gemm.add_grad_factor(grad_low_rank, operands.hidden, grads.lora_a, first)
    if grads.weight is not None:
        gemm.add_grad_factor(grad_logits, operands.hidden, grads.weight, first)
    if grads.lora_b is not None:
        gemm.add_grad_factor(grad_logits, operands.low_rank[:, : grads.lora_b.shape[1]], grads.lora_b, first)
    if grads.bias is not None:
        gemm.add_grad_bias(grads.bias, grad_logits)


def put_rows(out: Tensor, index: Tensor | slice, values: Tensor) -> None:
    """out[index] = values, rounded to the dtype of `out`: on the way where `index` is a slice, in a pass of its own otherwise."""
    out[index] = values if isinstance(index, slice) else values.to(out.dtype)
