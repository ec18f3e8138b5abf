"""Backward of scoring: a chunk of recomputed logits becomes its own gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trapo_kernels.backends.logits import LogitTransform, RowStatistics
from trapo_kernels.backends.triton_ops.launch import gradient_buffer, tile, transform_arguments
from trapo_kernels.backends.triton_ops.softmax import gradient_sweep, zero_row


# One program per row, in place or beside it:
#
#     logits row r ─▶ [BLOCK_V] ─ p, log p ─▶ dL/dlogits row r [BLOCK_V], in the dtype of the next GEMM
#
# Work: about 6 FLOP and 1 exp per logit (10 FLOP with entropy).
# Reads / writes: C·V logits in (4 bytes), C·V gradients out (2 bytes in bf16), 28 bytes per row.
# Saved: nothing. On chip: one tile. Order: elementwise, bitwise repeatable.
# Edges: masked tail; a row with target -100 is written as zeros without being read; row offsets are int64.
@triton.jit
def row_gradient_kernel(
    logits_ptr, row_stride, grad_ptr, grad_row_stride, target_ptr, vocab_size,
    logprob_ptr, entropy_ptr, row_max_ptr, log_sum_ptr, grad_logprob_ptr, grad_entropy_ptr,
    bias_ptr, temperature_ptr, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_ROW_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target != -100:
        row_temperature = temperature
        if HAS_ROW_TEMPERATURE:
            row_temperature = tl.load(temperature_ptr + row)
        e = 0.0
        if WITH_ENTROPY:
            e = tl.load(grad_entropy_ptr + row)
        gradient_sweep(
            logits_ptr + row * row_stride, grad_ptr + row * grad_row_stride, bias_ptr, target, vocab_size,
            1.0 / row_temperature, softcap,
            tl.load(logprob_ptr + row), tl.load(entropy_ptr + row), tl.load(row_max_ptr + row), tl.load(log_sum_ptr + row),
            tl.load(grad_logprob_ptr + row), e,
            HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, BLOCK_V,
        )  # fmt: skip
    else:
        zero_row(grad_ptr + row * grad_row_stride, vocab_size, BLOCK_V)


def logprob_gradient(
    logits: Tensor,
    target: Tensor,
    transform: LogitTransform,
    stats: RowStatistics,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dlogits [C, V] from the gradients of logprob and entropy [C] into `out`; without it, over `logits` if the dtype allows."""
    grad = gradient_buffer(logits, grad_dtype) if out is None else out
    grad_logprob = torch.zeros_like(stats.logprob) if grad_logprob is None else grad_logprob.contiguous()
    with torch.cuda.device_of(logits):  # where Triton launches; nothing on a CPU
        row_gradient_kernel[(logits.shape[0],)](
            logits, logits.stride(0), grad, grad.stride(0), target.contiguous(), logits.shape[1],
            *(part.contiguous() for part in stats), grad_logprob,
            grad_logprob if grad_entropy is None else grad_entropy.contiguous(),
            **transform_arguments(transform, logits), WITH_ENTROPY=grad_entropy is not None, **tile(logits.shape[1]),
        )  # fmt: skip
    return grad
