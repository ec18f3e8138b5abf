"""The three GEMMs of a head on a chunk of rows, and the dtypes they run in."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trapo_kernels.backends.logits import statistics_dtype

# Logits per chunk. GPU: 4096 rows at a vocabulary of 152k, where every GEMM is fat enough to run at the speed of one large one.
# CPU: 128 MiB of fp32 logits, so that dWeight, read and written once per chunk, is amortised over some 200 rows at 152k.
_CHUNK_LOGITS = {"cpu": 2**25}
_CHUNK_LOGITS_GPU = 4096 * 152064
_ROW_ALIGNMENT = 16  # logits; Triton's unit of divisibility, 64 bytes in fp32
# Rows of every GEMM in batch-invariant mode, the last chunk padded: one shape, so one kernel and one order of summation per row.
_INVARIANT_ROWS = {"cpu": 64}
_INVARIANT_ROWS_GPU = 1024


def chunk_rows(num_rows: int, vocab_size: int, device_type: str, batch_invariant: bool = False) -> int:
    """Rows per chunk: a pure function of the shapes, so that the same batch always gives the same bits."""
    if batch_invariant:
        return _INVARIANT_ROWS.get(device_type, _INVARIANT_ROWS_GPU)
    most = max(128, _CHUNK_LOGITS.get(device_type, _CHUNK_LOGITS_GPU) // vocab_size)
    num_chunks = max(1, -(-num_rows // most))
    even = -(-num_rows // num_chunks)
    return max(1, -(-even // 128) * 128 if num_chunks > 1 else even)


class Head(NamedTuple):
    """Hidden states and the head they meet: logits = hidden · weightᵀ (+ low_rank · lora_bᵀ)."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    low_rank: Tensor | None = None  # [N, R] scaling · hidden · lora_aᵀ
    lora_b: Tensor | None = None  # [V, R]


class Operands(NamedTuple):
    """A chunk of hidden [C, D] and low_rank [C, R] as the GEMMs take them."""

    hidden: Tensor
    low_rank: Tensor | None


class HeadGemm:
    """logits = hidden · weightᵀ and its two gradients with fp32 accumulation.

    On a GPU bf16 and fp16 operands stay as they are and the output is fp32. On a CPU, whose bf16 GEMMs are up to 90 times
    slower than fp32 ones, they are converted to fp32 first: one fp32 copy of the weight lives as long as the call.
    A float32 master weight beside bf16 or fp16 hidden states is rounded to their dtype for the call; its gradient stays fp32.
    With `batch_invariant` every GEMM has the same number of rows, missing ones being zeros. A LoRA'd head adds low_rank · lora_bᵀ,
    one thin GEMM into the same logits.
    """

    def __init__(self, head: Head, logits_dtype: torch.dtype, batch_invariant: bool = False):
        hidden, weight = head.hidden, head.weight
        self.batch_invariant = batch_invariant
        low_precision = hidden.dtype in (torch.bfloat16, torch.float16)
        self.upcast = low_precision and hidden.device.type == "cpu"
        self.mixed = low_precision and not self.upcast
        weight = weight.to(hidden.dtype)
        self.weight = weight.float() if self.upcast else weight
        self.lora_b = head.lora_b.float() if self.upcast and head.lora_b is not None else head.lora_b
        self.statistics_dtype = statistics_dtype(hidden)
        self.operand_dtype = self.weight.dtype  # of hidden, weight and the logit gradient as GEMM operands
        self.logits_dtype = self.statistics_dtype if logits_dtype == torch.float32 else logits_dtype

    def operands(self, hidden_chunk: Tensor, low_rank_chunk: Tensor | None) -> Operands:
        """The chunk in the dtype that the GEMMs take."""
        low_rank = None if low_rank_chunk is None else low_rank_chunk.to(self.operand_dtype)
        return Operands(hidden_chunk.to(self.operand_dtype), low_rank)

    def logits(self, operands: Operands, buffer: Tensor) -> Tensor:
        """hidden · weightᵀ (+ low_rank · lora_bᵀ) of a chunk into `buffer[:C]` [C, V], in `logits_dtype`.

        Rounded once; with bf16 logits on a GPU the low-rank part is added to rounded logits, and rounded again.
        """
        num_rows = operands.hidden.shape[0]
        hidden = self._padded(operands.hidden)
        out = buffer[: hidden.shape[0]]
        rounds_late = out.dtype != self.operand_dtype and not self.mixed  # bf16 logits of fp32 operands
        with self._exact():
            exact = torch.mm(hidden, self.weight.t()) if rounds_late else self._multiply(hidden, self.weight.t(), out)
            if self.lora_b is not None:
                self._add_product(exact, self._padded(operands.low_rank), self.lora_b.t(), beta=1)
            if rounds_late:
                out.copy_(exact)
        return buffer[:num_rows]

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if self.mixed and out.dtype == torch.float32:
            return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
        return torch.mm(a, b, out=out)

    def _add_product(self, out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
        """out = beta · out + a · b, accumulated in the dtype of `out`; with beta 0 `out` is not read."""
        if self.mixed and out.dtype == torch.float32:
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=beta, alpha=1, out=out)
        else:
            out.addmm_(a, b, beta=beta)

    def buffer(self, rows: int) -> Tensor:
        """Room for a chunk of logits [rows, V], every row aligned as the first, so that odd V are loaded in whole vectors too."""
        vocab_size = self.weight.shape[0]
        stride = -(-vocab_size // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        return torch.empty(rows, stride, dtype=self.logits_dtype, device=self.weight.device)[:, :vocab_size]

    def grad_rows(self, grad_logits: Tensor, factor: Tensor) -> Tensor:
        """grad_logits [C, V] · factor [V, K] in fp32 (fp64): dHidden for the weight, dLow_rank for lora_b.

        Not in the dtype of hidden, because cuBLAS may split V and add the parts in the dtype of its output.
        """
        padded = self._padded(grad_logits)
        out = torch.empty(padded.shape[0], factor.shape[1], dtype=self.statistics_dtype, device=factor.device)
        with self._exact():
            return self._multiply(padded, factor, out)[: grad_logits.shape[0]]

    def add_grad_factor(self, grad_logits: Tensor, rows: Tensor, grad: Tensor, first: bool) -> None:
        """grad [V, K] fp32 += grad_logitsᵀ · rows [C, K], accumulated in fp32; the first chunk overwrites it unread."""
        with self._exact():
            self._add_product(grad, grad_logits.t(), rows, beta=0 if first else 1)

    def _exact(self) -> torch.autocast:
        """The caller's autocast has chosen the inputs' dtype; it must not round what is computed from them."""
        return torch.autocast(self.weight.device.type, enabled=False)

    def _padded(self, rows: Tensor) -> Tensor:
        if not self.batch_invariant:
            return rows
        return F.pad(rows, (0, 0, 0, chunk_rows(0, 0, rows.device.type, batch_invariant=True) - rows.shape[0]))
