"""Steps whose gradient is not finite: skipped, then the run ends with what it had."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.trapo_train.step.test_optimizer_step import make_model
from tests.trapo_train.test_train import StopAfter, build_config, rows, train_to_end
from trapo_kernels import objectives
from trapo_train import train, trainer
from trapo_train.checkpoints import model_state
from trapo_train.checkpoints.checkpoint import CheckpointError, CheckpointStore
from trapo_train.checkpoints.model_state import non_finite_weight
from trapo_train.engines.engine import EngineError
from trapo_train.models.model import policy_forward
from trapo_train.reports.display import Reporter
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.run import postmortem
from trapo_train.step.optimizer import OptimizerConfig
from trapo_train.step.optimizer_step import NonFiniteError
from trapo_train.train import run


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def test_non_finite_steps_are_skipped_then_stop_the_run(configure, monkeypatch, capsys):
    real, calls = trainer.optimizer_step, []

    def poisoned(model, optimizer, scheduler, micro_batches, *arguments):
        calls.append(len(calls))
        with torch.no_grad():
            model.lm_head.weight[0, 0] += float("nan") if len(calls) > 2 else 0.0
        return real(model, optimizer, scheduler, micro_batches, *arguments)

    monkeypatch.setattr(trainer, "optimizer_step", poisoned)
    # expert traces only: the engine refuses to sample from broken weights itself
    config = configure("poisoned", "plan.name=sft", "objective.name=sft", "optimizer.max_skipped_steps=1", "checkpoint.every=0")
    with pytest.raises(NonFiniteError, match=r"2 steps in a row.*Resume from the last checkpoint"):
        train_to_end(config)
    kept = Path(config.output_dir) / "non_finite_step_4"
    line = json.loads((kept / "samples.jsonl").read_text().splitlines()[0])
    assert line["prompt"] and "#" in line["prefix"] and line["finish_reason"] == "expert"  # texts, as in every file of samples
    example = postmortem.__doc__.split("\n\n", 1)[1].replace("runs/my/non_finite_step_7", str(kept))
    found = {}
    exec(example.replace("runs/my", config.output_dir), found)
    losses = [float(loss) for loss in re.findall(r"tensor\(([-\d.einfa]+)", capsys.readouterr().out)]
    assert losses and all(math.isfinite(loss) for loss in losses)
    broken, micro_batch = found["trainer"], found["micro_batch"]
    with torch.no_grad():
        broken.model.lm_head.weight[0, 0] = float("nan")
    assert not torch.isfinite(policy_forward(broken.model, micro_batch, objectives.sft()).loss)
    assert [row["skipped_step"] for row in rows(config)] == [0, 0, 1, 1]


def test_a_full_disk_for_the_batch_or_the_checkpoint_changes_nothing_of_why_the_run_ends(configure, monkeypatch):
    real = trainer.optimizer_step

    def infinite(*arguments):
        return real(*arguments) | {"skipped_step": 1, "grad_norm": float("inf")}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    def refused(*arguments, **options):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(trainer, "optimizer_step", infinite)
    monkeypatch.setattr(train, "save_batch", full)
    settings = ("plan.name=sft", "objective.name=sft", "optimizer.max_skipped_steps=1", "checkpoint.every=0")
    config = configure("batch", *settings)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row.*The last batch could not be written to .*No space.*Resume"):
        train_to_end(config)
    assert (Path(config.output_dir) / "checkpoints" / "step_00000002").is_dir()
    monkeypatch.setattr(CheckpointStore, "save", refused)
    config = configure("both", *settings)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row"):
        train_to_end(config)
    assert "step 2 could not be saved: the disk is full" in (Path(config.output_dir) / "metrics.jsonl").read_text()


def count_checks(monkeypatch):
    """A list that gets an entry whenever weights are asked whether they are finite."""
    checked = []

    def ask(*arguments):
        checked.append(non_finite_weight(*arguments))

    for module in (model_state, train):  # the loop, too, if it asks by itself
        monkeypatch.setattr(module, "non_finite_weight", ask, raising=False)
    return checked


def test_after_too_many_skipped_steps_the_state_before_them_is_saved(configure, monkeypatch):
    real, calls = trainer.optimizer_step, []

    def poisoned(model, optimizer, scheduler, micro_batches, *arguments):
        calls.append(len(calls))
        if len(calls) in (3, 4, 5):  # what is resumed counts anew
            micro_batches = [replace(m, batch=replace(m.batch, weight=m.batch.weight * 1e38)) for m in micro_batches]
        return real(model, optimizer, scheduler, micro_batches, *arguments)

    monkeypatch.setattr(trainer, "optimizer_step", poisoned)
    checked = count_checks(monkeypatch)
    settings = ("plan.name=sft", "objective.name=sft", "optimizer.max_skipped_steps=1", "checkpoint.every=0", "steps=5")
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        train_to_end(configure("poisoned", *settings))
    assert len(calls) == 4 and len(checked) == 1
    assert train_to_end(configure("poisoned", *settings, "checkpoint.resume=true")).steps == 5
    assert len(calls) == 5, "the weights after step 4, which are those after step 2, were saved"


def test_steps_count_in_a_row_of_which_every_update_was_skipped(configure, monkeypatch):
    trained = trainer.Trainer(configure("run", "plan.name=sft", "objective.name=sft", "updates.epochs=2"))
    in_a_row = []
    for skipped in (2, 1, 2, 2, 0, 2):
        monkeypatch.setattr(trained, "_update", lambda *given, skipped=skipped: {"skipped_step": skipped, "loss_tokens": 1})
        trained.train_step()
        in_a_row.append(trained.skipped_in_a_row)
    assert in_a_row == [1, 0, 1, 2, 0, 1]


def test_steps_skipped_before_a_stop_count_after_it(configure, monkeypatch):
    real, calls = trainer.optimizer_step, []

    def poisoned(model, optimizer, scheduler, micro_batches, *arguments):
        calls.append(len(calls))
        if len(calls) > 1:
            micro_batches = [replace(m, batch=replace(m.batch, weight=m.batch.weight * 1e38)) for m in micro_batches]
        return real(model, optimizer, scheduler, micro_batches, *arguments)

    monkeypatch.setattr(trainer, "optimizer_step", poisoned)
    settings = ("plan.name=sft", "objective.name=sft", "optimizer.max_skipped_steps=1", "checkpoint.every=1")
    assert train_to_end(configure("run", *settings, "steps=2")).steps == 2
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        train_to_end(configure("run", *settings, "steps=4", "checkpoint.resume=true"))
    assert len(calls) == 3


def test_a_loss_that_overflows_alone_is_noted_and_its_step_taken(configure, monkeypatch):
    """As of a KL with importance weights, whose gradient is bounded, to a reference that is 100 nats above."""
    real = trainer.optimizer_step

    def far(model, optimizer, scheduler, micro_batches, *arguments):
        far_above = [replace(m.batch, ref_logprob=torch.full_like(m.batch.weight, 100.0)) for m in micro_batches]
        micro_batches = [replace(m, batch=batch) for m, batch in zip(micro_batches, far_above, strict=True)]
        return real(model, optimizer, scheduler, micro_batches, *arguments)

    monkeypatch.setattr(trainer, "optimizer_step", far)
    monkeypatch.setattr("trapo_kernels.batch_checks._MOST_LOGPROB", 200.0)  # the model here has no logprob of -100
    objective = "objective={name: dr_grpo, kl: {beta: 0.01, estimator: k3_corrected}}"
    config = configure("far", objective, "plan.name=grpo", "reward='tests.trapo_train.step.test_updates:coin'", "steps=1")
    train_to_end(config)
    (row,) = [row for row in rows(config) if row["kind"] == "train"]
    assert row["skipped_step"] == 0 and row["loss"] is None and row["grad_norm"] > 0
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert sum("step 1: the loss is inf, its gradient is finite and was taken" in text for text in told) == 1


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("grpo", "objective.options.delta caps"),
        ("ppo", "objective.options.dual caps"),
        ("dapo", "ppo's option dual and grpo's delta cap"),
    ],
)
def test_a_step_skipped_for_a_ratio_says_what_caps_ratios(configure, monkeypatch, name, remedy):
    real = trainer.optimizer_step

    def far(model, optimizer, scheduler, micro_batches, *arguments):
        far_below = [replace(m.batch, old_logprob=torch.full_like(m.batch.weight, -100.0)) for m in micro_batches]
        micro_batches = [replace(m, batch=batch) for m, batch in zip(micro_batches, far_below, strict=True)]
        return real(model, optimizer, scheduler, micro_batches, *arguments)

    monkeypatch.setattr(trainer, "optimizer_step", far)
    settings = (f"objective.name={name}", "plan.name=grpo", "reward='tests.trapo_train.step.test_updates:coin'", "steps=1")
    config = configure("far", *settings)
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    (text,) = [text for text in told if "step 1 skipped: gradient norm nan must be finite" in text]
    assert f"A token's logprob is over 88 nats above the old one, and its ratio not finite: {remedy} it where" in text


@pytest.mark.parametrize("every", [0, 1])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(configure, monkeypatch, every):
    real, calls = trainer.optimizer_step, []

    def diverging(model, *arguments):
        metrics = real(model, *arguments)
        calls.append(len(calls))
        if len(calls) == 3:  # the update of a step whose loss and gradient are finite
            with torch.no_grad():
                model.model.norm.weight[0] = float("inf")
                model.lm_head.weight[0, 0] = float("nan")
        return metrics

    monkeypatch.setattr(trainer, "optimizer_step", diverging)
    settings = ("plan.name=sft", "objective.name=sft", "steps=3", f"checkpoint.every={every}", "checkpoint.keep=1")
    config = configure("diverged", *settings)
    whence = "the checkpoint of step 2" if every else "the beginning"
    with pytest.raises(NonFiniteError, match=rf"after step 3, first in model\.norm\.weight; .*Resume from {whence}.*learning_rate"):
        train_to_end(config)
    assert not (Path(config.output_dir) / "model").exists()
    assert train_to_end(configure("diverged", *settings, "checkpoint.resume=true")).steps == 3
    assert len(calls) == (4 if every else 6), "the checkpoint of step 2 survived"


@pytest.mark.parametrize("ended_by", ["signal", "sampling"])
def test_a_run_that_ends_early_saves_no_weights_that_are_not_finite(configure, monkeypatch, ended_by):
    real = trainer.Trainer.train_step

    def diverging(self):
        if self.step == 1:
            raise EngineError("vllm: no answer")
        metrics = real(self)
        with torch.no_grad():
            self.model.lm_head.weight[0, 0] = float("nan")
        return metrics

    monkeypatch.setattr(trainer.Trainer, "train_step", diverging)
    config = configure("early", "plan.name=sft", "objective.name=sft", "checkpoint.every=0")
    reporter = StopAfter(config.output_dir, 1) if ended_by == "signal" else Reporter(config.output_dir)
    with pytest.raises(NonFiniteError, match=r"after step 1, first in lm_head\.weight; .*from the beginning"):
        run(config, reporter)
    assert not list((Path(config.output_dir) / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("every", [0, 1])
def test_weights_are_asked_once_before_they_are_written(configure, monkeypatch, every):
    checked = count_checks(monkeypatch)
    settings = ("plan.name=sft", "objective.name=sft", "steps=1", f"checkpoint.every={every}")
    train_to_end(configure("run", *settings))
    assert checked == [None]


def test_ranks_agree_on_the_first_weight_that_is_not_finite():
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    world = SimpleNamespace(gather=lambda mine: [mine, []])
    assert non_finite_weight(model, world) is None
    model.get_parameter(names[3]).data.view(-1)[-1] = float("-inf")
    for others, first in (([], names[3]), ([names[5]], names[3]), ([names[1], names[4]], names[1])):
        world.gather = lambda mine, others=others: [mine, others]
        assert non_finite_weight(model, world) == first
    model.get_parameter(names[3]).requires_grad_(False)  # nothing trains it
    world.gather = lambda mine: [mine]
    assert non_finite_weight(model, world) is None


@pytest.mark.parametrize(
    ("name", "eps"), [("AdamW", 0), ("AdamW", 0.0), ("Adam", 1e-46), ("RMSprop", -0.0), ("Adafactor", [None, 0.0])]
)
def test_an_eps_that_is_zero_in_float32_is_refused(name, eps):
    with pytest.raises(ValueError, match="options must have eps of at least 1.18e-38, got .*Raise it, or leave it out"):
        OptimizerConfig(name, options={"eps": eps})
    OptimizerConfig(name, options={"eps": [None, 1e-3] if name == "Adafactor" else 1e-12})
