"""Bytes and FLOP on paper: the peak memory formula beside each measurement, and predictions for a GPU that is not at hand.

    python -m benchmarks.account > benchmarks/results/TODO.md        # what awaits a GPU, with the arithmetic

A prediction is arithmetic, never a measurement. Its two rates per GPU are those of a bf16 GEMM and of a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.problem import Case
from trapo_kernels import head_memory
from trapo_kernels.backends.gemm import chunk_rows, grad_weight_dtype


class Rates(NamedTuple):
    """A GPU's bf16 GEMM, and bytes read plus bytes written per second of a large copy, as measured on that kind of machine."""

    gpu: str
    gemm_tflops: float
    copy_tbps: float

    def gemm_ms(self, flop: float) -> float:
        """Time of a GEMM, or of several."""
        return flop / (self.gemm_tflops * 1e12) * 1e3

    def copy_ms(self, num_bytes: float) -> float:
        """Time of moving so many bytes."""
        return num_bytes / (self.copy_tbps * 1e12) * 1e3


H200, H100 = Rates("H200", 790.0, 4.3), Rates("H100", 798.0, 3.0)
MULTIPROCESSORS, TILE = 132, (128, 256)  # of either, and of the GEMMs of a chunk, as far as known
L2_TBPS = 5.5  # what the L2 of either gives to all multiprocessors: a cautious guess
LAUNCHES, LAUNCH_US = 150, 2.0  # of a loss at most, on vectors of N (scoring: a dozen); of each behind another, a guess


def memory_formula(contender: str, case: Case, device_type: str) -> dict[str, int] | None:
    """Bytes that our backends hold at their peak above the inputs, by what they hold: `head_memory`, and rows of dHidden that no
    GEMM reaches; None for contenders and settings whose allocations it does not state."""
    ours = contender.startswith("ours") and "reference" not in contender and "_fused" not in contender
    if not ours or case.chunk_rows or case.logits_dtype != "float32" or case.setting:
        return None
    dtype, scores = getattr(torch, case.dtype), case.job == "score"
    rows = max(1, int(case.num_rows * case.active))
    sizes, how = (rows, case.hidden_size, case.vocab_size), {"grad_weight": not scores, "in_place": "torch" not in contender}
    parts = head_memory(*sizes, dtype=dtype, device_type=device_type, **how)
    if scores:
        held = {name: parts[name] for name in ("logits", "weight")}
        copied = chunk_rows(*sizes, device_type) * case.hidden_size * dtype.itemsize
        return held if device_type == "cpu" else held | {"hidden chunk": copied}
    return parts | {"grad_hidden": case.num_rows * case.hidden_size * dtype.itemsize}


class Plan(NamedTuple):
    """A way through the head: its GEMMs and its floor's, bytes per fp32 logit that its row kernels move, GEMMs that write fp32
    logits, the share of rows that take part, whether the head is trained, rows per chunk (0: the backend's own rule), bytes from
    L2 for every 128 · 128 · 64 products of a kernel whose logits stay on the chip."""

    name: str
    gemms: float
    floor: int
    row_bytes: int
    wide_gemms: int
    active: float = 1.0
    trained: bool = True
    chunk: int = 0
    l2_bytes: int = 0


SINGLE_PASS = Plan("single pass, `triton`", 3, 3, 4 + 4 + 2, 1)
SCORING = Plan("scoring, `triton`", 1, 1, 4, 1, trained=False)
PLANS = [
    SINGLE_PASS,
    Plan("single pass, `native`: a row stays in shared memory", 3, 3, 4 + 2, 1),
    Plan("two passes, `triton`", 4, 3, 4 + 4 + 4 + 2, 2),
    SINGLE_PASS._replace(name="single pass, half of the rows active", active=0.5),
    Plan("single pass, frozen head", 2, 3, 4 + 4 + 2, 1, trained=False),
    SINGLE_PASS._replace(name="single pass, batch_invariant=True", chunk=1024),
    SCORING,
    Plan("scoring, `native_fused`", 1, 1, 0, 0, trained=False, l2_bytes=16 << 10),  # 128 × 256, weight tiles for two blocks
    Plan("scoring, `triton_fused`", 1, 1, 0, 0, trained=False, l2_bytes=32 << 10),  # 128 × 128
]


class Prediction(NamedTuple):
    """Milliseconds of the parts, and the ratio to the floor if the GEMMs' own extra traffic hides behind their arithmetic
    (`hidden`) or adds up (`exposed`)."""

    gemms_ms: float
    floor_ms: float
    row_kernels_ms: float
    rounding_ms: float
    wide_logits_ms: float
    grad_weight_ms: float
    waves_ms: float
    l2_ms: float
    launches_ms: float
    chunks: int

    @property
    def hidden(self) -> float:
        return (self.gemms_ms + self.row_kernels_ms + self.rounding_ms) / self.floor_ms

    @property
    def exposed(self) -> float:
        more_ms = self.wide_logits_ms + self.grad_weight_ms + self.waves_ms + self.launches_ms
        return max(self.hidden + more_ms / self.floor_ms, self.l2_ms / self.floor_ms)


def rounds(rows: int, columns: int) -> float:
    """How much longer than its work a GEMM of [rows, columns] takes whose last round of tiles leaves multiprocessors idle."""
    tiles = -(-rows // TILE[0]) * -(-columns // TILE[1])
    return -(-tiles // MULTIPROCESSORS) * MULTIPROCESSORS * TILE[0] * TILE[1] / (rows * columns)


def predict(case: Case, plan: Plan = SINGLE_PASS, rates: Rates = H200) -> Prediction:
    """The account of a plan with fp32 logits and bf16 inputs on one GPU."""
    n, d, v = round(case.num_rows * plan.active), case.hidden_size, case.vocab_size
    rows = min(n, plan.chunk or chunk_rows(n, d, v, "cuda"))
    chunks = -(-n // rows)
    one = rates.gemm_ms(case.gemm_flop)
    forward_only = plan.gemms == 1
    held = grad_weight_dtype(n, d, v, torch.bfloat16, torch.bfloat16, "cuda", batch_invariant=plan.chunk > 0)
    in_fp32 = plan.trained and held == torch.float32
    return Prediction(
        gemms_ms=plan.gemms * one * plan.active,
        floor_ms=plan.floor * one,
        row_kernels_ms=rates.copy_ms(plan.row_bytes * n * v),
        rounding_ms=0.0 if forward_only else rates.copy_ms(6 * n * d + (6 * v * d if in_fp32 else 0)),
        wide_logits_ms=rates.copy_ms(2 * n * v * plan.wide_gemms),
        grad_weight_ms=rates.copy_ms((2 * chunks - 1) * 4 * v * d) if in_fp32 else 0.0,
        waves_ms=0.0 if forward_only else max(0.0, rounds(rows, d) / rounds(case.num_rows, d) - 1) * one * plan.active,
        l2_ms=plan.l2_bytes * (n * v * d / (128 * 128 * 64)) / (L2_TBPS * 1e12) * 1e3,
        launches_ms=0.0 if forward_only else LAUNCHES * LAUNCH_US / 1e3,
        chunks=chunks,
    )


if __name__ == "__main__":
    from benchmarks.todo import todo

    print(todo(), end="")
