"""What a head's kernels hold beside their inputs, on paper: for planning memory before anything runs."""

from __future__ import annotations

import torch

from trapo_kernels import checks
from trapo_kernels.backends import in_weight, kept_memory
from trapo_kernels.backends.gemm import chunk_bounds, chunk_rows, grad_weight_dtype, operand_dtype

LEAST_KEPT_BYTES = kept_memory.LEAST_BYTES  # of a dWeight, or a chunk of logits, whose memory a CPU keeps for the next call


def head_memory(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device_type: str = "cuda",
    grad_weight: bool = True,
    in_place: bool = True,
    vocab_parallel: bool = False,
) -> dict[str, int]:
    """Bytes that a forward and backward of `linear_policy_loss` or `linear_logprob` hold at their peak, by what they hold.

    Their sum is the peak of allocated memory during the call, above its inputs, up to vectors of [N] and, on a CPU where some rows
    do not count, up to a copy of the hidden states of a chunk.

    Args:
        num_rows: rows that reach the head, N ≥ 1; with a sharded head those of all ranks.
        hidden_size, vocab_size: D and V; of a head sharded over the vocabulary this rank's part of V.
        dtype: of the hidden states: bfloat16, float16 or float32.
        weight_dtype: of the head's weight; None for `dtype`.
        device_type: "cuda" or "cpu"; it decides the chunk, and a CPU computes in float32, but for bfloat16 with AMX or AVX512_BF16.
        grad_weight: whether the weight is trained.
        in_place: False for backend "torch", which needs the chunk of logits three times (with a softcap four; not counted).
        vocab_parallel: whether the head is sharded over the vocabulary; on a CPU that takes a second chunk of logits.

    Returns: "logits" (a chunk and its gradient, float32, but what lies where dWeight will), "hidden chunk" (hidden states, which a
        GPU copies, and their gradient), "grad_hidden", "grad_weight" (float32; 16 bits where all rows are one chunk of such),
        "weight" (a copy in another dtype, for the GEMMs) and "rounding" (of a narrow gradient, beyond the room of chunk and copy).
    Raises: ValueError for a size that is no whole number ≥ 1, a dtype that the head does not take, or another device.
    Memory: none; nothing is allocated.
    Determinism: a pure function of its arguments, as the chunk is; on a CPU also of the processor, whose make decides the chunk and
        whose instructions, with the native extension, the dtype of the GEMMs.
    Source: the account of buffers in `backends/sweep.py` and `backends/gemm.py`; tests compare it with measured peaks.
    """
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    _check({"num_rows": num_rows, "hidden_size": hidden_size, "vocab_size": vocab_size}, dtype, weight_dtype, device_type)
    gemm_dtype, shape = operand_dtype(dtype, device_type), (num_rows, hidden_size, vocab_size)
    held = grad_weight_dtype(*shape, weight_dtype, gemm_dtype, device_type, sharded=vocab_parallel) if grad_weight else None
    rows, rows_of_grad, logits = _rows_and_logits(shape, device_type, gemm_dtype, vocab_parallel, held, in_place)
    matrix = vocab_size * hidden_size
    # The ranks agree on the statistics between two launches, and on a CPU the first overwrites its logits, of which it gets a copy.
    # dHidden takes over the room of what only the launches need. The ranks add it up in fp32 and round it after the last chunk.
    chunk = 4 * logits
    of_launches = ((not in_place) + (vocab_parallel and device_type == "cpu")) * chunk
    operand = rows * hidden_size * (gemm_dtype.itemsize if gemm_dtype != dtype or device_type == "cuda" else 0)
    gone = {
        "logits": (1 if in_place else 2) * chunk + of_launches,
        "hidden chunk": operand + max(0, 4 * rows_of_grad * hidden_size - of_launches),
        "weight": matrix * gemm_dtype.itemsize if {dtype, weight_dtype} != {gemm_dtype} else 0,
    }
    rounded = matrix * weight_dtype.itemsize if grad_weight and held != weight_dtype else 0
    rounded_hidden = num_rows * hidden_size * dtype.itemsize if vocab_parallel and dtype.itemsize < 4 else 0
    return {
        **gone,
        "grad_hidden": num_rows * hidden_size * (4 if vocab_parallel else dtype.itemsize),
        "grad_weight": matrix * held.itemsize if grad_weight else 0,
        "rounding": max(0, rounded - sum(gone.values()), rounded_hidden - gone["logits"] - gone["hidden chunk"]),
    }


def free_kept_memory() -> None:
    """Give back what a CPU keeps for the next call: the memory of the last dWeight and of the last chunk of logits.

    Returns: nothing. The next call keeps again: one dWeight, used again once nobody holds it or a view of it, and one chunk of
        logits, each only where it has `LEAST_KEPT_BYTES`. On a GPU nothing is kept here; see `torch.cuda.empty_cache`.
    Raises: nothing. Determinism: results have the same bits with kept memory and without.
    Memory: a call's peak is no higher for it, but for logits left by a larger batch, of which it keeps less than twice its own.
    Source: the caching allocator that torch has for GPUs.
    """
    for kept in (kept_memory.GRADIENT, kept_memory.LOGITS):
        kept.free()


def _rows_and_logits(
    shape: tuple[int, int, int],
    device_type: str,
    gemm_dtype: torch.dtype,
    vocab_parallel: bool,
    grad_weight: torch.dtype | None,
    in_place: bool,
) -> tuple[int, int, int]:
    """Of the largest chunk: how many rows, of how many the gradient is held, how many logits do not lie where dWeight will.
    `grad_weight` is what that is held in, None where nobody wants it."""
    num_rows, _, vocab_size = shape
    if grad_weight is not None:
        if device_type == "cpu" and in_place and not vocab_parallel and in_weight.fits(*shape, grad_weight):
            return num_rows, in_weight.grad_rows(num_rows), in_weight.spare_logits(*shape, grad_weight)
        if grad_weight.itemsize < torch.float32.itemsize:
            return num_rows, num_rows, num_rows * vocab_size
    size = chunk_rows(*shape, device_type, sharded=vocab_parallel, operands=gemm_dtype)
    rows = max(end - start for start, end in chunk_bounds(num_rows, size))
    return rows, rows, rows * vocab_size


def _check(sizes: dict[str, int], dtype: torch.dtype, weight_dtype: torch.dtype, device_type: str) -> None:
    where, narrow = "head_memory", (torch.bfloat16, torch.float16)
    for name, value in sizes.items():
        checks.size(where, name, value)
    checks.one_of(where, "dtype", dtype, (*narrow, torch.float32))
    checks.one_of(where, "weight_dtype", weight_dtype, (dtype, torch.float32) if dtype in narrow else (torch.float32,))
    checks.one_of(where, "device_type", device_type, ("cuda", "cpu"))
