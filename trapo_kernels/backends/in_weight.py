"""All rows as one chunk whose logits lie where dWeight will: what a CPU does with at most D rows.

    dWeight   │ block 0 │ block 1 │ block 2 │ …  │ block B-1 │
    logits              │ of 0 ─▶ │ of 1 ─▶ │    │ of B-2 ─▶ │ of B-1, in a spare block

The logits [M, width] of a block of tokens lie in the room of the next block's dWeight [width, D], M ≤ D, and become their own
gradient there. dWeight is then written block after block, over gradients that have been used.

Memory: the spare block beside the results, an eighth of the logits at most. Work: three GEMMs of all rows, and none of them adds to
what an earlier chunk left. Order: blocks ascend, so results are bitwise repeatable.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from trapo_kernels.backends.gemm import HeadGemm

_LEAST_LOGITS = 2**20  # below it a chunk takes no memory worth saving, and blocks are calls without work
# Tokens per block. Intel Xeon, 2 cores, fp32, time over the floor in blocks of 2048, 4096 and 8192: 1.12, 1.11, 1.08 (512 rows,
# D = 896, V = 151936), 1.15, 1.14, 1.12 (V = 32768), 1.11, 1.07, 1.06 (1024 rows, D = 2048).
_BLOCK = 8192
_LEAST_BLOCKS = 8  # so that the spare one is no more than an eighth of eager PyTorch's memory, which at few rows is the logits'
_UNIT = 16


def fits(num_rows: int, hidden_size: int, vocab_size: int) -> bool:
    """Whether the logits of so many rows find room in dWeight, and are worth it: a pure function of the shapes."""
    return num_rows <= hidden_size and num_rows * vocab_size >= _LEAST_LOGITS


def spare_logits(num_rows: int, vocab_size: int) -> int:
    """How many logits lie outside dWeight."""
    return num_rows * _width(vocab_size)


def applies(rows: ModuleType, gemm: HeadGemm, num_rows: int) -> bool:
    """Whether this backend and these GEMMs can: row operations on logits in parts, fp32 logits and chunks of any size."""
    able = gemm.on_cpu and hasattr(rows, "policy_in_parts")
    plain = not gemm.has_lora and not gemm.batch_invariant and gemm.logits_dtype == gemm.statistics_dtype == torch.float32
    vocab_size, hidden_size = gemm.weight.shape
    return able and plain and fits(num_rows, hidden_size, vocab_size)


def gradients(
    gemm: HeadGemm,
    hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    with_grad_hidden: bool,
    of_rows: Callable[[list[Tensor]], list[Tensor]],
) -> Tensor | None:
    """Fills `grad_weight` [V, D] fp32, adds to `grad_bias` [V] and returns dHidden [M, D] in fp32 where it is wanted.

    `of_rows` turns the logits of all rows `hidden` [M, D], in parts [M, V₁], [M, V₂], …, into their gradient in the same memory.
    """
    operands = gemm.operands(hidden)
    blocks = _blocks(gemm.weight.shape[0])
    parts = _room(grad_weight, blocks, hidden.shape[0])
    for tokens, part in zip(blocks, parts, strict=True):
        gemm.put_logits(operands, tokens, part)
    parts = of_rows(parts)
    grad_hidden = gemm.empty_grad_rows(*hidden.shape) if with_grad_hidden else None
    for number, (tokens, part) in enumerate(zip(blocks, parts, strict=True)):
        if grad_hidden is not None:
            gemm.add_grad_rows(grad_hidden, part, tokens, first=number == 0)
        if grad_bias is not None:
            gemm.add_grad_bias(grad_bias[tokens], part)
        gemm.add_grad_factor(part, operands.hidden, grad_weight[tokens], first=True)
    return grad_hidden


def _width(vocab_size: int) -> int:
    """Tokens of a block."""
    return min(_BLOCK, -(-vocab_size // _LEAST_BLOCKS // _UNIT) * _UNIT)


def _blocks(vocab_size: int) -> list[slice]:
    """All tokens in blocks; a shorter one comes first, whose room takes no logits."""
    width = _width(vocab_size)
    starts = [0, *range(vocab_size % width or width, vocab_size, width)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], vocab_size], strict=True)]


def _room(grad_weight: Tensor, blocks: list[slice], num_rows: int) -> list[Tensor]:
    """A part [M, width] for the logits of each block, in the room of the next."""
    rooms = [grad_weight[block].view(-1) for block in blocks[1:]]
    rooms.append(grad_weight.new_empty(num_rows * (blocks[-1].stop - blocks[-1].start)))
    widths = [block.stop - block.start for block in blocks]
    return [room[: num_rows * width].view(num_rows, width) for room, width in zip(rooms, widths, strict=True)]
