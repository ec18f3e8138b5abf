"""Scoring without logits in memory: the head's GEMM with the softmax statistics in its epilogue."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from trapo_kernels.backends.fences import has_fences
from trapo_kernels.backends.logits import LogitTransform, RowStatistics
from trapo_kernels.backends.triton_ops.launch import OPTIONS, aligned, transform_arguments
from trapo_kernels.backends.triton_ops.softmax import tanh
from trapo_kernels.roles import IGNORE_INDEX

# One tile for every shape: 128 × 128 fp32 accumulators over 8 warps are 64 registers per thread; three stages of two 128 × 64 bf16
# operands are 96 KiB of shared memory. Chosen by the table in benchmarks/results/offline_compile.md (no spill); speed awaits a GPU.
# GROUP: blocks of rows whose programs, of all splits, run before those of the next group. So their hidden states stay in L2, 15 MB
# at D = 3584 beside 7 of weight tiles; those of 32768 rows, all at once, would not, and each tile would read them from memory.
TILE = OPTIONS | {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3}
# At a depth of 64 sm_120 spills (40 bytes of stack in that table's compiler), and sm_86 and 89 do in Triton 3.6 (8 bytes). Half as
# deep, four stages are 48 KiB of their 99. sm_80, which would not spill, goes with them: tiles are of a major version.
TILE_SM80_SM120 = TILE | {"BLOCK_D": 32, "num_stages": 4}
# fp32 operands multiply without tensor cores, out of registers: a quarter of the tile, 16 deep. At a depth of 32 sm_100 spills (16
# bytes of stack in that table's compiler); half of BLOCK_V would not, but would read hidden twice as often.
TILE_FP32 = OPTIONS | {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 16, "GROUP": 16, "num_warps": 8, "num_stages": 2}
FENCES = has_fences(triton.__version__)  # else nothing is pipelined from sm_90 to sm_110
MULTIPROCESSORS = 132  # of an H200; where the kernel is interpreted


# One program per BLOCK_N rows and split of the vocabulary, group by group of row blocks; within a group these vary fastest, so that
# neighbours share weight tiles in L2:
#
#                         weight[V, D]ᵀ   split s
#                      [BLOCK_V][BLOCK_V] … [BLOCK_V]
#     hidden           ┌───────┐
#     [BLOCK_N, D] ──▶ │ acc   │ ──▶ max, Σexp, Σexp·z, z_target  ─▶ partial[s, row]
#                      └───────┘ fp32, in registers, one tile at a time
#
# Work: 2·N·D·V FLOP on tensor cores, and about 10 FLOP and 1 exp per logit in the epilogue.
# Reads / writes: hidden once per tile of the vocabulary, from L2; weight once per block of rows, from memory once per group of
#     blocks; 16 bytes per row and split out. Logits: 0 bytes (the chunked path writes and reads 4 each).
# Saved: nothing.
# On chip: acc [BLOCK_N, BLOCK_V] fp32 and num_stages operand tiles in shared memory.
# Order: tiles ascend within a split, splits are merged in order by `_merge`: bitwise repeatable, and a pure function of the shapes
#     and the number of the GPU's multiprocessors.
# Edges: ragged N, V and D are masked; addresses are int64; a row with target -100 gives zeros, its hidden state is read as zeros.
@triton.jit(do_not_specialize=["num_rows", "tiles_per_split"])  # which vary from call to call
def fused_scoring_kernel(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, target_ptr,
    row_max_ptr, others_ptr, moment_ptr, z_target_ptr,
    num_rows, hidden_size, vocab_size, tiles_per_split,
    bias_ptr, temperature_ptr, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_ROW_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    num_row_blocks = tl.cdiv(num_rows, BLOCK_N)
    group_programs = GROUP * (tl.num_programs(0) // num_row_blocks)
    first_block = tl.program_id(0) // group_programs * GROUP
    in_group = tl.minimum(num_row_blocks - first_block, GROUP)
    split = tl.program_id(0) % group_programs // in_group
    rows = (first_block + tl.program_id(0) % group_programs % in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < num_rows
    target = tl.load(target_ptr + rows, mask=inside, other=-100)
    counted = inside & (target != -100)
    inverse_temperature = tl.full([BLOCK_N], 1.0, tl.float32) / temperature
    if HAS_ROW_TEMPERATURE:
        inverse_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=inside, other=1.0)
    row_max = tl.full([BLOCK_N], -1e30, tl.float32)  # finite, so that no -inf - -inf arises
    others = tl.zeros([BLOCK_N], tl.float32)  # Σ exp(z - max) without the target
    moment = tl.zeros([BLOCK_N], tl.float32)  # Σ exp(z - max) (z - max) without the target
    z_target = tl.zeros([BLOCK_N], tl.float32)  # stays 0 where another split has the target
    depth = tl.arange(0, BLOCK_D)
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride
    first = split * tiles_per_split * BLOCK_V
    for start in range(first, tl.minimum(first + tiles_per_split * BLOCK_V, vocab_size), BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        weight_rows = weight_ptr + cols.to(tl.int64)[None, :] * weight_stride
        acc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for k in range(0, hidden_size, BLOCK_D):
            deep = k + depth < hidden_size
            h = tl.load(hidden_rows + (k + depth)[None, :], mask=counted[:, None] & deep[None, :], other=0.0)
            w = tl.load(weight_rows + (k + depth)[:, None], mask=(cols < vocab_size)[None, :] & deep[:, None], other=0.0)
            acc = tl.dot(h, w, acc, input_precision="ieee")  # [BLOCK_N, BLOCK_V] fp32
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=cols < vocab_size, other=0.0).to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            acc = softcap * tanh(acc / softcap)
        acc = tl.where((cols < vocab_size)[None, :], acc * inverse_temperature[:, None], float("-inf"))
        is_target = cols[None, :] == target[:, None]
        hit = tl.where(is_target, acc, 0.0)  # summed, because a GPU's max drops NaN
        acc = tl.where(is_target, float("-inf"), acc)
        z_target += tl.sum(hit, axis=1)
        new_max = tl.maximum(row_max, tl.max(acc, axis=1))
        rescale = tl.exp(row_max - new_max)
        acc = acc - new_max[:, None]
        exponential = tl.exp(acc)
        moment = (moment + others * (row_max - new_max)) * rescale
        moment += tl.sum(tl.where(exponential > 0, exponential * acc, 0.0), axis=1)
        others = others * rescale + tl.sum(exponential, axis=1)
        row_max = new_max
    out = split.to(tl.int64) * num_rows + rows
    tl.store(row_max_ptr + out, row_max, mask=inside)
    tl.store(others_ptr + out, others, mask=inside)
    tl.store(moment_ptr + out, moment, mask=inside)
    tl.store(z_target_ptr + out, z_target, mask=inside)


def tile_of(dtype: torch.dtype, major: int) -> dict[str, int]:
    """The pinned tile for operands of `dtype` on GPUs of compute capability `major`.x."""
    if dtype == torch.float32:
        return TILE_FP32
    if major in (8, 12):
        return TILE_SM80_SM120
    return TILE if FENCES else TILE | {"num_stages": 1}


@functools.cache
def tiles_of_split(row_blocks: int, tiles: int, multiprocessors: int) -> int:
    """Tiles of the vocabulary per program: those with which the last program ends first, if a multiprocessor takes one at a time.

    So it is with 16-bit operands: 8 warps of more than 128 registers. A program's start and end count as one more tile, which
    keeps splits and the memory of their partial sums few.
    """

    def duration(size: int) -> tuple[int, int]:
        waves = -(-row_blocks * -(-tiles // size) // multiprocessors)
        return waves * (size + 1), -size

    return min(range(1, tiles + 1), key=duration)


def fused_scoring(hidden: Tensor, weight: Tensor, target: Tensor, transform: LogitTransform) -> RowStatistics:
    """logprob, entropy, row_max and log_sum [N] fp32 of hidden [N, D] · weight [V, D]ᵀ, logits staying on the chip.

    Rows with target -100 give zeros. A target outside the vocabulary gives NaN.
    """
    num_rows, hidden_size = hidden.shape
    vocab_size = weight.shape[0]
    if num_rows == 0:
        return RowStatistics(*(torch.zeros(0, dtype=torch.float32, device=hidden.device) for _ in RowStatistics._fields))
    if hidden.device.type == "cpu":  # triton 3.9's interpreter multiplies the bit patterns of bf16 as integers
        hidden, weight = hidden.float(), weight.float()
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    gpu = torch.cuda.get_device_properties(hidden.device) if hidden.is_cuda else None
    tile = tile_of(hidden.dtype, gpu.major if gpu else 0)
    row_blocks, tiles = triton.cdiv(num_rows, tile["BLOCK_N"]), triton.cdiv(vocab_size, tile["BLOCK_V"])
    tiles_per_split = tiles_of_split(row_blocks, tiles, gpu.multi_processor_count if gpu else MULTIPROCESSORS)
    splits = triton.cdiv(tiles, tiles_per_split)
    row_max, others, moment, z_target = aligned(4, splits * num_rows, hidden.device)
    with torch.cuda.device_of(hidden):  # where Triton launches; nothing on a CPU
        fused_scoring_kernel[(row_blocks * splits,)](
            hidden, hidden.stride(0), weight, weight.stride(0), target.contiguous(), row_max, others, moment, z_target,
            num_rows, hidden_size, vocab_size, tiles_per_split, **transform_arguments(transform, row_max), **tile,
        )  # fmt: skip
    return _merge(*(part.view(splits, num_rows) for part in (row_max, others, moment, z_target)), target, vocab_size)


def _merge(row_max: Tensor, others: Tensor, moment: Tensor, z_target: Tensor, target: Tensor, vocab_size: int) -> RowStatistics:
    """One softmax from the partial sums [splits, N] and the target's logit, which stayed out of them: p → 1 keeps its digits."""
    z_target = z_target.sum(0)
    z_target = torch.where((target >= 0) & (target < vocab_size), z_target, float("nan"))
    global_max = torch.maximum(row_max.amax(0), z_target.nan_to_num(nan=-1e30, neginf=-1e30))
    scale = (row_max - global_max).exp()
    sum_others = (others * scale).sum(0)
    shifted_target = z_target - global_max
    target_term = shifted_target.exp()
    total = sum_others + target_term
    log_sum = torch.where(shifted_target == 0, sum_others.log1p(), total.log())
    sum_moment = ((moment + others * (row_max - global_max)) * scale).sum(0)
    sum_moment = sum_moment + torch.where(target_term > 0, target_term * shifted_target, 0.0)
    stats = RowStatistics(shifted_target - log_sum, log_sum - sum_moment / total, global_max, log_sum)
    return RowStatistics(*(torch.where(target == IGNORE_INDEX, 0.0, value) for value in stats))
