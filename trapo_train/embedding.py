"""Embeddings in the compute type: autocast leaves them in that of their weight, FSDP and a sampler in 16 bits do not.

Left in float32 they would make the residual stream of a single process float32, between layers that compute in 16 bits: other
numbers than on several ranks, and activations of twice the size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def embed_in_autocasts_type(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Have every embedding, of tokens or positions, give autocast's type where that is on; a factor inside one (Gemma 3) is rounded
    to `compute_dtype`, as transformers does with weights in that type."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_cast)
            factor = getattr(module, "embed_scale", None)
            if isinstance(factor, Tensor):
                factor.copy_(factor.to(compute_dtype))


def _cast(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output
