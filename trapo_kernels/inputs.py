"""A head's inputs as the public functions take them, checked and in the autocast dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trapo_kernels import checks, dispatch
from trapo_kernels.backends.logits import statistics_dtype
from trapo_kernels.lora import LoraHead


class Inputs(NamedTuple):
    """A head's checked inputs, in the autocast dtype where autocast is on; lora_a with its scaling, in fp32 (fp64)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


def prepared(where: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraHead | None, backend: str) -> Inputs:
    """The inputs as the op takes them; raises for what breaks a rule."""
    dispatch.check_name(where, backend)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    checks.head(where, hidden, weight, bias)
    if lora is None:
        return Inputs(hidden, weight, bias, None, None)
    checks.is_a(where, "lora", lora, LoraHead, "LoraHead(a, b, scaling)")
    lora = lora.autocast(hidden.dtype) if _autocasts(hidden.device.type) else lora
    checks.lora_fits(where, lora.a, lora.b, hidden, weight)
    return Inputs(hidden, weight, bias, lora.scaled_a(statistics_dtype(hidden)), lora.b)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to the autocast dtype where autocast is on, as torch.nn.functional.linear does.

    A float32 weight is left to the op, which computes in the dtype of hidden and returns the weight's gradient in float32.
    """
    device_type = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if not _autocasts(device_type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(x: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype in dtypes else x

    low = (torch.bfloat16, torch.float16)
    return cast(hidden, torch.float32, *low), cast(weight, *low), cast(bias, torch.float32, *low)


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
