"""Attention over a packed row: every sequence sees itself only, without padding and without a [T, T] mask.

A packed row holds several sequences one after the other, [1, T]. The backend "sdpa_packed" runs causal
`scaled_dot_product_attention` once per run of equal-length neighbours, on views of the row; the segment lengths are
Python ints, so nothing waits for the device. The packer sorts a row by length, so that there are few runs.
"varlen" hands the boundaries to torch's own FlashAttention (see `varlen`), "flash_attention_2" to that of the package flash-attn.

The embedded engine's padded batches run through SDPA whatever the backend: in transformers' own flash_attention_2 the host waits
to know the padding, and all keys and values are copied, in every layer for every token. Left to it are models that cap attention
logits, which SDPA cannot, and those whose values are of another width than keys.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward, lazy_import_flash_attention
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

from trapo_train.micro_batch import upload
from trapo_train.models.varlen import WIDEST_HEAD, computed_in, head_widths, varlen_forward, varlen_obstacle
from trapo_train.schema import UserError

logger = logging.getLogger(__name__)

# The names that transformers knows our functions by. What has "flash" in its name it takes for one of its own.
PACKED_IMPLEMENTATION, VARLEN_IMPLEMENTATION, FA2_IMPLEMENTATION = "trapo_packed", "trapo_varlen", "trapo_fa2"
_OURS = {
    "sdpa_packed": PACKED_IMPLEMENTATION,
    "varlen": VARLEN_IMPLEMENTATION,
    "flash_attention_2": FA2_IMPLEMENTATION,
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_UNSAID = -1  # a window that a layer leaves to its mask, which packed rows have none of


def choose_attention(
    attention: str,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    architecture: PretrainedConfig,
    tell: Callable[[str], None] = logger.info,
) -> str:
    """The `attn_implementation` for transformers; a named backend is honoured or refused, what "auto" chose is told. On CUDA it
    takes cuDNN's kernels from this process's SDPA.

    Raises: UserError when flash_attention_2 or varlen is asked for and cannot run.
    """
    if device.type == "cuda":  # cuDNN builds a plan for every shape and keeps it for ever; of ours hardly any comes twice
        torch.backends.cuda.enable_cudnn_sdp(False)
    config = architecture.get_text_config()
    obstacles = {"flash_attention_2": _flash_obstacle(config), "varlen": varlen_obstacle(config)}
    if device.type != "cuda":
        obstacles = dict.fromkeys(obstacles, f"it needs a CUDA device, got {device}")
    elif torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        obstacles = dict.fromkeys(obstacles, f"it needs a GPU of compute capability 8.0, {name} has less")
    elif compute_dtype != torch.bfloat16:
        obstacles = dict.fromkeys(obstacles, f"it needs model.dtype=bfloat16, got {str(compute_dtype).removeprefix('torch.')}")
    if obstacles.get(attention):
        why = obstacles[attention]
        raise UserError(f"model.attention={attention} cannot run: {why}. Use model.attention=sdpa_packed or auto.")
    if attention == "auto":
        refused = dict(takewhile(lambda entry: entry[1], obstacles.items()))
        attention = next((name for name in obstacles if name not in refused), "sdpa_packed")
        tell("; ".join([f"model.attention=auto: {attention}", *(f"{name} cannot run: {why}" for name, why in refused.items())]))
    theirs = getattr(config, "attn_logit_softcapping", None) or getattr(config, "v_head_dim", None)
    return attention if attention == "flash_attention_2" and theirs else _OURS[attention]


def _flash_obstacle(config: PretrainedConfig) -> str | None:
    """Why the package flash-attn cannot run the layers of this (text) model; None where it can."""
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed (pip install 'trapo[flash-attn]')"
    try:
        lazy_import_flash_attention("flash_attention_2")
    except ImportError as error:  # as of one that was built for another torch
        return f"the package flash-attn does not load ({error})"
    widest = max(head_widths(config))
    return f"it needs heads of at most {WIDEST_HEAD} numbers, the model has {widest}" if widest > WIDEST_HEAD else None


def check_architecture(architecture: PretrainedConfig) -> None:
    """Refuse before anything is loaded what `check_attention` would refuse for its class, as some cannot even be built (Falcon).

    Raises: UserError, as that.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(architecture), None)
    if isinstance(model_class, type):
        _check_interface(model_class, model_class.__name__)


def _check_interface(model: PreTrainedModel | type, name: str) -> None:
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"model: packing needs a model that uses transformers' attention interface, {name} does not. "
            "Use an architecture of transformers itself that does, with model.trust_remote_code=false."
        )


def check_attention(model: PreTrainedModel) -> None:
    """Refuse a model whose attention would be silently wrong on a packed row.

    Raises: UserError naming what the model does that the backend cannot do.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    other_types = sorted(set(getattr(config, "layer_types", None) or []) - _LAYER_TYPES)
    _check_interface(model, name)
    if other_types or getattr(config, "attention_chunk_size", None):
        kinds = ", ".join(other_types) or "chunked attention"
        raise UserError(
            f"model: packing supports full and sliding-window causal attention, {name} has {kinds}. "
            "Use a model with softmax attention over one contiguous window."
        )
    if model.config._attn_implementation in _OURS.values() and getattr(config, "attn_logit_softcapping", None):
        raise UserError(
            f"model.attention=sdpa_packed and varlen cannot cap attention logits, {name} caps them at "
            f"{config.attn_logit_softcapping}. Use model.attention=flash_attention_2 with model.dtype=bfloat16."
        )


def longrope_limit(architecture: PretrainedConfig) -> int | None:
    """Tokens of the longest sequence that leaves the others beside it as they are; None for a model without LongRoPE (Phi 3 and 4).

    LongRoPE has short and long factors, and transformers takes those that the longest sequence of a whole pass needs, for all of
    its rows and packed sequences. "dynamic" RoPE depends on it, too, but only beyond the model's positions.
    """
    ropes = getattr(architecture.get_text_config(), "rope_parameters", None) or {}
    by_layer = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    limits = [rope["original_max_position_embeddings"] for rope in by_layer if rope.get("rope_type") == "longrope"]
    return min(limits, default=None)


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise UserError for a model that computes something else of a packed row than of its sequences alone."""
    chosen, device = model.config._attn_implementation, model.get_input_embeddings().weight.device
    if chosen not in _OURS.values():
        return
    lengths, training = (3, 2), model.training
    parts = [torch.arange(length, device=device)[None] for length in lengths]
    model.eval()
    with plain_attention(model):
        alone = torch.cat([model.base_model(input_ids=part, use_cache=False).last_hidden_state for part in parts], 1).float()
    model.set_attn_implementation(PACKED_IMPLEMENTATION)  # which runs in host memory
    try:
        row = torch.cat(parts, 1)
        inputs = {"input_ids": row, "position_ids": row, **segment_arguments(model, lengths, device)}
        packed = model.base_model(**inputs, use_cache=False).last_hidden_state.float()
    finally:
        model.set_attn_implementation(chosen)
        model.train(training)
    error = (packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6)
    if not error < 1e-3:
        raise UserError(
            f"model: a packed row must give what its sequences give alone; that of {type(model).__name__} is off by "
            f"{float(error):.2g} of the largest hidden state. Choose another model."
        )


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, attention is transformers' own in plain PyTorch, which runs on every device and in every type: FlashAttention would
    refuse weights that are still in float32 or in host memory."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def segment_arguments(model: PreTrainedModel, segment_lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the model's body that carry the boundaries of a packed row to its attention."""
    if model.config._attn_implementation in _OURS.values():
        # transformers hands a 4-d mask through unread, so no mask is built and no position is compared.
        ours = {"segment_lengths": tuple(segment_lengths), "attention_mask": torch.empty(1, 1, 0, 0, device=device)}
        if model.config._attn_implementation not in (VARLEN_IMPLEMENTATION, FA2_IMPLEMENTATION):
            return ours
        return ours | {"boundaries": _boundaries(segment_lengths, device)}
    boundaries = _boundaries(segment_lengths, device)
    longest = max(segment_lengths)
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _boundaries(segment_lengths: Sequence[int], device: torch.device) -> Tensor:
    """Int32 [segments + 1]: where each segment of the row starts, and its tokens in all."""
    boundaries = F.pad(torch.tensor(segment_lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return upload(boundaries, device)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = _UNSAID,
    boundaries: Tensor | None = None,
    flash: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of a packed row; without `segment_lengths`, transformers' own SDPA.

    Args:
        query: [1, heads, T, head_dim]; `key` and `value` [1, kv_heads, T, head_dim].
        segment_lengths: tokens of each sequence of the row, summing to T.
        sliding_window: tokens that a query sees, itself included; None for all earlier ones. Left out, it is the module's own.
        boundaries: int32 [segments + 1], where segments start, and T; with them one varlen kernel runs in place of an SDPA call
            per run of equal lengths.
        flash: with boundaries, the varlen kernel is that of the package flash-attn.

    Returns: [1, T, heads, head_dim] and no attention weights.
    """
    for unsupported in ("softcap", "s_aux", "position_bias"):  # transformers' SDPA would leave them out without a word
        if kwargs.get(unsupported) is not None:
            raise UserError(f"attention: {type(module).__name__} asks for {unsupported}, which SDPA cannot do. Use another model.")
    if segment_lengths is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise UserError(
                f"packed attention: {type(module).__name__} did not pass segment_lengths on to its attention. "
                "Use an architecture of transformers itself."
            )
        options = {"dropout": dropout, "scaling": scaling}  # a window is in the mask
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    if sliding_window == _UNSAID:
        sliding_window = _own_window(module, max(segment_lengths))
    if flash:
        options = {"dropout": dropout, "softmax_scale": scaling, "sliding_window": sliding_window}
        return _flash_forward((query, key, value), boundaries, max(segment_lengths), **options), None
    if boundaries is not None:
        row = (boundaries, max(segment_lengths))
        return varlen_forward(query, key, value, *row, sliding_window, scaling), None
    runs = [(length, len(list(group))) for length, group in groupby(segment_lengths)]
    sizes = [length * count for length, count in runs]
    # split, not slices: its backward is one concatenation instead of one full-row addition per run
    parts = [states[0].split(sizes, dim=1) for states in (query, key, value)]
    outputs = [
        _attend_run(length, count, *qkv, sliding_window=sliding_window, dropout=dropout, scaling=scaling)
        for (length, count), *qkv in zip(runs, *parts, strict=True)
    ]
    return torch.cat(outputs).unsqueeze(0), None


def _own_window(module: nn.Module, longest: int) -> int | None:
    """The sliding window of a layer that does not hand it to its attention, as those of Qwen2 MoE.

    Raises: UserError where the layer has none, its configuration does, and the longest segment is longer than that.
    """
    window = getattr(module, "sliding_window", None)
    if window is not None:
        return window
    config = getattr(module, "config", None)
    configured, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if configured is None or longest <= configured or (kinds and kinds[module.layer_idx] == "full_attention"):
        return None
    raise UserError(
        f"packed attention: {type(module).__name__} must hand on its sliding window, it hands on none, and its configuration has "
        f"one of {configured} tokens. Keep prompts and responses together within that (data.max_prompt_tokens, "
        "rollout.max_response_tokens), or choose another model."
    )


def _flash_forward(qkv: Sequence[Tensor], boundaries: Tensor, longest: int, **options: Any) -> Tensor:
    """`varlen_forward` with the kernel of the package flash-attn, as transformers calls it for rows that it knows to be packed; it
    takes the `options`."""
    query = qkv[0]
    return _flash_attention_forward(
        *(x.transpose(1, 2) for x in qkv),  # [1, T, heads, head_dim]
        attention_mask=None,
        query_length=query.shape[2],
        is_causal=True,
        **options,
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=longest,
        max_length_k=longest,
        target_dtype=computed_in(query),  # of what norms have left in fp32
        attn_implementation="flash_attention_2",
    )


def _attend_run(
    length: int,
    count: int,
    *qkv: Tensor,
    sliding_window: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Causal attention of `count` neighbouring segments of `length` tokens; `qkv` are [heads, count · length, head_dim]."""
    q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)  # views [count, heads, length, head_dim]
    mask = None
    if sliding_window is not None and length > sliding_window:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cpu" and not _flash_runs(q, mask):
        # Of CUDA's kernels only flash takes fewer key heads; the other that does holds every score.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    output = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2).flatten(0, 1)  # [count · length, heads, head_dim]


def _flash_runs(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a GPU's SDPA may take its flash kernel, which knows no mask and no fp32."""
    return mask is None and computed_in(q).itemsize == 2 and q.shape[-1] <= WIDEST_HEAD


AttentionInterface.register(PACKED_IMPLEMENTATION, packed_attention_forward)
AttentionInterface.register(VARLEN_IMPLEMENTATION, packed_attention_forward)
AttentionInterface.register(FA2_IMPLEMENTATION, functools.partial(packed_attention_forward, flash=True))
for _name in _OURS.values():
    AttentionMaskInterface.register(_name, sdpa_mask)  # generate() runs padded batches through SDPA's mask
