"""A model that the first rank alone reads: the others hold its tensors without values until each unit is sharded, so that the ranks
of a machine together take the memory of one model to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops

from trapo_train.models.loading import replace_tensors
from trapo_train.parallel.world import World
from trapo_train.schema import UserError

if TYPE_CHECKING:
    from trapo_train.models.model import ModelConfig


def meta_model(
    config: ModelConfig, architecture: PretrainedConfig, hub: dict[str, Any], options: dict[str, Any]
) -> PreTrainedModel:
    """A model of `architecture` whose tensors are on the meta device: shapes and types without memory or values.

    Args:
        config: where its settings of generation come from.
        hub: options of `from_pretrained` that say which revision is read.
        options: of `from_config`.
    """
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=hub["trust_remote_code"], **options)
    if config.scratch is not None:
        return model
    if model.can_generate():
        model.generation_config = _generation_config(config.name_or_path, hub["revision"])
    return model.eval()  # as from_pretrained leaves it


def _generation_config(name_or_path: str, revision: str) -> GenerationConfig:
    """As from_pretrained of a model has it, of its config.json where there is no other."""
    try:
        return GenerationConfig.from_pretrained(name_or_path, revision=revision)
    except OSError:
        return GenerationConfig.from_pretrained(name_or_path, "config.json", revision=revision, _from_model_config=True)


def match_first_rank(model: PreTrainedModel, world: World) -> None:
    """Give a model whose head has weights of its own on the first rank, because its files have them though its configuration says
    that they are the embedding's, such weights on the others; every rank calls it.

    Raises: UserError, on every rank, where a rank has other tensors than the first, by name, shape and type.
    """
    first = world.gather(_tensors(model))[0]
    mine = _tensors(model)
    for name, tied in list(model.named_parameters(remove_duplicate=False)):
        if name in first and name not in mine:
            path, _, leaf = name.rpartition(".")
            own = nn.Parameter(torch.empty_like(tied), tied.requires_grad)
            setattr(model.get_submodule(path), leaf, own)
    differing = {name for name, _ in _tensors(model).items() ^ first.items()}
    for rank, name in enumerate(world.gather(min(differing, default=None))):
        if name is not None:
            raise UserError(
                f"model: every rank must make the model that the first has loaded, rank {rank} has another {name}, or none. Use "
                "the same transformers, model and revision on all machines."
            )


def _tensors(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of parameters and buffers; those that are one tensor have one name."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: (tensor.shape, tensor.dtype) for name, tensor in held.items()}


def broadcast_from_first(unit: nn.Module, device: torch.device) -> None:
    """Move what `unit` holds to `device`, with the first rank's values; every rank calls it. What is sharded stays as it is."""
    replace_tensors(unit, lambda tensor: tensor if isinstance(tensor, DTensor) else _first_ranks(tensor, device))


def _first_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    empty = tensor.is_meta
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if empty else tensor.detach().to(device).contiguous()
    dist.broadcast(there.view(-1).view(torch.uint8), src=0)  # bytes: not every backend sends every type
    return there
