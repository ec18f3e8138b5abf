"""The GEMMs of a CPU: what suits those in fp32, and which of them `csrc/cpu/gemm.h` does instead of torch."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trapo_kernels.backends import native


class Tuning(NamedTuple):
    """What suits the fp32 GEMMs of a processor."""

    most_rows: int  # per chunk of at most _LARGE_CHUNK logits, or of 512 rows
    block: int  # tokens per GEMM into the logits
    gradient_in_columns: bool  # dHiddenᵀ = weightᵀ · dLogitsᵀ instead of dHidden = dLogits · weight
    logits_in_tiles: bool = False  # the GEMM into the logits is that of csrc/cpu/tiles.cpp, whole, instead of torch's


# MKL 2024.2 has code of its own for Intel's processors. In fp32, 2 cores, D = 896, V = 32768, 128 rows unless said otherwise:
#   AMD EPYC     CPU time per row of all GEMMs, V = 151936: 11.1 ms in chunks of 64 rows, 9.7 of 128, 8.9 of 256, 9.1 of 384. MKL
#                prepares an operand before it multiplies, and 1024 rows of the weight stay in cache meanwhile: 0.91 ms per row into
#                the logits instead of 1.17. dHidden takes 0.67 ms per row transposed, 0.78 as it is.
#                With AVX512_BF16 (Zen 4), GFLOP/s: into the logits 145 to 167, in the tiles of csrc/cpu/tiles.cpp 183 to 193; for
#                dHidden transposed 177 to 193, in tiles 168 to 183; for dWeight 183 to 208, in tiles 165 to 175. Into the logits of
#                1 to 64 rows tiles take 0.5 to 0.9 of MKL's time; on one thread up to 1.8 of it below 16 rows.
#   Intel Xeon   time per row of all GEMMs: 0.93 ms in chunks of 64 rows, 0.65 of 128, 0.56 of 256, 0.53 of 384, 0.52 of 512. Into
#                the logits, 176 rows: 261 GFLOP/s in blocks of 1024 tokens, 289 of 8192; 322 of them and 265 in one at D = 2048,
#                V = 151936, 256 rows. dHidden: 264 GFLOP/s transposed, 323 as it is.
#                Whole calls of 2048 rows in chunks of 512, 683 and 1024: 1.10, 1.09, 1.05 × the bare GEMMs, bf16 1.66, 1.58, 1.54.
_INTEL = Tuning(most_rows=1024, block=8192, gradient_in_columns=False)
_OTHER = Tuning(most_rows=256, block=1024, gradient_in_columns=True)
_OTHER_WITH_TILES = _OTHER._replace(logits_in_tiles=True)


_LARGE_CHUNK = 2**25  # 128 MiB in fp32: as much as 1024 rows of 32768 tokens


def most_rows(vocab_size: int) -> int:
    """The most rows of a chunk that suit this processor."""
    return min(tuning().most_rows, max(512, _LARGE_CHUNK // vocab_size))


@functools.cache
def tuning() -> Tuning:
    """What was found best for a processor of this make."""
    info = Path("/proc/cpuinfo")
    if "GenuineIntel" in (info.read_text() if info.exists() else platform.processor()):
        return _INTEL
    return _OTHER_WITH_TILES if native.BF16_UNITS == "AVX512_BF16" else _OTHER


# Of bf16 operands, Xeon with AMX, 2 cores, D = 896, V = 32768: 1030 GFLOP/s into the logits of 512 rows at once, 970 in blocks of
# 8192 tokens (256 rows: 890 and 800); dHidden 1370 in columns, 1160 in rows; dWeight 1090. Those in fp32 run at 310 to 360. An EPYC
# with AVX512_BF16: csrc/cpu/tiles.cpp.


def supports(dtype: torch.dtype) -> bool:
    """Whether GEMMs take operands of this 16-bit dtype as they are: bf16 where there are AMX or AVX512_BF16, sums in fp32."""
    return dtype == torch.bfloat16 and bool(native.BF16_UNITS)


def product(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> Tensor:
    """out [M, N] fp32 = beta · out + a [M, K] · b [K, N] by `csrc/cpu/gemm.h`, both bf16 or both fp32; with beta 0 `out` is not
    read."""
    native.gemm(in_lines(a), in_lines(b), out, beta)
    return out


def in_lines(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows or its columns lie in memory one after the other."""
    rows, columns = matrix.shape
    across, along = matrix.stride()
    in_rows = along == 1 and across >= columns
    in_columns = across == 1 and along >= rows
    return matrix if in_rows or in_columns else matrix.contiguous()
