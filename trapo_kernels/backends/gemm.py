"""The three GEMMs of a head on a chunk of rows, and the dtypes they run in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trapo_kernels.backends.logits import statistics_dtype

# Logits per chunk. GPU: 4096 rows at a vocabulary of 152k, where every GEMM is fat enough to run at the speed of one large one.
# CPU: 128 MiB of fp32 logits, so that dWeight, read and written once per chunk, is amortised over some 200 rows at 152k.
_CHUNK_LOGITS = {"cpu": 2**25}
_CHUNK_LOGITS_GPU = 4096 * 152064
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


class HeadGemm:
    """logits = hidden · weightᵀ and its two gradients with fp32 accumulation.

    On a GPU bf16 and fp16 operands stay as they are and the output is fp32. On a CPU, whose bf16 GEMMs are up to 90 times
    slower than fp32 ones, they are converted to fp32 first: one fp32 copy of the weight lives as long as the call.
    With `batch_invariant` every GEMM has the same number of rows, missing ones being zeros.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype, batch_invariant: bool = False):
        self.batch_invariant = batch_invariant
        low_precision = hidden.dtype in (torch.bfloat16, torch.float16)
        self.upcast = low_precision and hidden.device.type == "cpu"
        self.mixed = low_precision and not self.upcast
        self.weight = weight.float() if self.upcast else weight
        self.statistics_dtype = statistics_dtype(hidden)
        self.operand_dtype = self.weight.dtype  # of hidden, weight and the logit gradient as GEMM operands
        self.logits_dtype = self.statistics_dtype if logits_dtype == torch.float32 else logits_dtype
        self.grad_hidden_dtype = hidden.dtype

    def operand(self, hidden_chunk: Tensor) -> Tensor:
        """The chunk [C, D] in the dtype that the GEMMs take."""
        return hidden_chunk.to(self.operand_dtype)

    def logits(self, hidden_chunk: Tensor, buffer: Tensor) -> Tensor:
        """hidden_chunk [C, D] · weightᵀ into `buffer[:C]` [C, V], rounded once to `logits_dtype`."""
        num_rows = hidden_chunk.shape[0]
        hidden_chunk = self._padded(hidden_chunk)
        with self._exact():
            self._multiply(hidden_chunk, buffer[: hidden_chunk.shape[0]])
        return buffer[:num_rows]

    def _multiply(self, hidden_chunk: Tensor, out: Tensor) -> Tensor:
        if self.mixed and out.dtype == torch.float32:
            return torch.ops.aten.mm.dtype_out(hidden_chunk, self.weight.t(), torch.float32, out=out)
        if out.dtype == self.operand_dtype:
            return torch.mm(hidden_chunk, self.weight.t(), out=out)
        return out.copy_(torch.mm(hidden_chunk, self.weight.t()))

    def buffer(self, rows: int) -> Tensor:
        """Room for a chunk of logits [rows, V]."""
        return torch.empty(rows, self.weight.shape[0], dtype=self.logits_dtype, device=self.weight.device)

    def grad_hidden(self, grad_logits: Tensor) -> Tensor:
        """dHidden [C, D] in the dtype of hidden."""
        with self._exact():
            grad_hidden = torch.mm(self._padded(grad_logits), self.weight)[: grad_logits.shape[0]]
        return grad_hidden.to(self.grad_hidden_dtype)

    def add_grad_weight(self, grad_logits: Tensor, hidden_chunk: Tensor, grad_weight: Tensor, first: bool) -> None:
        """grad_weight [V, D] fp32 += grad_logitsᵀ · hidden_chunk, accumulated in fp32; the first chunk overwrites it unread."""
        beta = 0 if first else 1
        with self._exact():
            if self.mixed:
                torch.ops.aten.addmm.dtype_out(
                    grad_weight, grad_logits.t(), hidden_chunk, torch.float32, beta=beta, alpha=1, out=grad_weight
                )
            else:
                grad_weight.addmm_(grad_logits.t(), hidden_chunk, beta=beta)

    def _exact(self) -> torch.autocast:
        """The caller's autocast has chosen the inputs' dtype; it must not round what is computed from them."""
        return torch.autocast(self.weight.device.type, enabled=False)

    def _padded(self, rows: Tensor) -> Tensor:
        if not self.batch_invariant:
            return rows
        return F.pad(rows, (0, 0, 0, chunk_rows(0, 0, rows.device.type, batch_invariant=True) - rows.shape[0]))
