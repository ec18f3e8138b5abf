"""Rollouts from vLLM in this process, on the GPU that trains: `rollout.engine=vllm`, for which the extra [vllm] must be installed.

vLLM holds a second copy of the weights while it generates, handed over tensor by tensor in memory before each use. In between it
sleeps: weights and key-value cache are given up, and the memory is the trainer's.

Written against vLLM 0.33 and 0.20 (`LLM`, `LLMEngine.add_request` and `step`, `Worker.reload_weights`, sleep level 2) and run with
the CPU build of 0.32, alone and on two ranks. That cannot sleep: sleeping and GPUs are only tested against a stand-in so far.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo_train.engines.draws import request_seed
from trapo_train.engines.engine import Engine, EngineError, SamplingParams, finite_logprobs, stop_ids
from trapo_train.random_states import keep_generators, seed_generators
from trapo_train.records import Completion
from trapo_train.schema import UserError, check

# Arguments of vllm.LLM that are not free: the fields of VllmConfig, and what sampling in the trainer's process needs.
_SET_HERE = {
    *("gpu_memory_utilization", "max_num_seqs", "max_model_len", "enforce_eager", "enable_sleep_mode"),
    *("model", "tokenizer", "skip_tokenizer_init", "load_format", "dtype", "seed", "logprobs_mode"),
    *("distributed_executor_backend", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
}


@dataclass(frozen=True)
class VllmConfig:
    """How vLLM runs in this process; only read with rollout.engine: vllm."""

    gpu_memory_utilization: float = 0.5
    """Share of the GPU's memory for vLLM's weights and cache while it generates, in (0, 1]; the trainer's weights, gradients and
    optimizer state stay where they are, so leave room for them."""
    max_num_seqs: int = 256
    """Most rows that generate at once, at least 1."""
    max_model_len: int | None = None
    """Longest prompt and response together, in tokens, at least 2; null for what the model can."""
    enforce_eager: bool = False
    """Run without CUDA graphs: slower, but starts sooner and needs less memory."""
    sleep: bool = True
    """Give vLLM's memory back while training; without it both must fit at once. A CPU cannot, and does not."""
    seed_requests: bool = False
    """A seed for every request, for which vLLM draws row by row; else one for each round of sampling. What is sampled with a seed
    of its own, as an evaluation, has one for every request either way."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, such as {max_num_batched_tokens: 8192}; not what the trainer or a field above sets."""

    def __post_init__(self) -> None:
        for name in self.options:
            if name in _SET_HERE:
                raise UserError(f"options must not set {name}, which rollout.vllm or the trainer itself sets. Leave it out.")
        check(
            self,
            ("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "in (0, 1]"),
            ("max_num_seqs", self.max_num_seqs >= 1, "at least 1"),
            ("max_model_len", self.max_model_len is None or self.max_model_len >= 2, "null or at least 2"),
        )


class VllmEngine(Engine):
    """Samples from a `vllm.LLM` in this process, whose weights are those handed over by `load`, between `wake` and `sleep`.

    `Completion.logprobs` are those at the sampling temperature; unlike the embedded engine's they are taken after top_k and top_p.

    Determinism: equal states ask for equal samples: a stream, or each of its requests, has a seed derived from the engine's. What
    requests without seeds draw depends on which run together; a GPU's sums, and so its answers, may in any case.

    Args:
        config: how vLLM runs.
        model: gives configuration and type; its weights are not taken yet.
        folder: where the model's configuration is written for vLLM to read.
        tokenizer: its `eos_token_id` ends a completion unless `end_ids` are set or the call says otherwise.
        dtype: what vLLM computes in: "bfloat16", "float16" or "float32".
        ranks: how many processes run an engine each, all at once.

    Raises: EngineError where vLLM is not installed, and for what it raises.
    """

    def __init__(
        self,
        config: VllmConfig,
        model: PreTrainedModel,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        dtype: str,
        ranks: int = 1,
    ) -> None:
        super().__init__(seed)
        self._vllm = _import_vllm()
        self._tokenizer = tokenizer
        self._seed_requests = config.seed_requests
        self._sleeps = config.sleep and model.device.type == "cuda"
        architecture = type(model).__name__.removeprefix("FSDP")  # of which sharding makes a subclass
        type(model.config).from_dict(model.config.to_dict() | {"architectures": [architecture]}).save_pretrained(folder)
        options = dict(config.options)
        if ranks > 1:
            options["distributed_executor_backend"] = "external_launcher"
        if config.max_model_len is not None:
            options["max_model_len"] = config.max_model_len
        with keep_generators(), _vllm_errors("LLM"):  # in this process vLLM seeds them
            self._llm = self._vllm.LLM(
                str(folder),
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=dtype,
                seed=0,
                logprobs_mode="processed_logprobs",
                gpu_memory_utilization=config.gpu_memory_utilization,
                max_num_seqs=config.max_num_seqs,
                enforce_eager=config.enforce_eager,
                enable_sleep_mode=self._sleeps,
                **options,
            )
        self.sleep()

    def wake(self) -> None:
        """Take the memory for weights, those of before sleep are lost; raises EngineError where there is too little."""
        if self._sleeps:
            torch.cuda.empty_cache()  # what the trainer's allocator holds in reserve, vLLM cannot have
            with _vllm_errors("wake_up"):
                self._llm.wake_up(tags=["weights"])

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take `weights`: whole tensors under the names of the checkpoint, one after the other; then sample from them.

        Raises: EngineError for what vLLM raises, when the last of `weights` was asked for: ranks put each together in turn. What
            `weights` itself raises, such as for too little memory, as it is: the other ranks wait for a part of this one.
        """
        ours: list[Exception] = []

        def noted() -> Iterator[tuple[str, Tensor]]:
            try:
                yield from weights
            except Exception as error:  # whatever it is: raised as it is, where vLLM would have it as a failure of its own
                ours.append(error)
                raise

        given = noted()
        try:
            with _vllm_errors("reload_weights"):
                try:
                    self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": given})
                finally:
                    for _ in given:  # the other ranks wait at each of them for this one
                        pass
        except EngineError:
            if ours:
                raise ours[0] from None
            raise
        if self._sleeps:
            torch.cuda.empty_cache()  # of the gathered weights: vLLM before 0.28 does not ask for it back
            with _vllm_errors("wake_up"):
                self._llm.wake_up(tags=["kv_cache"])
        with _vllm_errors("reset_prefix_cache"):
            self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Give weights and cache up; raises EngineError for what vLLM raises."""
        if self._sleeps:
            with _vllm_errors("sleep"):
                self._llm.sleep(level=2)

    def close(self) -> None:
        """End vLLM, which ends torch's process groups, too: at exit it would look for those of a run that has left them."""
        self._llm.llm_engine.engine_core.shutdown()

    def stream(self, params: SamplingParams) -> VllmStream:
        """Start generating for requests that arrive one after another; each brings its own budget."""
        options = {  # vLLM's own defaults for the rest: unlike a server, an engine reads no generation_config for these
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            # Not the model's own list, which may name further tokens: what ends a completion is decided here.
            "stop_token_ids": list(stop_ids(params, self._tokenizer, self.end_ids)),
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
            "output_kind": self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        }
        seeded = self._seed_requests or params.seed is not None
        return VllmStream(self._vllm, self._llm.llm_engine, options, self._next_key(params), seeded)


class VllmStream:
    """vLLM at work in this process (see `Stream`): it generates inside `advance`, and a request joins at the next of its steps."""

    in_order, hungry = False, True

    def __init__(self, vllm: Any, llm_engine: Any, options: dict[str, Any], key: int, seeded: bool) -> None:
        self._vllm, self._engine, self._options, self._key, self._seeded = vllm, llm_engine, options, key, seeded
        self._generators = ExitStack()
        self._running: set[str] = set()
        self._tickets, self._steps, self._rows = 0, 0, 0

    def submit(self, prompt: Sequence[int], budget: int, key: int) -> int:
        """Hand in a request.

        Raises: EngineError for one that vLLM refuses.
        """
        self._tickets += 1
        seed = request_seed(self._key, key) if self._seeded else None
        params = self._vllm.SamplingParams(max_tokens=budget, seed=seed, **self._options)
        with _vllm_errors("add_request"):
            self._engine.add_request(str(self._tickets), self._vllm.inputs.tokens_input(list(prompt)), params)
        self._running.add(str(self._tickets))
        return self._tickets

    def advance(self, others: Collection[Future] = ()) -> list[tuple[int, Completion]]:
        """Generate until a request is done, or one of `others`; with nothing to generate, wait for one of these.

        Raises: EngineError for what vLLM raises.
        """
        while self._running:
            self._steps, self._rows = self._steps + 1, self._rows + len(self._running)
            with _vllm_errors("step"):
                outputs = [output for output in self._engine.step() if output.finished]
            self._running.difference_update(output.request_id for output in outputs)
            if outputs or any(other.done() for other in others):
                return [(int(output.request_id), _completion(output)) for output in outputs]
        wait(others, return_when=FIRST_COMPLETED)
        return []

    def metrics(self) -> dict[str, float]:
        """vLLM's steps, and the mean number of requests that it had in one, waiting ones included."""
        if not self._steps:
            return {}
        return {"rollout/engine_steps": float(self._steps), "rollout/rows_in_flight": self._rows / self._steps}

    def __enter__(self) -> Self:
        if not self._seeded:  # vLLM then draws from the generators of torch and numpy, which are the trainer's
            self._generators.enter_context(keep_generators())
            seed_generators(self._key)
        return self

    def __exit__(self, *error: object) -> None:
        self._generators.close()
        if self._running:
            self._engine.abort_request(sorted(self._running))


def _completion(output: Any) -> Completion:
    (answer,) = output.outputs
    token_ids, entries, reason = answer.token_ids, answer.logprobs or (), answer.finish_reason
    if reason not in ("stop", "length") or not token_ids or len(token_ids) != len(entries):
        raise EngineError(
            f"vllm: a request must end by stop or length with a logprob for each token, got {reason!r}, {len(token_ids)} tokens "
            f"and {len(entries)} logprobs."
        )
    logprobs = [entry[token_id].logprob for token_id, entry in zip(token_ids, entries, strict=True)]
    return Completion(tuple(token_ids), finite_logprobs("vllm", logprobs), reason)


@contextmanager
def _vllm_errors(call: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # vLLM's errors have no class in common, and all of them must leave the step untrained
        remedy = ". Lower rollout.vllm.gpu_memory_utilization." if "out of memory" in str(error) else ""
        raise EngineError(f"vllm: {call} failed with {type(error).__name__}: {error}{remedy}") from error


def _import_vllm() -> Any:
    # In a process of its own, which is vLLM's default, its model could not be handed tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        import vllm
        import vllm.inputs
        import vllm.sampling_params
    except ImportError as error:
        raise EngineError(
            f"rollout.engine=vllm needs vLLM in this environment: {error}. Install trapo[vllm], run vLLM elsewhere and use "
            "rollout.engine=vllm_server, or rollout.engine=transformers."
        ) from error
    return vllm
