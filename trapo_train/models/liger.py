"""Liger's Triton kernels for norms, rotary embeddings and MLP of a loaded model; its heads and losses stay out, ours are there."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from trapo_train.extras import lacks
from trapo_train.schema import MissingPackage, UserError

logger = logging.getLogger(__name__)

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def apply_liger(
    model: PreTrainedModel, wanted: bool | str, device: torch.device, tell: Callable[[str], None] = logger.info
) -> bool:
    """Patch the model's layers with Liger's kernels; returns whether that was done.

    Rotary embeddings are a function of the model's module in transformers: from then on every model of this type in the process
    uses Liger's.

    Args:
        wanted: True does it or raises, "auto" does it where it can run, False does nothing.
        tell: what "auto" chose is told to it.

    Raises: MissingPackage naming the extra; UserError where the kernels do not run on `device` or for a model type without kernels.
    """
    if wanted is False:
        return False
    try:
        patch = _patch_function(model.config.model_type, device)
    except UserError as error:
        if wanted == "auto":
            tell(f"model.liger=auto: not used, {error}")
            return False
        raise
    defaults = {name: parameter.default for name, parameter in inspect.signature(patch).parameters.items()}
    losses = {name: False for name in _LOSSES if name in defaults}
    patch(model=model, **losses)  # what else Liger leaves off by itself, such as GLM-4's rotary embeddings, it does not have
    if wanted == "auto":
        tell(f"model.liger=auto: {', '.join(sorted(name for name, on in (defaults | losses).items() if on is True))}")
    return True


def _patch_function(model_type: str, device: torch.device) -> Any:
    """Liger's function for models of this type."""
    try:
        from liger_kernel import transformers as liger
    except ImportError as error:
        raise MissingPackage(lacks("model.liger", "liger_kernel", "liger")) from error
    if device.type != "cuda":
        raise UserError(f"model.liger: its kernels need a CUDA device, got {device}. Use model.liger=false, or auto.")
    prefix = "apply_liger_kernel_to_"
    known = sorted(name.removeprefix(prefix) for name in liger.__all__ if name.startswith(prefix))
    if model_type not in known:
        raise UserError(
            f"model.liger: the model's type must be one that liger-kernel has kernels for ({', '.join(known)}), got {model_type}. "
            "Use model.liger=false, or auto."
        )
    return getattr(liger, prefix + model_type)
