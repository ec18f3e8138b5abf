"""The global generators: a run's seed decides what a reward draws, and a checkpoint keeps where they are."""

from __future__ import annotations

import random
from functools import partial

import numpy
import pytest
import torch

from tests.trapo_train.test_train import EVALUATED, build_config, exported, train_to_end
from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.random_states import restore_rng_state, rng_state
from trapo_train.rewards.functions import RewardError
from trapo_train.trainer import Trainer

DICE = (f"reward='{__name__}:dice'", "plan.name=grpo", "objective.name=dr_grpo")


def dice(prompts, completions, **columns):
    return [random.random() + numpy.random.random() + float(torch.rand(())) for _ in completions]


def test_loading_leaves_each_rank_a_generator_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_rank_seed", lambda trainer, step: 77 + step)
    Trainer(build_config(tmp_path, "run", "objective.kl={beta: 0.1}"))
    assert torch.initial_seed() == 77 and torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(77).get_state())


class Fails:
    """Draws and then raises, once."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        values = dice(prompts, completions)
        if self.calls == 2:
            raise ConnectionError("the judge is away")
        return values


fails = Fails()


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), numpy.random.normal(), float(torch.rand(1)), float(torch.randn(1))]


def test_random_states_survive_a_checkpoint(store):
    draw()
    store.save(1, {"rng": rng_state()}, {})
    expected = [draw(), draw()]
    random.seed(5)
    numpy.random.seed(5)
    torch.manual_seed(5)
    restore_rng_state(store.load({})[1]["rng"])
    assert [draw(), draw()] == expected


class _Gpus:
    """torch.cuda's generators of so many devices, of which `current` is in use."""

    def __init__(self, monkeypatch, count, current):
        self.states = [torch.tensor([device]) for device in range(count)]
        self.current = current
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.states[self.current])
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def set(self, state):
        self.states[self.current] = state


def test_a_run_moves_to_a_machine_with_another_number_of_gpus(store, monkeypatch):
    _Gpus(monkeypatch, count=4, current=3)
    store.save(1, {"rng": rng_state()}, {})
    gpus = _Gpus(monkeypatch, count=1, current=0)
    restore_rng_state(store.load({})[1]["rng"])
    assert gpus.states == [torch.tensor([3])]


def test_a_gpu_without_a_saved_state_keeps_its_own(monkeypatch):
    state = rng_state()
    gpus = _Gpus(monkeypatch, count=1, current=0)
    restore_rng_state(state)
    assert gpus.states == [torch.tensor([0])]


@pytest.mark.slow
def test_the_seed_decides_the_run(configure):
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        torch.manual_seed(len(name))  # whatever the process did before must not matter
        train_to_end(configure(name, "steps=2", f"seed={seed}"))
    assert exported(configure("first")) == exported(configure("second"))
    assert exported(configure("first")) != exported(configure("other"))


def test_the_seed_decides_what_a_reward_draws(configure):
    for name, seed in (("first", 2**40), ("second", 2**40), ("other", 1)):
        random.seed(len(name))  # whatever the process did before must not matter
        numpy.random.seed(len(name))
        train_to_end(configure(name, *DICE, "steps=2", f"seed={seed}"))
    assert exported(configure("first")) == exported(configure("second"))
    assert exported(configure("first")) != exported(configure("other"))


def test_on_another_number_of_ranks_reward_and_engine_draw_anew_and_repeatably(configure, store, monkeypatch):
    trainer = Trainer(configure("run", *DICE))
    at_the_start = draw()
    trainer.train_step()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.world, "gather", lambda value: [value, value])
        trainer.save(store)
    drawn, engines = [], []
    for _ in range(2):
        trainer = Trainer(configure("run", *DICE))
        engines.append(trainer.engine.state_dict())
        assert trainer.resume(store) and any("saved by 2 ranks, continued by 1" in note for note in trainer.notes)
        drawn.append(draw())
        engines.append(trainer.engine.state_dict())
    assert drawn[0] == drawn[1] and engines[1] == engines[3] != engines[0] == engines[2]
    assert all(new != old for new, old in zip(drawn[0], at_the_start, strict=True))


def test_ranks_draw_other_rewards(configure, monkeypatch):
    monkeypatch.setattr("trapo_train.trainer.place_model", lambda model, world: model.to_empty(device=world.device))
    drawn = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        Trainer(configure("run", *DICE))
        drawn.append(draw()[:3])  # of python and numpy
    assert all(first != second for first, second in zip(*drawn, strict=True))


def test_a_reward_that_fails_once_is_resumed_with_the_draws_it_would_have_had(configure):
    settings = (*DICE[1:], "steps=3", f"reward='{__name__}:fails'")
    fails.calls = 10
    train_to_end(configure("whole", *settings))
    fails.calls = 0
    with pytest.raises(RewardError, match="the judge is away"):
        train_to_end(configure("failed", *settings))
    train_to_end(configure("failed", *settings, "checkpoint.resume=true"))
    assert exported(configure("failed")) == exported(configure("whole"))


def test_evaluations_leave_to_training_what_it_draws(configure):
    for name, every in (("rarely", 3), ("often", 1)):
        train_to_end(configure(name, *DICE, "steps=3", EVALUATED[0], f"evaluation.every={every}"))
    assert exported(configure("rarely")) == exported(configure("often"))
