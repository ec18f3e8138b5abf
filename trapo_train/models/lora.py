"""LoRA through PEFT, inside the model's own class: adapters beside its linear layers, everything else frozen."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from trapo_train.extras import why_no_peft
from trapo_train.models.autocast import stays_in_float32
from trapo_train.schema import MissingPackage, UserError, check

logger = logging.getLogger(__name__)


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
    """Names of the linear layers that get one, such as [q_proj, v_proj]; all-linear for all but the output head, which leaves
    out layers that are no torch.nn.Linear, such as fused experts, and notes them."""
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


def add_lora(model: PreTrainedModel, config: LoraConfig, tell: Callable[[str], None] = logger.info) -> None:
    """Freeze the model and put a trainable adapter beside each of the configured layers.

    Args:
        tell: which weights all-linear leaves without an adapter is told to it.

    Raises: MissingPackage naming the extra, for an older PEFT, too; UserError for a module that the model does not have, its output
        head, one that is not linear, or a model without linear layers.
    """
    if reason := why_no_peft():
        raise MissingPackage(reason)
    import peft

    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings()).split(".")[-1]
    named = [] if config.target_modules == "all-linear" else config.target_modules
    if head in named:
        raise UserError(
            f"model.lora.target_modules must not name the output head {head!r}, which runs inside the fused loss. Leave it out."
        )
    # what is frozen by now: parts of a multimodal model that no text reaches
    beside_text = [name for name, module in model.named_modules() if any(not p.requires_grad for p in module.parameters(False))]
    targets = named or _linear_layers(model, tell)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=[head, *beside_text],
        use_rslora=config.rank_stabilised,
        task_type="CAUSAL_LM",
    )
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    unknown = [name for name in named if name not in names]
    if unknown:
        raise UserError(f"model.lora.target_modules must name layers of the model, it has no {', '.join(unknown)}.")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with names_as_they_are():
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


@contextmanager
def names_as_they_are() -> Iterator[None]:
    """Inside, PEFT looks for target_modules in the model at hand. By itself it takes them for names of transformers 4, and so the
    gate_proj, up_proj and down_proj of dense and shared layers for those of experts, which are fused since (huggingface/peft#3711).
    """
    if not hasattr(_conversion(), "convert_peft_config_for_transformers"):
        yield
        return
    with patch.object(_conversion(), "convert_peft_config_for_transformers", lambda *arguments, **options: None):
        yield


def _conversion() -> ModuleType:
    """Where PEFT converts names."""
    return importlib.import_module("peft.utils.transformers_weight_conversion")


def other_layers(model: PreTrainedModel) -> str | None:
    """A sentence where PEFT by itself would put the model's adapter on other layers than were trained; None where it does not."""
    if not hasattr(_conversion(), "convert_peft_config_for_transformers"):
        return None
    trained, read = model.peft_config["default"], copy.deepcopy(model.peft_config["default"])
    try:
        _conversion().convert_peft_config_for_transformers(read, model=model, conversions=None)
        same = set(read.target_modules) == set(trained.target_modules)
    except ValueError:  # which loading would raise as well
        same = False
    if same:
        return None
    return (
        f"PEFT {version('peft')} takes the layers of the adapter for those of transformers 4 (huggingface/peft#3711), and so puts "
        "parts of it elsewhere. Load it inside `with trapo_train.models.lora.names_as_they_are():`, or export the whole model, "
        "without --adapter"
    )


def _linear_layers(model: PreTrainedModel, tell: Callable[[str], None]) -> list[str]:
    """The names of all linear layers but the output head; what other layers have matrices is told."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    holders = {
        name: module
        for name, module in model.named_modules()
        if module not in (head, embedding) and any(p.ndim >= 2 and p.requires_grad for p in module.parameters(recurse=False))
    }
    found = [name for name, module in holders.items() if type(module) is nn.Linear]
    others = ", ".join(sorted({type(module).__name__ for module in holders.values() if type(module) is not nn.Linear}))
    if not found:
        raise UserError(
            f"model.lora needs layers of torch.nn.Linear, the adapters of which can be merged; those of {type(model).__name__} are "
            f"{others or 'none'}. Leave model.lora out, which trains the weights, or choose another model."
        )
    if others:
        tell(f"model.lora: all-linear puts no adapter beside the weights of {others}, which are no torch.nn.Linear")
    return found


def check_no_adapter(name_or_path: str | None, revision: str | None = None) -> None:
    """Raise UserError for a model that comes with an adapter: a run would start from it or replace it, and neither be seen."""
    if name_or_path is None or find_adapter_config_file(name_or_path, revision=revision) is None:
        return
    raise UserError(
        f"model.name_or_path must be a whole model, got a LoRA adapter to one, {name_or_path!r}. Give the model with the adapter "
        "added: `trapo-train export RUN` writes it from a checkpoint, a finished run has it in RUN/model, and an adapter from "
        "elsewhere is added by PEFT's merge_and_unload. With model.lora a new adapter is then trained on top of it."
    )


def hold_frozen(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Store frozen matrices, those of fused experts included, and the biases of linear layers in `compute_dtype`, which they are
    computed in anyway: half the memory in bfloat16, and no cast per pass and generated token. What transformers keeps in float32
    stays, such as some routers."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.requires_grad:
            module.to(compute_dtype)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            # An expert's bias, which no GEMM takes, is added in its own type.
            is_matrix = parameter.is_floating_point() and parameter.ndim >= 2 and not name.endswith("bias")
            if is_matrix and not parameter.requires_grad and not stays_in_float32(model, f"{path}.{name}"):
                parameter.data = parameter.data.to(compute_dtype)


def adapted_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The layers that have an adapter, with their names."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]


def has_lora(model: PreTrainedModel) -> bool:
    """Whether `add_lora` was called on the model."""
    return bool(adapted_layers(model))


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
    """The tensors `names` (of parameters and buffers) in `dtype`, but for what transformers keeps in float32 in a 16-bit model, as
    some routers and their biases; with every adapter added to its layer before that is rounded, under the names of the plain model.

    `whole` gives a tensor by its name, in a type that is given or its own; it is asked for them one after the other.
    """
    layers = {f"{name}.base_layer.weight": (name, module) for name, module in adapted_layers(model)}
    at_least_32_bits = torch.promote_types(dtype, torch.float32)
    for name in names:
        if ".lora_" in name:
            continue
        rounded = at_least_32_bits if stays_in_float32(model, name) else dtype
        if name in layers:
            path, layer = layers[name]
            (adapter,) = layer.active_adapters
            weight, a, b = (whole(n) for n in (name, *(f"{path}.lora_{part}.{adapter}.weight" for part in "AB")))
            weight = (weight + layer.scaling[adapter] * b @ a).to(rounded)
        else:
            weight = whole(name, rounded)
        yield name.replace(".base_layer.", "."), weight
