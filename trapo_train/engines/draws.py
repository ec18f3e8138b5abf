"""Random draws that depend on their request alone: not on what else is generated, where, or in which order.

A request has a key, a 64-bit number, and its draw for position t is a hash of (key, t): SplitMix64 started at the key (Steele, Lea,
Flood, OOPSLA 2014). A token is the inverse of the cumulative distribution at that number, which costs one number per row instead of
one per token of the vocabulary: 0.13 of the CPU time of torch.multinomial at [16, 151936], 0.2 at [64, 40] (medians of 9
interleaved runs, one core).
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

_GAMMA, _MIX_1, _MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_RANK_SEED = 1_000_003  # between the seeds of neighbouring ranks


def request_key(*parts: int) -> int:
    """A signed 64-bit number that stands for these numbers; others give another one."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big", signed=True)


def uniforms(key: Tensor, start: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) per row, for the positions from `start` on: [B, count] float64, the same bits on every device.

    Args:
        key: [B] int64. start: [B] int64, at least 0.
    """
    position = start[:, None] + torch.arange(1, count + 1, device=key.device)  # [B, count]
    z = key[:, None] + _GAMMA * position  # int64 arithmetic wraps, as SplitMix64 wants it
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def draw_token(logprob: Tensor, uniform: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """The token [B] that `uniform` [B] picks from `logprob` [B, V], after top_k (0 keeps all), then top_p.

    A token without probability is never picked.
    """
    if top_k == 0 and top_p == 1:
        return _invert(logprob.exp(), uniform)
    ordered, token_id = logprob.sort(dim=-1, descending=True)
    if top_k > 0:
        ordered[:, top_k:] = -torch.inf
    prob = ordered.softmax(dim=-1)
    prob[prob.cumsum(dim=-1) - prob >= top_p] = 0  # the mass above a token already suffices
    return token_id.gather(1, _invert(prob, uniform)[:, None])[:, 0]


def _invert(prob: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative sum exceeds `uniform` times the total."""
    # On a GPU the scan adds in a tree: in float32 a sum may exceed the next one, and the search finds a token of probability 0.
    # On a CPU the sum runs in float64 whatever the output.
    cumulative = prob.cumsum(dim=-1, dtype=torch.float64 if prob.is_cuda else None)
    total = cumulative[:, -1:]
    target = (uniform[:, None] * total).to(total.dtype)
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # rounding may have reached the total
    # Past the end only for NaN, whose index a GPU would answer with an assert that ends the process.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(prob.shape[1] - 1)


def request_seed(*parts: int) -> int:
    """`request_key` as others take a seed, at least 0 and below 2^63."""
    return request_key(*parts) & (2**63 - 1)


def rank_seed(seed: int, step: int, size: int, rank: int) -> int:
    """Of the engine and the global generators of a rank of `size` that starts at `step` of a run, at least 0.

    At step 0 ranks have the same whatever their number; a later start, on another number of ranks, has seeds of its own.
    """
    return seed + _RANK_SEED * rank if step == 0 else request_seed(seed, step, size, rank)


def _shift(z: Tensor, bits: int) -> Tensor:
    """`z` shifted right without its sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
