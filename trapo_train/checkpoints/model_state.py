"""Weights and optimizer state as named tensors: for a checkpoint, and whole for an export or an engine.

The names are those of the parameters, so that a checkpoint does not depend on how the parameters are sharded or ordered.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.models.lora import merged_weights
from trapo_train.parallel.world import World
from trapo_train.step.optimizer_step import NonFiniteError

_TRAINED, _INCOMPLETE = StateDictOptions(ignore_frozen_params=True), StateDictOptions(strict=False)
# What an optimizer's groups hold and a checkpoint does not: the parameters, and what is chosen for how these are held. Steps may
# change all else, as Prodigy and schedule-free AdamW do.
_NOT_SAVED = {"params", "param_names", "fused", "foreach", "capturable", "differentiable"}
_PLAIN = (bool, int, float, str, tuple, list, Tensor, NoneType)  # what a checkpoint takes


def training_state(model: PreTrainedModel, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained weights and optimizer state: tensors by name, views of the live ones and of this rank's shards, and plain values.

    Frozen weights, those beside LoRA's adapters, are where the model came from. A tied weight has one name.
    """
    tensors = _trained_weights(model)
    values: dict[str, Any] = {}
    stateless: list[str] = []
    if optimizer.state:  # before the first step there is none, and asking for it would take one
        states = get_optimizer_state_dict(model, optimizer)["state"]
        for name, entries in states.items():
            for key, value in entries.items():
                home = tensors if isinstance(value, Tensor) else values
                home[f"optimizer.{name}.{key}"] = value
        # What never had a gradient, as an expert that no token was routed to, has none.
        stateless = [name for name, p in model.named_parameters() if p.requires_grad and name not in states]
    groups = [
        {key: value for key, value in group.items() if key not in _NOT_SAVED and isinstance(value, _PLAIN)}
        for group in optimizer.param_groups
    ]
    return tensors, {"values": values, "groups": groups, "stateful": bool(optimizer.state), "stateless": stateless}


def _trained_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    weights, names = get_model_state_dict(model, options=_TRAINED), _names(model)
    return {f"model.{name}": value for name, value in weights.items() if name in names}


def _names(model: PreTrainedModel) -> set[str]:
    """Of parameters and buffers; a tied weight has one, and no second entry in a file."""
    return {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}


def load_training_state(
    model: PreTrainedModel, optimizer: Optimizer, state: dict[str, Any], store: CheckpointStore, step: int
) -> None:
    """Put the checkpoint of `step`, tensors and the plain values `state`, into a model and an optimizer, on any number of ranks.

    Raises: CheckpointError for a checkpoint of another model.
    """
    if state["stateful"]:
        get_optimizer_state_dict(model, optimizer)  # makes the optimizer's state, for the checkpoint to overwrite
        for name in state.get("stateless", ()):
            optimizer.state.pop(model.get_parameter(name), None)
        nested = get_optimizer_state_dict(model, optimizer)
    tensors, _ = training_state(model, optimizer)
    store.load_tensors(step, tensors)
    if state["stateful"]:
        loaded = tensors | state["values"]
        nested["state"] = {
            name: {key: loaded[f"optimizer.{name}.{key}"] for key in entries} for name, entries in nested["state"].items()
        }
        set_optimizer_state_dict(model, optimizer, nested, options=_INCOMPLETE)
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        for key, value in saved.items():
            held = group.get(key)
            group[key] = value.to(held.device) if isinstance(value, Tensor) and isinstance(held, Tensor) else value


def load_trained_weights(model: PreTrainedModel, store: CheckpointStore, step: int) -> None:
    """Put the weights of the checkpoint of `step` into a model.

    Raises: CheckpointError for a checkpoint of another model.
    """
    store.load_tensors(step, _trained_weights(model))


def non_finite_weight(model: PreTrainedModel, world: World) -> str | None:
    """Name of the first trained weight that is not finite on some rank, the same on all ranks, which must all call this; None where
    all are finite. Waits for the device once."""
    trained = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters() if p.requires_grad}
    finite = torch.stack([weight.isfinite().all() for weight in trained.values()]).tolist()  # of an empty shard, too
    broken = [name for name, is_finite in zip(trained, finite, strict=True) if not is_finite]
    anywhere = set().union(*world.gather(broken))
    return next((name for name in trained if name in anywhere), None)


def check_finite(model: PreTrainedModel, world: World, store: CheckpointStore, step: int) -> None:
    """Raise NonFiniteError, on every rank, where a weight after `step` is not finite: nothing of it may replace what is intact."""
    name = non_finite_weight(model, world)
    if name is None:
        return
    saved = store.steps()
    whence = f"from the checkpoint of step {saved[-1]}" if saved else "from the beginning, for want of a checkpoint,"
    raise NonFiniteError(
        f"train: weights must be finite to be saved, got NaN or infinity after step {step}, first in {name}; no checkpoint and no "
        f"model was written of them. Resume {whence} with checkpoint.resume=true and a lower optimizer.learning_rate, or start a "
        "new run with other optimizer.options."
    )


def whole_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain model under its names, as they are now: whole, rounded to `dtype` (see `merged_weights`) and with
    LoRA's adapters added; a tied weight once. Every rank must go through all of them: a sharded weight is put together when its
    turn comes, from shards that were rounded before they travel."""
    names = _names(model)
    tensors = {name: value for name, value in model.state_dict().items() if name in names}

    def whole(name: str, dtype: torch.dtype | None = None) -> Tensor:
        value = tensors[name].detach()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        return value.full_tensor() if isinstance(value, DTensor) else value

    return merged_weights(model, tensors, whole, dtype)
