"""Which versions of Triton may pipeline a GEMM on asynchronous tensor cores; no import of Triton, so that anyone may ask."""

from __future__ import annotations


def has_fences(triton_version: str) -> bool:
    """Whether that Triton orders the copies of a pipeline before the asynchronous tensor cores of sm_90 to sm_110 that read them.

    Before 3.8, some 3.7 excepted, a tile could be multiplied before it is there (triton-lang/triton#9610).
    """
    return tuple(int(part) for part in triton_version.split(".")[:2]) >= (3, 8)
