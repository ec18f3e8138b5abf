"""Where autocast alone would differ from a model whose weights are in the compute type, as FSDP gathers them and a 16-bit sampler
holds them."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trapo_train.models.varlen import computed_in

_ROUTERS = ("Router", "Gate")  # how transformers ends the names of their classes, beside others: these stand beside `experts`
_JETMOE = "TopKGating"  # whose experts have other names


def cast_embeddings(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Have every embedding, of tokens or positions, give autocast's type where that is on; a factor inside one (Gemma 3) is rounded
    to `compute_dtype`, as transformers does with weights in that type.

    Autocast leaves embeddings in the type of their weight, FSDP and a sampler in 16 bits do not. Left in float32 they would make
    the residual stream of a single process float32: other numbers than on several ranks, and activations of twice the size.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, inputs, output: output.to(computed_in(output)))
            factor = getattr(module, "embed_scale", None)
            if isinstance(factor, Tensor):
                factor.copy_(factor.to(compute_dtype))


def cast_routers(model: PreTrainedModel) -> None:
    """Have the routers of a mixture of experts run without autocast, on weights in its type, or in that of their input where
    FSDP has left them in float32; but for what transformers keeps in float32.

    Most raise input and weight to float32 (DeepSeek, GLM), which autocast would undo: tokens would reach other experts than on
    several ranks and in a sampler.
    """
    for path, module in model.named_modules():
        name, holder = type(module).__name__, model.get_submodule(path.rpartition(".")[0])
        if name.endswith(_JETMOE) or (name.endswith(_ROUTERS) and hasattr(holder, "experts")):
            module.kept_in_float32 = {name for name, _ in module.named_parameters() if stays_in_float32(model, f"{path}.{name}")}
            module.forward = types.MethodType(_route, module)


def _route(router: nn.Module, *arguments: Any, **options: Any) -> Any:
    hidden, *others = arguments
    kind, dtype = hidden.device.type, computed_in(hidden)
    if not router.kept_in_float32 and not torch.is_autocast_enabled(kind):  # its weights have the type of its input
        return type(router).forward(router, *arguments, **options)
    weights = {
        f"router.{name}": weight if name in router.kept_in_float32 else weight.to(dtype)
        for name, weight in router.named_parameters()
    }
    with torch.autocast(kind, enabled=False):
        return torch.func.functional_call(_OwnForward(router), weights, (hidden.to(dtype), *others), options)


class _OwnForward(nn.Module):
    """What its class computes in a router, as a module without its hooks, which the call that is under way fires."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return type(self.router).forward(self.router, *arguments, **options)


def routers_in_float32(layer: nn.Module) -> list[nn.Module]:
    """The routers in a layer, after `cast_routers`, that transformers keeps something of in float32."""
    return [module for module in layer.modules() if getattr(module, "kept_in_float32", None)]


def stays_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers keeps the parameter or buffer of this name in float32 in a model of bfloat16; its other list is for
    float16."""
    return any(part in name for part in model._keep_in_fp32_modules_strict or ())
