"""Optimizer and learning-rate schedule by name: what they are built as, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.trapo_train.step.test_optimizer_step import make_model, make_samples, packed, step, weights
from trapo_kernels import objectives
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer, build_scheduler

OPTIMIZERS = sorted(name for name, value in vars(torch.optim).items() if isinstance(value, type) and name != "Optimizer")


def test_weight_decay_spares_vectors():
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    assert optimizer.defaults["fused"] is True
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"LBFGS", "SparseAdam", "Muon"}))
def test_optimizers_by_name(name):
    model, objective = make_model(), objectives.trapo()
    before = weights(model)
    step(model, packed(make_samples(), objective), objective, OptimizerConfig(name, learning_rate=1e-2))
    assert not torch.equal(weights(model), before)


@pytest.fixture
def sharded_model():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield fully_shard(make_model(), mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_optimizers_without_a_form_for_shards_are_refused_on_several_ranks(sharded_model):
    for name in ("Adafactor", "Rprop"):
        with pytest.raises(ValueError, match=f"{name} has no form for parameters sharded over ranks, .* Use AdamW"):
            build_optimizer(sharded_model, OptimizerConfig(name))
    build_optimizer(sharded_model, OptimizerConfig("AdamW"))


def test_schedules_by_name():
    parameter = torch.nn.Linear(1, 1, bias=False)
    options = {"schedule": "cosine_with_min_lr", "schedule_options": {"min_lr": 1e-4}, "warmup_steps": 2}
    config = OptimizerConfig(learning_rate=1e-3, **options)
    optimizer = build_optimizer(parameter, config)
    scheduler = build_scheduler(optimizer, config, steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_muon_trains_matrices_alone():
    config = OptimizerConfig(name="Muon")
    with pytest.raises(ValueError, match=r"optimizer.name=Muon trains matrices alone, got a model with \d+ vectors .*model.lora"):
        build_optimizer(make_model(), config)
    build_optimizer(torch.nn.Linear(4, 4, bias=False), config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Adamw"}, "name must be an optimizer of torch.optim .*AdamW.*got 'Adamw'"),
        ({"name": "LBFGS"}, "got 'LBFGS'"),
        ({"name": "SGD", "betas": (0.9, 0.9)}, "SGD takes lr, .*got 'betas'. Set optimizer.betas=null"),
        ({"options": {"momentum": 0.9}}, "AdamW takes .*got 'momentum'"),
        ({"name": "SGD", "options": {"nesterov": True}}, "SGD refuses its arguments: .*[Nn]esterov"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0, got 0"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number above 0, got inf"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number of at least 0, got inf"),
        ({"options": {"weight_decay": 0.5}}, "options must not set weight_decay, which is optimizer.weight_decay. Set that."),
        ({"options": {"lr": 0.5}}, "options must not set lr, which is optimizer.learning_rate. Set that."),
        ({"schedule_options": {"min_lr": 1e-4}}, "schedule constant_with_warmup has no schedule_options, got .*min_lr.*Leave"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), or null, got \(0.9, 1.0\)"),
        ({"schedule": "cosin"}, "schedule must be one of linear, cosine.*got 'cosin'"),
        ({"schedule": "reduce_lr_on_plateau"}, "schedule must be one of"),
        (
            {"schedule": "polynomial", "schedule_options": {"power": -5}},
            "schedule polynomial refuses its arguments: .*negative power",
        ),
        (
            {"schedule": "polynomial", "schedule_options": {"lr_end": -1}, "learning_rate": 0.01},
            "must give learning rates of at least 0, got -49.5 times the peak. See schedule_options",
        ),
        ({"schedule": "cosine", "schedule_options": {"min": 1}}, "schedule cosine refuses its arguments: .*'min'"),
        ({"schedule": "constant", "warmup_steps": 3}, "Use constant_with_warmup"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0"),
    ],
)
def test_optimizer_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)
