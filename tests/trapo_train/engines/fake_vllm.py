"""Stand-ins for vLLM: a server that speaks its protocol, and a module with the part of its interface that is used."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import numpy
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trapo_train.engines.engine import SamplingParams, TransformersEngine
from trapo_train.tasks import build_tokenizer

MODEL = "tiny"

# What a server would take from the model's generation_config where it is left out, besides temperature, top_p and top_k.
NEUTRAL = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
BODY = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos", "logprobs",
    "return_token_ids", "skip_special_tokens", *NEUTRAL,
}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer({"data": [self.server.fake.card]} if self.path == "/v1/models" else None)

    def do_POST(self):
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.requests.append((self.path, body))
        if self.path == "/collective_rpc":
            assert body["method"] == "reload_weights" and body["kwargs"]["is_checkpoint_format"]
            fake.load(body["kwargs"]["weights_path"])
            return self._answer({"results": [None]})
        if self.path == "/reset_prefix_cache":
            return self._answer(None)
        if body.keys() - {"seed"} != BODY or not body["ignore_eos"]:
            return self._answer({"error": f"not what vLLM expects: {sorted(set(body) ^ BODY)}"}, 400)
        if any(body[name] != value for name, value in NEUTRAL.items()):
            return self._answer({"error": f"not the model's own distribution: {[body[name] for name in NEUTRAL]}"}, 400)
        self._complete(body, fake.fault(body))

    def _complete(self, body, fault):
        fake = self.server.fake
        with fake.counting:
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        time.sleep(1.5 if fault == "hang" else fake.delay(body))
        with fake.counting:
            fake.at_once -= 1  # before the answer, on which the client may send its next request
        if isinstance(fault, int):
            return self._answer({"error": f"status {fault}"}, fault)
        if fault == "garbage":
            return self._raw(b"{not json")
        if fault == "die":
            return self.connection.shutdown(socket.SHUT_RDWR)
        answer = fake.complete(body)
        spoil(answer, fault)
        fake.answered.append(body)
        self._answer(answer)

    def _answer(self, value, status=200):
        self._raw(b"" if value is None else json.dumps(value).encode(), status)

    def _raw(self, data, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # as many connections at once as a test opens; the default of 5 resets the others

    def handle_error(self, *arguments):
        """A client that has gone is no error."""


class FakeServer:
    """`vllm serve` for one model: weights come from a folder, completions from the embedded engine, faults from a list.

    A fault is a status to answer with, or says how an answer is spoiled; None is none. `delay(body)` is in seconds. `card` is
    what it offers.
    """

    def __init__(self, port=0):
        self.lock, self.logprobs_mode = threading.Lock(), "processed_logprobs"
        self.card = {"id": MODEL, "max_model_len": 2048}
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        self._serve(LlamaForCausalLM(LlamaConfig(vocab_size=len(build_tokenizer()), **shape)))
        self.counting = threading.Lock()
        self.faults, self.requests, self.loaded, self.answered = [], [], [], []
        self.delay = lambda body: 0.0
        self.fault = lambda body: self.faults.pop(0) if self.faults else None
        self.at_once = self.most_at_once = 0
        self.http = _Server(("127.0.0.1", port), _Handler)
        self.http.fake = self
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def load(self, path):
        self._serve(AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"))
        self.loaded.append(path)

    def _serve(self, model):
        self.model = model.eval()
        self.engine = TransformersEngine(self.model, build_tokenizer(), seed=0, max_batch_tokens=4096)

    def complete(self, body):
        top_k, stop_ids = max(0, body["top_k"]), tuple(body["stop_token_ids"])
        params = SamplingParams(body["max_tokens"], body["temperature"], body["top_p"], top_k, stop_ids, body.get("seed"))
        with self.lock:
            (completion,) = self.engine.generate([body["prompt"]], params)
            logprobs = self.reported(body["prompt"], completion, params)
        choice = {"index": 0, "text": "", "finish_reason": completion.finish_reason, "token_ids": list(completion.token_ids)}
        return {"choices": [choice | {"logprobs": {"token_logprobs": logprobs}}]}

    @torch.no_grad()
    def reported(self, prompt, completion, params):
        """The logprobs as vLLM's sampler has them: processed ones after temperature and top_k, raw ones before both."""
        processed = self.logprobs_mode == "processed_logprobs"
        if processed and not params.top_k:
            return list(completion.logprobs)
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        if processed:
            logits = logits / params.temperature
            logits = logits.masked_fill(logits < logits.topk(params.top_k).values[:, -1:], -torch.inf)
        return logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def spoil(answer, fault):
    """Make of an answer what no client can use."""
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]["token_logprobs"]
    if fault == "short":
        logprobs.pop()
    if fault == "not a number":
        logprobs[0] = float("nan")
    if fault == "null":
        logprobs[0] = None
    if fault == "no ids":
        del choice["token_ids"]
    if fault == "no logprobs":
        choice["logprobs"] = None
    if fault == "words":
        choice["token_ids"] = ["token_id:5"] * len(logprobs)
    if fault == "capped":  # as with max_new_tokens in the generation_config of the server
        choice["token_ids"].pop()
        logprobs.pop()
    if fault == "abort":
        choice["finish_reason"] = "abort"
    if fault == "two choices":
        answer["choices"].append(choice)
    if fault == "too long":
        choice["token_ids"] *= 9
        logprobs *= 9


class FakeVllm(ModuleType):
    """The module `vllm` as far as it is used; LLMs that were built are in `built`."""

    def __init__(self):
        super().__init__("vllm")
        self.built = []
        fake = self
        self.inputs, self.sampling_params = ModuleType("vllm.inputs"), ModuleType("vllm.sampling_params")
        self.inputs.tokens_input = lambda prompt_token_ids: {"type": "token", "prompt_token_ids": prompt_token_ids}
        self.sampling_params.RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)

        def llm(model, **options):
            fake.built.append(FakeLLM(model, **options))
            return fake.built[-1]

        self.LLM, self.SamplingParams = llm, FakeSamplingParams

    def install(self, monkeypatch):
        for name, module in (("vllm", self), ("vllm.inputs", self.inputs), ("vllm.sampling_params", self.sampling_params)):
            monkeypatch.setitem(sys.modules, name, module)


class FakeSamplingParams:
    def draw(self):
        """Of torch's generator, as vLLM's runner does, or of numpy's, as its second one (`numpy_draw`)."""
        return int(torch.randint(2**62, ()))

    def numpy_draw(self):
        return int(numpy.random.randint(2**62))

    def __init__(
        self, *, max_tokens, seed, temperature, top_p, top_k, stop_token_ids, ignore_eos, logprobs, detokenize, output_kind
    ):
        assert ignore_eos and logprobs == 0 and not detokenize and output_kind == 2
        seed = self.draw() if seed is None else seed
        assert 0 <= seed < 2**63
        self.budget, self.params = max_tokens, SamplingParams(max_tokens, temperature, top_p, top_k, tuple(stop_token_ids), seed)


class FakeLLM:
    """`vllm.LLM`: its weights are random until some are loaded, it knows what is awake, and takes a step for each token."""

    def __init__(
        self, model, *, skip_tokenizer_init, load_format, dtype, seed, logprobs_mode, gpu_memory_utilization, max_num_seqs,
        enforce_eager, enable_sleep_mode, max_model_len=64, distributed_executor_backend=None, max_num_batched_tokens=None,
    ):  # fmt: skip
        assert skip_tokenizer_init and load_format == "dummy" and logprobs_mode == "processed_logprobs"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        torch.manual_seed(seed)  # as vLLM does where it shares the process
        config = AutoConfig.from_pretrained(model)
        assert config.architectures[0] in ("LlamaForCausalLM", "Qwen3MoeForCausalLM"), "vLLM knows no other name"
        self.dtype, self.backend, self.sleep_mode = dtype, distributed_executor_backend, enable_sleep_mode
        self.memory = {"weights", "kv_cache"}
        self.log = []
        self.max_model_len, self.max_num_batched_tokens = max_model_len, max_num_batched_tokens
        self.model = AutoModelForCausalLM.from_config(config)
        self.engine = TransformersEngine(self.model, build_tokenizer(), seed=0, max_batch_tokens=4096)
        self.requests, self.aborted, self.fault = {}, [], None
        self.llm_engine = self
        self.engine_core = SimpleNamespace(shutdown=lambda: self.log.append("shutdown"))

    def sleep(self, level):
        assert self.sleep_mode and level == 2
        self.memory.clear()
        self.log.append("sleep")
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)

    def wake_up(self, tags):
        assert self.sleep_mode
        self.memory.update(tags)
        self.log.append(f"wake {tags[0]}")

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and "weights" in self.memory
        self.log.append("load")
        self.handed = {}
        for name, weight in kwargs["weights_iterator"]:
            assert name not in self.handed, f"{name} was handed over twice"
            self.handed[name] = weight.clone()
        with tempfile.TemporaryDirectory() as folder:  # names and shapes are those of a model's files
            self.model.config.save_pretrained(folder)
            save_file(self.handed, f"{folder}/model.safetensors", metadata={"format": "pt"})
            loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        self.model.load_state_dict(loaded.state_dict())
        return [None]

    def reset_prefix_cache(self):
        self.log.append("reset")
        return True

    def add_request(self, request_id, prompt, params):
        if len(prompt["prompt_token_ids"]) >= self.max_model_len:
            raise ValueError(f"The prompt is longer than the maximum model length of {self.max_model_len}")
        assert self.memory == {"weights", "kv_cache"} and prompt["type"] == "token"
        (completion,) = self.engine.generate([prompt["prompt_token_ids"]], params.params)
        self.requests[request_id] = [len(completion.token_ids), completion]
        return f"{request_id}-0a1b2c3d"  # not the id that outputs carry

    def step(self):
        if self.fault is not None:
            raise self.fault
        outputs = []
        for request_id, request in list(self.requests.items()):
            request[0] -= 1
            if request[0] == 0:
                del self.requests[request_id]
                outputs.append(fake_output(request_id, request[1]))
        return outputs

    def abort_request(self, request_ids):
        self.aborted += request_ids
        for request_id in request_ids:
            del self.requests[request_id]


def fake_output(request_id, completion):
    logprobs = [
        {token_id: SimpleNamespace(logprob=logprob, rank=1)}
        for token_id, logprob in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    answer = SimpleNamespace(token_ids=list(completion.token_ids), logprobs=logprobs, finish_reason=completion.finish_reason)
    return SimpleNamespace(request_id=request_id, finished=True, outputs=[answer])
