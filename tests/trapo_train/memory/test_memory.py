"""Predicted memory: the tracer against real tensors, the plan against a measured step, and what the command says."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from dataclasses import astuple, replace

import pytest
import torch
import yaml
from transformers import AutoConfig, PhiConfig, Qwen2Config

from benchmarks.memory_plan import TOLERANCE, Run, compare
from trapo_train import cli
from trapo_train.config import load_config
from trapo_train.memory import trace
from trapo_train.memory.plan import _candidates, changes, plan_memory
from trapo_train.memory.tables import changes_table, memory_summary
from trapo_train.memory.trace import HeadSizes, LiveTensors, frozen_bytes, trace_optimizer, trace_pass, weigh
from trapo_train.models.lora import LoraConfig
from trapo_train.models.model import ModelConfig
from trapo_train.schema import UserError
from trapo_train.step.optimizer import OptimizerConfig

SHAPE = Qwen2Config(
    vocab_size=500, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
MATRICES = 2 * 500 * 64 + 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
VECTORS = 4 * (2 * 64 + 64 + 2 * 32) + 64  # norms, and the biases of queries, keys and values


def test_live_tensors_counts_what_lives():
    known = torch.zeros(1000)
    with LiveTensors([known]) as live:
        a = torch.ones(100)
        view, same = a[:50], known.add_(1.0)
        b = a + 1
        del a
    assert (live.now_bytes, live.peak_bytes) == (800, 800)  # the view keeps all of a
    del view, b, same
    assert live.now_bytes == 0
    live.restart_peak()
    assert live.peak_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_pass_on_fake_tensors_is_that_of_real_ones(dtype, checkpointing, monkeypatch):
    config = ModelConfig(name_or_path="none", dtype=dtype, gradient_checkpointing=checkpointing)
    head = HeadSizes(64, 500)
    traced = trace_pass(config, SHAPE, (40, 24), head, cast=True)
    monkeypatch.setattr(trace, "fake_tensors", nullcontext)
    assert trace._trace(config, SHAPE, 4, (40, 24), head, torch.float32) == traced
    assert 0 < traced.activations <= traced.forward_peak < traced.backward_peak


EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def _mixture(name):
    sizes = {name: getattr(SHAPE, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return AutoConfig.for_model(name, **sizes, **heads, tie_word_embeddings=False, **EXPERTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("cast", [True, False], ids=["one process", "several"])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_planned_as_it_runs(name, cast, monkeypatch):
    config, head = ModelConfig(name_or_path="none", dtype="bfloat16"), HeadSizes(64, 500)
    traced = trace_pass(config, _mixture(name), (40, 24), head, cast=cast)
    monkeypatch.setattr(trace, "fake_tensors", nullcontext)
    dtype = torch.float32 if cast else torch.bfloat16
    real = trace._trace(config, _mixture(name), 4, (40, 24), head, dtype)
    assert traced.activations == real.activations
    assert astuple(traced) == pytest.approx(astuple(real), rel=0.02)  # peaks, by when Python frees what


def test_what_depends_on_values_is_not_planned():
    loops = _mixture("mixtral")
    loops._experts_implementation = "eager"
    with pytest.raises(UserError, match=r"plan-memory: memory must follow from the model's shape, mixtral asks for values .* Only"):
        trace_pass(ModelConfig(name_or_path="none"), loops, (32,), HeadSizes(32, 500), cast=True)


@pytest.mark.slow
def test_a_training_pass_keeps_no_second_copy_of_the_weights():
    config = ModelConfig(name_or_path="none", dtype="bfloat16", gradient_checkpointing=True)
    shallow, deep = (trace._trace(config, SHAPE, layers, (8,), HeadSizes(8, 500), torch.float32) for layers in (2, 4))
    residuals = 2 * 8 * 64 * 2  # what two layers more keep: their input
    assert deep.activations - shallow.activations == residuals
    assert deep.forward_peak - shallow.forward_peak == residuals


def test_dropout_is_planned_as_it_runs_switched_off():
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 500}
    without, with_masks = (
        trace_pass(ModelConfig(name_or_path="none"), PhiConfig(**sizes, resid_pdrop=p), (40, 24), HeadSizes(64, 500), cast=True)
        for p in (0.0, 0.1)
    )
    assert without == with_masks


@pytest.mark.parametrize(
    ("optimizer", "state"), [("AdamW", 2), ("SGD", 0), ("RMSprop", 1), ("Adagrad", 1), ("NAdam", 2)], ids=lambda value: str(value)
)
def test_optimizer_state(optimizer, state):
    model = ModelConfig(name_or_path="none")
    size, _ = trace_optimizer(model, SHAPE, OptimizerConfig(name=optimizer), "cuda")
    assert size == pytest.approx(state * 4 * (MATRICES + VECTORS), rel=1e-3)  # and a step count for each parameter


@pytest.mark.parametrize("num_layers", [1, 3])
def test_an_architecture_that_lists_its_layers_has_any_number_of_them(num_layers):
    shape = Qwen2Config(**SHAPE.to_dict() | {"num_hidden_layers": num_layers, "layer_types": None})
    assert len(shape.layer_types) == num_layers
    found = trace_pass(ModelConfig(name_or_path="none"), shape, (8,), HeadSizes(8, 500), cast=False)
    assert found.activations > 0


def test_a_head_whose_gradient_is_narrow_has_no_fp32_one_in_backward():
    config = ModelConfig(name_or_path="none", dtype="bfloat16")
    wide, narrow = (
        trace_pass(config, SHAPE, (8,), HeadSizes(8, 500, dtype), cast=False).backward_peak
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide - narrow == 4 * 500 * 64  # fp32 instead of bf16, and what rounding it takes


def test_an_optimizer_that_looks_at_values_is_traced_too():
    size, transient = trace_optimizer(ModelConfig(name_or_path="none"), SHAPE, OptimizerConfig(name="Adafactor"), "cuda")
    assert 0 < size < 4 * MATRICES / 10 < transient


def test_weights_are_counted_tied_or_not_and_with_adapters():
    whole = weigh(ModelConfig(name_or_path="none"), SHAPE)
    assert (whole.total, whole.trained, whole.head) == (MATRICES + VECTORS, whole.total, 500 * 64)
    assert whole.held_bytes == 4 * whole.total
    tied = Qwen2Config(**{**SHAPE.to_dict(), "tie_word_embeddings": True})
    assert weigh(ModelConfig(name_or_path="none"), tied).total == whole.total - 500 * 64
    if importlib.util.find_spec("peft"):
        adapters = LoraConfig(rank=2, target_modules=["q_proj"])
        lora = weigh(ModelConfig(name_or_path="none", dtype="bfloat16", lora=adapters), SHAPE)
        assert (lora.trained, lora.head_trained, lora.head_dtype) == (4 * 2 * (64 + 64), False, torch.bfloat16)
        biases = 4 * (64 + 2 * 32)
        in_float32 = VECTORS - biases + lora.trained  # the norms and the adapters
        assert lora.held_bytes == 4 * in_float32 + 2 * (whole.total - VECTORS + biases)


@pytest.fixture
def recipe(tmp_path):
    """A configuration of a model of which there is a config.json and nothing else."""
    SHAPE.save_pretrained(tmp_path / "model")
    values = {
        "output_dir": "unused", "steps": 1, "prompts_per_step": 8, "reward": "exact_match",
        "model": {"name_or_path": str(tmp_path / "model"), "dtype": "bfloat16"},
        "data": {"path": "unused.jsonl", "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": 448, "max_batch_tokens": 4096},
        "packing": {"max_tokens": 4096},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_plan_adds_up(recipe):
    plan = plan_memory(load_config(recipe))
    assert (plan.context, plan.micro_batch_tokens, plan.sequences) == (512, 4096, 8)  # of 32 that the plan asks for at once
    parts = plan.components
    assert parts["weights"]["loss"] == 4 * (MATRICES + VECTORS) == parts["gradients, float32"]["backward"]
    layer = 2 * 32 * 2 * 8 * 512  # keys and values, width, bytes, sequences, tokens
    assert parts["keys and values of the responses"]["rollout"] == (4 + 1) * layer
    assert plan.peak_bytes == max(plan.total(phase) for phase in ("rollout", "loss", "backward", "update"))
    assert parts["chunk of logits and its gradient"] == {"loss": 4 * 4096 * 500}


@pytest.mark.slow
def test_what_a_cpu_keeps_for_the_next_head_is_there_until_it_samples(recipe, monkeypatch):
    name, config = "memory kept for the next head", load_config(recipe)
    assert name not in plan_memory(config, device_type="cpu").components  # it is small
    before = plan_memory(config, device_type="cpu").components["activations"]["backward"]
    monkeypatch.setattr("trapo_train.memory.plan.LEAST_KEPT_BYTES", 1)
    assert name not in plan_memory(config).components
    parts = plan_memory(config, device_type="cpu").components
    logits, weight = parts["chunk of logits and its gradient"]["loss"], 4 * 500 * 64
    assert parts[name] == {"backward": logits, "update": logits + weight}
    assert before <= parts["activations"]["backward"] <= before + weight


def test_what_samples_nothing_is_planned_no_responses(recipe):
    sft = ["plan.name=sft", "objective.name=sft", "reward=null", "evaluation.every=5", "eval_data={path: held_out.jsonl}"]
    plans = [plan_memory(load_config(recipe, [*sft, f"evaluation.sample={sample}"])) for sample in ("false", "true")]
    assert [plan.sequences for plan in plans] == [0, 8] and plans[0].total("rollout") < plans[1].total("rollout")
    assert "micro-batches of 4096 tokens. Before" in memory_summary(plans[0], "cuda")
    assert "micro-batches of 4096 tokens, 8 responses of at most" in memory_summary(plans[1], "cuda")


@pytest.mark.parametrize(("device", "outside"), [("cuda", "the CUDA context"), ("cpu", "Python and its libraries")])
def test_what_is_not_counted_depends_on_the_device(recipe, device, outside):
    told = memory_summary(plan_memory(load_config(recipe), device_type=device), device)
    assert told.endswith(f"Not counted: {outside}, the allocator's fragmentation.")


@pytest.mark.slow
def test_an_evaluation_of_longer_responses_counts(recipe):
    held_out = ["eval_data={path: held_out.jsonl}", "evaluation.responses_per_call=16", "rollout.max_batch_tokens=131072"]
    same = plan_memory(load_config(recipe, held_out))
    longer = plan_memory(load_config(recipe, [*held_out, "evaluation.max_response_tokens=1984"]))
    assert (same.sequences, same.generated) == (32, 512) and (longer.sequences, longer.generated) == (16, 2048)
    assert same.generated_by == "a step; prompts_per_step=8 bounds them"
    assert longer.generated_by == "an evaluation call; evaluation.responses_per_call=16 bounds them"
    assert plan_memory(load_config(recipe)).generated_by == "a step; rollout.max_batch_tokens=4096 bounds them"
    assert longer.total("loss") == same.total("loss") and longer.total("rollout") > same.total("rollout")
    assert plan_memory(load_config(recipe, [*held_out, "evaluation.max_response_tokens=9999"])).generated == 4096  # the positions


@pytest.mark.slow
def test_more_gpus_share_weights_and_state(recipe):
    alone, eight = (plan_memory(load_config(recipe), gpus=gpus) for gpus in (1, 8))
    for name in ("weights", "optimizer state", "gradients, float32"):
        assert eight.components[name]["update"] == alone.components[name]["update"] // 8
    assert "weights gathered by FSDP" in eight.components and "weights gathered by FSDP" not in alone.components
    replicated = plan_memory(load_config(recipe, ["parallel.replicate=2"]), gpus=8)
    assert replicated.components["optimizer state"]["update"] == alone.components["optimizer state"]["update"] // 4
    with pytest.raises(ValueError, match=r"gpus must be a multiple of parallel\.replicate = 2 and at least 1, got 3"):
        plan_memory(load_config(recipe, ["parallel.replicate=2"]), gpus=3)


def test_a_head_of_its_own_is_scattered_before_the_layers(recipe, tmp_path):
    tied = SHAPE.to_dict() | {"tie_word_embeddings": True}
    Qwen2Config(**tied).save_pretrained(tmp_path / "tied")
    own = plan_memory(load_config(recipe), gpus=4).components
    shared = plan_memory(load_config(recipe, [f"model.name_or_path={tmp_path / 'tied'}"]), gpus=4).components
    table, layer = 500 * 64, (MATRICES + VECTORS - 2 * 500 * 64 - 64) // 4
    assert own["weights gathered by FSDP"]["loss"] - shared["weights gathered by FSDP"]["loss"] == 2 * table
    assert own["weights gathered by FSDP"]["backward"] == 2 * (2 * layer + table + 64)  # embedding, norm and two layers
    assert own["gradients before FSDP scatters them"]["backward"] == int(2 * layer + 4 * layer * 1.25)
    assert shared["gradients before FSDP scatters them"]["backward"] == int(2 * (layer + table + 64) + 4 * layer * 1.25)


def test_the_command_says_what_loading_takes_of_each_ranks_host(recipe, capsys):
    assert plan_memory(load_config(recipe), gpus=8).loading_bytes == 4 * (MATRICES + VECTORS)
    assert cli.main(["plan-memory", recipe, "--gpus", "8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the first rank takes 0.00 GiB of host memory to load the model in float32" in shown


def test_vllm_takes_its_share_while_it_generates(recipe):
    plan = plan_memory(load_config(recipe, ["rollout.engine=vllm"]), gpu_bytes=1000)
    assert plan.components["vLLM"] == {"rollout": 500} and "keys and values of the responses" not in plan.components
    awake = plan_memory(load_config(recipe, ["rollout.engine=vllm", "rollout.vllm.sleep=false"]), gpu_bytes=1000)
    assert awake.components["vLLM"]["update"] == 500


def test_a_reference_holds_its_matrices_in_the_compute_type():
    config = ModelConfig(name_or_path="none", dtype="bfloat16")
    assert frozen_bytes(config, SHAPE) == 2 * (MATRICES + 4 * (64 + 2 * 32)) + 4 * (VECTORS - 4 * (64 + 2 * 32))
    assert frozen_bytes(replace(config, dtype="float32"), SHAPE) == 4 * (MATRICES + VECTORS)


@pytest.mark.slow
def test_changes_lower_the_peak(recipe):
    config = load_config(recipe)
    plan = plan_memory(config)
    found = changes(config, plan)
    assert "model.gradient_checkpointing=true" in [setting for setting, _ in found]
    peaks = [other.peak_bytes for _, other in found]
    assert peaks == sorted(peaks) and peaks[-1] < plan.peak_bytes
    for limit, title, columns in ((1.0, "one change at a time", 4), (0.001, "one change at a time, none of which is enough", 3)):
        table = changes_table(found, limit)
        assert (table.title, len(table.columns), table.row_count) == (title, columns, len(found))


@pytest.mark.slow
def test_an_evaluation_is_cut_at_the_positions_from_its_own_length(recipe):
    """Rollouts that are cut to the positions, 5000 to 4096, make no evaluation shorter; nor is it in the plans of changes."""
    held_out = ["eval_data={path: held_out.jsonl}", "evaluation={responses_per_call: 64, max_response_tokens: 500}"]
    settings = ["data.max_prompt_tokens=3000", "rollout={max_response_tokens: 2000, max_batch_tokens: 999999, engine: vllm_server}"]
    config = load_config(recipe, [*held_out, *settings])
    plan = plan_memory(config)
    assert (plan.context, plan.generated, plan.longest) == (4096, 3500, 4096)
    assert {other.generated for _, other in changes(config, plan)} == {3500}
    assert plan_memory(config, context=3000).generated == 1500


@pytest.mark.parametrize(("rollout", "evaluation"), [(448, 64), (64, 448)])
def test_a_batch_that_is_proposed_holds_the_longest_response(recipe, rollout, evaluation):
    settings = ["eval_data={path: held_out.jsonl}", f"evaluation={{responses_per_call: 4, max_response_tokens: {evaluation}}}"]
    settings += [f"rollout={{max_response_tokens: {rollout}, max_batch_tokens: 8192}}", "prompts_per_step=1"]
    config = load_config(recipe, settings)
    plan = plan_memory(config)
    assert plan.longest == 512
    shorter = replace(plan, generated=128, sequences=4)  # the peak is of the shorter responses
    (batch,) = [changed.rollout.max_batch_tokens for name, changed, _ in _candidates(config, shorter) if "max_batch_tokens" in name]
    assert batch == 512


@pytest.mark.slow
def test_the_command_says_whether_it_fits_and_what_to_change(recipe, capsys):
    assert cli.main(["plan-memory", recipe, "--memory-gib", "1"]) == 0
    assert "fits into 1 GiB" in capsys.readouterr().out
    assert cli.main(["plan-memory", recipe, "--memory-gib", "0.05", "--context", "1024", "--gpus", "2"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "context 1024 tokens" in printed and "memory of each of 2 GPUs" in printed
    assert "does not fit into 0.05 GiB: loss needs most, and most of it is activations" in printed
    assert "model.gradient_checkpointing=true" in printed


@pytest.mark.slow
def test_the_plan_is_what_a_run_needs():
    shape = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 256}
    (row,) = compare(Run("small", shape, 16000, 8, 128, ["model.gradient_checkpointing=true"]), "cpu")
    for what in ("step", "rollout"):
        assert row[f"predicted_{what}_mib"] == pytest.approx(row[f"{what}_mib"], rel=TOLERANCE)
