"""Generation: what every `Engine` and `Stream` has, and the embedded engine, for any Hugging Face causal language model.

The embedded engine loops over the model's forward pass itself. What transformers has (read and run in 5.23) does not do the job:

- `generate` has one budget for all rows, lets none join, and keeps every step's [rows, vocabulary] logits to return logprobs.
- `generate_batch`, its continuous batching, has budgets and logprobs per request, but it draws from the global generator, which it
  seeds; it runs in a thread of its own, so that time decides what is computed together; its logprobs are those after top_k and
  top_p; and it swaps the model's attention.
- `StaticCache` belongs to one batch, from which no row can leave and which none can join.

16 ragged prompts x 4 samples of 7 to 28 tokens (3 layers x 128, one core) take 112 ms of CPU time here, 160 ms in `generate` and
220 ms in a warm `generate_batch` (medians). On a GPU nothing has been compared yet; vLLM is the engine for speed there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from trapo_train.engines.decoding import Row, RunningBatch
from trapo_train.engines.draws import request_key
from trapo_train.records import Completion
from trapo_train.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; the same for every prompt of a call, except the budget."""

    max_new_tokens: int | tuple[int, ...]
    """Most tokens to generate, the one that ends it included, at least 1: one number, or one per prompt."""
    temperature: float = 1.0
    """Divides the logits, at least 0; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Samples from the smallest set of tokens whose probabilities sum to at least top_p, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Samples from the k most likely tokens, at least 0; 0 keeps all. Applied before top_p."""
    stop_token_ids: tuple[int, ...] | None = None
    """Token ids that end a completion; None means the engine's, () means none."""
    seed: int | None = None
    """Draws from this seed and leaves the engine's random state untouched; None uses the engine's own."""
    first_key: int = 0
    """Key of the first prompt of a call, at least 0, from which the others count on: with one seed, a call whose first_key is the
    number of prompts before it draws what one call for all of them would have drawn."""

    def __post_init__(self) -> None:
        budgets = self.max_new_tokens if isinstance(self.max_new_tokens, tuple) else (self.max_new_tokens,)
        if any(budget < 1 for budget in budgets):
            raise ValueError(
                f"SamplingParams: max_new_tokens must be at least 1, got {min(budgets)}. "
                "Leave out prompts that have nothing to generate."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"SamplingParams: temperature must be a finite number of at least 0, got {self.temperature}. "
                "Use 1.0 to sample from the model as it is, 0 for greedy."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingParams: top_p must be in (0, 1], got {self.top_p}. Use 1.0 to keep all tokens.")
        if self.top_k < 0:
            raise ValueError(f"SamplingParams: top_k must be at least 0, got {self.top_k}. Use 0 to keep all tokens.")
        if self.first_key < 0:
            raise ValueError(f"SamplingParams: first_key must be at least 0, got {self.first_key}. Use 0 for a call of its own.")

    def budgets(self, num_prompts: int) -> list[int]:
        """Return the budget of each of `num_prompts` prompts; raises if the number of budgets given differs."""
        if isinstance(self.max_new_tokens, int):
            return [self.max_new_tokens] * num_prompts
        if len(self.max_new_tokens) != num_prompts:
            raise ValueError(
                f"SamplingParams: max_new_tokens must be one number or one per prompt ({num_prompts}), "
                f"got {len(self.max_new_tokens)} numbers. Build it from the same list as the prompts."
            )
        return list(self.max_new_tokens)


class EngineError(RuntimeError):
    """An engine that is down, too slow, or answers what cannot be used; nothing of the step has been trained."""


def finite_logprobs(where: str, logprobs: Sequence[float | None]) -> tuple[float, ...]:
    """The logprobs of a completion that vLLM returned; EngineError for one that is NaN, infinite, or null as JSON has these."""
    for place, logprob in enumerate(logprobs):
        if logprob is None or not math.isfinite(logprob):
            raise EngineError(
                f"{where}: the logits of vLLM are not finite: token {place} has the logprob {logprob}. Look for NaN in the weights "
                "that it was given, and have it compute in bfloat16 or float32 where float16 overflows."
            )
    return tuple(map(float, logprobs))


class Stream(Protocol):
    """Requests in flight together, further ones joining while others run. A context: leaving it drops what is unfinished.

    What a request draws depends on its key, not on when it was handed in or what runs beside it.
    """

    in_order: bool
    """Whether what is computed together must depend on the requests alone, not on time: then a caller hands in what depends on
    rewards only while the stream is `hungry`, and after all rewards under way are there."""

    @property
    def hungry(self) -> bool:
        """Whether further requests would be taken up now."""
        ...

    def submit(self, prompt: Sequence[int], budget: int, key: int) -> int:
        """Hand in a request for at most `budget` tokens; returns its ticket. Equal keys of one stream draw equal numbers."""
        ...

    def advance(self, others: Collection[Future] = ()) -> list[tuple[int, Completion]]:
        """Generate until something is done and return completions by ticket; [] if it was one of `others`, or nothing is left."""
        ...

    def metrics(self) -> dict[str, float]:
        """What it took so far: "rollout/rows_in_flight" and what else the engine can tell."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class Engine:
    """Whatever turns token ids into completions, a pure function of its inputs, the weights and its random state: a seed and the
    number of streams so far. Each engine has a `stream` of its own."""

    end_ids: tuple[int, ...] = ()
    """Token ids that end a completion unless the call says otherwise; () for the tokenizer's end-of-sequence token alone."""

    def __init__(self, seed: int) -> None:
        self._seed, self._streams = seed, 0

    def stream(self, params: SamplingParams) -> Stream:
        """Start generating for requests that arrive one after another; each brings its own budget."""
        raise NotImplementedError

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """Return one completion per prompt, in the order of the prompts. The key of a prompt is its position after first_key."""
        budgets = params.budgets(len(prompts))
        # Prompts of about one length together pad least, and equal ones can be computed once.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        completions: list[Completion | None] = [None] * len(prompts)
        with self.stream(params) as stream:
            place = {stream.submit(prompts[i], budgets[i], key=params.first_key + i): i for i in order}
            while place:
                for ticket, completion in stream.advance():
                    completions[place.pop(ticket)] = completion
        return completions

    def state_dict(self) -> dict[str, Any]:
        """Seed and number of streams, so that a resumed run draws what the interrupted one would have drawn."""
        return {"seed": self._seed, "streams": self._streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._seed, self._streams = state["seed"], state["streams"]

    def reseed(self, seed: int) -> None:
        """Start with another seed."""
        self._seed, self._streams = seed, 0

    def close(self) -> None:
        """Give back what the engine holds besides memory of its own, at the end of a run; the engine is of no use afterwards."""

    def _next_key(self, params: SamplingParams) -> int:
        """The key of a stream: of the call's own seed, or the next one of the engine's."""
        if params.seed is not None:
            return request_key(params.seed)
        self._streams += 1
        return request_key(self._seed, self._streams)


def stop_ids(params: SamplingParams, tokenizer: PreTrainedTokenizerBase, end_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Token ids that end a completion: those of the call, else `end_ids`, else the tokenizer's; raises where there are none and the
    call did not say so."""
    if params.stop_token_ids is not None or end_ids:
        return end_ids if params.stop_token_ids is None else params.stop_token_ids
    # Not the model's generation_config: that of a fresh LlamaConfig names token 2, whatever the tokenizer has there
    if tokenizer.eos_token_id is None:
        raise UserError(
            "generate: the tokenizer must have an end-of-sequence token, got eos_token_id None. "
            "Set tokenizer.eos_token, or pass stop_token_ids=() to generate to the budget."
        )
    return (tokenizer.eos_token_id,)


class TransformersEngine(Engine):
    """Samples from a Hugging Face causal language model in this process, with the weights as they are at the call.

    An autocast context around the call applies to it.

    `Completion.logprobs` are those of the model at the sampling temperature (1 when greedy), over the whole vocabulary:
    after the temperature, before top_k and top_p. A ratio loss compares with just that; the probability of the draw
    itself is higher where top_k or top_p cut tokens off.

    Continuous batching: rows leave the batch when they are done, and waiting prompts join, in the order they were handed in, once
    at most half of the rows that ran after the last join are left. A join copies the cache and pauses the running rows for a
    prefill, and waiting for half of them makes few joins do: in a simulation of 128 ladders (4 + 2 + 1 samples, log-normal lengths,
    room for 128 rows) 18 joins took 2297 steps, one join per departure 557 and 2091, rounds 7 and 5600.

    Args:
        model: a causal language model of transformers with a key-value cache; its training mode is left as found.
        tokenizer: its `eos_token_id` ends a completion unless `end_ids` are set or the call says otherwise.
        seed: of the engine's own draws; the global generators are never used.
        max_batch_tokens: most tokens, prompts and budgets of all rows with padding, held at once; bounds the cache.

    Determinism: on a CPU, equal weights, inputs and random state give equal bits. What is drawn for a request does not depend on
    the others; the logits that it is drawn from do in their last bits, as matrix products of other shapes round differently.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int, max_batch_tokens: int) -> None:
        super().__init__(seed)
        if max_batch_tokens < 2:
            raise ValueError(
                f"TransformersEngine: max_batch_tokens must be at least 2, got {max_batch_tokens}. "
                "Give it room for several prompts with their completions, such as 131072."
            )
        self._model = model
        self._tokenizer = tokenizer
        self._max_batch_tokens = max_batch_tokens

    def stream(self, params: SamplingParams) -> TransformersStream:
        """Start generating for requests that arrive one after another; each brings its own budget.

        Raises: UserError for no end-of-sequence token.
        """
        batch = RunningBatch(
            self._model,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            stop_ids=stop_ids(params, self._tokenizer, self.end_ids),
        )
        return TransformersStream(self._model, batch, self._next_key(params), self._max_batch_tokens)


class TransformersStream:
    """The embedded engine at work (see `Stream`): it generates inside `advance`, in the caller's thread.

    Which rows run together is a function of the requests and of the order in which they were handed in. To keep it one where
    requests depend on rewards, the stream is `hungry` when the next prompts would join, and not before.
    """

    in_order = True

    def __init__(self, model: PreTrainedModel, batch: RunningBatch, key: int, max_batch_tokens: int) -> None:
        self._model, self._batch, self._key, self._max_batch_tokens = model, batch, key, max_batch_tokens
        self._waiting: deque[Row] = deque()
        self._tickets = 0
        self._low_water = 0
        self._generated = 0

    @property
    def hungry(self) -> bool:
        """Whether at most half of the rows that ran after the last join are left."""
        return len(self._batch.rows) <= self._low_water

    def submit(self, prompt: Sequence[int], budget: int, key: int) -> int:
        """Hand in a request.

        Raises: UserError for an empty prompt; prompt and budget beyond the model's positions or max_batch_tokens.
        """
        self._check_length(prompt, budget)
        self._tickets += 1
        self._waiting.append(Row(self._tickets, tuple(prompt), budget, request_key(self._key, key)))
        return self._tickets

    def advance(self, others: Collection[Future] = ()) -> list[tuple[int, Completion]]:
        """Generate until a row is done; [] if nothing is left to generate. `others` are not waited for.

        Raises: EngineError for logits that are NaN or infinite, or too little memory of the GPU.
        """
        try:
            done, too_little = self._until_one_is_done(), None
        except FloatingPointError as error:
            raise EngineError(str(error)) from error
        except torch.OutOfMemoryError as error:
            done, too_little = [], str(error).split(". ")[0]  # not the error, whose frames hold what fills the memory
        if too_little is not None:
            raise EngineError(
                f"generate: the GPU must hold the cache of max_batch_tokens = {self._max_batch_tokens} beside the model, got "
                f"{too_little}. Lower rollout.max_batch_tokens or rollout.max_response_tokens; `trapo-train plan-memory` says what "
                "they take."
            )
        self._generated += sum(len(row.token_ids) for row in done)
        return [(row.ticket, self._batch.completion(row)) for row in done]

    def _until_one_is_done(self) -> list[Row]:
        done: list[Row] = []
        # no_grad, not inference_mode: tensors that FSDP2 gathers under inference_mode break the next training step
        # ("Inference tensors do not track version counter", torch 2.13).
        with _eval_mode(self._model), torch.no_grad():
            while not done and (self._batch.rows or self._waiting):
                joining = self._take_waiting() if self.hungry and self._batch.joinable else []
                if joining:
                    done = self._batch.join(joining)
                    self._low_water = len(self._batch.rows) // 2
                else:
                    done = self._batch.step()
        return done

    def metrics(self) -> dict[str, float]:
        """Forward passes, those over prompts included, and the mean number of rows that generate in one."""
        passes = self._batch.passes
        if not passes:
            return {}
        return {"rollout/engine_steps": float(passes), "rollout/rows_in_flight": self._generated / passes}

    def _take_waiting(self) -> list[Row]:
        """The next prompts, in order, as far as the batch has room for them with all budgets spent."""
        joining: list[Row] = []
        while self._waiting and self._batch.tokens_with([*joining, self._waiting[0]]) <= self._max_batch_tokens:
            joining.append(self._waiting.popleft())
        return joining

    def _check_length(self, prompt: Sequence[int], budget: int) -> None:
        max_positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        length = f"{len(prompt)} + {budget} = {len(prompt) + budget}"
        if len(prompt) == 0:
            raise UserError(
                "generate: a prompt must have at least 1 token, got an empty one. Start it with the tokenizer's bos_token, or "
                "drop the row."
            )
        if max_positions is not None and len(prompt) + budget > max_positions:
            raise UserError(
                f"generate: prompt and budget must fit into the model's {max_positions} positions, got {length}. "
                "Shorten or drop the prompt, lower the response budget, or take a model with a longer context."
            )
        if len(prompt) + budget > self._max_batch_tokens:
            raise UserError(
                f"generate: prompt and budget must fit into max_batch_tokens = {self._max_batch_tokens}, got {length}. "
                "Raise max_batch_tokens, or lower the response budget."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.clear()


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in, also if the modes were mixed."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
