"""All rows as one chunk whose logits lie where dWeight will: what a CPU does with at most D rows.

    dWeight   │ block 0 │ block 1 │ block 2 │ …  │ block B-1 │
    logits              │ of 0 ─▶ │ of 1 ─▶ │    │ of B-2 ─▶ │ of B-1, in a spare block

The logits [M, width] of a block of tokens lie in the room of the next block's dWeight [width, D], M ≤ D, and become their own
gradient there. dWeight is then written block after block, over gradients that have been used. In a dWeight of 16 bits fp32 logits
take up to two rooms each; those of the last blocks, for which there are none, are spare too.

Memory: beside the results the spare blocks, dHidden of up to 512 rows in fp32, and the hidden states where rows are selected or are
converted for the GEMMs. Work: three GEMMs of all rows, and dWeight is written once. Order: blocks ascend, so results are bitwise
repeatable.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from trapo_kernels.backends import kept_memory
from trapo_kernels.backends.gemm import HeadGemm
from trapo_kernels.backends.gradients import Gradients, put_rows
from trapo_kernels.backends.vocab_parallel import VocabShard

_LEAST_LOGITS = 2**20  # below it a chunk takes no memory worth saving
# Fewer tokens make blocks too narrow: up to 1.5 times as long as chunks at V = 256, 1.1 at 8192 (Xeon, D = 896 to 4096).
_LEAST_VOCABULARY = 16384
# Tokens per block. Intel Xeon, 2 cores, fp32, time over the floor in blocks of 2048, 4096 and 8192: 1.12, 1.11, 1.08 (512 rows,
# D = 896, V = 151936), 1.15, 1.14, 1.12 (V = 32768), 1.11, 1.07, 1.06 (1024 rows, D = 2048).
_BLOCK = 8192
_LEAST_BLOCKS = 8  # so that the spare one holds an eighth of the logits
_WIDTH_UNIT = 16  # tokens; rows of a part then begin at whole cache lines
_GRAD_ROWS = 512  # of dHidden at a time


def fits(num_rows: int, hidden_size: int, vocab_size: int, grad_dtype: torch.dtype = torch.float32) -> bool:
    """Whether fp32 logits of so many rows go into dWeight, as far as it has room: a pure function of the shapes."""
    whole = hidden_size * grad_dtype.itemsize % torch.float32.itemsize == 0
    return whole and num_rows <= hidden_size and vocab_size >= _LEAST_VOCABULARY and num_rows * vocab_size >= _LEAST_LOGITS


def spare_logits(num_rows: int, hidden_size: int, vocab_size: int, grad_dtype: torch.dtype) -> int:
    """How many logits lie outside dWeight."""
    blocks = _blocks(vocab_size)
    inside = len(_places(blocks, num_rows, hidden_size, grad_dtype))
    return num_rows * sum(block.stop - block.start for block in blocks[inside:])


def grad_rows(num_rows: int) -> int:
    """How many rows of dHidden are held in fp32 beside it."""
    return min(num_rows, _GRAD_ROWS)


def applies(rows: ModuleType, gemm: HeadGemm, shard: VocabShard | None, num_rows: int, grad_dtype: torch.dtype) -> bool:
    """Whether this backend and these GEMMs can: rows in parts, a whole head without LoRA, fp32 logits, chunks of any size."""
    able = gemm.on_cpu and getattr(rows, "TAKES_PARTS", False) and shard is None
    plain = not gemm.has_lora and not gemm.batch_invariant and gemm.logits_dtype == gemm.statistics_dtype == torch.float32
    vocab_size, hidden_size = gemm.weight.shape
    return able and plain and fits(num_rows, hidden_size, vocab_size, grad_dtype)


def add_gradients(
    gemm: HeadGemm,
    hidden: Tensor,
    grads: Gradients,
    index: Tensor | slice,
    of_rows: Callable[[list[Tensor]], list[Tensor]],
) -> None:
    """Fills the gradient of the weight, adds to that of the bias and puts that of `hidden` [M, D] at the rows `index`.

    `of_rows` turns the logits of all rows, in parts [M, V₁], [M, V₂], …, into their gradient in the same memory.
    """
    operands = gemm.operands(hidden)
    blocks = _blocks(gemm.weight.shape[0])
    parts = _room(grads.weight, blocks, hidden.shape[0])
    for tokens, part in zip(blocks, parts, strict=True):
        gemm.put_logits(operands, tokens, part)
    parts = of_rows(parts)
    if grads.hidden is not None:
        for start in range(0, hidden.shape[0], _GRAD_ROWS):
            some = slice(start, min(start + _GRAD_ROWS, hidden.shape[0]))
            put_rows(grads.hidden, some if isinstance(index, slice) else index[some], _grad_hidden(gemm, parts, blocks, some))
    for tokens, part in zip(blocks, parts, strict=True):
        if grads.bias is not None:
            gemm.add_grad_bias(grads.bias[tokens], part)
        gemm.add_grad_factor(part, operands.hidden, grads.weight[tokens], first=True)


def _grad_hidden(gemm: HeadGemm, parts: list[Tensor], blocks: list[slice], rows: slice) -> Tensor:
    """dHidden of some rows in fp32."""
    grad = gemm.empty_grad_rows(rows.stop - rows.start, gemm.weight.shape[1])
    for number, (tokens, part) in enumerate(zip(blocks, parts, strict=True)):
        gemm.add_grad_rows(grad, part[rows], tokens, first=number == 0)
    return grad


def _width(vocab_size: int) -> int:
    """Tokens of a block."""
    return min(_BLOCK, -(-vocab_size // _LEAST_BLOCKS // _WIDTH_UNIT) * _WIDTH_UNIT)


def _blocks(vocab_size: int) -> list[slice]:
    """All tokens in blocks; a shorter one comes first, whose room takes no logits."""
    width = _width(vocab_size)
    starts = [0, *range(vocab_size % width or width, vocab_size, width)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], vocab_size], strict=True)]


def _places(blocks: list[slice], num_rows: int, hidden_size: int, grad_dtype: torch.dtype) -> list[int]:
    """Where in dWeight, counted in fp32 numbers, the logits of the first blocks begin: behind what dWeight has up to their own last
    token and behind each other. Those of the other blocks find no room."""
    per_token = hidden_size * grad_dtype.itemsize // torch.float32.itemsize
    places, end = [], 0
    for block in blocks:
        start = max(end, block.stop * per_token)
        end = start + num_rows * (block.stop - block.start)
        if end > blocks[-1].stop * per_token:
            break
        places.append(start)
    return places


def _room(grad_weight: Tensor, blocks: list[slice], num_rows: int) -> list[Tensor]:
    """A part [M, width] for the logits of each block."""
    flat, widths = grad_weight.view(-1).view(torch.float32), [block.stop - block.start for block in blocks]
    places = _places(blocks, num_rows, grad_weight.shape[1], grad_weight.dtype)
    spare = kept_memory.LOGITS.empty((num_rows * sum(widths[len(places) :]),), torch.float32, flat.device)
    rooms = [flat[start:] for start in places]
    for width in widths[len(places) :]:
        rooms.append(spare)
        spare = spare[num_rows * width :]
    return [room[: num_rows * width].view(num_rows, width) for room, width in zip(rooms, widths, strict=True)]
