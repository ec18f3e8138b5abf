"""Pieces of a row kernel: loading transformed logits, the online-softmax sweep, the gradient sweep.

One program owns one row and walks it in tiles:

    row ─▶ [ BLOCK_V ][ BLOCK_V ] … [ ragged tail, masked ]

Whole tiles carry no mask: a mask that may change within 4 columns would turn every 16-byte load into four.
"""

import triton
import triton.language as tl

from trapo_kernels.backends.triton_ops.gates import expm1, log1p


@triton.jit
def tanh(x):
    """tanh from exp; its odd series below 1/4, where 1 - 2/(exp(2x)+1) would lose digits."""
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    x2 = x * x
    near = a * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    y = tl.where(a < 0.25, near, far)
    return tl.where(x < 0, -y, y)


@triton.jit
def load_z(
    row_ptr, bias_ptr, cols, mask, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """z = softcap · tanh((x + bias)/softcap) / temperature, and dz/dx; if MASKED, z is -inf outside `mask`."""
    x = tl.load(row_ptr + cols, mask=mask if MASKED else None).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=mask if MASKED else None).to(tl.float32)
    dz_dx = inverse_temperature
    if HAS_SOFTCAP:
        squashed = tanh(x / softcap)
        dz_dx = (1.0 - squashed * squashed) * inverse_temperature
        x = softcap * squashed
    z = x * inverse_temperature
    if MASKED:
        z = tl.where(mask, z, float("-inf"))
    return z, dz_dx


@triton.jit
def sweep_tile(
    row_ptr, bias_ptr, start, target, vocab_size, inverse_temperature, softcap, row_max, others, moment,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(row_max, others, moment) after one more tile."""
    cols = start + tl.arange(0, BLOCK_V)
    z, _slope = load_z(
        row_ptr, bias_ptr, cols, cols < vocab_size, inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP, MASKED
    )  # [BLOCK_V] fp32
    z = tl.where(cols == target, float("-inf"), z)
    new_max = tl.maximum(row_max, tl.max(z, axis=0))
    rescale = tl.exp(row_max - new_max)
    exponential = tl.exp(z - new_max)
    if WITH_ENTROPY:
        product = tl.where(exponential > 0, exponential * (z - new_max), 0.0)
        moment = (moment + others * (row_max - new_max)) * rescale + product
    others = others * rescale + exponential
    return new_max, others, moment


@triton.jit
def row_sweep(
    row_ptr, bias_ptr, target, vocab_size, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(logprob, entropy, row_max, log_sum) of one row in one sweep.

    The target's term stays out of the running sum, so that p → 1 keeps the digits of 1 - p:
    log_sum = log1p(Σ_others) where the target is the maximum. A target outside [0, V) gives NaN.
    """
    known = (target >= 0) & (target < vocab_size)
    z_target, _target_slope = load_z(row_ptr, bias_ptr, target, known, inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP, True)
    z_target = tl.where(known, z_target, float("nan"))
    row_max = tl.where(z_target > -1e30, z_target, -1e30)  # finite, so that no -inf - -inf arises
    others = tl.zeros([BLOCK_V], dtype=tl.float32)  # Σ exp(z - max) without the target, per lane
    moment = tl.zeros([BLOCK_V], dtype=tl.float32)  # Σ exp(z - max) (z - max) without the target, per lane
    whole = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        row_max, others, moment = sweep_tile(
            row_ptr, bias_ptr, start, target, vocab_size, inverse_temperature, softcap, row_max, others, moment,
            HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, BLOCK_V, False,
        )  # fmt: skip
    if whole < vocab_size:
        row_max, others, moment = sweep_tile(
            row_ptr, bias_ptr, whole, target, vocab_size, inverse_temperature, softcap, row_max, others, moment,
            HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, BLOCK_V, True,
        )  # fmt: skip
    target_term = tl.exp(z_target - row_max)
    sum_others = tl.sum(others, axis=0)
    total = sum_others + target_term
    log_sum = tl.where(z_target == row_max, log1p(sum_others), tl.log(total))
    logprob = z_target - row_max - log_sum
    entropy = 0.0
    if WITH_ENTROPY:
        target_product = tl.where(target_term > 0, target_term * (z_target - row_max), 0.0)
        entropy = log_sum - (tl.sum(moment, axis=0) + target_product) / total
    return logprob, entropy, row_max, log_sum


@triton.jit
def gradient_tile(
    row_ptr, grad_ptr, bias_ptr, start, target, vocab_size, inverse_temperature, softcap,
    entropy, row_max, log_sum, c, e, at_target,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, BLOCK_V)
    mask = cols < vocab_size
    z, dz_dx = load_z(row_ptr, bias_ptr, cols, mask, inverse_temperature, softcap, HAS_BIAS, HAS_SOFTCAP, MASKED)
    log_p = z - row_max - log_sum
    p = tl.exp(log_p)  # [BLOCK_V] fp32
    grad = -c * p
    if WITH_ENTROPY:
        grad -= tl.where(p > 0, e * p * (log_p + entropy), 0.0)
    grad = tl.where(cols == target, at_target, grad) * dz_dx
    tl.debug_barrier()
    if MASKED:
        tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty))


@triton.jit
def gradient_sweep(
    row_ptr, grad_ptr, bias_ptr, target, vocab_size, inverse_temperature, softcap,
    logprob, entropy, row_max, log_sum, c, e,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dL/dx = [c (1[v = target] - p) - e p (log p + H)] · dz/dx for one row, over the row itself if need be.

    `grad_ptr` may be the same row in a narrower dtype: tile b then covers bytes that tiles ≤ b have read, and the barrier keeps
    a fast warp from overwriting what a slow one has still to load.
    """
    at_target = -c * expm1(logprob)  # c (1 - p) without cancellation at p → 1
    if WITH_ENTROPY:
        p_target = tl.exp(logprob)
        at_target -= tl.where(p_target > 0, e * p_target * (logprob + entropy), 0.0)
    whole = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        gradient_tile(
            row_ptr, grad_ptr, bias_ptr, start, target, vocab_size, inverse_temperature, softcap,
            entropy, row_max, log_sum, c, e, at_target, HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, BLOCK_V, False,
        )  # fmt: skip
    if whole < vocab_size:
        gradient_tile(
            row_ptr, grad_ptr, bias_ptr, whole, target, vocab_size, inverse_temperature, softcap,
            entropy, row_max, log_sum, c, e, at_target, HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, BLOCK_V, True,
        )  # fmt: skip


@triton.jit
def zero_row(grad_ptr, vocab_size, BLOCK_V: tl.constexpr):
    for start in range(0, vocab_size, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        tl.store(grad_ptr + cols, tl.zeros([BLOCK_V], dtype=grad_ptr.dtype.element_ty), mask=cols < vocab_size)
