"""Contract 7: any number of ranks trains what one process trains; gloo processes run the code that torchrun runs on GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests import ranks
from tests.trapo_train.step.test_optimizer_step import make_model, make_samples
from tests.trapo_train.test_train import EVALUATED, TINY, build_config
from trapo_kernels import objectives
from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.checkpoints.model_state import load_training_state, training_state
from trapo_train.models.placement import gathered, place_model
from trapo_train.parallel.vocab_parallel import join_micro_batches
from trapo_train.parallel.world import ParallelConfig, World
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer, build_scheduler
from trapo_train.step.optimizer_step import optimizer_step
from trapo_train.step.packing import PackingConfig, pack
from trapo_train.trainer import Trainer

SETTINGS = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)


def _new(world, tied):
    """A model in fp64, its optimizer and its schedule."""
    model = make_model()
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.double()
    model.get_output_embeddings().compute_dtype = torch.float64
    place_model(model, world)
    optimizer = build_optimizer(model, SETTINGS)
    return model, optimizer, build_scheduler(optimizer, SETTINGS, steps=4)


def _two_steps(world, tied):
    """Model and optimizer after two steps, the metrics of the last, and whether its head was sharded in every layer's
    backward."""
    model, optimizer, scheduler = _new(world, tied)
    sharded = []
    for layer in model.model.layers:
        layer.register_full_backward_pre_hook(lambda *_: sharded.append(isinstance(model.lm_head.weight, DTensor)))
    objective = objectives.trapo(entropy_coef=0.01)
    for budget in (12, 48):  # two micro-batches for each of 2 ranks, then one
        config = PackingConfig(max_tokens=budget)
        packed = pack(make_samples(), config, objective, max_response_tokens=16, ranks=world.size)
        joined = world.vocab_parallel_head
        mine = join_micro_batches(packed, world.size, world.rank) if joined else world.share(packed)
        metrics = optimizer_step(model, optimizer, scheduler, mine, objective, 1.0, 1.0, world)
        with gathered(model):  # as a rollout between two steps does
            model(input_ids=torch.tensor([[1, 2, 3]]))
    return model, optimizer, metrics, sharded


def _save(store, model, optimizer):
    tensors, values = training_state(model, optimizer)
    store.save(2, values, {}, tensors)


def _load(store, model, optimizer):
    """Put the checkpoint into model and optimizer; returns the tensors as they are then."""
    step, values = store.load({})
    load_training_state(model, optimizer, values, store, step)
    tensors, loaded = training_state(model, optimizer)
    assert loaded == values
    return tensors


def _worker(rank, parallel, tied, directory):
    world = World(parallel)
    model, optimizer, metrics, sharded = _two_steps(world, tied)
    assert sharded[-1] != tied  # of the first layer: a head of its own was given up by then
    _save(CheckpointStore(directory / "ranks", 1, world), model, optimizer)
    again = _load(CheckpointStore(directory / "alone", 1, world), *_new(world, tied)[:2])  # saved by one process
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in again.items()}
    if rank == 0:
        torch.save((whole, metrics), directory / "rank_0.pt")
    world.close()
    os._exit(0)


@pytest.mark.parametrize(
    ("size", "settings", "tied"),
    [
        (2, {}, False),
        pytest.param(3, {}, True, marks=pytest.mark.slow),
        pytest.param(4, {"replicate": 2}, False, marks=pytest.mark.slow),
        pytest.param(2, {"vocab_parallel_head": True}, False, marks=pytest.mark.slow),
        pytest.param(3, {"vocab_parallel_head": True}, False, marks=pytest.mark.slow),
    ],
)
def test_ranks_train_and_save_what_one_process_does(size, settings, tied, tmp_path):
    world = World.alone()
    model, optimizer, expected, _ = _two_steps(world, tied)
    _save(CheckpointStore(tmp_path / "alone", 1), model, optimizer)
    alone, _ = training_state(model, optimizer)
    ranks.start(_worker, size, ParallelConfig(timeout_s=60, **settings), tied, tmp_path)
    loaded_by_ranks, metrics = torch.load(tmp_path / "rank_0.pt", weights_only=False)
    saved_by_ranks = _load(CheckpointStore(tmp_path / "ranks", 1), *_new(world, tied)[:2])
    assert alone.keys() == loaded_by_ranks.keys() == saved_by_ranks.keys() and any("exp_avg" in name for name in alone)
    # Llama's norms compute in fp32 whatever their input: scaling by 2 is exact there, by 3 it rounds.
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if size == 2 else {"rtol": 1e-4, "atol": 5e-6}
    for name, value in alone.items():
        assert torch.equal(loaded_by_ranks[name], value), name
        torch.testing.assert_close(saved_by_ranks[name], value, **tolerance, msg=name)
    for name, value in expected.items():
        if name != "micro_batches":
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [SETTINGS, OptimizerConfig(name="SGD", options={"momentum": 0.9}), OptimizerConfig(name="SGD")]
)
def test_a_state_before_and_after_the_first_step_moves_to_a_fresh_model(settings, tmp_path):
    for steps in (0, 1):
        model = make_model()
        optimizer = build_optimizer(model, settings)
        build_scheduler(optimizer, settings, steps=4)  # which adds to the optimizer's groups what the state has there
        for _ in range(steps):
            model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
            optimizer.step()
        store = CheckpointStore(tmp_path / str(steps), 1)
        _save(store, model, optimizer)
        fresh = make_model()
        for parameter in fresh.parameters():
            parameter.data.zero_()
        again = _load(store, fresh, build_optimizer(fresh, settings))
        for name, value in training_state(model, optimizer)[0].items():
            assert torch.equal(again[name], value), name


def _new_with_idle_weights(world):
    """A model with a matrix that no token reaches, as those of an expert may be, its optimizer and its schedule."""
    model = make_model()
    model.model.layers[0].idle = torch.nn.Linear(16, 16)
    place_model(model, world)
    optimizer = build_optimizer(model, SETTINGS)
    return model, optimizer, build_scheduler(optimizer, SETTINGS, steps=4)


def _resume_with_idle_weights(rank, directory):
    """A step, a checkpoint and another step, and that step out of the checkpoint: the same bits, and no state where no gradient
    was."""
    world, objective = World(ParallelConfig(timeout_s=60)), objectives.trapo()
    packed = pack(make_samples(), PackingConfig(12), objective, max_response_tokens=16, ranks=world.size)

    def step(run):
        optimizer_step(*run, world.share(packed), objective, 1.0, 1.0, world)

    first, again, store = _new_with_idle_weights(world), _new_with_idle_weights(world), CheckpointStore(directory, 1, world)
    step(first)
    _save(store, *first[:2])
    _load(store, *again[:2])
    again[2].load_state_dict(first[2].state_dict())
    step(first)
    step(again)
    expected, values = training_state(*first[:2])
    found, _ = training_state(*again[:2])
    assert values["stateless"] == ["model.layers.0.idle.weight", "model.layers.0.idle.bias"]
    assert found.keys() == expected.keys() and "optimizer.model.embed_tokens.weight.exp_avg" in found
    for name, value in expected.items():
        assert torch.equal(*(x.to_local() if isinstance(x, DTensor) else x for x in (found[name], value))), name
    world.close()
    os._exit(0)


@pytest.mark.parametrize("size", [1, 2])
def test_weights_that_never_had_a_gradient_have_no_state_after_resuming_either(size, tmp_path):
    ranks.start(_resume_with_idle_weights, size, tmp_path)


def test_a_loaded_state_leaves_the_implementation_that_was_chosen_for_these_parameters(tmp_path):
    model, saved = make_model(), OptimizerConfig(name="SGD", learning_rate=0.1, options={"momentum": 0.9})
    optimizer = build_optimizer(model, saved)
    assert optimizer.param_groups[0]["fused"]
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05  # by the schedule
    store = CheckpointStore(tmp_path, 1)
    _save(store, model, optimizer)
    fresh = make_model()
    for_shards = build_optimizer(fresh, replace(saved, options={"momentum": 0.9, "fused": False, "foreach": True}))
    _load(store, fresh, for_shards)
    assert {group["fused"] for group in for_shards.param_groups} == {False} and for_shards.param_groups[0]["foreach"]
    assert [group["lr"] for group in for_shards.param_groups] == [0.05, 0.1]


def test_a_tied_head_is_not_sharded_over_the_vocabulary():
    model, world = make_model(), World.alone()
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    world.size, world.vocab_parallel_head, world.gather = 2, True, lambda value: [value, value]
    with pytest.raises(ValueError, match="vocab_parallel_head needs an output head of its own"):
        place_model(model, world)


def ranks_train(size, directory, *overrides):
    """What the ranks of a run with these overrides print."""
    (directory / "run.yaml").write_text(yaml.safe_dump(TINY))
    return ranks.run(size, directory / "log", "run", directory / "run.yaml", f"output_dir={directory / 'run'}", *overrides)


def _torchrun(size, directory, *overrides, wait=True):
    (directory / "run.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += ["-m", "trapo_train", "run", str(directory / "run.yaml"), f"output_dir={directory / 'run'}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
def test_torchrun_trains_resumes_on_other_ranks_and_exports(tmp_path):
    _torchrun(2, tmp_path, "steps=2")
    ranks_train(3, tmp_path, "steps=4", "checkpoint.resume=true")
    output = ranks_train(1, tmp_path, "steps=6", "checkpoint.resume=true")
    assert "saved by 3 ranks, continued by 1" in " ".join(output.split())
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "--shutdown-timeout" in (tmp_path / "run" / "metrics.jsonl").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def torn(step, metrics):
    """A chooser whose answer differs from rank to rank, as one that looks at times does."""
    return "rollout" if os.environ["RANK"] == "0" else "expert"


@pytest.mark.slow
def test_ranks_with_a_chooser_that_ranks_disagree_on_and_an_optimizer_without_a_fused_form_for_shards(tmp_path):
    settings = (
        "optimizer={name: SGD, learning_rate: 1e-2}",
        "objective={chooser: 'tests.trapo_train.parallel.test_parallel:torn'}",
    )
    ranks_train(1, tmp_path, "steps=1", *settings)  # fused
    ranks_train(2, tmp_path, "steps=3", "checkpoint.resume=true", *settings)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["num_samples"] for row in rows] == [24, 24, 24]  # of the plan of the first rank's answer, on both


@pytest.mark.slow
def test_ranks_with_lora_and_a_reference(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    (tmp_path / "base").mkdir()
    ranks_train(2, tmp_path / "base", "steps=1")
    base = tmp_path / "base" / "run" / "model"
    model = f"model={{name_or_path: {json.dumps(str(base))}, lora: {{rank: 2}}, dtype: bfloat16}}"
    settings = (model, "objective={name: grpo, options: {beta: 0.1}}", "plan.name=grpo", "optimizer.warmup_steps=0")
    ranks_train(2, tmp_path, "steps=2", "reward=tests.trapo_train.step.test_updates:coin", *settings)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    held = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float()  # as frozen weights are
    loaded = peft.PeftModel.from_pretrained(held, tmp_path / "run" / "adapter").merge_and_unload().state_dict()
    for name, value in loaded.items():
        torch.testing.assert_close(value, merged[name], rtol=1e-6, atol=1e-7)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name), "these start as zeros"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2)])  # float32: test_ranks_train_and_save_what_one_process_does
def test_ranks_with_a_vocabulary_parallel_head_a_reference_and_old_logprobs(dtype, tolerance, tmp_path):
    settings = ("objective={name: grpo, options: {beta: 0.1}}", "updates={mini_batches: 3, correction: {name: tis}}")
    run = ("steps=2", f"model.dtype={dtype}", "reward=tests.trapo_train.step.test_updates:coin", "plan.name=grpo", *settings)
    rows = {}
    for sharded in ("false", "true"):
        directory = tmp_path / sharded
        directory.mkdir()
        ranks_train(2, directory, *run, f"parallel.vocab_parallel_head={sharded}")
        rows[sharded] = [row for row in read_metrics(directory / "run" / "metrics.jsonl") if row["kind"] == "train"]
        AutoModelForCausalLM.from_pretrained(directory / "run" / "model")
    assert len(rows["true"]) == 2
    names = ("loss", "grad_norm", "entropy/rollout", "rollout/ratio_max", "rollout/mismatch_p95", "loss_tokens", "reward/mean")
    for name in (*names, "correction/mean", "correction/capped_share"):
        for sharded, whole in zip(rows["true"], rows["false"], strict=True):
            assert sharded[name] == pytest.approx(whole[name], rel=tolerance, abs=tolerance / 100), name


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path):
    process = _torchrun(2, tmp_path, "steps=100000", "checkpoint.every=0", wait=False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "143" in output, output[-3000:]  # of torchrun, which shows those of the ranks
    assert len(CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps()) == 1


@pytest.mark.slow
def test_ctrl_c_on_torchrun_saves(tmp_path):
    process = _torchrun(2, tmp_path, "steps=100000", "checkpoint.every=0", wait=False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert output.count("SIGINT: the run saves after this step and stops\n") == 1, output[-3000:]
    (step,) = CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps()
    assert f"Stopped by SIGINT after step {step}" in " ".join(output.split())


def signalled(prompts, completions, **columns):
    """A reward that sends SIGTERM to the second rank, from the first evaluation on."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return [0.0] * len(completions)


@pytest.mark.slow
def test_a_signal_to_one_rank_during_an_evaluation_ends_it_on_all(tmp_path):
    reward = "reward=tests.trapo_train.parallel.test_parallel:signalled"
    process = _torchrun(2, tmp_path, reward, *EVALUATED, "evaluation={every: 3, responses_per_call: 1}", wait=False)
    output, _ = process.communicate(timeout=120)
    assert "Stopped by SIGTERM after step 0" in " ".join(output.split())
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps() == [0]
    assert {row["kind"] for row in read_metrics(tmp_path / "run")} == {"event"}


def fails_on_one_rank(prompts, completions, **columns):
    """A reward that raises on the second rank, in its third step."""
    if os.environ["RANK"] == "1":
        CALLS.append(len(completions))
        if sum(CALLS) > 2 * 8:  # one problem of 8 samples a step
            raise RuntimeError("not today")
    return [0.0] * len(completions)


CALLS = []


@pytest.mark.slow
def test_what_cannot_be_sampled_on_one_rank_ends_all_of_them_with_everything_before_saved(tmp_path):
    settings = ("steps=5", "prompts_per_step=2", "checkpoint.every=0")
    process = _torchrun(2, tmp_path, *settings, "reward=tests.trapo_train.parallel.test_parallel:fails_on_one_rank", wait=False)
    output = " ".join(process.communicate(timeout=120)[0].split())
    assert process.returncode != 0 and "not today" in output and "lost another rank" not in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def _wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "nothing happened within two minutes"
        time.sleep(0.2)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_rank_alone_tells_what_takes_a_while(tmp_path, monkeypatch, first):
    told = []
    monkeypatch.setattr(World, "first", first)
    monkeypatch.setattr("trapo_train.trainer.place_model", lambda model, world: model.to_empty(device=world.device))
    Trainer(build_config(tmp_path, "run"), tell=told.append)
    assert told == (["loading a model from scratch", "reading pointer_chasing"] if first else [])
