"""Chunk size and logits dtype: is the pinned chunk the right one, and what does rounding the logits save and cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import SMALL, TRAPO_MICRO_BATCH

ABOUT = __doc__
_OURS = ("floor, 3 GEMMs", "ours (triton)", "ours (torch)", "ours (native)")


def cases(device: str, small: bool) -> list[Case]:
    """Chunks of a few sizes at one shape; on a GPU also bf16 logits. On a CPU inputs are fp32, so logits are fp32 too."""
    if small:
        sizes, shape, dtypes, dtype = (128,), (256, *SMALL[1:]), ("float32",), "float32"
    elif device == "cuda":
        sizes, shape, dtypes, dtype = (4096, 4736, 2048, 8192, 1024), TRAPO_MICRO_BATCH, ("float32", "bfloat16"), "bfloat16"
    else:
        sizes, shape, dtypes, dtype = (128, 256, 512), (1024, 256, 32768), ("float32",), "float32"
    return [
        Case("chunk", "trapo", *shape, dtype, chunk_rows=rows, logits_dtype=logits, contenders=_OURS)
        for logits in dtypes
        for rows in sizes
    ]
