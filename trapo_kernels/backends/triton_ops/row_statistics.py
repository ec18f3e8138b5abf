"""Scoring a chunk of logits: logprob, entropy and the parts of logsumexp per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trapo_kernels.backends.logits import LogitTransform, RowStatistics
from trapo_kernels.backends.triton_ops.launch import row_outputs, tile, transform_arguments
from trapo_kernels.backends.triton_ops.softmax import row_sweep


# One program per row of logits [C, V]:
#
#     row r ─▶ [BLOCK_V][BLOCK_V] … ─▶ logprob[r] entropy[r] row_max[r] log_sum[r]
#
# Work: about 6 FLOP and 1 exp per logit (10 FLOP with entropy).
# Reads / writes: C·V logits once (4 bytes each in fp32), 16 bytes per row out.
# Saved: nothing else.
# On chip: 2 fp32 accumulators of BLOCK_V lanes; no shared memory beyond the reductions.
# Order: tiles ascend, lanes are summed by one tree: bitwise repeatable, and independent of the other rows.
# Edges: the ragged tail and the target's own column are masked to -inf; row offsets are int64.
@triton.jit
def row_statistics_kernel(
    logits_ptr, row_stride, target_ptr, vocab_size,
    logprob_ptr, entropy_ptr, row_max_ptr, log_sum_ptr,
    bias_ptr, temperature_ptr, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_ROW_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logprob, entropy, row_max, log_sum = 0.0, 0.0, 0.0, 0.0
    if target != -100:
        row_temperature = temperature
        if HAS_ROW_TEMPERATURE:
            row_temperature = tl.load(temperature_ptr + row)
        logprob, entropy, row_max, log_sum = row_sweep(
            logits_ptr + row * row_stride, bias_ptr, target, vocab_size, 1.0 / row_temperature, softcap,
            HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, BLOCK_V,
        )  # fmt: skip
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)


def statistics_overwrite(logits: Tensor) -> bool:
    """Whether `statistics` destroys these logits."""
    return False


def statistics(logits: Tensor, target: Tensor, transform: LogitTransform, with_entropy: bool) -> RowStatistics:
    """logprob, entropy, row_max and log_sum of every row of logits [C, V]; zeros where target is -100."""
    out = row_outputs(logits)
    with torch.cuda.device_of(logits):  # where Triton launches; nothing on a CPU
        row_statistics_kernel[(logits.shape[0],)](
            logits, logits.stride(0), target.contiguous(), logits.shape[1], *out,
            **transform_arguments(transform, logits), WITH_ENTROPY=with_entropy, **tile(logits.shape[1]),
        )  # fmt: skip
    return out
