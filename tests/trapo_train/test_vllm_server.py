"""The vLLM engine against a server that speaks its protocol, samples from a real model, and fails in every way a server can."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train import vllm_server
from trapo_train.display import Reporter, read_metrics
from trapo_train.engine import SamplingParams, TransformersEngine
from trapo_train.tasks import build_tokenizer
from trapo_train.train import run
from trapo_train.vllm_server import EngineError, VllmConfig, VllmServerEngine

MODEL = "tiny"


class FakeServer:
    """`vllm serve` for one model: weights come from a folder, completions from the embedded engine, faults from a list."""

    def __init__(self):
        self.model, self.engine, self.lock = None, None, threading.Lock()
        self.faults, self.requests, self.loaded = [], [], []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                self._answer({"data": [{"id": MODEL}]} if self.path == "/v1/models" else None)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append((self.path, body))
                if self.path == "/collective_rpc":
                    fake.load(body["kwargs"]["weights_path"])
                    return self._answer({"results": [None]})
                if self.path == "/reset_prefix_cache":
                    return self._answer(None)
                fault = fake.faults.pop(0) if fake.faults else None
                if fault == "hang":
                    time.sleep(1.5)
                if fault in (500, 400):
                    return self._answer({"error": f"status {fault}"}, fault)
                if fault == "garbage":
                    return self._raw(b"{not json")
                if fault == "die":
                    return self.connection.close()
                answer = fake.complete(body)
                if fault == "short":
                    answer["choices"][0]["logprobs"]["token_logprobs"].pop()
                if fault == "no ids":
                    del answer["choices"][0]["token_ids"]
                self._answer(answer)

            def _answer(self, value, status=200):
                self._raw(b"" if value is None else json.dumps(value).encode(), status)

            def _raw(self, data, status=200):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # as many connections at once as a test opens; the default of 5 resets the others

        self.http = Server(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def load(self, path):
        self.model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        self.engine = TransformersEngine(self.model, build_tokenizer(), seed=0, max_batch_tokens=4096)
        self.loaded.append(path)

    def complete(self, body):
        params = SamplingParams(
            body["max_tokens"], body["temperature"], body["top_p"], stop_token_ids=tuple(body["stop_token_ids"]), seed=body["seed"]
        )
        with self.lock:
            (completion,) = self.engine.generate([body["prompt"]], params)
        choice = {"index": 0, "text": "", "finish_reason": completion.finish_reason, "token_ids": list(completion.token_ids)}
        return {"choices": [choice | {"logprobs": {"token_logprobs": list(completion.logprobs)}}]}


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


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
    config = VllmConfig(base_url=server.url, timeout_s=1.0, max_retries=2)
    engine = VllmServerEngine(config, MODEL, weights, build_tokenizer(), seed=3)
    engine.load_weights()
    return engine


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


def test_equal_states_ask_for_equal_samples_whatever_the_order_of_arrival(engine):
    state = engine.state_dict()
    first = engine.generate([[5, 6]] * 6, SamplingParams(8))
    second = engine.generate([[5, 6]] * 6, SamplingParams(8))
    assert first != second and len({completion.token_ids for completion in first}) > 1
    engine.load_state_dict(state)
    assert engine.generate([[5, 6]] * 6, SamplingParams(8)) == first
    assert engine.generate([[5, 6]], SamplingParams(8, seed=1)) == engine.generate([[5, 6]], SamplingParams(8, seed=1))


@pytest.mark.parametrize("fault", [500, "garbage", "die", "hang"])
def test_a_fault_that_passes_is_retried(engine, server, fault):
    server.faults = [fault, fault]
    (completion,) = engine.generate([[5, 6]], SamplingParams(3))
    assert completion.token_ids


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, "failed 3 times, at last with HTTP 500"),
        ("garbage", "failed 3 times, at last with JSONDecodeError"),
        ("die", "failed 3 times"),
        ("hang", "failed 3 times, at last with TimeoutError"),
        (400, "was refused: HTTP 400"),
        ("short", "a logprob each"),
        ("no ids", "must hold one choice with token_ids"),
    ],
)
def test_a_fault_that_stays_is_an_error_that_says_what_to_do(engine, server, fault, message):
    server.faults = [fault] * 9
    with pytest.raises(EngineError, match=message):
        engine.generate([[5, 6]], SamplingParams(3))


def test_a_server_that_is_not_there_and_one_with_another_model(server, weights, monkeypatch):
    monkeypatch.setattr(vllm_server, "_FIRST_PAUSE_S", 0.01)
    tokenizer = build_tokenizer()
    absent = VllmServerEngine(VllmConfig(base_url="http://127.0.0.1:9", max_retries=1), MODEL, weights, tokenizer, seed=0)
    with pytest.raises(EngineError, match="failed 2 times.*Check that the server runs"):
        absent.check()
    other = VllmServerEngine(VllmConfig(base_url=server.url), "other", weights, tokenizer, seed=0)
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
        VllmConfig(**settings)


def _overrides(server):
    return (
        "rollout.engine=vllm_server",
        f"rollout.vllm={{base_url: '{server.url}', model: {MODEL}, max_retries: 1, timeout_s: 20}}",
        "reward='tests.trapo_train.test_updates:coin'",
        "objective={name: dapo}",
        "plan.name=grpo",
        "steps=4",
    )


def test_a_run_samples_from_the_weights_that_it_has_just_trained(server, tmp_path):
    config = build_config(tmp_path, "run", *_overrides(server))
    train_to_end(config)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 4 and len(server.loaded) == 4
    assert all(abs(row["rollout/mismatch_kl"]) < 1e-4 and row["rollout/mismatch_p95"] < 1e-3 for row in rows)


def test_a_server_that_dies_loses_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "_FIRST_PAUSE_S", 0.01)
    whole = build_config(tmp_path, "whole", *_overrides(server))
    train_to_end(whole)
    config = build_config(tmp_path, "run", *_overrides(server))
    answered = server.complete
    calls = []

    def dies(body):
        calls.append(body)
        if len(calls) > 60:
            server.faults = [500] * 999
        return answered(body)

    server.complete = dies
    with pytest.raises(EngineError), Reporter(config.output_dir) as reporter:
        run(config, reporter)
    server.faults, server.complete = [], answered
    train_to_end(build_config(tmp_path, "run", *_overrides(server), "checkpoint.resume=true"))
    model = "model/model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
