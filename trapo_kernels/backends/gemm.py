"""The three GEMMs of a head on a chunk of rows, and the dtypes they run in."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from trapo_kernels.backends import cpu_gemm, kept_memory
from trapo_kernels.backends.logits import statistics_dtype

# Logits per chunk on a GPU: 4096 rows at a vocabulary of 152k, where every GEMM is fat enough to run at the speed of one large one.
_CHUNK_LOGITS_GPU = 4096 * 152064
# Rows per chunk on a CPU, where the logits do not lie in dWeight (`in_weight.py`): as many as keep the chunk at an eighth of what
# eager PyTorch needs beside both gradients, or at an eighth of dWeight, within these bounds and those of the processor
# (`cpu_gemm.tuning`); more rows while the logits are below 4 MiB. Eager holds 5 N V numbers at its peak, dWeight is D V of them.
# The GEMMs of a chunk pass over the weight, twice, and over dWeight. With operands of 16 bits half of dWeight is allowed: half of
# the fp32 copy of the weight that others hold, and as much as rounding dWeight takes when the chunk is gone.
_LEAST_ROWS_CPU = 128
_LEAST_LOGITS_CPU = 2**20
# Numbers of a dWeight that a GEMM rounds on a GPU. For a smaller one cuBLAS may split the sum over rows to fill the GPU, and would
# add the parts in 16 bits; these are 512 tiles of 128 × 256, four for each of 132 multiprocessors.
_LEAST_ROUNDED_GPU = 2**24
_NUM_PARTS = 3  # of an fp32 matrix for GEMMs of 16 bits
_THIN = 16  # columns; in a product with fewer MKL gives a row bits that depend on its place, unless it is written in columns
_ROW_ALIGNMENT = 16  # logits; Triton's unit of divisibility, 64 bytes in fp32
# Rows of every GEMM in batch-invariant mode, the last chunk filled up: one shape, so one kernel and one order of summation per row.
_INVARIANT_ROWS_CPU, _INVARIANT_ROWS_GPU = 64, 1024
# Most rows per chunk where ranks share the vocabulary.
_SHARDED_ROWS_CPU, _SHARDED_ROWS_GPU = 256, 4096


def chunk_rows(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    device_type: str,
    batch_invariant: bool = False,
    sharded: bool = False,
    operands: torch.dtype = torch.float32,
) -> int:
    """Rows per chunk: a pure function of the shapes on a given machine, so that the same batch always gives the same bits.

    `operands` is what the GEMMs take (`operand_dtype`). With a head `sharded` over the vocabulary neither this rank's part of it
    nor the processor may matter: all ranks meet once per chunk, and must have the same ones.
    """
    if batch_invariant:
        return _INVARIANT_ROWS_CPU if device_type == "cpu" else _INVARIANT_ROWS_GPU
    if sharded:
        return _even_chunk(num_rows, _SHARDED_ROWS_CPU if device_type == "cpu" else _SHARDED_ROWS_GPU, multiple=128)
    if device_type == "cpu":
        beside_grad = hidden_size // (2 if operands == torch.bfloat16 else 8)
        most = min(max((5 * num_rows - hidden_size) // 8, beside_grad, _LEAST_ROWS_CPU), cpu_gemm.most_rows(vocab_size))
        return _even_chunk(num_rows, max(most, _LEAST_LOGITS_CPU // vocab_size), multiple=16)
    return _even_chunk(num_rows, _most_rows_gpu(vocab_size, False), multiple=128)


def check_products(dtype: torch.dtype, device: torch.device) -> None:
    """That a GPU multiplies operands of `dtype` with sums in float32; cuBLAS says the same in other words, and after the fact."""
    if device.type != "cuda":
        return
    gpu = torch.cuda.get_device_properties(device)
    if dtype == torch.bfloat16 and gpu.major < 8:
        raise RuntimeError(
            f"bfloat16 with sums in float32 needs a GPU of sm_80 or later, got sm_{gpu.major}{gpu.minor}. Pass hidden and "
            'lm_head_weight in float16 or float32, or take backend="reference".'
        )
    if dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        raise RuntimeError(
            "products of float16 must be added up in float32, got torch.backends.cuda.matmul.allow_fp16_accumulation = True. "
            "Set it to False, or pass bfloat16."
        )


def operand_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """What the GEMMs take hidden states of `dtype` in.

    On a GPU they stay as they are; on a CPU that has no instructions for them, whose 16-bit GEMMs are up to 90 times slower than
    fp32 ones, they are converted to fp32.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and device_type == "cpu" and not cpu_gemm.supports(dtype) else dtype


def grad_weight_dtype(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    weight_dtype: torch.dtype,
    operands: torch.dtype,
    device_type: str,
    batch_invariant: bool = False,
    sharded: bool = False,
) -> torch.dtype:
    """What a sweep of at most `num_rows` rows holds dWeight in: fp32 (fp64), to which chunks add; or the 16 bits of the weight
    where all rows are one chunk, whose GEMM rounds its sums itself.

    On a GPU that is where they fit a chunk, on a CPU that multiplies such operands where their fp32 logits take no more than the
    fp32 dWeight that they save.
    """
    exact = torch.float64 if operands == torch.float64 else torch.float32
    if weight_dtype != operands or operands.itemsize > 2 or batch_invariant:
        return exact
    if device_type == "cpu":
        most = 0 if sharded else hidden_size
    else:
        most = _most_rows_gpu(vocab_size, sharded) if vocab_size * hidden_size >= _LEAST_ROUNDED_GPU else 0
    return weight_dtype if _known(num_rows <= most) else exact


def _known(condition: bool) -> bool:
    """False also where torch.compile cannot tell, because the number of rows is in the data."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy, for half a second

    return guard_or_false(condition)


def _most_rows_gpu(vocab_size: int, sharded: bool) -> int:
    """Rows of a full chunk on a GPU."""
    return _SHARDED_ROWS_GPU if sharded else max(128, _CHUNK_LOGITS_GPU // vocab_size)


def _even_chunk(num_rows: int, most: int, multiple: int) -> int:
    """Rows of the fewest chunks of at most `most` rows, all of them or a `multiple`, as even as that allows."""
    if num_rows <= most:
        return max(1, num_rows)
    num_chunks = -(-num_rows // max(multiple, most // multiple * multiple))
    return -(-num_rows // num_chunks // multiple) * multiple


def chunk_bounds(num_rows: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of the fewest chunks of at most `size` rows, as even as multiples of the largest power of two in `size`, up to
    128, allow: a short last chunk would pass over weight and dWeight like a whole one."""
    multiple = math.gcd(size, 128)
    blocks, chunks = -(-num_rows // multiple), -(-num_rows // size)
    starts = [blocks * i // chunks * multiple for i in range(chunks)]
    return list(pairwise([*starts, num_rows]))


class Head(NamedTuple):
    """Hidden states and the head they meet: logits = hidden · weightᵀ (+ hidden · lora_aᵀ · lora_bᵀ)."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    lora_a: Tensor | None = None  # [R, D], its scaling included
    lora_b: Tensor | None = None  # [V, R]


class Operands(NamedTuple):
    """A chunk of hidden [C, D] and low_rank = hidden · lora_aᵀ as the GEMMs take them; of the latter's parts the first [C, R] is
    rounded."""

    hidden: Tensor
    low_rank: Tensor | None


class HeadGemm:
    """logits = hidden · weightᵀ and its two gradients with fp32 accumulation.

    16-bit operands stay as they are and the output is fp32; the gradient of the logits is rounded to 16 bits to be one, so that
    its rows no longer add up to zero exactly. Where a CPU cannot (`operand_dtype`), one fp32 copy of the weight lives as long as
    the call. A float32 master weight beside bf16 or fp16 hidden states is rounded to their dtype for the call; its gradient is not.

    A LoRA'd head adds two thin GEMMs: low_rank = hidden · lora_aᵀ, and low_rank · lora_bᵀ into the same logits. What is fp32 in
    them goes through GEMMs of 16 bits in three parts of 8 bits or more each, so that the logits lose nothing there either, but
    beside fp16 hidden states what of a factor is below fp16's smallest number, 6e-8.

    With `batch_invariant` every GEMM must get the same number of rows.
    """

    def __init__(self, head: Head, logits_dtype: torch.dtype, batch_invariant: bool = False):
        hidden, weight = head.hidden, head.weight
        check_products(hidden.dtype, hidden.device)
        self.batch_invariant = batch_invariant
        self.on_cpu = hidden.device.type == "cpu"
        self.operand_dtype = operand_dtype(hidden.dtype, hidden.device.type)  # of hidden, weight and the logit gradient
        self.mixed = self.operand_dtype in (torch.bfloat16, torch.float16)
        weight = weight.to(hidden.dtype).to(self.operand_dtype)
        self.logits_in_tiles = self.on_cpu and self.operand_dtype == torch.float32 and cpu_gemm.tuning().logits_in_tiles
        self.weight = cpu_gemm.in_lines(weight) if self.on_cpu and (self.mixed or self.logits_in_tiles) else weight
        self.statistics_dtype = statistics_dtype(hidden)
        self.gradient_in_columns = self.on_cpu and (self.mixed or cpu_gemm.tuning().gradient_in_columns)
        self.has_lora = head.lora_a is not None
        if self.has_lora:
            a_parts, b_parts = _parts(head.lora_a, self.operand_dtype), _parts(head.lora_b, self.operand_dtype)
            self.num_a_parts, self.lora_a = len(a_parts), torch.cat(a_parts)  # [parts · R, D]
            pairs = _pairs(_NUM_PARTS if self.mixed else 1, len(b_parts))
            self.low_rank_order, b_order = zip(*pairs, strict=True)
            self.b_beside_low_rank = torch.cat([b_parts[i] for i in b_order], 1)
            self.num_b_parts, rank = len(b_parts), head.lora_b.shape[1]
            self.lora_b = self.b_beside_low_rank[:, : rank * len(b_parts)]  # [V, parts · R]: the pairs begin with each part of b
        self.logits_dtype = self.statistics_dtype if logits_dtype == torch.float32 else logits_dtype

    def operands(self, hidden_chunk: Tensor) -> Operands:
        """The chunk in the dtype that the GEMMs take, and its low-rank part."""
        hidden = hidden_chunk.to(self.operand_dtype)
        if not self.has_lora:
            return Operands(hidden, None)
        with self._exact():
            room = self._empty_out(hidden.shape[0], self.lora_a.shape[0], self._is_thin(self.lora_a.shape[0]))
            low_rank = _sum_of(self.num_a_parts, self._multiply(hidden, self.lora_a.t(), room))
        parts = _parts(low_rank, self.operand_dtype)
        return Operands(hidden, torch.cat([parts[i] for i in self.low_rank_order], 1))

    def logits(self, operands: Operands, buffer: Tensor) -> Tensor:
        """hidden · weightᵀ (+ low_rank · lora_bᵀ) of a chunk into `buffer[:C]` [C, V], in `logits_dtype`.

        Rounded once, unless cuBLAS splits D: parts of 16-bit logits are then added in 16 bits too, as long as
        `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` (fp16: `allow_fp16_...`) is on, which is the default.
        With bf16 logits of bf16 operands the low-rank part is added to rounded logits, and rounded again.
        """
        out = buffer[: operands.hidden.shape[0]]
        self.put_logits(operands, slice(0, self.weight.shape[0]), out)
        return out

    def put_logits(self, operands: Operands, tokens: slice, out: Tensor) -> None:
        """out [C, tokens] = the logits of some tokens, whose range has both ends."""
        in_blocks = self.on_cpu and not self.mixed and not self.logits_in_tiles
        step = cpu_gemm.tuning().block if in_blocks else tokens.stop - tokens.start
        with self._exact():
            for start in range(tokens.start, tokens.stop, step):
                block = slice(start, min(start + step, tokens.stop))
                self._block_of_logits(*operands, block, out[:, start - tokens.start : block.stop - tokens.start])

    def _block_of_logits(self, hidden: Tensor, low_rank: Tensor | None, tokens: slice, out: Tensor) -> None:
        weight = self.weight[tokens].t()
        thin = self.batch_invariant and self._is_thin(out.shape[1])
        apart = thin or (out.dtype != self.operand_dtype and not self.mixed)  # bf16 logits of fp32 operands are rounded late
        multiply = cpu_gemm.product if self.logits_in_tiles else self._multiply
        exact = multiply(hidden, weight, self._empty_out(*out.shape, in_columns=thin) if apart else out)
        if low_rank is not None:
            self._add_product(exact, low_rank, self.b_beside_low_rank[tokens].t(), beta=1)
        if apart:
            out.copy_(exact)

    def _is_thin(self, columns: int) -> bool:
        return self.on_cpu and not self.mixed and columns < _THIN

    def _empty_out(self, rows: int, columns: int, in_columns: bool) -> Tensor:
        """[rows, columns] in fp32 (fp64), one column after the other or one row."""
        out = torch.empty(rows * columns, dtype=self.statistics_dtype, device=self.weight.device)
        return out.view(columns, rows).t() if in_columns else out.view(rows, columns)

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if not self.mixed or out.dtype != torch.float32:
            return torch.mm(a, b, out=out)
        return cpu_gemm.product(a, b, out) if self.on_cpu else torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)

    def _add_product(self, out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
        """out = beta · out + a · b, accumulated in the dtype of `out`; with beta 0 `out` is not read."""
        a = a.reshape(a.shape)  # one row, of a transposed column, gets its length for stride, without which cuBLASLt refuses it
        if not self.mixed or out.dtype != torch.float32:
            out.addmm_(a, b, beta=beta)
        elif self.on_cpu:
            cpu_gemm.product(a, b, out, beta)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=beta, alpha=1, out=out)

    def buffer(self, rows: int) -> Tensor:
        """Room for a chunk of logits [rows, V], every row aligned as the first, so that odd V are loaded in whole vectors too."""
        vocab_size = self.weight.shape[0]
        stride = -(-vocab_size // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        return kept_memory.LOGITS.empty((rows, stride), self.logits_dtype, self.weight.device)[:, :vocab_size]

    def grad_low_rank(self, grad_logits: Tensor) -> Tensor:
        """dLow_rank [C, R] as a GEMM operand."""
        return _sum_of(self.num_b_parts, self._grad_rows(grad_logits, self.lora_b)).to(self.operand_dtype)

    def grad_hidden(self, grad_logits: Tensor, grad_low_rank: Tensor | None) -> Tensor:
        """dHidden [C, D] in fp32 (fp64)."""
        grad = self._grad_rows(grad_logits, self.weight)
        if grad_low_rank is None:
            return grad
        with self._exact():
            self._add_product(grad, grad_low_rank.repeat(1, self.num_a_parts), self.lora_a, beta=1)
        return grad

    def _grad_rows(self, grad_logits: Tensor, factor: Tensor) -> Tensor:
        """grad_logits [C, V] · factor [V, K] in fp32 (fp64); not in the dtype of hidden, because cuBLAS may split V and add the
        parts in the dtype of its output."""
        shape = grad_logits.shape[0], factor.shape[1]
        with self._exact():
            return self._multiply(grad_logits, factor, self._empty_out(*shape, self.gradient_in_columns or self._is_thin(shape[1])))

    def empty_grad_rows(self, rows: int, columns: int) -> Tensor:
        """Room for a gradient [rows, columns] that `add_grad_rows` puts together."""
        return self._empty_out(rows, columns, self.gradient_in_columns)

    def add_grad_rows(self, grad: Tensor, grad_logits: Tensor, tokens: slice, first: bool) -> None:
        """grad [C, D] fp32 += grad_logits [C, tokens] · weight[tokens]; the first overwrites it unread."""
        with self._exact():
            self._add_product(grad, grad_logits, self.weight[tokens], beta=0 if first else 1)

    def add_grad_factor(self, grad_out: Tensor, rows: Tensor, grad: Tensor, first: bool) -> None:
        """grad [M, K] += grad_outᵀ [M, C] · rows [C, K], summed in fp32; the first chunk overwrites it unread. One of 16 bits takes
        a single chunk (`grad_weight_dtype`), whose sums are rounded once."""
        with self._exact():
            self._add_product(grad, grad_out.t(), rows, beta=0 if first else 1)

    def add_grad_bias(self, grad_bias: Tensor, grad_logits: Tensor) -> None:
        """grad_bias [V] fp32 (fp64) += Σ grad_logits over rows; a sum into another dtype would copy [C, V] on a CPU."""
        if self.on_cpu and self.mixed:
            cpu_gemm.product(grad_logits.new_ones(1, grad_logits.shape[0]), grad_logits, grad_bias[None], beta=1)
        else:
            grad_bias.add_(grad_logits.sum(0, dtype=grad_bias.dtype))

    def _exact(self) -> torch.autocast:
        """The caller's autocast has chosen the inputs' dtype; it must not round what is computed from them."""
        return torch.autocast(self.weight.device.type, enabled=False)


def _parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Matrices in `dtype` that add up to x: itself, or x rounded, what rounding took from it rounded, and so on (in
    fp16 but for 3e-8)."""
    if dtype.itemsize >= x.dtype.itemsize:
        return [x.to(dtype)]
    parts = []
    for _ in range(_NUM_PARTS):
        parts.append(x.to(dtype))
        x = x - parts[-1]
    return parts


def _pairs(num_left: int, num_right: int) -> list[tuple[int, int]]:
    """Which parts of two factors to multiply, those of the first rounding first: the others are below the last digit."""
    return [(i, j) for i in range(num_left) for j in range(num_right) if i + j < _NUM_PARTS]


def _sum_of(num_parts: int, side_by_side: Tensor) -> Tensor:
    """[C, R] from the products [C, parts · R] with each of the parts."""
    return side_by_side if num_parts == 1 else side_by_side.unflatten(1, (num_parts, -1)).sum(1)
