"""flex_attention over a packed row: one kernel for all sequences, its block mask built on the host from their lengths.

keys →   0   1   2   3        each cell is 128 × 128 tokens; a row of cells sees one contiguous range of cells:
0        ◪                    from the cell where the first query's sequence (or window) starts to the diagonal
1        ■   ◪                ■ every pair is visible, ◪ the pairs are compared, the rest is skipped
2            ◪   ◪
3                ◪   ◪
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from trapo_train.schema import UserError
from trapo_train.upload import upload
from trapo_train.varlen import computed_in

BLOCK = 128  # tokens; flex_attention's default
_MASKS_KEPT = 4  # of the current row: one per window that its layers have, on their device


@functools.lru_cache(maxsize=_MASKS_KEPT)
def packed_block_mask(segment_lengths: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    """Which keys each query of a packed row sees: those of its own sequence up to itself, at most `window` counting itself.

    Memory: O((T / 128)²) integers; no [T, T] mask. No host sync.
    """
    lengths = torch.tensor(segment_lengths)
    num_tokens = int(lengths.sum())
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)  # [T] where a token's sequence starts
    first_query = torch.arange(0, num_tokens, BLOCK)  # [B] of every row of cells
    last_query = (first_query + BLOCK).clamp(max=num_tokens) - 1
    reach = num_tokens if window is None else window
    first_key = torch.maximum(start[first_query], first_query - reach + 1)
    cell = torch.arange(len(first_query))
    key_cell, query_cell = cell[None, :], cell[:, None]
    seen = (key_cell >= (first_key // BLOCK)[:, None]) & (key_cell <= query_cell)  # [B, B]
    # All pairs visible: one sequence from the first key of the cell to the last query of the row, below the diagonal, in reach.
    one_sequence = first_query[None, :] >= start[last_query][:, None]
    whole = seen & (key_cell < query_cell) & one_sequence & (last_query[:, None] - first_query[None, :] < reach)
    start = upload(start, device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= start[query]) & (query - key < reach)

    return BlockMask.from_kv_blocks(
        *_compact(seen & ~whole, device), *_compact(whole, device), BLOCK, visible, (num_tokens, num_tokens)
    )


def _compact(cells: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many cells of each row are marked, [1, 1, B], and which, [1, 1, B, B], the marked ones first."""
    order = cells.int().argsort(dim=1, descending=True, stable=True)
    parts = (cells.sum(1)[None, None], order[None, None])
    return tuple(upload(part.to(torch.int32), device) for part in parts)


def flex_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: tuple[int, ...],
    sliding_window: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Causal attention inside each segment of a packed row.

    Args: query [1, heads, T, head_dim]; key and value [1, kv_heads, T, head_dim]; sliding_window: tokens that a query sees.

    Returns: [1, T, heads, head_dim].
    Raises: UserError for attention dropout, which flex_attention does not have.
    """
    if dropout:
        raise UserError(
            f"packed attention: flex has no dropout, {type(module).__name__} asks for {dropout}. Use model.attention=sdpa_packed."
        )
    mask = packed_block_mask(segment_lengths, sliding_window, query.device)
    dtype = computed_in(query)  # autocast does not know flex_attention; norms of query and key may have left them in fp32
    query, key, value = (x.to(dtype) for x in (query, key, value))
    attend = _compiled() if query.device.type == "cuda" else flex_attention  # uncompiled it builds all scores, for tests
    out = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2)


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)  # the length of a row changes with every micro-batch
