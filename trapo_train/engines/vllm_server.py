"""Rollouts from a vLLM server, which may live in another environment or on other machines.

Start the server with its endpoints for reinforcement learning, on a file system that both sides see:

    VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-Math-7B --port 8000 --logprobs-mode processed_logprobs

`processed_logprobs` are those at the sampling temperature, which is what the trainer compares with: a server that reports others is
refused. vLLM takes them after top_k and top_p, so leave these off where the sampler's logprobs enter the loss. Before a step
samples, the trainer writes its weights as safetensors to `sync_dir`, and the server reads them from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO
from urllib.parse import urlsplit

from trapo_train.engines.draws import request_seed
from trapo_train.engines.engine import Engine, EngineError, SamplingParams, finite_logprobs, stop_ids
from trapo_train.files import lock, sign
from trapo_train.records import Completion
from trapo_train.schema import check, expand_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_RETRIES_AT_START = 3  # of a server that perhaps nobody has started
# Said, because a server takes from the model's generation_config what a request leaves out: Qwen2.5's names a repetition penalty.
_NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class VllmServerConfig:
    """Where the vLLM server is and how it is used; only read with rollout.engine: vllm_server."""

    base_url: str = "http://127.0.0.1:8000"
    """Address of the server, without /v1."""
    model: str | None = None
    """Name under which the server offers the model; null for model.name_or_path."""
    sync_dir: str | None = None
    """Folder that the trainer writes weights to and the server reads them from; null for vllm_weights in output_dir."""
    timeout_s: float = 1800.0
    """Longest wait for one answer, in seconds, above 0; it includes the time that a request waits in the server's queue."""
    max_retries: int = 10
    """Further attempts after a failed connection, an error of the server or timeout_s, at least 0; the first after 0.5 s, each
    further one after twice the time, at most 30 s: with 10 a server has 151 s to start anew. At the start of a run 3 at most."""
    max_in_flight: int = 256
    """Most requests sent at once, at least 1."""
    seed_requests: bool = False
    """A seed for every request, for which vLLM draws row by row; else the server draws as it likes. What is sampled with a seed of
    its own, as an evaluation, has one for every request either way."""

    def __post_init__(self) -> None:
        check(
            self,
            ("base_url", self.base_url.startswith(("http://", "https://")), "an address with http:// or https://"),
            ("timeout_s", self.timeout_s > 0, "above 0"),
            ("max_retries", self.max_retries >= 0, "at least 0"),
            ("max_in_flight", self.max_in_flight >= 1, "at least 1"),
        )
        expand_home(self, "sync_dir")


def claim_file(base_url: str) -> Path:
    """The file that is locked by the process which samples from a server."""
    return Path(tempfile.gettempdir()) / f"trapo_vllm_server_{os.getuid()}_{hashlib.sha256(base_url.encode()).hexdigest()[:16]}"


@cache
def _claimed(base_url: str) -> TextIO:
    """The file of `claim_file`, locked, and open as long as the process lives, whatever becomes of its engines."""
    file = claim_file(base_url).open("a+", encoding="utf-8")
    other = lock(file)
    if other is not None:
        file.close()
        raise EngineError(
            f"vllm_server: a server must serve one run, or one evaluation, at a time, got {base_url}, which {other} uses: each "
            "would sample from the weights of the other. Wait for its end, stop it, or start a second server and set "
            "rollout.vllm_server.base_url."
        )
    sign(file)
    return file


class VllmServerEngine(Engine):
    """Samples from a vLLM server over its OpenAI-compatible protocol, one request per prompt, many at once.

    `Completion.logprobs` are what the server reports; see the module's docstring for the server's option.

    A request that fails may mean that the server has started anew, with its old weights: it reads those of this run again before
    the request is repeated, and whenever generating begins.

    Determinism: with seed_requests, requests carry seeds derived from the engine's, so that equal states ask for equal samples;
    what a GPU server answers may still depend on how it batches them.
    """

    def __init__(
        self, config: VllmServerConfig, model: str, sync_dir: Path, tokenizer: PreTrainedTokenizerBase, *, seed: int
    ) -> None:
        super().__init__(seed)
        self._config = config
        self._model = config.model or model
        self._tokenizer = tokenizer
        self._weights = _Weights(self.load_weights)
        self.loaded_step = -1  # none handed over yet
        self.sync_dir = Path(config.sync_dir or sync_dir).resolve()

    def check(self) -> None:
        """Raise EngineError unless the server answers, offers the model and reports the logprobs that the trainer compares with."""
        _first_contact(self._config).call("GET", "/health")
        longest_of_server(self._config, self._model)
        # After top_k = 1 one token is left, whose processed logprob is 0 and whose raw one is not; three times, as tokens may tie.
        words = [[len(self._tokenizer) // part] for part in (2, 3, 4)]
        answers = self.generate(words, SamplingParams(1, temperature=2.0, top_k=1, stop_token_ids=(), seed=0))
        reported = [logprob for answer in answers for logprob in answer.logprobs]
        if not any(logprob == 0 for logprob in reported):
            raise EngineError(
                "vllm_server: the server must report the logprobs that it samples with, 0 for a token drawn with top_k=1, it "
                f"reports {', '.join(f'{logprob:.4g}' for logprob in reported)}: temperature and importance weights would be "
                "wrong. Start it with --logprobs-mode processed_logprobs."
            )

    def claim(self) -> None:
        """Keep other runs of this user on this machine from the server, as long as the process lives.

        Raises: EngineError where another has it: each would sample from the weights of the other. OSError where no file can be
            locked in the directory for temporary ones.
        """
        _claimed(self._config.base_url)

    def load_weights(self) -> None:
        """Have the server read the weights in `sync_dir` and forget what it cached of the old ones."""
        client = _Client(self._config)
        client.call(
            "POST",
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(self.sync_dir), "is_checkpoint_format": True}},
        )
        client.call("POST", "/reset_prefix_cache", {})

    def stream(self, params: SamplingParams) -> VllmServerStream:
        """Start generating for requests that arrive one after another; each brings its own budget."""
        body = {
            "model": self._model,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            **_NEUTRAL,
            # Not the model's own list, which may name further tokens: what ends a completion is decided here.
            "stop_token_ids": list(stop_ids(params, self._tokenizer, self.end_ids)),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        weights = self._weights if self.loaded_step >= 0 else None
        key = self._next_key(params)
        seeded = self._config.seed_requests or params.seed is not None
        return VllmServerStream(_Client(self._config, weights), self._config.max_in_flight, body, key if seeded else None)


def _first_contact(config: VllmServerConfig) -> _Client:
    return _Client(replace(config, max_retries=min(config.max_retries, _RETRIES_AT_START)))


def longest_of_server(config: VllmServerConfig, model: str | None) -> int | None:
    """The server's max_model_len: tokens of the longest prompt with its response that it takes; None where it does not say.

    Args:
        model: its name, unless `config` has another.

    Raises: EngineError unless the server answers and offers the model.
    """
    name = config.model or model
    offered = {entry.get("id"): entry for entry in (_first_contact(config).call("GET", "/v1/models") or {}).get("data", [])}
    if name not in offered:
        raise EngineError(
            f"vllm_server: the server must offer the model {name!r}, it offers {list(offered)}. Set rollout.vllm_server.model."
        )
    return offered[name].get("max_model_len")


class VllmServerStream:
    """Requests to a vLLM server (see `Stream`): they are sent as they are handed in, and done in whatever order."""

    in_order, hungry = False, True

    def __init__(self, client: _Client, max_in_flight: int, body: dict[str, Any], key: int | None) -> None:
        self._client, self._body, self._key = client, body, key
        self._threads = ThreadPoolExecutor(max_in_flight, thread_name_prefix="vllm-server")
        self._running: dict[Future, int] = {}
        self._tickets = 0
        self._busy_s, self._started, self._ended = 0.0, time.perf_counter(), 0.0

    def submit(self, prompt: Sequence[int], budget: int, key: int) -> int:
        """Send a request."""
        self._tickets += 1
        body = self._body | {"prompt": list(prompt), "max_tokens": budget}
        if self._key is not None:
            body["seed"] = request_seed(self._key, key)
        self._running[self._threads.submit(self._complete, body)] = self._tickets
        return self._tickets

    def advance(self, others: Collection[Future] = ()) -> list[tuple[int, Completion]]:
        """Wait until a request or one of `others` is done.

        Raises: EngineError after the last retry, or for an answer that does not fit its request.
        """
        wait([*self._running, *others], return_when=FIRST_COMPLETED)
        done = []
        for future in [future for future in self._running if future.done()]:
            completion, seconds = future.result()
            self._busy_s, self._ended = self._busy_s + seconds, time.perf_counter()
            done.append((self._running.pop(future), completion))
        return done

    def metrics(self) -> dict[str, float]:
        """The mean number of requests that the server worked at, those in its queue included."""
        return {"rollout/rows_in_flight": self._busy_s / (self._ended - self._started)} if self._ended else {}

    def _complete(self, body: dict[str, Any]) -> tuple[Completion, float]:
        started = time.perf_counter()
        completion = _read_completion(self._client.call("POST", "/v1/completions", body), body["max_tokens"])
        return completion, time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.stop()  # or threads would wait for a server that hangs, and this process for them
        self._threads.shutdown(wait=True, cancel_futures=True)


def _read_completion(answer: Any, max_tokens: int) -> Completion:
    try:
        (choice,) = answer["choices"]
        token_ids, reason = choice["token_ids"], choice["finish_reason"]
        logprobs = choice["logprobs"]["token_logprobs"]
        fits = reason in ("stop", "length") and 0 < len(token_ids) == len(logprobs) <= max_tokens
        fits = fits and all(isinstance(token_id, int) for token_id in token_ids)
        fits = fits and all(isinstance(logprob, float | int | None) for logprob in logprobs)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"vllm_server: an answer must hold one choice with token_ids, finish_reason and logprobs, got {str(answer)[:300]}. "
            "The server must be vLLM ≥ 0.20."
        ) from error
    if not fits:
        raise EngineError(
            f"vllm_server: an answer must hold 1 to {max_tokens} tokens with a logprob each and end by stop or length, "
            f"got {len(token_ids)} tokens, {len(logprobs)} logprobs and {reason!r}."
        )
    if reason == "length" and len(token_ids) < max_tokens:
        raise EngineError(
            f"vllm_server: an answer that ends by length must have all {max_tokens} tokens that were asked for, got "
            f"{len(token_ids)}: the server has a limit of its own, which would pass for that of the run. Start it without "
            "max_new_tokens in --override-generation-config, and where the model's generation_config.json has one with "
            "--generation-config vllm."
        )
    return Completion(tuple(token_ids), finite_logprobs("vllm_server", logprobs), reason)


class _Weights:
    """Has the server read this run's weights again, once for all the requests whose connections broke together."""

    def __init__(self, load: Callable[[], None]) -> None:
        self.times = 0
        self._load, self._lock = load, threading.Lock()

    def restore(self, seen: int) -> None:
        """Read them unless that has been done since `times` was `seen`."""
        with self._lock:
            if self.times == seen:
                self._load()
                self.times += 1


class _Client:
    """Requests with a bounded number of repetitions, from any number of threads.

    Each has a connection of its own: one that was kept would break when the server tires of it, after 5 s by default, and a failure
    means that the server may have lost its weights. They are restored before it is repeated, unless the server was only busy (429).
    """

    def __init__(self, config: VllmServerConfig, weights: _Weights | None = None) -> None:
        self._config, self._weights = config, weights
        self._address = urlsplit(config.base_url.rstrip("/"))
        self._connections: set[HTTPConnection] = set()
        self._stopped = threading.Event()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer as JSON, None for an empty one.

        Raises: EngineError, saying what went wrong at last.
        """
        url = self._config.base_url.rstrip("/") + path
        broken, seen = False, 0
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                self._stopped.wait(min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
            if self._stopped.is_set():
                raise EngineError(f"vllm_server: {method} {url} was called off.")
            try:
                if self._weights is not None:
                    if broken:
                        self._weights.restore(seen)
                    seen = self._weights.times
                status, text = self._exchange(method, self._address.path + path, body)
                if status < 400:
                    return json.loads(text) if text.strip() else None
                reason = f"HTTP {status}: {text.decode(errors='replace')[:300]}"
                broken = status != 429
                if status < 500 and status != 429:
                    raise EngineError(f"vllm_server: {method} {url} was refused: {reason}")
            except (OSError, HTTPException, ValueError) as error:  # no connection, a timeout, a broken answer
                reason = f"{type(error).__name__}: {error}"
                broken = True
        raise EngineError(
            f"vllm_server: {method} {url} failed {self._config.max_retries + 1} times, at last with {reason}. Check that the "
            "server runs (VLLM_SERVER_DEV_MODE=1 vllm serve …), then continue with checkpoint.resume=true."
        )

    def stop(self) -> None:
        """Call off everything that is under way; a server that runs stops generating for it."""
        self._stopped.set()
        for connection in list(self._connections):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        connection = kind(self._address.netloc, timeout=self._config.timeout_s)
        self._connections.add(connection)
        try:
            connection.connect()
            if self._stopped.is_set():  # after the last look of `stop`
                raise ConnectionAbortedError("called off")
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            self._connections.discard(connection)
            connection.close()
