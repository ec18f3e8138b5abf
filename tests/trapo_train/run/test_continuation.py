"""How a run ends and goes on: what may change in between, a signal at any moment, a disk or a rank in the way at the end."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from tests.trapo_train.parallel.test_parallel import ranks_train
from tests.trapo_train.test_train import EVALUATED, StopAfter, build_config, exported, rows, train_to_end
from trapo_train import train
from trapo_train import trainer as trainer_module
from trapo_train.checkpoints.checkpoint import CheckpointError, CheckpointStore
from trapo_train.data.dataset import DataConfig
from trapo_train.evaluation import evaluate
from trapo_train.models.attention import PACKED_IMPLEMENTATION
from trapo_train.models.lora import LoraConfig
from trapo_train.models.model import ModelConfig, prepare
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.run import output_dir
from trapo_train.run.continuation import about_dates, set_learning_rate
from trapo_train.step.chooser import ChooserError
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer, build_scheduler
from trapo_train.tasks import build_tokenizer
from trapo_train.train import Trainer, run


@pytest.fixture
def configure(tmp_path):
    """A function that builds the tiny configuration with overrides, in its own output directory."""
    return partial(build_config, tmp_path)


def _events(config):
    return [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]


@pytest.mark.slow
def test_a_continuation_may_lower_the_learning_rate_and_the_memory_it_needs_and_says_so(configure):
    train_to_end(configure("run", "steps=4"))
    changes = ("optimizer.learning_rate=0.001", "optimizer.max_grad_norm=0.5", "packing.max_tokens=150")
    config = configure("run", "steps=6", "checkpoint.resume=true", *changes)
    assert train_to_end(config).steps == 6
    assert [row["learning_rate"] for row in rows(config)] == pytest.approx([0.0, 0.005, 0.01, 0.01, 0.001, 0.001])
    (note,) = [text for text in _events(config) if "not bitwise the run" in text]
    assert note.startswith(
        "optimizer.learning_rate was 0.01, is 0.001; optimizer.max_grad_norm was 1.0, is 0.5; packing.max_tokens"
    )


def test_an_unchanged_continuation_says_nothing_of_the_kind(configure):
    train_to_end(configure("run", "steps=2"))
    config = configure("run", "steps=3", "checkpoint.resume=true")
    train_to_end(config)
    assert any("resumed from step 2" in text for text in _events(config))
    assert not any("not bitwise the run" in text for text in _events(config))


@pytest.mark.parametrize(("schedule", "options"), [("cosine", {}), ("cosine_with_min_lr", {"min_lr": 1e-3})])
def test_a_new_peak_keeps_the_place_in_the_schedule(schedule, options):
    def trained(peak, steps):
        layer = nn.Linear(2, 2)
        config = OptimizerConfig(learning_rate=peak, schedule=schedule, warmup_steps=2, schedule_options=options)
        optimizer = build_optimizer(layer, config)
        scheduler = build_scheduler(optimizer, config, steps=10)
        for _ in range(steps):
            layer(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            scheduler.step()
        return optimizer, scheduler

    saved, (optimizer, scheduler) = trained(0.1, 5), trained(0.02, 0)
    optimizer.load_state_dict(saved[0].state_dict())  # as a continuation does
    scheduler.load_state_dict(saved[1].state_dict())
    set_learning_rate(optimizer, scheduler, 0.02)
    for steps in (5, 6, 7):
        assert scheduler.get_last_lr() == pytest.approx(trained(0.02, steps)[1].get_last_lr())
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()


@pytest.mark.slow
@pytest.mark.parametrize(("at_step", "call"), [(0, 2), (3, 2), (3, 4), (6, 2), (6, 4)])
def test_a_signal_during_an_evaluation_ends_it_and_the_run_there(configure, monkeypatch, at_step, call):
    """Of four engine calls; with the last one the evaluation is whole."""
    answers, calls = evaluate._answers, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == at_step // 3 * 4 + call:
            os.kill(os.getpid(), signal.SIGTERM)
        return answers(*arguments)

    settings = (*EVALUATED, "evaluation={every: 3, responses_per_call: 1}", "checkpoint.every=0")
    whole, config = configure("whole", *settings), configure("run", *settings)
    train_to_end(whole)
    monkeypatch.setattr(evaluate, "_answers", interrupted)
    summary = train_to_end(config)
    assert len(calls) == at_step // 3 * 4 + call
    assert (summary.steps, summary.interrupted) == (at_step, not (at_step == 6 and call == 4))
    assert CheckpointStore(Path(config.output_dir) / "checkpoints", keep=2).steps() == [at_step]
    evaluated = [row["step"] for row in rows(config) if row["kind"] == "eval"]
    assert evaluated == [step for step in (0, 3, 6) if step < at_step or (step == at_step and call == 4)]
    train_to_end(configure("run", *settings, "checkpoint.resume=true"))
    assert rows(config) == rows(whole) and exported(config) == exported(whole)


@pytest.mark.slow
@pytest.mark.parametrize("died", ["during", "after"])
def test_a_run_that_dies_around_an_evaluation_goes_on_from_its_step_and_evaluates_it_once(configure, monkeypatch, died):
    settings = (*EVALUATED, "checkpoint={every: 3, keep_best: true}")
    whole, config = configure("whole", *settings), configure("run", *settings)
    train_to_end(whole)
    evaluate, steps = Trainer.evaluate, []

    def dying(trainer, **options):
        steps.append(trainer.step)
        if died == "during" and steps == [0, 3]:
            raise KeyboardInterrupt("power cut")
        return evaluate(trainer, **options)

    monkeypatch.setattr(Trainer, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        run(config, StopAfter(config.output_dir, 5, KeyboardInterrupt("power cut")))
    assert CheckpointStore(Path(config.output_dir) / "checkpoints", keep=2).steps() == [3]
    resumed = configure("run", *settings, "checkpoint={every: 3, keep_best: true, resume: true}")
    train_to_end(resumed)
    assert steps == ([0, 3, 3, 6] if died == "during" else [0, 3, 6])
    assert rows(config) == rows(whole) and exported(config) == exported(whole)


def test_a_best_checkpoint_of_before_that_cannot_be_deleted_once_there_is_a_better_one_is_told(configure, monkeypatch):
    rate = CheckpointStore.rate

    def busy(path, *arguments, **options):
        raise OSError(16, "Device or resource busy", str(path))

    def rate_higher(store, step, score, state):
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", busy)
            rate(store, step, float(step), state)

    monkeypatch.setattr(CheckpointStore, "rate", rate_higher)
    config = configure("run", *EVALUATED, "checkpoint={every: 3, keep: 1, keep_best: true}")
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert sum("step_00000003 could not be deleted" in text for text in told) == 1


def test_a_signal_while_the_model_is_written_does_not_stop_that(configure, monkeypatch):
    export = train.export_model

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return export(*arguments)

    monkeypatch.setattr(train, "export_model", interrupted)
    config = configure("run", "steps=1", "checkpoint.every=0")
    assert not train_to_end(config).interrupted
    assert (Path(config.output_dir) / "model" / "model.safetensors").is_file()


def test_a_signal_after_a_last_checkpoint_that_failed_stops_the_evaluation_and_not_the_export(configure, monkeypatch):
    def full(*arguments, **options):
        raise CheckpointError("checkpoint: No space left on device.")

    def interrupted(trainer, *arguments):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_sets(trainer, *arguments)

    evaluate_sets = trainer_module.evaluate_sets
    monkeypatch.setattr(CheckpointStore, "save", full)
    monkeypatch.setattr(trainer_module, "evaluate_sets", interrupted)
    config = configure("run", *EVALUATED, "steps=3", "checkpoint.every=3")
    with pytest.raises(CheckpointError, match=r"checkpoint: No space.* The trained model is complete"):
        train_to_end(config)
    assert (Path(config.output_dir) / "model" / "model.safetensors").is_file()
    assert [row["step"] for row in rows(config) if row["kind"] == "eval"] == [0]


@pytest.mark.slow
@pytest.mark.parametrize(("export_fails", "act"), [(False, "save"), (True, "save"), (False, "rate")])
def test_a_last_checkpoint_that_cannot_be_written_keeps_the_model_from_nothing(configure, monkeypatch, export_fails, act):
    done = getattr(CheckpointStore, act)

    def full(store, step, *arguments):
        if step == 3:
            raise CheckpointError("checkpoint: No space left on device.")
        return done(store, step, *arguments)

    def no_export(*arguments):
        raise CheckpointError("model: No space left on device.")

    monkeypatch.setattr(CheckpointStore, act, full)
    if export_fails:
        monkeypatch.setattr(train, "export_model", no_export)
    config = configure("run", *EVALUATED, "steps=3")
    message = (
        r"model: No space.* Nor could a checkpoint" if export_fails else r"checkpoint: No space.* The trained model is complete"
    )
    with pytest.raises(CheckpointError, match=message):
        train_to_end(config)
    assert (Path(config.output_dir) / "model" / "model.safetensors").is_file() != export_fails
    assert [row["step"] for row in rows(config) if row["kind"] == "eval"] == [0, 3]


def test_the_model_to_start_from_is_not_replaced(configure):
    config = configure("run", "steps=1", "checkpoint.every=0")
    train_to_end(config)
    base = Path(config.output_dir) / "model"
    (Path(config.output_dir) / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="output_dir must not hold the model to start from, which the export would replace"):
        train_to_end(configure("run", "steps=1", "model.scratch=null", f"model.name_or_path={base}"))
    assert (base / "model.safetensors").is_file()


def failing(step, metrics):
    """A chooser with a slip at its third step."""
    return "expert" if step < 2 else "expert "


def test_a_chooser_that_fails_loses_nothing(configure):
    config = configure(
        "run", "objective={name: trapo, chooser: 'tests.trapo_train.run.test_continuation:failing'}", "checkpoint.every=0"
    )
    with pytest.raises(ChooserError, match=r"test_continuation:failing' failed at step 2: .*must answer one of"):
        train_to_end(config)
    assert CheckpointStore(Path(config.output_dir) / "checkpoints", keep=2).steps() == [2]


@pytest.mark.slow
def test_an_evaluation_is_recorded_once_however_often_the_run_was_stopped(configure, monkeypatch):
    config = configure("run", *EVALUATED, "checkpoint.every=0")
    run(config, StopAfter(config.output_dir, 3))
    resumed = configure("run", *EVALUATED, "checkpoint={every: 0, resume: true}")
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        run(resumed, StopAfter(config.output_dir, 5, KeyboardInterrupt("power cut")))
    summary = train_to_end(resumed)
    assert [row["step"] for row in rows(config) if row["kind"] == "eval"] == [0, 3, 6]
    assert train_to_end(resumed).evaluation == summary.evaluation != {}


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, dropout=0.2)], ids=["whole", "lora"])
def test_dropout_of_the_model_is_switched_off_and_that_of_adapters_left(lora):
    if lora is not None:
        pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
    model = PhiForCausalLM(PhiConfig(**sizes, resid_pdrop=0.1, attention_dropout=0.1, attn_implementation=PACKED_IMPLEMENTATION))
    told = []
    prepare(model, ModelConfig(name_or_path="none", lora=lora), device=torch.device("cpu"), tell=told.append)
    left = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0}
    assert all("lora_dropout" in name for name in left) and set(left.values()) == ({0.2} if lora else set())
    assert model.base_model.layers[0].self_attn.attention_dropout == 0.0
    assert [text for text in told if "own dropout and noise are switched off" in text]


def test_ranks_that_see_different_directories_are_told_before_the_first_rollout(configure, monkeypatch):
    monkeypatch.setattr(output_dir, "SHARED_WITHIN_S", 0.2)
    config = configure("run")
    world = SimpleNamespace(barrier=lambda: None, gather=lambda seen: [True, seen])
    with pytest.raises(ValueError, match=r"output_dir must be one directory for all ranks.* ranks \[1\] do not see"):
        output_dir.check_shared(config, world)


@pytest.mark.slow
def test_two_ranks_make_a_dry_run(tmp_path):
    ranks_train(2, tmp_path, "--dry-run")
    assert not (tmp_path / "run").exists()


def test_a_chat_template_that_writes_the_date_is_named_where_another_day_keeps_a_run_from_going_on(configure, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "ab?a1:", "solution": "b", "expert": "#b$"}\n')
    data = f"data={{path: {tmp_path / 'train.jsonl'}, as_chat: true}}"
    overrides = (data, f"model.tokenizer={tmp_path / 'tokenizer'}", "reward=exact_match", "prompts_per_step=1", "plan.name=sft")
    tokenizer = build_tokenizer()

    def on(day, read=""):
        tokenizer.chat_template = read + day + "{{ messages[0].content }}"
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return tokenizer

    on("a")
    train_to_end(configure("run", *overrides, "objective.name=sft", "steps=2"))
    again = configure("run", *overrides, "objective.name=sft", "steps=4", "checkpoint.resume=true")
    for read, words in (
        ("", r"output_dir\.$"),
        ("{% if false %}{{ strftime_now('%d') }}{% endif %}", r"its prompts have another date"),
    ):
        on("b", read)
        with pytest.raises(CheckpointError, match=rf"data was '\w+', is '\w+'.* {words}"):
            train_to_end(again)
    dated = DataConfig(path="x", chat_template_kwargs={"date_string": "26 Jul 2024"})
    llama = on("a", "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}")
    assert about_dates(llama, DataConfig(path="x")).endswith("set data.chat_template_kwargs={date_string: <a day>}.")
    assert about_dates(llama, dated) == ""
