"""An optimizer of one's own, by the path of its class."""

from __future__ import annotations

import sys

import pytest

from tests.trapo_train.step.test_optimizer import sharded_model as sharded_model
from tests.trapo_train.test_train import EVALUATED, build_config, exported, rows, train_to_end
from trapo_train import cli
from trapo_train.memory.plan import load_architecture
from trapo_train.memory.trace import trace_optimizer
from trapo_train.run.export_checkpoint import export_checkpoint
from trapo_train.schema import UserError
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer
from trapo_train.trainer import Trainer

MODULE = """
import torch
from torch.optim import Optimizer

class Lion(Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        if lr > 1:
            raise ValueError("lr is too large")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["momentum"] = 0, torch.zeros_like(p, dtype=torch.bfloat16)
                momentum = state["momentum"].float()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * momentum.lerp(p.grad, 1 - fast).sign())
                state["momentum"].copy_(momentum.lerp(p.grad, 1 - slow))
                state["step"] += 1

class Prodigious(Lion):  # keeps in its groups what steps change
    def __init__(self, params, lr=1e-4):
        super().__init__(params, lr)
        for group in self.param_groups:
            group |= {"k": 0, "d": torch.ones(())}

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = group["d"] / group["k"]
            group["weight_decay"] = group["d"].item()
        super().step()

class Wrapped(torch.Tensor):
    pass

class Odd(Lion):
    def step(self, closure=None):
        super().step()
        for state in self.state.values():
            state["momentum"] = state["momentum"].as_subclass(Wrapped)

class Asking(Lion):
    def step(self, closure=None):
        if any(p.grad.numpy().any() for group in self.param_groups for p in group["params"]):
            super().step()

def function(params):
    return Lion(params)
"""
LION = "optimizer={name: 'odd_optimizers:Lion', learning_rate: 1e-3, betas: [0.8, 0.9], weight_decay: 0.1}"


@pytest.fixture
def module(own_module):
    return own_module("odd_optimizers", MODULE)


def _resumed(tmp_path, settings):
    """A run of four steps, and another that was interrupted after two: the same metrics and the same weights."""

    def build(name, *more):
        return build_config(tmp_path, name, *settings, *EVALUATED, "checkpoint.every=2", *more)

    whole = build("whole", "steps=4")
    train_to_end(whole)
    train_to_end(build("halves", "steps=2"))
    halves = build("halves", "steps=4", "checkpoint.resume=true")
    train_to_end(halves)
    assert exported(halves) == exported(whole)
    assert [row for row in rows(halves) if row["kind"] == "train"] == [row for row in rows(whole) if row["kind"] == "train"]


def test_what_steps_change_in_its_groups_is_resumed_too(module, tmp_path):
    _resumed(tmp_path, ["optimizer={name: 'odd_optimizers:Prodigious', learning_rate: 1e-3}"])


@pytest.mark.slow
def test_a_run_with_one_trains_and_resumes_with_the_same_bits(module, tmp_path):
    _resumed(tmp_path, [LION])


def test_it_gets_the_settings_and_spares_vectors_from_decay(module, tmp_path):
    optimizer = Trainer(build_config(tmp_path, "run", LION)).optimizer
    assert type(optimizer).__name__ == "Lion" and optimizer.defaults["betas"] == (0.8, 0.9)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.1), (1e-3, 0.0)]


def test_a_run_with_one_is_exported_where_its_module_is_not(module, tmp_path):
    train_to_end(build_config(tmp_path, "run", "steps=1", LION))
    sys.modules.pop(module)
    (tmp_path / f"{module}.py").unlink()
    assert export_checkpoint(tmp_path / "run", tmp_path / "exported")[1] == 1


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{name: 'no_such:Lion'}", "^optimizer.name 'no_such:Lion': importing the module 'no_such' failed"),
        ("{name: 'odd_optimizers:Tiger'}", "^optimizer.name .*: the module 'odd_optimizers' has no function or class 'Tiger'"),
        (
            "{name: 'odd_optimizers:function'}",
            "^optimizer.name .* must be a class that derives from torch.optim.Optimizer, got ",
        ),
        ("{name: 'odd_optimizers:Lion', options: {momentum: 1}}", "^odd_optimizers:Lion takes lr, betas, weight_decay, got 'momen"),
        ("{name: 'odd_optimizers:Lion', learning_rate: 2}", "^odd_optimizers:Lion refuses its arguments: lr is too large"),
    ],
)
def test_what_is_wrong_with_one_is_said_before_a_model_is_loaded(optimizer, message, module, tmp_path, monkeypatch):
    monkeypatch.setattr("trapo_train.trainer.load_model_and_tokenizer", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        Trainer(build_config(tmp_path, "run", f"optimizer={optimizer}"))


def test_state_that_no_checkpoint_holds_is_refused_before_the_first_step(module, tmp_path):
    config = build_config(tmp_path, "run", f"optimizer.name={module}:Odd")
    with pytest.raises(UserError, match=r"state must be plain tensors .*odd_optimizers:Odd keeps Wrapped\. Use bitsandbytes"):
        train_to_end(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_its_memory_is_planned_or_not_with_a_reason(module, tmp_path):
    config = build_config(tmp_path, "run")

    def plan(name):
        return trace_optimizer(config.model, load_architecture(config), OptimizerConfig(name), "cpu")[0]

    adam, lion = plan("AdamW"), plan(f"{module}:Lion")
    assert 3.9 < adam / lion < 4.1  # two moments of four bytes, one of two
    with pytest.raises(UserError, match=r"plan-memory: a step of optimizer.name=odd_optimizers:Asking must run on tensors without"):
        plan(f"{module}:Asking")


def test_a_dry_run_takes_its_step(module, capsys):
    assert cli.main(["run", "demo_base", "--dry-run", f"optimizer.name={module}:Lion"]) == 0
    assert "dry run passed" in capsys.readouterr().out


def test_those_of_bitsandbytes_are_refused_on_shards_and_others_not(module, sharded_model, monkeypatch):
    config = OptimizerConfig(f"{module}:Lion")
    cls = type(build_optimizer(sharded_model, config))
    monkeypatch.setattr(cls, "__module__", "bitsandbytes.optim.lion")
    with pytest.raises(UserError, match="odd_optimizers:Lion has no form for parameters sharded over ranks"):
        build_optimizer(sharded_model, config)


def test_eight_bits_resume_with_the_same_bits_in_a_quarter_of_the_memory(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    eight = OptimizerConfig("bitsandbytes.optim:AdamW8bit")
    wide = (
        "model.scratch={hidden_size: 128, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 256, max_position: 80}"
    )
    _resumed(tmp_path, [f"optimizer.name={eight.name}", wide])
    config = build_config(tmp_path, "run", wide)
    state = [trace_optimizer(config.model, load_architecture(config), one, "cpu")[0] for one in (OptimizerConfig(), eight)]
    assert 0.25 < state[1] / state[0] < 0.3  # matrices below 4096 weights and scales are float32
