"""Rollouts from a vLLM server, which may live in another environment or on other machines.

Start the server with its endpoints for reinforcement learning, on a file system that both sides see:

    VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-Math-7B --port 8000 --logprobs-mode processed_logprobs

`processed_logprobs` are those at the sampling temperature, which is what the trainer compares with. Before a step samples, the
trainer writes its weights as safetensors to `sync_dir`, and the server reads them from there.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trapo_train.engine import SamplingParams
from trapo_train.records import Completion

_FIRST_PAUSE_S = 0.5


@dataclass(frozen=True)
class VllmConfig:
    """Where the vLLM server is and how it is used; only read with rollout.engine: vllm_server."""

    base_url: str = "http://127.0.0.1:8000"
    """Address of the server, without /v1."""
    model: str | None = None
    """Name under which the server offers the model; null for model.name_or_path."""
    sync_dir: str | None = None
    """Folder that the trainer writes weights to and the server reads them from; null for vllm_weights in output_dir."""
    timeout_s: float = 1800.0
    """Longest wait for one answer, in seconds, above 0."""
    max_retries: int = 3
    """Further attempts after a failed connection or an error of the server, at least 0."""
    max_in_flight: int = 256
    """Most requests sent at once, at least 1."""

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("base_url", self.base_url.startswith(("http://", "https://")), "an address with http:// or https://"),
            ("timeout_s", self.timeout_s > 0, "above 0"),
            ("max_retries", self.max_retries >= 0, "at least 0"),
            ("max_in_flight", self.max_in_flight >= 1, "at least 1"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}.")


class EngineError(RuntimeError):
    """A generation server that is down, too slow, or answers what cannot be used; nothing of the step has been trained."""


class VllmServerEngine:
    """Samples from a vLLM server over its OpenAI-compatible protocol, one request per prompt, all at once.

    `Completion.logprobs` are what the server reports; see the module's docstring for the server's option.

    Determinism: requests carry seeds derived from the engine's, so that equal states ask for equal samples; what a GPU server
    answers may still depend on how it batches them.
    """

    def __init__(self, config: VllmConfig, model: str, sync_dir: Path, tokenizer: Any, *, seed: int) -> None:
        self._config = config
        self._model = config.model or model
        self._tokenizer = tokenizer
        self._seed = seed
        self._requests = 0
        self.sync_dir = Path(config.sync_dir or sync_dir).resolve()

    def check(self) -> None:
        """Raise EngineError unless the server answers and offers the model."""
        self._call("GET", "/health")
        offered = [entry.get("id") for entry in (self._call("GET", "/v1/models") or {}).get("data", [])]
        if self._model not in offered:
            raise EngineError(
                f"vllm_server: the server must offer the model {self._model!r}, it offers {offered}. Set rollout.vllm.model."
            )

    def load_weights(self) -> None:
        """Have the server read the weights in `sync_dir` and forget what it cached of the old ones."""
        self._call(
            "POST",
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(self.sync_dir), "is_checkpoint_format": True}},
        )
        self._call("POST", "/reset_prefix_cache", {})

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Raises: EngineError after the last retry, or for an answer that does not fit its request.
        """
        if not prompts:
            return []
        stops = params.stop_token_ids if params.stop_token_ids is not None else (self._tokenizer.eos_token_id,)
        bodies = []
        for i, (prompt, budget) in enumerate(zip(prompts, params.budgets(len(prompts)), strict=True)):
            seed = self._seed * 1_000_003 + self._requests + i if params.seed is None else params.seed * 1_000_003 + i
            bodies.append(
                {
                    "model": self._model,
                    "prompt": list(prompt),
                    "max_tokens": budget,
                    "temperature": params.temperature,
                    "top_p": params.top_p,
                    "top_k": params.top_k or -1,
                    "seed": seed % 2**31,
                    "stop_token_ids": list(stops),
                    "logprobs": 0,
                    "return_token_ids": True,
                    "skip_special_tokens": False,
                }
            )
        if params.seed is None:
            self._requests += len(bodies)
        with ThreadPoolExecutor(min(self._config.max_in_flight, len(bodies))) as threads:
            return list(threads.map(self._complete, bodies))

    def state_dict(self) -> dict[str, Any]:
        """How many requests have drawn seeds, so that a resumed run asks for what the interrupted one would have."""
        return {"requests": self._requests, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._requests, self._seed = state["requests"], state["seed"]

    def reseed(self, seed: int) -> None:
        """Start with another seed."""
        self._seed, self._requests = seed, 0

    def _complete(self, body: dict[str, Any]) -> Completion:
        answer = self._call("POST", "/v1/completions", body)
        try:
            (choice,) = answer["choices"]
            token_ids, reason = choice["token_ids"], choice["finish_reason"]
            logprobs = choice["logprobs"]["token_logprobs"]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"vllm_server: an answer must hold one choice with token_ids, finish_reason and logprobs, got {str(answer)[:300]}. "
                "return_token_ids needs vLLM ≥ 0.12."
            ) from error
        fits = reason in ("stop", "length") and 0 < len(token_ids) == len(logprobs) <= body["max_tokens"]
        if not fits or not all(isinstance(x, int | float) for x in logprobs):
            raise EngineError(
                f"vllm_server: an answer must hold 1 to {body['max_tokens']} tokens with a logprob each and end by stop or length, "
                f"got {len(token_ids)} tokens, {len(logprobs)} logprobs and {reason!r}."
            )
        return Completion(tuple(token_ids), tuple(map(float, logprobs)), reason)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer as JSON, None for an empty one."""
        url = self._config.base_url.rstrip("/") + path
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self._config.max_retries + 1):
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
            try:
                with urllib.request.urlopen(request, timeout=self._config.timeout_s) as response:
                    text = response.read()
                return json.loads(text) if text.strip() else None
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {error.read().decode(errors='replace')[:300]}"
                if error.code < 500 and error.code != 429:
                    raise EngineError(f"vllm_server: {method} {url} was refused: {reason}") from error
            except (OSError, ValueError) as error:  # no connection, a timeout, a broken answer
                reason = f"{type(error).__name__}: {error}"
            if attempt < self._config.max_retries:
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise EngineError(
            f"vllm_server: {method} {url} failed {self._config.max_retries + 1} times, at last with {reason}. Check that the "
            "server runs (VLLM_SERVER_DEV_MODE=1 vllm serve …), then continue with checkpoint.resume=true."
        )
