"""The vLLM engine against a server that speaks its protocol, samples from a real model, and fails in every way a server can."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.trapo_train.engines.fake_vllm import MODEL, FakeServer
from tests.trapo_train.rollouts.test_rollout import CONFIG, TOKENIZER, iter_requests, problem
from tests.trapo_train.step.test_optimizer_step import make_model
from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train.checkpoints.export import export_model
from trapo_train.engines import vllm_server
from trapo_train.engines.engine import EngineError, SamplingParams
from trapo_train.engines.vllm_server import VllmServerConfig, VllmServerEngine
from trapo_train.records import Request
from trapo_train.reports.display import Reporter
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.rewards.functions import RewardError
from trapo_train.rollouts.rollout import run_plans
from trapo_train.tasks import build_tokenizer, pointer_chasing_reward
from trapo_train.train import run
from trapo_train.trainer import Trainer


@pytest.fixture
def weights(tmp_path):
    """A tiny model on disk that the demo's tokenizer fits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    model.save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def engine(server, weights, monkeypatch):
    monkeypatch.setattr(vllm_server, "_FIRST_PAUSE_S", 0.01)
    config = VllmServerConfig(base_url=server.url, timeout_s=1.0, max_retries=2, seed_requests=True)
    engine = VllmServerEngine(config, MODEL, weights, build_tokenizer(), seed=3)
    engine.load_weights()
    engine.loaded_step = 0
    return engine


def test_each_of_several_tokens_ends_a_completion(engine):
    (free,) = engine.generate([[5, 6]], SamplingParams(9, temperature=0.0, stop_token_ids=()))
    engine.end_ids = (build_tokenizer().eos_token_id, free.token_ids[2])
    (stopped,) = engine.generate([[5, 6]], SamplingParams(9, temperature=0.0))
    length = next(i for i, token_id in enumerate(free.token_ids, start=1) if token_id in engine.end_ids)
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:length], "stop")


def test_completions_are_those_of_the_model_with_its_logprobs(engine, server):
    engine.check()
    prompts, params = [[5, 6, 7], [8, 9], [5]], SamplingParams((4, 9, 1), temperature=0.7)
    completions = engine.generate(prompts, params)
    for prompt, completion, budget in zip(prompts, completions, (4, 9, 1), strict=True):
        assert 0 < len(completion.token_ids) <= budget
        assert completion.finish_reason == "stop" or len(completion.token_ids) == budget
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logits = server.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].detach() / 0.7
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)
    assert server.requests[1][0] == "/reset_prefix_cache"  # the old weights' cache is gone before the first request


def test_a_server_that_reports_logprobs_before_the_temperature_is_refused(engine, server):
    before = engine.state_dict()
    server.logprobs_mode = "raw_logprobs"  # vLLM's default
    with pytest.raises(EngineError, match=r"0 for a token drawn with top_k=1, it reports -\d.*--logprobs-mode processed_logprobs"):
        engine.check()
    server.logprobs_mode = "processed_logprobs"
    engine.check()
    assert engine.state_dict() == before


def test_a_tie_of_two_tokens_is_no_reason_to_refuse_a_server(engine, server, monkeypatch):
    tied = iter([[-0.6931], [0.0], [0.0]])
    monkeypatch.setattr(server, "reported", lambda *arguments: next(tied))
    engine.check()


def test_equal_states_ask_for_equal_samples_whatever_the_order_of_arrival(engine):
    state = engine.state_dict()
    first = engine.generate([[5, 6]] * 6, SamplingParams(8))
    second = engine.generate([[5, 6]] * 6, SamplingParams(8))
    assert first != second and len({completion.token_ids for completion in first}) > 1
    engine.load_state_dict(state)
    assert engine.generate([[5, 6]] * 6, SamplingParams(8)) == first
    assert engine.generate([[5, 6]], SamplingParams(8, seed=1)) == engine.generate([[5, 6]], SamplingParams(8, seed=1))


def test_a_request_has_a_seed_where_that_is_asked_for(server, engine):
    engine._config = replace(engine._config, seed_requests=False)
    assert VllmServerConfig().seed_requests is False
    for params in (SamplingParams(3), SamplingParams(3, seed=1)):
        engine.generate([[5, 6]] * 3, params)
    assert [body.get("seed") is None for path, body in server.requests if path == "/v1/completions"] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("fault", [500, 429, "garbage", "die", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_fault_that_passes_is_retried(engine, server, fault):
    server.faults = [fault, fault]
    (completion,) = engine.generate([[5, 6]], SamplingParams(3))
    assert completion.token_ids


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, "failed 3 times, at last with HTTP 500"),
        ("garbage", "failed 3 times, at last with JSONDecodeError"),
        ("die", "failed 3 times, at last with RemoteDisconnected"),
        pytest.param("hang", "failed 3 times, at last with TimeoutError", marks=pytest.mark.slow),
        (400, "was refused: HTTP 400"),
        ("short", "a logprob each.* got 3 tokens, 2 logprobs"),
        ("not a number", "logits of vLLM are not finite: token 0 has the logprob nan. Look for NaN in the weights"),
        ("null", "logits of vLLM are not finite: token 0 has the logprob None"),
        ("no ids", "must hold one choice with token_ids"),
        ("no logprobs", "must hold one choice with token_ids, finish_reason and logprobs"),
        ("words", "must hold 1 to 3 tokens"),
        ("abort", "end by stop or length, got 3 tokens, 3 logprobs and 'abort'"),
        ("capped", "must have all 3 tokens that were asked for, got 2: .* without max_new_tokens"),
        ("two choices", "must hold one choice"),
        ("too long", "must hold 1 to 3 tokens .* got 27 tokens"),
    ],
)
def test_a_fault_that_stays_is_an_error_that_says_what_to_do(engine, server, fault, message):
    server.faults = [fault] * 9
    with pytest.raises(EngineError, match=message):
        engine.generate([[5, 6]], SamplingParams(3, stop_token_ids=()))


def test_many_requests_are_in_flight_at_once_and_come_back_in_any_order(server, engine):
    server.delay = lambda body: 0.02 * (8 - len(body["prompt"]))  # the first ones take longest
    prompts = [[5] * (1 + i) for i in range(8)]
    reordered = engine.generate(prompts, SamplingParams(3, seed=1))
    assert server.most_at_once > 3
    assert [len(body["prompt"]) for body in server.answered] != [1, 2, 3, 4, 5, 6, 7, 8]
    server.delay = lambda body: 0.0
    assert engine.generate(prompts, SamplingParams(3, seed=1)) == reordered
    engine._config = replace(engine._config, max_in_flight=2)
    server.most_at_once = 0
    engine.generate(prompts, SamplingParams(3))
    assert server.most_at_once <= 2


@pytest.mark.slow
def test_a_quick_problem_moves_on_while_a_slow_one_is_in_flight(server, engine):
    quick, slow = problem(0, "ab?a1:"), problem(1, "ab,bc?a2:")
    engine._config = replace(engine._config, timeout_s=60.0)

    def wait(body):  # the slow one for all four answers of the quick one
        for _ in range(5000 if tuple(body["prompt"][: len(slow.prompt_ids)]) == slow.prompt_ids else 0):
            time.sleep(0.01 if len(server.answered) < 4 else 0)
        return 0.0

    server.delay = wait
    plan = lambda problem: iter_requests([Request(2), Request(1, 0.25), Request(1, 0.5)])  # noqa: E731
    result = run_plans([slow, quick], plan, engine, pointer_chasing_reward, TOKENIZER, CONFIG)
    order = [tuple(body["prompt"][: len(quick.prompt_ids)]) == quick.prompt_ids for body in server.answered]
    assert order[:4] == [True] * 4  # all micro-groups of the quick one before the slow one's first answer
    assert [len(group) for group in result.groups] == [4, 4]
    assert 0 < result.metrics["rollout/rows_in_flight"] < 3 and result.metrics["rollout/tokens_per_s"] > 0


def test_the_budget_of_a_request_is_what_the_prefix_leaves(server, engine):
    one = problem()
    plan = lambda problem: iter_requests([Request(1), Request(1, 0.25), Request(1, 0.5), Request(1, 1.0)])  # noqa: E731
    (group,) = run_plans([one], plan, engine, pointer_chasing_reward, TOKENIZER, CONFIG).groups
    bodies = [body for path, body in server.requests if path == "/v1/completions"]
    assert [body["max_tokens"] for body in bodies] == [20 - len(sample.prefix_ids) for sample in group[:3]] == [20, 17, 11]
    assert [tuple(body["prompt"]) for body in bodies] == [one.prompt_ids + sample.prefix_ids for sample in group[:3]]
    assert all(len(sample.completion_logprobs) == len(sample.completion_ids) > 0 for sample in group[:3])


def test_a_server_that_started_anew_gets_the_weights_before_it_samples_again(server, engine, weights):
    engine._config = replace(engine._config, max_retries=8)
    expected = engine.generate([[5, 6]] * 4, SamplingParams(6, seed=1))
    server.faults = ["die"] * 4
    answered = []
    thread = threading.Thread(target=lambda: answered.append(engine.generate([[5, 6]] * 4, SamplingParams(6, seed=1))))
    server.delay = lambda body: 0.2
    thread.start()
    time.sleep(0.1)  # all four are under way
    server.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=0.2).close()
    again = FakeServer(server.port)  # knows no weights yet
    thread.join(20)
    again.close()
    assert answered == [expected] and again.loaded == [str(weights)]
    paths = [path for path, _ in again.requests]
    assert paths[:2] == ["/collective_rpc", "/reset_prefix_cache"] and paths[2:] == ["/v1/completions"] * 4


def test_what_is_longer_than_the_server_takes_is_refused_before_anything_is_sampled(server, tmp_path):
    config = build_config(tmp_path, "run", *server_settings(server))
    prompt = Trainer(config).problems.longest_prompt_tokens
    server.card["max_model_len"] = prompt + 16
    Trainer(config)
    server.requests.clear()
    server.card["max_model_len"] -= 1
    said = rf"vLLM server's --max-model-len = {prompt + 15}, got {prompt} \+ 16 = {prompt + 16} tokens\. Raise that limit"
    with pytest.raises(ValueError, match=said):
        Trainer(config)
    assert server.requests == []
    del server.card["max_model_len"]  # which a server may leave out
    Trainer(config)


def test_the_server_reads_weights_in_the_dtype_that_training_computes_in(tmp_path):
    model = make_model().bfloat16().float()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    export_model(model, build_tokenizer(), tmp_path / "weights", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight.bfloat16())
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("fault", "reloads"), [(503, 1), pytest.param("hang", 1, marks=pytest.mark.slow), ("garbage", 1), (429, 0)]
)
def test_any_failure_but_a_busy_server_brings_the_weights_back_on_every_rank(server, engine, weights, fault, reloads):
    other = VllmServerEngine(engine._config, MODEL, weights, build_tokenizer(), seed=3)  # a rank that did not hand them over
    other.loaded_step = 0
    for rank in (engine, other):
        server.loaded.clear()
        server.faults = [fault]
        rank.generate([[5, 6]], SamplingParams(3, seed=1))
        assert server.loaded == [str(weights)] * reloads


def test_an_error_does_not_wait_for_other_requests_that_hang(server, weights, monkeypatch):
    monkeypatch.setattr(vllm_server, "_FIRST_PAUSE_S", 0.01)
    engine = VllmServerEngine(VllmServerConfig(base_url=server.url, timeout_s=60), MODEL, weights, build_tokenizer(), seed=3)
    engine.load_weights()
    server.delay = lambda body: 0.0 if len(body["prompt"]) == 1 else 30.0
    server.fault = lambda body: 400 if len(body["prompt"]) == 1 else None
    started = time.perf_counter()
    with pytest.raises(EngineError, match="HTTP 400"):
        engine.generate([[5, 6], [5, 6, 7], [5]], SamplingParams(3))
    assert time.perf_counter() - started < 10


def test_a_server_that_is_not_there_and_one_with_another_model(server, weights, monkeypatch):
    monkeypatch.setattr(vllm_server, "_FIRST_PAUSE_S", 0.01)
    for settings, attempts in (({"max_retries": 1}, 2), ({}, 4)):  # at the start 3 further ones at most
        absent = VllmServerConfig(base_url="http://127.0.0.1:9", **settings)
        with pytest.raises(EngineError, match=f"failed {attempts} times.*Check that the server runs"):
            VllmServerEngine(absent, MODEL, weights, build_tokenizer(), seed=0).check()
    other = VllmServerEngine(VllmServerConfig(base_url=server.url), "other", weights, build_tokenizer(), seed=0)
    with pytest.raises(EngineError, match=r"must offer the model 'other', it offers \['tiny'\]"):
        other.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be an address"),
        ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VllmServerConfig(**settings)


def server_settings(server):
    return (
        "rollout.engine=vllm_server",
        f"rollout.vllm_server={{base_url: '{server.url}', model: {MODEL}, max_retries: 1, timeout_s: 20, seed_requests: true}}",
        "reward=tests.trapo_train.step.test_updates:coin",
        "objective={name: dapo}",
        "plan.name=grpo",
        "steps=4",
    )


@pytest.mark.slow
def test_a_run_samples_from_the_weights_that_it_has_just_trained(server, tmp_path):
    config = build_config(tmp_path, "run", *server_settings(server))
    train_to_end(config)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 4 and len(server.loaded) == 4
    assert all(abs(row["rollout/mismatch_kl"]) < 1e-4 and row["rollout/mismatch_p95"] < 1e-3 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["/v1/completions", "/collective_rpc"])
def test_a_server_that_dies_loses_nothing(server, tmp_path, monkeypatch, where):
    """The step that could not be sampled is not begun, everything before it is saved, and the run goes on to the same bits."""
    monkeypatch.setattr(vllm_server, "_FIRST_PAUSE_S", 0.01)
    overrides = (*server_settings(server), "checkpoint.every=0")
    whole = build_config(tmp_path, "whole", *overrides)
    train_to_end(whole)
    config = build_config(tmp_path, "run", *overrides)
    if where == "/v1/completions":  # 24 samples a step: in the middle of the third
        monkeypatch.setattr(server, "complete", dies_after(server, server.complete, 60))
    else:  # four loads of the whole run, and two of this one
        monkeypatch.setattr(server, "load", raises_after(server.load, 2))
    with pytest.raises(EngineError, match="checkpoint.resume=true"), Reporter(config.output_dir) as reporter:
        run(config, reporter)
    assert [path.name for path in (Path(config.output_dir) / "checkpoints").iterdir()] == ["step_00000002"]
    monkeypatch.undo()
    server.faults = []
    train_to_end(build_config(tmp_path, "run", *overrides, "checkpoint.resume=true"))
    model = "model/model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


@pytest.mark.slow
def test_weights_that_cannot_be_written_for_the_server_lose_nothing(server, tmp_path, monkeypatch):
    config, writes = build_config(tmp_path, "run", *server_settings(server), "checkpoint.every=0"), []

    def refuses(model, *arguments, inner=PreTrainedModel.save_pretrained, **options):
        writes.append(model)
        if len(writes) == 3:
            raise ValueError("transformers does not save this")
        inner(model, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuses)
    with pytest.raises(EngineError, match="weights cannot be handed over.*ValueError: transformers does not save this"):
        train_to_end(config)
    assert [path.name for path in (Path(config.output_dir) / "checkpoints").iterdir()] == ["step_00000002"]


def dies_after(server, complete, calls):
    """`complete`, until the server answers nothing but errors."""
    counted = []

    def dying(body):
        counted.append(body)
        if len(counted) == calls:
            server.faults = [500] * 999
        return complete(body)

    return dying


def raises_after(load, calls):
    counted = []

    def failing(path):
        counted.append(path)
        if len(counted) > calls:
            raise OSError("no weights today")
        load(path)

    return failing


def test_a_reward_that_fails_loses_nothing_either(tmp_path):
    config = build_config(tmp_path, "run", f"reward={__name__}:moody", "checkpoint.every=0", "steps=4")
    MOOD["calls"] = 0
    with pytest.raises(RewardError, match="not today"), Reporter(config.output_dir) as reporter:
        run(config, reporter)
    assert [path.name for path in (Path(config.output_dir) / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.slow
def test_an_evaluation_that_fails_loses_nothing_either(server, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "_FIRST_PAUSE_S", 0.01)
    held_out = "eval_data={task: pointer_chasing, split: test, num_problems: 4}"
    overrides = (*server_settings(server), "checkpoint.every=0", held_out, "evaluation.every=2")
    config = build_config(tmp_path, "run", *overrides)
    complete, limit = server.complete, 3 + 4 + 2 * 24 + 2  # `check`, then two samples into the evaluation after the second step
    monkeypatch.setattr(server, "complete", dies_after(server, complete, limit))
    with pytest.raises(EngineError), Reporter(config.output_dir) as reporter:
        run(config, reporter)
    assert [path.name for path in (Path(config.output_dir) / "checkpoints").iterdir()] == ["step_00000002"]
    server.faults, server.complete = [], complete
    train_to_end(build_config(tmp_path, "run", *overrides, "checkpoint.resume=true"))
    evaluated = [row["step"] for row in read_metrics(config.output_dir) if row["kind"] == "eval"]
    assert evaluated == [0, 2, 4]


MOOD = {"calls": 0}


def moody(prompts, completions, **columns):
    """Raises in the third step, of which each has three problems."""
    MOOD["calls"] += len(completions)
    if MOOD["calls"] > 2 * 3 * 8 + 8:
        raise RuntimeError("not today")
    return [0.0] * len(completions)
