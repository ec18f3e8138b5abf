"""LoRA through PEFT, inside the model's own class: adapters beside its linear layers, everything else frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trapo_train.schema import MissingPackage, UserError, check


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that are trained in place of the weights."""

    rank: int = 16
    """Rank of the adapters, at least 1."""
    alpha: float = 32.0
    """The adapter's product is scaled by alpha / rank (or alpha / √rank), above 0."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are dropped in training, in [0, 1)."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get one, such as [q_proj, v_proj]; all-linear for all but the output head."""
    rank_stabilised: bool = False
    """Scale by alpha / √rank (arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        check(
            self,
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < float("inf"), "a finite number above 0"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            (
                "target_modules",
                bool(self.target_modules) and (self.target_modules == "all-linear" or not isinstance(self.target_modules, str)),
                "all-linear or a list of names such as [q_proj, v_proj]",
            ),
        )


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze the model and put a trainable adapter beside each of the configured layers.

    Raises: MissingPackage naming the extra; UserError for a module that the model does not have, its output head, or one that is
        not linear.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPackage("model.lora needs PEFT: pip install 'trapo[peft]'.") from error
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings()).split(".")[-1]
    if config.target_modules == head or (not isinstance(config.target_modules, str) and head in config.target_modules):
        raise UserError(
            f"model.lora.target_modules must not name the output head {head!r}, which runs inside the fused loss. Leave it out."
        )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        exclude_modules=[head],
        use_rslora=config.rank_stabilised,
        task_type="CAUSAL_LM",
    )
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    unknown = [] if isinstance(config.target_modules, str) else [name for name in config.target_modules if name not in names]
    if unknown:
        raise UserError(f"model.lora.target_modules must name layers of the model, it has no {', '.join(unknown)}.")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(settings, model)
    except ValueError as error:  # which prints the module, whole
        raise UserError(
            f"model.lora.target_modules must name linear layers, got {config.target_modules}, of which PEFT refuses one "
            f"({str(error).splitlines()[0][:100]}…). Leave it out."
        ) from error
    others = {
        name: type(layer.base_layer).__name__ for name, layer in adapted_layers(model) if type(layer.base_layer) is not nn.Linear
    }
    if others:
        name, kind = next(iter(others.items()))
        raise UserError(
            f"model.lora.target_modules must name linear layers, {name} is of type {kind}, whose adapter could not be merged. "
            "Leave it out."
        )


def hold_frozen(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Keep the frozen weights of linear layers and embeddings in `compute_dtype`, which they are computed with in anyway: in
    bfloat16 half of their memory, and no cast for every pass and every generated token."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.requires_grad:
            module.to(compute_dtype)


def adapted_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The layers that have an adapter, with their names."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]


def has_lora(model: PreTrainedModel) -> bool:
    """Whether `add_lora` was called on the model."""
    return any(name.endswith("lora_A") for name, _ in model.named_modules())


@contextmanager
def without_lora(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is the one that the adapters were added to."""
    layers = [layer for _, layer in adapted_layers(model)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def enable(enabled: bool) -> None:
        for layer in layers:
            layer.enable_adapters(enabled)
        for parameter in trainable:  # disabling freezes the adapters; FSDP2, if this is its first pass, would not reduce in fp32
            parameter.requires_grad_(True)

    enable(False)
    try:
        yield
    finally:
        enable(True)


def merged_weights(
    model: PreTrainedModel, names: Iterable[str], whole: Callable[..., Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors `names` (of parameters and buffers) in `dtype`, with every adapter added to its layer before that is rounded,
    under the names of the plain model.

    `whole` gives a tensor by its name, in a type that is given or its own; it is asked for them one after the other.
    """
    layers = {f"{name}.base_layer.weight": (name, module) for name, module in adapted_layers(model)}
    for name in names:
        if ".lora_" in name:
            continue
        if name in layers:
            path, layer = layers[name]
            (adapter,) = layer.active_adapters
            weight, a, b = (whole(n) for n in (name, *(f"{path}.lora_{part}.{adapter}.weight" for part in "AB")))
            weight = (weight + layer.scaling[adapter] * b @ a).to(dtype)
        else:
            weight = whole(name, dtype)
        yield name.replace(".base_layer.", "."), weight
