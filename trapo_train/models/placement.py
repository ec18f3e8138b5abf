"""A loaded model on its device: whole in a single process, else sharded over the ranks by FSDP2, or HSDP with replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from trapo_train.models.autocast import routers_in_float32
from trapo_train.models.first_rank import broadcast_from_first, match_first_rank
from trapo_train.models.loading import decoder_layers
from trapo_train.models.model import policy_head
from trapo_train.parallel.world import World
from trapo_train.schema import UserError


def place_model(model: PreTrainedModel, world: World) -> None:
    """Move a model from host memory to this rank's device; of several ranks, each unit to its shards, so that no GPU ever holds
    all of it. Each decoder layer is a unit, within it each router with parameters that transformers keeps in float32, so is a head
    that is not the embedding, and the rest. Values are the first rank's: the others need none (see `first_rank.meta_model`).

    Backward begins with the head, whose weight and gradient are then given up while the layers compute. The policy head runs
    inside the model's own `run_head`, which FSDP treats as a forward: the weight that the fused op sees is whole, tied or not.
    With `vocab_parallel_head` FSDP leaves the head alone and it stays sharded (see `vocab_parallel`).
    Weights travel and compute in the model's compute type, those of such routers travel in float32; those that are trained are
    float32, and so are sums of gradients.

    Raises, on every rank: UserError for a vocabulary-parallel head that is the embedding, too, a model without a list of layers, or
        a rank whose model has other tensors than the first rank's; RankError.
    """
    if world.size == 1:
        model.to(world.device)
        return
    with world.together():
        match_first_rank(model, world)
        _shard(model, world)


def _shard(model: PreTrainedModel, world: World) -> None:
    head = policy_head(model)
    if world.vocab_parallel_head and _is_tied(model):
        raise UserError(
            "parallel.vocab_parallel_head needs an output head of its own, this model's is its embedding, which every rank needs "
            "whole. Set parallel.vocab_parallel_head=false."
        )
    mesh = world.mesh
    head_parameters: set[nn.Parameter] = set()
    if world.vocab_parallel_head:
        broadcast_from_first(head, world.device)
        head.shard_over_vocabulary(mesh)
        head_parameters = set(head.parameters())
    # Inputs stay as they are: FSDP would round the loss weights inside a micro-batch, too.
    at_least_32_bits = torch.promote_types(head.compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(head.compute_dtype, reduce_dtype=at_least_32_bits, cast_forward_inputs=False)
    unrounded = replace(policy, param_dtype=at_least_32_bits)
    for layer in decoder_layers(model):
        broadcast_from_first(layer, world.device)
        for router in routers_in_float32(layer) if unrounded != policy else ():
            fully_shard(router, mesh=mesh, mp_policy=unrounded)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if not _is_tied(model) and not world.vocab_parallel_head:
        broadcast_from_first(head, world.device)
        fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # its backward follows at once
    broadcast_from_first(model, world.device)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=head_parameters)
    register_fsdp_forward_method(model, "run_head")


def _is_tied(model: PreTrainedModel) -> bool:
    return policy_head(model).weight is model.get_input_embeddings().weight


def reshard(model: nn.Module) -> None:
    """Drop gathered copies of the weights; due after every pass without gradients, or the next forward sees stale ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """Inside, every rank holds the whole model and may run it as often as it likes without the others; costs its full size.

    Afterwards the gathered copies are dropped, so that no later forward sees stale weights.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with policy_head(model).gathered():
            yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit not in (model, policy_head(model)), recurse=False)
