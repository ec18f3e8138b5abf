"""The embedded engine's batch: rows that generate together, joined by others while they run, and that leave when they are done.

It is left-padded: the last column of the cache is every row's latest token. A prompt that joins is computed on its own and laid
beside the running rows, the shorter of the two caches padded; when the longest row leaves, the padding common to all is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trapo_train.engines.cache import cache_name, can_move, keep_rows, lay_below, new_cache
from trapo_train.engines.draws import draw_token, uniforms
from trapo_train.records import Completion

_DRAWS_AT_ONCE = 32  # positions whose draws are computed together


@dataclass(eq=False)
class Row:
    """One request in the batch, and what it has generated."""

    ticket: int
    prompt: tuple[int, ...]
    budget: int
    key: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Its columns of the cache without padding: the latest token has none yet."""
        return len(self.prompt) + max(len(self.token_ids) - 1, 0)

    @property
    def remaining(self) -> int:
        """Tokens that it may still generate."""
        return self.budget - len(self.token_ids)


class RunningBatch:
    """The rows in flight. Row r of every tensor belongs to `rows[r]`.

    One forward pass per `step` or `join`, each with one synchronisation: tokens and logprobs come to the host together.

    Args:
        model: in evaluation mode, called without gradients.
        temperature, top_k, top_p: as in SamplingParams.
        stop_ids: token ids that end a row.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, top_k: int, top_p: float, stop_ids: Sequence[int]) -> None:
        self.rows: list[Row] = []
        self.passes = 0
        self._model = model
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        self._stop_ids = frozenset(stop_ids)
        self._length = 0  # columns of the cache, padding included
        self._cache, self._cache_name = new_cache(model.config), cache_name(model)
        self._movable = can_move(self._cache, model.config)
        self._mask: Tensor | None = None  # [B, columns to the last budget], None without padding
        self._token = self._position = self._key = torch.empty(0, dtype=torch.int64, device=model.device)  # [B]
        self._uniform: Tensor | None = None  # [B, _DRAWS_AT_ONCE], None when they are to be computed
        self._column = 0

    @property
    def joinable(self) -> bool:
        """Whether rows may join now: the batch is empty, or its cache can be padded and cut."""
        return not self.rows or self._movable

    def tokens_with(self, more: Sequence[Row]) -> int:
        """Tokens held at most if `more` joined now, padding and budgets included: rows times columns.

        Padding that all rows share is cut off, so the columns never exceed the longest prompt with its budget. A cache that
        cannot be cut starts with the longest prompt and lives through the longest budget.
        """
        rows = [*self.rows, *more]
        if self._movable:
            return len(rows) * max(len(row.prompt) + row.budget for row in rows)
        return len(rows) * (max(len(row.prompt) for row in rows) + max(row.budget for row in rows))

    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Compute the prompts of `rows`, equal ones once, draw their first tokens and let them run; returns those that are done."""
        unique = {row.prompt: None for row in rows}
        place = {prompt: i for i, prompt in enumerate(unique)}
        width = max(map(len, unique))
        padding = [width - len(prompt) for prompt in unique]
        position_ids = torch.arange(width, device=self._token.device) - self._tensor(padding)[:, None]  # [U, T]
        cache = new_cache(self._model.config)
        logits = self._forward(
            self._tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, unique, strict=True)]),
            (position_ids >= 0).long() if any(padding) else None,
            position_ids.clamp_min(0),
            cache,
        )
        copies = self._tensor([place[row.prompt] for row in rows])  # [N]
        key = self._tensor([row.key for row in rows])
        token, live = self._draw(list(rows), logits[copies], uniforms(key, torch.zeros_like(key), 1)[:, 0])
        if live:
            kept = self._tensor(live)
            position = self._tensor([len(rows[i].prompt) for i in live])
            cache.reorder_cache(copies[kept])
            if self.rows:
                self._length = max(self._length, width)
                lay_below(self._cache, cache, self._length)
            else:
                self._cache, self._length = cache, width
            self.rows += [rows[i] for i in live]
            self._token = torch.cat([self._token, token[kept]])
            self._position = torch.cat([self._position, position])
            self._key = torch.cat([self._key, key[kept]])
            self._uniform = None
            self._lay_out()
        return _without(rows, live)

    def step(self) -> list[Row]:
        """One token more for every row; returns those that are done, which leave."""
        if self._uniform is None or self._column == _DRAWS_AT_ONCE:
            start = self._tensor([len(row.token_ids) for row in self.rows])
            self._uniform, self._column = uniforms(self._key, start, _DRAWS_AT_ONCE), 0
        mask = None if self._mask is None else self._mask[:, : self._length + 1]
        logits = self._forward(self._token[:, None], mask, self._position[:, None], self._cache)
        self._length += 1
        self._token, live = self._draw(self.rows, logits, self._uniform[:, self._column])
        self._position = self._position + 1
        self._column += 1
        if len(live) == len(self.rows):
            return []
        done = _without(self.rows, live)
        self._keep(live)
        return done

    def completion(self, row: Row) -> Completion:
        """What a row that is done has come to."""
        reason = "stop" if row.token_ids[-1] in self._stop_ids else "length"
        return Completion(tuple(row.token_ids), tuple(row.logprobs), reason)

    def _draw(self, rows: list[Row], logits: Tensor, uniform: Tensor) -> tuple[Tensor, list[int]]:
        """Draw a token [B] for each row of `logits` [B, V] and note it; also returns which rows go on."""
        logprob = torch.log_softmax(logits / (self._temperature or 1.0), dim=-1)
        if self._temperature == 0:
            token = logprob.argmax(dim=-1)
        else:
            token = draw_token(logprob, uniform, top_k=self._top_k, top_p=self._top_p)
        drawn = torch.stack([token.double(), logprob.gather(1, token[:, None])[:, 0].double()])
        tokens, values = drawn.tolist()  # the step's only host sync with work queued
        live = []
        for i, (row, token_id, value) in enumerate(zip(rows, tokens, values, strict=True)):
            if value != value:  # one logit of the row is NaN or +inf, or all are -inf
                raise FloatingPointError(
                    "generate: the model's logits must be finite, got NaN or infinity. The weights have diverged: resume from an "
                    "earlier checkpoint with a lower learning rate."
                )
            row.token_ids.append(int(token_id))
            row.logprobs.append(value)
            if row.remaining > 0 and row.token_ids[-1] not in self._stop_ids:
                live.append(i)
        return token, live

    def _forward(self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, cache: DynamicCache) -> Tensor:
        self.passes += 1
        out = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: cache},
        )
        return out.logits[:, -1].float()

    def _keep(self, live: list[int]) -> None:
        """Let the other rows go, and with them the padding that no row needs any more. The last rows fill the gaps."""
        if not live:
            self.rows, self._cache, self._length = [], new_cache(self._model.config), 0
            order = []
        else:
            gaps, movers = set(range(len(live))).difference(live), [row for row in live if row >= len(live)]
            order = list(range(len(live)))
            for gap, mover in zip(sorted(gaps), movers, strict=True):
                order[gap] = mover
            self.rows = [self.rows[row] for row in order]
            if self._movable:
                self._length = max(row.cached for row in self.rows)
            keep_rows(self._cache, order, self._length)
        kept = self._tensor(order)
        self._token, self._position, self._key = self._token[kept], self._position[kept], self._key[kept]
        self._uniform = self._uniform[kept]
        self._lay_out()

    def _lay_out(self) -> None:
        """Mask the padding, now and for all columns to come. No mask without padding: generation is then a tenth faster."""
        padding = [self._length - row.cached for row in self.rows]
        self._mask = None
        if any(padding):
            columns = torch.arange(self._length + max(row.remaining for row in self.rows), device=self._token.device)
            self._mask = (columns >= self._tensor(padding)[:, None]).long()

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)


def _without(rows: Sequence[Row], live: list[int]) -> list[Row]:
    kept = set(live)
    return [row for i, row in enumerate(rows) if i not in kept]
