"""What the launchers share: the pinned row tile, the transform's arguments, the buffers of what comes out."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from trapo_kernels.backends.logits import LogitTransform, RowStatistics, split_temperature

# In every launch: a multiplication and an addition may become one. Left open, the environment decides the bits (triton 3.9 warns).
OPTIONS = {"enable_fp_fusion": True}
# One tile for every shape: 2048 fp32 logits over 8 warps are 8 registers per thread and tensor, two 16-byte loads. On sm_90 the
# policy kernel of TRAPO takes 40 registers compiled by triton 3.9 (benchmarks/results/offline_compile.md): 6 rows are on a
# multiprocessor at once, with 48 KiB of them on the way. Compiled by triton 3.6 (`python -m benchmarks.offline_compile` under it)
# it takes 64: 4 rows, 32 KiB. The speed of this tile awaits a GPU.
TILE = OPTIONS | {"BLOCK_V": 2048, "num_warps": 8}


def tile(vocab_size: int) -> dict[str, int]:
    """BLOCK_V and launch options for a row of `vocab_size` logits; small vocabularies fit one smaller tile."""
    return TILE | {"BLOCK_V": min(TILE["BLOCK_V"], triton.next_power_of_2(vocab_size))}


def transform_arguments(transform: LogitTransform, logits: Tensor) -> dict[str, object]:
    """bias, temperature and softcap as kernel arguments; an absent pointer is the logits' own and never read."""
    row_temperature, temperature = split_temperature(transform.temperature)
    return {
        "bias_ptr": logits if transform.bias is None else transform.bias.contiguous(),
        "temperature_ptr": logits if row_temperature is None else row_temperature.float().contiguous(),
        "temperature": temperature,
        "softcap": 1.0 if transform.softcap is None else float(transform.softcap),
        "HAS_BIAS": transform.bias is not None,
        "HAS_ROW_TEMPERATURE": row_temperature is not None,
        "HAS_SOFTCAP": transform.softcap is not None,
    }


def aligned(count: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Room for `count` times [size] in fp32, each 16-byte aligned whatever `size` is, or Triton would compile anew for each way
    they are not."""
    return torch.empty(count, -(-size // 4) * 4, dtype=torch.float32, device=device)[:, :size].unbind()


def row_outputs(logits: Tensor) -> RowStatistics:
    """Room for the statistics [C] of a chunk in fp32."""
    return RowStatistics(*aligned(len(RowStatistics._fields), logits.shape[0], logits.device))


def gradient_buffer(logits: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """[C, V] of `grad_dtype` over the memory of `logits` (row r starts where row r of the logits does), or new if it is wider."""
    if grad_dtype == logits.dtype:
        return logits
    if grad_dtype.itemsize > logits.dtype.itemsize:
        return torch.empty_like(logits, dtype=grad_dtype)
    return logits.view(grad_dtype)[:, : logits.shape[1]]
