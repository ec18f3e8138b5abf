"""A router of a mixture of experts chooses on several ranks what it chooses in one process, whatever is kept in float32."""

import copy
import os

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.trapo_train.models.test_autocast import build
from trapo_train.models.model import enable_gradient_checkpointing
from trapo_train.models.placement import gathered, place_model, reshard
from trapo_train.parallel.world import ParallelConfig, World

BIAS = "moe_statics.e_score_correction_bias"
CASES = [  # a model, what it keeps in float32, and which parameters of its router that names
    ("glm4_moe", ["gate.weight"], {"weight"}, {"first_k_dense_replace": 0, "head_dim": 8}),
    ("ernie4_5_moe", ["e_score_correction_bias"], {BIAS}, {"moe_k": 2, "moe_layer_start_index": 0}),
    ("ernie4_5_moe", ["gate.weight", "moe_statics"], {"weight", BIAS}, {"moe_k": 2, "moe_layer_start_index": 0}),
    ("qwen3_moe", [], set(), {"head_dim": 8}),
]


def _check_a_second_pass(model, router, hidden, found):
    """Recomputed, the gradients are the same; gathered, a rank runs the router without the other."""
    gradients = {name: weight.grad.full_tensor() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    enable_gradient_checkpointing(model.train())
    model(torch.arange(20)[None], use_cache=False).logits.float().square().sum().backward()
    for name, weight in model.named_parameters():
        assert name not in gradients or torch.equal(weight.grad.full_tensor(), gradients[name]), name
    reshard(model)
    with gathered(model), torch.no_grad():
        if dist.get_rank() == 0:
            assert all(map(torch.equal, router(hidden), found))


def _rank(rank):
    world = World(ParallelConfig(timeout_s=60))
    for name, keep, kept, options in CASES:
        model, router = build(name, keep, **options)
        assert router.kept_in_float32 == kept
        alone, seen = copy.deepcopy(router), []
        del alone.forward  # that of its class, as in a model of 16 bits
        for path, parameter in alone.named_parameters():
            parameter.data = parameter.data if path in kept else parameter.data.bfloat16()
        router.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append((inputs[0], output)))
        place_model(model, world)
        model(torch.arange(20)[None], use_cache=False).logits.float().square().sum().backward()
        ((hidden, found),) = seen
        assert hidden.dtype == torch.bfloat16 and all(map(torch.equal, found, alone(hidden))), (name, keep)
        assert router.weight.grad.dtype == torch.float32 and router.weight.grad.full_tensor().any()
        _check_a_second_pass(model, router, hidden, found)
    os._exit(0)  # while the models still live: to free them here can wait forever for gloo's threads (torch 2.13)


@pytest.mark.slow
def test_a_router_on_two_ranks_is_that_of_a_model_in_16_bits():
    ranks.start(_rank, 2)
