"""torch's own FlashAttention over a packed row: one varlen kernel for all sequences, told where each begins."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import PretrainedConfig

WIDEST_HEAD = 256  # of FlashAttention's kernels, be it torch's or the package's


def varlen_obstacle(config: PretrainedConfig) -> str | None:
    """Why `varlen_attn` cannot run the layers of this (text) model on a CUDA device in 16 bits; None where it can."""
    missing = {"scale", "window_size", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters)
    if missing:
        return f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(missing))}, that of torch 2.13 has"
    if getattr(config, "attn_logit_softcapping", None):
        return f"it cannot cap attention logits, the model caps them at {config.attn_logit_softcapping}"
    if getattr(config, "v_head_dim", None):
        return "it needs values as wide as keys, the model has some of another width (v_head_dim)"
    unfit = [width for width in head_widths(config) if width > WIDEST_HEAD or width % 8]
    return f"it needs heads of a multiple of 8 up to {WIDEST_HEAD} numbers, the model has {unfit[0]}" if unfit else None


def head_widths(config: PretrainedConfig) -> set[int]:
    """Numbers in a head, of each kind of layer."""
    widths = {getattr(config, name, None) for name in ("head_dim", "global_head_dim")} - {None}
    return widths or {config.hidden_size // config.num_attention_heads}


def varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    sliding_window: int | None,
    scaling: float | None,
) -> Tensor:
    """Causal attention inside each segment of a packed row.

    Args: query [1, heads, T, head_dim]; key and value [1, kv_heads, T, head_dim]; boundaries: int32 [segments + 1], where each
        segment starts, and T; longest: tokens of the longest; sliding_window: tokens that a query sees, itself included.

    Returns: [1, T, heads, head_dim].
    """
    dtype = computed_in(query)  # autocast knows SDPA, but not this op; norms of query and key may have left them in fp32
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [T, heads, head_dim]
    left = -1 if sliding_window is None else sliding_window - 1  # tokens before the query's own
    out = varlen_attn(
        q,
        k,
        v,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.unsqueeze(0)


def computed_in(tensor: Tensor) -> torch.dtype:
    """The type that a matrix product of `tensor` is computed in: autocast's where that is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
