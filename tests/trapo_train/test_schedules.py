"""Schedules: their endpoints and middles, how they are built from a configuration, and what they refuse."""

import math
from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.trapo_train.test_train import build_config
from trapo_kernels import KL
from trapo_train.run.continuation import split_settings
from trapo_train.schedules import Constant, Cosine, Linear, WarmUp, build_schedule, is_schedule
from trapo_train.step.objective import ObjectiveConfig, build_objective
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer, build_scheduler


def test_constant():
    assert [build_schedule(3)(step) for step in (0, 1, 10**9)] == [3.0, 3.0, 3.0]


def test_linear_endpoints():
    schedule = Linear(1.0, 0.0, 4)
    assert [schedule(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_cosine_endpoints_and_middle():
    schedule = Cosine(0.95, 0.05, 10)
    assert schedule(0) == 0.95
    assert schedule(5) == pytest.approx(0.5)
    assert schedule(10) == schedule(11) == 0.05
    assert schedule(1) == pytest.approx(0.05 + 0.9 * (1 + math.cos(math.pi / 10)) / 2)
    values = [schedule(step) for step in range(11)]
    assert values == sorted(values, reverse=True)


def test_cosine_may_drop_at_its_end():
    schedule = Cosine(0.95, 0.05, 10, after=0.0)
    assert schedule(9) > 0.05
    assert schedule(10) == 0.0
    assert schedule.bounds == (0.0, 0.95)


def test_warm_up_then_decay():
    schedule = WarmUp(0.0, 4, Cosine(0.8, 0.2, 10))
    assert [schedule(step) for step in (0, 2, 4)] == pytest.approx([0.0, 0.4, 0.8])
    assert schedule(9) == pytest.approx(0.5)
    assert schedule(14) == schedule(100) == 0.2
    assert schedule.bounds == (0.0, 0.8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, Constant(0.5)),
        ({"schedule": "constant", "value": 1}, Constant(1.0)),
        ({"schedule": "linear", "start": 0, "end": 1, "steps": 3}, Linear(0.0, 1.0, 3)),
        ({"schedule": "cosine", "start": 0, "end": 1, "steps": 3}, Cosine(0.0, 1.0, 3)),
        ({"schedule": "warm_up", "start": 0, "steps": 2, "after": 1}, WarmUp(0.0, 2, Constant(1.0))),
        (Linear(0.0, 1.0, 3), Linear(0.0, 1.0, 3)),
    ],
)
def test_built_from_a_configuration(value, expected):
    schedule = build_schedule(value)
    assert schedule == expected
    low, high = schedule.bounds
    assert all(low <= schedule(step) <= high for step in range(10))


def test_which_values_are_schedules():
    assert is_schedule({"schedule": "linear"})
    assert not is_schedule({"start": 0}) and not is_schedule(0.5) and not is_schedule("linear")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"schedule": "cosin"}, "schedule must be one of constant, linear, .*got 'cosin'"),
        ({"schedule": "linear", "start": 0, "end": 1}, "linear.steps must be set"),
        ({"schedule": "linear", "start": 0, "end": 1, "step": 3}, "unknown key 'linear.step'. Did you mean 'linear.steps'"),
        ({"schedule": "linear", "start": 0, "end": 1, "steps": 0}, "linear: steps must be at least 1, got 0"),
        ({"schedule": "cosine", "start": math.nan, "end": 1, "steps": 3}, "start .*finite number, got nan"),
        ({"schedule": "cosine", "start": "a", "end": 1, "steps": 3}, r"cosine.start must be float, got 'a' \(text\)"),
        ({"schedule": "constant", "value": math.inf}, "value must be a finite number, got inf"),
        ({"schedule": "warm_up", "start": 0, "steps": 1.5, "after": 1}, "warm_up.steps must be int, got 1.5"),
        ({"schedule": "warm_up", "start": 0, "steps": 2}, "warm_up.after must be set"),
        ({"schedule": "warm_up", "start": 0, "steps": 2, "after": "x"}, "warm_up: A schedule must be a finite number or .*got 'x'"),
        ({"start": 0}, "mapping with the key schedule"),
        ("linear", "got 'linear'"),
        (True, "got True"),
        (math.inf, "got inf"),
    ],
)
def test_bad_schedules_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(value)


def test_a_kl_whose_weight_reaches_zero_keeps_its_options_for_the_other_steps():
    ramp = {"schedule": "linear", "start": 0.0, "end": 0.1, "steps": 2}
    config = ObjectiveConfig("grpo", {"beta": ramp, "kl": "k2", "kl_clamp": 3.0})
    assert [build_objective(config, step).kl for step in (0, 1, 2)] == [None, KL(0.05, "k2", 3.0), KL(0.1, "k2", 3.0)]
    for beta in (ramp, 0.0):
        with pytest.raises(ValueError, match="objectives.grpo: kl must be one of .*got 'zz'"):
            ObjectiveConfig("grpo", {"beta": beta, "kl": "zz"})


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.25, 8, 2), (0.25, 7, 1), (0.29, 100, 29), (0.9, 1, 0), (0.0, 8, 0)])
def test_a_warmup_may_be_a_share_of_the_steps(ratio, steps, warmup):
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=ratio)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), config)
    scheduler = build_scheduler(optimizer, config, steps=steps)
    (factor, *_) = scheduler.lr_lambdas
    assert [factor(step) for step in range(steps)] == [min(1.0, step / warmup) if warmup else 1.0 for step in range(steps)]


@pytest.mark.parametrize("warmup_steps", [0, 10**9 // 3, 10**12])
def test_a_schedule_of_very_many_steps_is_checked_at_some_of_them(warmup_steps, monkeypatch):
    tried = []

    def looked_at(name, optimizer, warmup, steps, options):
        return LambdaLR(optimizer, lambda step: tried.append(step) or (-1.0 if options and step == 10**9 - 1 else 1.0))

    monkeypatch.setattr("trapo_train.step.optimizer.get_scheduler", looked_at)
    config = OptimizerConfig(schedule="cosine", warmup_steps=warmup_steps)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), config)
    tried.clear()
    build_scheduler(optimizer, config, steps=10**9)
    assert len(tried) < 10_000 and {0, 10**9 - 1, 10**9} <= set(tried) and min(tried) == 0 and max(tried) == 10**9
    assert warmup_steps > 10**9 or warmup_steps in tried
    tried.clear()
    build_scheduler(optimizer, config, steps=4000)
    assert set(tried) == set(range(4001))
    odd = replace(config, warmup_steps=0, schedule_options={"num_cycles": 1})
    with pytest.raises(ValueError, match="schedule cosine must give learning rates of at least 0, got -1 times the peak"):
        build_scheduler(optimizer, odd, steps=10**9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\), got 1.0"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "say the same, got 3 and 0.1. Set either to 0"),
        ({"warmup_ratio": 0.1, "schedule": "constant"}, "warmup_ratio must be 0 with the schedule constant, got 0.1"),
    ],
)
def test_a_share_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(("optimizer", "kept"), [("{warmup_ratio: 0.1}", True), ("{warmup_steps: 1}", False)])
def test_a_continuation_keeps_the_steps_that_the_warmup_is_a_share_of(tmp_path, optimizer, kept):
    fixed, _ = split_settings(build_config(tmp_path, "run", f"optimizer={optimizer}"))
    assert ("steps" in fixed) == kept
