"""The heart of the single pass: a chunk of logits becomes statistics, coefficients and its own gradient in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trapo_kernels import terms
from trapo_kernels.backends.logits import LogitTransform, RowStatistics
from trapo_kernels.backends.triton_ops.gates import coefficient, gate_arguments
from trapo_kernels.backends.triton_ops.launch import gradient_buffer, row_outputs, tile, transform_arguments
from trapo_kernels.backends.triton_ops.softmax import gradient_sweep, row_sweep, zero_row
from trapo_kernels.objective import Objective


# One program per row, two sweeps, in place:
#
#     sweep 1   logits row ─▶ [BLOCK_V] … ─▶ max, Σexp, Σexp·z ─▶ logp, H ─▶ c = dL/dlogp, e = dL/dH
#     sweep 2   logits row ─▶ [BLOCK_V] … ─▶ c (1[y] - p) - e p (log p + H) ─▶ the same memory, dtype of the next GEMM
#
# Work: about 12 FLOP and 2 exp per logit (20 FLOP with entropy gradient).
# Reads / writes: C·V logits in twice (the second time from L2 where the row still lies there), C·V gradients out: 4 + 4 + 2 bytes
#     per fp32 logit with bf16 gradients; 41 bytes (49 with KL) per row.
# Saved: the gradient, in the logits' place.
# On chip: 2 fp32 accumulators of BLOCK_V lanes.
# Order: tiles ascend, one reduction tree per row: bitwise repeatable.
# Edges: masked tail; an IGNORED row is written as zeros without being read, so NaN in it goes nowhere; int64 row offsets.
@triton.jit
def row_policy_kernel(
    logits_ptr, row_stride, grad_ptr, grad_row_stride, target_ptr, vocab_size,
    logprob_ptr, entropy_ptr, row_max_ptr, log_sum_ptr,
    role_ptr, anchor_ptr, signal_ptr, advantage_ptr, kl_weight_ptr, ref_logprob_ptr, grad_entropy_ptr,
    e0, e1, e2, r0, r1, r2, k0, k1,
    bias_ptr, temperature_ptr, temperature, softcap,
    EXPERT_GATE: tl.constexpr, ROLLOUT_GATE: tl.constexpr, KL_CODE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY_GRADIENT: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    role = tl.load(role_ptr + row)
    logprob, entropy, row_max, log_sum = 0.0, 0.0, 0.0, 0.0
    if role != 0:
        target = tl.load(target_ptr + row)
        row_temperature = temperature
        if HAS_ROW_TEMPERATURE:
            row_temperature = tl.load(temperature_ptr + row)
        logits_row = logits_ptr + row * row_stride
        logprob, entropy, row_max, log_sum = row_sweep(
            logits_row, bias_ptr, target, vocab_size, 1.0 / row_temperature, softcap, HAS_BIAS, HAS_SOFTCAP, True, BLOCK_V
        )
        if WITH_GRADIENT:
            kl_weight, ref_logprob = 0.0, 0.0
            if KL_CODE > 0:
                kl_weight, ref_logprob = tl.load(kl_weight_ptr + row), tl.load(ref_logprob_ptr + row)
            c = coefficient(
                logprob, role, tl.load(anchor_ptr + row), tl.load(signal_ptr + row), tl.load(advantage_ptr + row),
                kl_weight, ref_logprob, e0, e1, e2, r0, r1, r2, k0, k1, EXPERT_GATE, ROLLOUT_GATE, KL_CODE,
            )  # fmt: skip
            gradient_sweep(
                logits_row, grad_ptr + row * grad_row_stride, bias_ptr, target, vocab_size, 1.0 / row_temperature, softcap,
                logprob, entropy, row_max, log_sum, c, tl.load(grad_entropy_ptr + row),
                HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY_GRADIENT, BLOCK_V,
            )  # fmt: skip
    elif WITH_GRADIENT:
        zero_row(grad_ptr + row * grad_row_stride, vocab_size, BLOCK_V)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)


def policy(
    logits: Tensor,
    target: Tensor,
    transform: LogitTransform,
    streams: terms.Streams,
    objective: Objective,
    with_entropy_gradient: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[RowStatistics, Tensor | None]:
    """Statistics and, unless `grad_dtype` is None, dL/dlogits [C, V] of a policy loss, over the memory of `logits`."""
    out = row_outputs(logits)
    grad = None if grad_dtype is None else gradient_buffer(logits, grad_dtype)
    grad_argument = logits if grad is None else grad
    unused = streams.anchor
    with torch.cuda.device_of(logits):  # where Triton launches; nothing on a CPU
        row_policy_kernel[(logits.shape[0],)](
            logits, logits.stride(0), grad_argument, grad_argument.stride(0), target.contiguous(), logits.shape[1], *out,
            streams.role, streams.anchor, streams.signal, streams.advantage,
            unused if streams.kl_weight is None else streams.kl_weight,
            unused if streams.ref_logprob is None else streams.ref_logprob,
            streams.grad_entropy,
            **gate_arguments(objective), **transform_arguments(transform, logits),
            WITH_ENTROPY_GRADIENT=with_entropy_gradient, WITH_GRADIENT=grad is not None, **tile(logits.shape[1]),
        )  # fmt: skip
    return out, grad
