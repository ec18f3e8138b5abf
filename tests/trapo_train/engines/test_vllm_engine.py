"""vLLM in this process, against a stand-in that speaks its interface: weights in memory, sleep, joins, errors, whole runs."""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.trapo_train.engines.fake_vllm import FakeLLM, FakeSamplingParams, FakeVllm
from tests.trapo_train.rollouts.test_rollout import CONFIG, TOKENIZER, problem
from tests.trapo_train.scripted import Rounds
from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train import trainer
from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.checkpoints.export import export_model
from trapo_train.engines.configured import build_engine, ready_to_generate
from trapo_train.engines.engine import EngineError, SamplingParams
from trapo_train.engines.vllm_engine import VllmConfig, VllmEngine
from trapo_train.models.lora import LoraConfig, add_lora
from trapo_train.models.model import install_policy_head
from trapo_train.parallel.world import World
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.rollouts.plans import PlanConfig, build_plan
from trapo_train.rollouts.rollout import run_plans
from trapo_train.tasks import pointer_chasing_reward

PROMPTS = [[5, 6, 7], [8, 9], [5], [8, 9]]


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **(shape | options)))
    install_policy_head(model, compute_dtype=torch.float32)
    return model


def build(model, tmp_path, *, seed=3, ranks=1, **config):
    return VllmEngine(VllmConfig(**config), model, tmp_path / "config", TOKENIZER, seed=seed, dtype="float32", ranks=ranks)


def ready(engine, model, world=None):
    return ready_to_generate(engine, model, TOKENIZER, world or World.alone(), step=0)


@pytest.mark.parametrize("tied", [False, True])
def test_completions_are_those_of_the_weights_handed_over(vllm, tmp_path, tied):
    first, second = tiny(0, tie_word_embeddings=tied), tiny(1, tie_word_embeddings=tied)
    engine, params, budgets = build(first, tmp_path), SamplingParams((4, 9, 1, 30), temperature=0.7, seed=1), (4, 9, 1, 30)
    found = []
    for model in (first, second, first):
        with ready(engine, model):
            found.append(engine.generate(PROMPTS, params))
        for prompt, completion, budget in zip(PROMPTS, found[-1], budgets, strict=True):
            assert completion.finish_reason == "stop" or len(completion.token_ids) == budget
            logits = model(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = torch.log_softmax(logits.detach(), -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)
    assert found[0] == found[2] != found[1]


MOE = Qwen3MoeConfig(
    vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "tied", "lora", "mixture of experts", "mixture of experts, loaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_handed_over_under_the_names_and_with_the_values_of_an_export(vllm, tmp_path, kind, dtype):
    if kind == "lora":
        pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    model = Qwen3MoeForCausalLM(MOE) if kind.startswith("mixture") else tiny(tie_word_embeddings=kind == "tied")
    if kind.endswith("loaded"):  # which remembers how its files were read
        model.save_pretrained(tmp_path / "published")
        model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "published")
    install_policy_head(model, compute_dtype=dtype)
    if kind == "lora":
        add_lora(model, LoraConfig(rank=2))
        for name, parameter in model.named_parameters():
            parameter.data += 0.1 if "lora_B" in name else 0.0
    with ready(build(model, tmp_path), model):
        pass
    exported = load_file(export_model(model, TOKENIZER, tmp_path / "exported", dtype=dtype) / "model.safetensors")
    (llm,) = vllm.built
    assert llm.handed.keys() == exported.keys()
    assert all(torch.equal(llm.handed[name], weight) for name, weight in exported.items())
    assert kind.startswith("mixture") == any("experts.3.gate_proj.weight" in name for name in exported)


def test_a_model_of_which_files_hold_several_weights_as_one_is_refused(vllm, tmp_path, monkeypatch):
    def fused(model, weights):
        return {re.sub("[qkv]_proj", "qkv_proj", name): weight for name, weight in weights.items()}

    monkeypatch.setattr("trapo_train.engines.configured.revert_weight_conversion", fused)
    model = tiny()
    engine = build(model, tmp_path)
    message = (
        r"must come from one weight of the model, got .*qkv_proj.weight of several, .*k_proj.weight the last. Use .*vllm_server"
    )
    with pytest.raises(EngineError, match=message), ready(engine, model):
        pass


def test_each_of_several_tokens_ends_a_completion(vllm, tmp_path):
    model = tiny()
    engine = build(model, tmp_path)
    with ready(engine, model):
        (free,) = engine.generate([[5, 6]], SamplingParams(9, temperature=0.0, stop_token_ids=()))
        engine.end_ids = (TOKENIZER.eos_token_id, free.token_ids[2])
        (stopped,) = engine.generate([[5, 6]], SamplingParams(9, temperature=0.0))
    length = next(i for i, token_id in enumerate(free.token_ids, start=1) if token_id in engine.end_ids)
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:length], "stop")


def test_it_sleeps_while_training_and_wakes_in_the_right_order(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "device", property(lambda model: torch.device("cuda")))
    model = tiny()
    engine = build(model, tmp_path)
    monkeypatch.undo()
    FakeVllm.install(vllm, monkeypatch)
    (llm,) = vllm.built
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: llm.log.append("empty cache"))
    assert llm.log == ["sleep"] and llm.sleep_mode and llm.memory == set()
    with ready(engine, model):
        assert llm.log[1:] == ["empty cache", "wake weights", "load", "empty cache", "wake kv_cache", "reset"]
        engine.generate(PROMPTS, SamplingParams(3))
    assert llm.log[7:] == ["sleep"] and llm.memory == set()
    with pytest.raises(ZeroDivisionError), ready(engine, model):
        raise ZeroDivisionError
    assert llm.log[-1] == "sleep"
    with ready(engine, model):
        assert engine.generate(PROMPTS, SamplingParams(3, seed=1))[0].token_ids  # from weights, not from what sleep left


def test_without_a_gpu_or_with_sleep_false_it_stays_awake(vllm, tmp_path, monkeypatch):
    model = tiny()
    build(model, tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "device", property(lambda model: torch.device("cuda")))
    build(model, tmp_path, sleep=False)
    assert [(llm.sleep_mode, llm.log) for llm in vllm.built] == [(False, []), (False, [])]


def test_building_it_leaves_the_random_states_alone_and_passes_the_settings_on(vllm, tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = tiny()
    torch.set_rng_state(before)
    build(model, tmp_path, ranks=2, max_model_len=33)
    assert torch.equal(torch.get_rng_state(), before)
    (llm,) = vllm.built
    assert (llm.backend, llm.max_model_len, llm.dtype) == ("external_launcher", 33, "float32")


def test_further_arguments_reach_vllm_and_those_that_are_not_free_are_refused(vllm, tmp_path):
    build(tiny(), tmp_path, options={"max_num_batched_tokens": 99})
    assert vllm.built[0].max_num_batched_tokens == 99
    with pytest.raises(EngineError, match="LLM failed with TypeError: .*max_num_batch_tokens"):
        build(tiny(), tmp_path, options={"max_num_batch_tokens": 99})
    for name in ("tensor_parallel_size", "max_model_len", "logprobs_mode"):
        with pytest.raises(ValueError, match=f"options must not set {name}, which .*Leave it out"):
            VllmConfig(options={name: 2})


@pytest.mark.parametrize(("seed_requests", "draw"), [(False, "draw"), (False, "numpy_draw"), (True, "draw")])
def test_equal_states_ask_for_equal_samples_and_leave_the_trainers_generator_alone(
    vllm, tmp_path, monkeypatch, seed_requests, draw
):
    monkeypatch.setattr(FakeSamplingParams, "draw", getattr(FakeSamplingParams, draw))
    model = tiny()
    engine = build(model, tmp_path, seed_requests=seed_requests)
    before, in_numpy = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    with ready(engine, model):
        first, state = engine.generate(PROMPTS, SamplingParams(8)), engine.state_dict()
        second = engine.generate(PROMPTS, SamplingParams(8))
        assert first != second
        engine.load_state_dict(state)
        assert engine.generate(PROMPTS, SamplingParams(8)) == second
        engine.reseed(3)
        assert engine.generate(PROMPTS, SamplingParams(8)) == first
        engine.reseed(4)  # another rank's
        assert engine.generate(PROMPTS, SamplingParams(8)) != first
    assert torch.equal(torch.get_rng_state(), before) and (numpy.random.get_state()[1] == in_numpy).all()


def test_a_request_has_a_seed_where_that_is_asked_for(vllm, tmp_path, monkeypatch):
    model, asked, make = tiny(), [], vllm.SamplingParams
    monkeypatch.setattr(vllm, "SamplingParams", lambda **options: asked.append(options["seed"] is not None) or make(**options))
    for seed_requests in (False, True):
        engine = build(model, tmp_path, seed_requests=seed_requests)
        with ready(engine, model):
            for params in (SamplingParams(3), SamplingParams(3, seed=1)):  # an evaluation brings its own
                engine.generate(PROMPTS[:1], params)
    assert asked == [False, True, True, True]


@pytest.mark.slow
def test_plans_go_on_one_by_one(vllm, tmp_path):
    model, config = tiny(), replace(CONFIG, max_response_tokens=200)  # about 28 tokens each
    problems, plan = [problem(i, f"ab,bc?a{1 + i % 8}:") for i in range(12)], build_plan(PlanConfig("paper"))
    results = []
    for kind in (Rounds, lambda engine: engine):
        engine = build(model, tmp_path, max_model_len=300, seed_requests=True)
        with ready(engine, model):
            results.append(run_plans(problems, plan, kind(engine), pointer_chasing_reward, TOKENIZER, config))
    rounds, free = results
    samples = [[[s.completion_ids for s in group] for group in result.groups] for result in results]
    assert samples[0] == samples[1]
    assert free.metrics["rollout/engine_steps"] < rounds.metrics["rollout/engine_steps"]
    assert free.metrics["rollout/rows_in_flight"] > rounds.metrics["rollout/rows_in_flight"]


def test_errors_of_vllm_are_engine_errors_and_what_is_unfinished_is_called_off(vllm, tmp_path):
    model = tiny()
    engine = build(model, tmp_path)
    (llm,) = vllm.built
    with ready(engine, model):
        with pytest.raises(EngineError, match="add_request failed with ValueError: The prompt is longer"):
            engine.generate([[5, 6], [5] * 64], SamplingParams(4))
        assert llm.aborted == ["1"] and not llm.requests
        llm.fault = RuntimeError("CUDA out of memory")
        with pytest.raises(EngineError, match="step failed with RuntimeError: CUDA out of memory"):
            engine.generate(PROMPTS, SamplingParams(4))
        assert not llm.requests


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "call", "name"),
    [
        ("wake_up", 3, "wake_up"),
        ("collective_rpc", 2, "reload_weights"),
        ("wake_up", 4, "wake_up"),
        ("reset_prefix_cache", 2, "reset_prefix_cache"),
        ("sleep", 3, "sleep"),
    ],
    ids=["weights", "reload", "kv_cache", "prefixes", "sleep"],
)
def test_a_run_whose_vllm_runs_out_of_memory_in_its_second_step_keeps_the_first(vllm, tmp_path, monkeypatch, method, call, name):
    inner, calls = getattr(FakeLLM, method), itertools.count(1)

    def fail(*arguments, **options):
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return inner(*arguments, **options)

    def build_as_on_a_gpu(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(LlamaForCausalLM, "device", property(lambda model: torch.device("cuda")))
            return build_engine(*arguments, **options)

    monkeypatch.setattr(FakeLLM, method, fail)
    monkeypatch.setattr(trainer, "build_engine", build_as_on_a_gpu)
    config = build_config(tmp_path, "run", "rollout.engine=vllm", "rollout.vllm.max_model_len=80", "steps=3", "checkpoint.every=0")
    with pytest.raises(EngineError) as raised:
        train_to_end(config)
    assert str(raised.value) == (
        f"vllm: {name} failed with OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB. "
        "Lower rollout.vllm.gpu_memory_utilization."
    )
    assert CheckpointStore(tmp_path / "run" / "checkpoints", keep=1).steps() == [1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda answer: setattr(answer, "finish_reason", "abort"), "got 'abort'"),
        (lambda answer: answer.logprobs.pop(), "2 tokens and 1 logprobs"),
        (lambda answer: setattr(answer, "logprobs", None), "2 tokens and 0 logprobs"),
        (lambda answer: answer.token_ids.clear(), "0 tokens"),
        (
            lambda answer: setattr(answer.logprobs[1][answer.token_ids[1]], "logprob", float("nan")),
            "vllm: the logits of vLLM are not finite: token 1 has the logprob nan. Look for NaN in the weights",
        ),
    ],
)
def test_outputs_that_cannot_be_used_are_errors(vllm, tmp_path, spoil, message):
    model = tiny()
    engine = build(model, tmp_path)
    (llm,) = vllm.built
    step = llm.step

    def spoiled():
        outputs = step()
        for output in outputs:
            spoil(output.outputs[0])
        return outputs

    llm.step = spoiled
    with ready(engine, model), pytest.raises(EngineError, match=message):
        engine.generate([[5, 6]], SamplingParams(2, stop_token_ids=()))


def test_without_vllm_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(EngineError, match=r"Install trapo\[vllm\].*vllm_server.*transformers"):
        build(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("gpu_memory_utilization", 0.0), ("gpu_memory_utilization", 1.1), ("max_num_seqs", 0), ("max_model_len", 1)],
)
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        VllmConfig(**{field: value})


TIED = pytest.param(("model.scratch.tie_word_embeddings=true",), marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("model.lora={rank: 2}",), TIED])
def test_a_run_samples_from_the_weights_that_it_has_just_trained(vllm, tmp_path, more):
    config = build_config(tmp_path, "run", "rollout.engine=vllm", "rollout.vllm.max_model_len=80", "steps=4", *more)
    train_to_end(config)
    rows = [row for row in read_metrics(config.output_dir) if row["kind"] == "train"]
    assert len(rows) == 4 and len({row["rollout/logprob"] for row in rows}) == 4  # it learns
    assert all(abs(row["rollout/mismatch_kl"]) < 1e-5 and row["rollout/mismatch_p95"] < 1e-4 for row in rows)
    (llm,) = vllm.built
    assert llm.log == ["load", "reset"] * 4 + ["shutdown"]


def test_a_response_beyond_what_vllm_can_hold_is_refused_before_any_work(vllm, tmp_path):
    config = build_config(tmp_path, "run", "rollout.engine=vllm", "rollout.vllm.max_model_len=20")
    with pytest.raises(ValueError, match=r"must fit into rollout\.vllm\.max_model_len = 20, got"):
        train_to_end(config)
    assert vllm.built == []


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(vllm, tmp_path):
    overrides = ("rollout.engine=vllm", "rollout.vllm.max_model_len=80")
    whole = build_config(tmp_path, "whole", *overrides, "steps=4")
    train_to_end(whole)
    train_to_end(build_config(tmp_path, "run", *overrides, "steps=2"))
    train_to_end(build_config(tmp_path, "run", *overrides, "steps=4", "checkpoint.resume=true"))
    exported = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "run")]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_with_nothing_to_generate_it_waits_for_the_reward(vllm, tmp_path):
    async def reward(completions, **columns):
        await asyncio.sleep(0.02)
        return [0.0] * len(completions)

    model = tiny()
    engine = build(model, tmp_path)
    with ready(engine, model):
        result = run_plans([problem()], build_plan(PlanConfig("paper")), engine, reward, TOKENIZER, CONFIG)
    assert [len(group) for group in result.groups] == [8]
