"""The key-value cache of a batch whose rows come and go: flush right, padded on the left, with room to grow.

A layer holds keys and values of all positions or of a sliding window. Both can be cut, padded and laid below each other, because a
position's keys do not depend on the padding before it. Other layers (recurrent states, chunked attention) do: they can only
lose rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 128  # columns
SMALL = 2**20  # elements of keys, below which a copy costs less than the gaps in memory that room makes


class RoomyLayer(DynamicLayer):
    """Keys and values of all positions, in buffers with room: a step writes its column in place, where DynamicLayer copies all
    earlier ones, and a row that leaves costs the copy of the one that takes its place.

    A decoding step took 0.74 of the CPU time at 16 rows of 2048 positions (4 layers x 512) and 0.67 at 64 of 512 (3 layers x 256),
    medians of 40 interleaved steps on one core; small caches are copied.
    """

    _buffers: tuple[Tensor, Tensor] | None = None  # keys and values, [B or more, heads, columns, head size]; `keys` is a view
    _first = _end = 0  # columns in use

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states; returns all of them. Keys that a norm in fp32 has widened (Qwen3) are held in the type of the values,
        which autocast computes attention in."""
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        more = key_states.shape[2]
        large, full = self.keys.numel() >= SMALL, self._buffers is not None and self._end + more > self._buffers[0].shape[2]
        if full or (large and self._buffers is None):
            self.place([(self.keys, self.values)], self.keys.shape[2])  # without room where rows have left that made it large
        if self._buffers is None:
            self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
            return self.keys, self.values
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: len(states), :, self._end : self._end + more] = states
        self._end += more
        self._view(len(key_states))
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep, or repeat, these rows."""
        super().reorder_cache(beam_idx)
        self._buffers = None

    def place(self, parts: Sequence[tuple[Tensor, Tensor]], columns: int) -> None:
        """Hold the rows of all parts, below each other and flush right in `columns` columns, with room for more unless small."""
        rows = sum(len(keys) for keys, _ in parts)
        small = rows * parts[0][0][0, :, :1].numel() * columns < SMALL
        buffers = tuple(_stack_right(states, columns, columns + (0 if small else ROOM)) for states in zip(*parts, strict=True))
        if small:
            self._buffers, (self.keys, self.values) = None, buffers
            return
        self._buffers, self._first, self._end = buffers, 0, columns
        self._view(rows)

    def keep(self, order: Sequence[int], columns: int) -> None:
        """Let row i be what row `order[i]` was, and drop all other rows and all but the last `columns` columns."""
        if self._buffers is None:
            rows, first = torch.tensor(order, device=self.device), self.keys.shape[2] - columns
            self.keys, self.values = (states[:, :, first:].index_select(0, rows) for states in (self.keys, self.values))
            return
        moved = [i for i, row in enumerate(order) if row != i]
        self._first = self._end - columns
        if moved:
            target, source = (torch.tensor(rows, device=self.device) for rows in (moved, [order[i] for i in moved]))
            for buffer in self._buffers:
                used = buffer[:, :, self._first : self._end]
                used[target] = used[source]
        self._view(len(order))

    def _view(self, rows: int) -> None:
        self.keys, self.values = (buffer[:rows, :, self._first : self._end] for buffer in self._buffers)


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_name(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: `cache` since transformers 5.24, but maybe not in a model's own code."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def can_move(cache: DynamicCache, config: PretrainedConfig) -> bool:
    """Whether the cache can be cut and padded."""
    types = getattr(config.get_text_config(), "layer_types", None) or ()
    by_position = all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return by_position and "chunked_attention" not in types


def keep_rows(cache: DynamicCache, order: Sequence[int], length: int) -> None:
    """Let row i be what row `order[i]` was, and drop all other rows. What can be cut keeps the last `length` columns."""
    index = None
    for layer in _filled(cache):
        if isinstance(layer, RoomyLayer):
            layer.keep(order, length)
            continue
        if index is None:
            index = torch.tensor(order, device=layer.device)
        layer.reorder_cache(index)
        if isinstance(layer, DynamicSlidingWindowLayer):
            first = layer.keys.shape[2] - _columns(layer, length)
            layer.keys, layer.values, layer.cumulative_length = layer.keys[:, :, first:], layer.values[:, :, first:], length


def lay_below(cache: DynamicCache, other: DynamicCache, length: int) -> None:
    """Add the rows of `other` below those of `cache`, both of at most `length` columns, flush right in `length`."""
    for layer, more in zip(_filled(cache), _filled(other), strict=True):
        parts, columns = [(layer.keys, layer.values), (more.keys, more.values)], _columns(layer, length)
        if isinstance(layer, RoomyLayer):
            layer.place(parts, columns)
        else:
            layer.keys, layer.values = (_stack_right(states, columns, columns) for states in zip(*parts, strict=True))
            layer.cumulative_length = length


def _columns(layer: Any, length: int) -> int:
    """Columns that a layer keeps of `length`."""
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def _filled(cache: DynamicCache) -> list[Any]:
    """The layers that hold something; those that share another layer's states stay empty."""
    return [layer for layer in cache.layers if getattr(layer, "is_initialized", True)]


def _stack_right(parts: Sequence[Tensor], columns: int, room: int) -> Tensor:
    """The rows of all parts [B, heads, T, head size] below each other in a buffer of `room` columns, flush right in the first
    `columns`, zero before."""
    first = parts[0]
    stacked = first.new_empty(sum(map(len, parts)), first.shape[1], room, first.shape[3])
    start = 0
    for part in parts:
        rows, padding = stacked[start : start + len(part)], columns - part.shape[2]
        rows[:, :, :padding] = 0
        rows[:, :, padding:columns] = part
        start += len(part)
    return stacked
