"""What a token's loss takes from its whole sequence: pooled ratios, pooled weights, selected tokens.

    logprob, entropy [N] ──no gradient──▶ Reduced(log_ratio, factor, flows) [N] ──▶ every token is pointwise again

A reduction is read off the current logprobs without gradient; a token's own logprob then carries the gradient through the gate,
the stop-gradient form of GSPO-token. Where advantage and weight are constant within a sequence, it is the gradient of the pooled
loss itself. Sequences must be whole: a sequence is never split over calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from trapo_kernels import checks

__all__ = ["EntropyWeight", "MeanRatio", "Reduced", "Reduction", "Sequences", "Tokens", "TopEntropy", "TrajectoryWeight", "starts"]


def starts(ordered: Tensor) -> Tensor:
    """[N] bool: where a run of equal neighbours begins."""
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return new


class Sequences:
    """Sums and ranks within the sequences of N tokens, in any order, without atomics and without a host sync.

    sequence_id [N] int64: labels, any values. counted [N] bool: the tokens that take part; the others count as absent.
    """

    def __init__(self, sequence_id: Tensor, counted: Tensor):
        num_tokens = sequence_id.shape[0]
        self.sequence_id, self.counted = sequence_id, counted
        self._order = sequence_id.argsort(stable=True)  # tokens of a sequence side by side
        self._segment = starts(sequence_id[self._order]).cumsum(0) - 1  # [N] which sequence, in that order
        # Sequence s covers offsets[s] … offsets[s + 1]; there are at most N of them, and the rest are empty.
        self._offsets = torch.searchsorted(self._segment, torch.arange(num_tokens + 1, device=sequence_id.device))

    def sum(self, x: Tensor) -> Tensor:
        """Σ of x [N] over the counted tokens of each token's sequence, [N] fp64."""
        if x.shape[0] == 0:
            return x.double()
        ordered = torch.where(self.counted, x, 0).double()[self._order]
        # One tree per sequence; the checks that `unsafe` skips would stall the host.
        sums = torch.segment_reduce(ordered, "sum", offsets=self._offsets, unsafe=True)  # [N]
        return torch.empty_like(ordered).scatter_(0, self._order, sums[self._segment])

    def count(self) -> Tensor:
        """Counted tokens of each token's sequence, [N] fp64, at least 1."""
        return self.sum(torch.ones_like(self.counted, dtype=torch.float64)).clamp(min=1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x [N] over the counted tokens of each token's sequence, [N] fp64; 0 where there is none."""
        return self.sum(x) / self.count()

    def rank(self, x: Tensor) -> Tensor:
        """[N] int64: a token's place among the counted tokens of its sequence, 0 for the largest x; equal ones in row order."""
        by_value = torch.where(self.counted, x, -torch.inf).argsort(descending=True, stable=True)
        order = by_value[self.sequence_id[by_value].argsort(stable=True)]
        place = torch.arange(len(order), device=x.device) - self._offsets[self._segment]
        return torch.empty_like(place).scatter_(0, order, place)


class Tokens(NamedTuple):
    """What a reduction sees of the tokens of one role; tensors are [N], without gradient, zero on other tokens."""

    logprob: Tensor
    entropy: Tensor
    log_ratio: Tensor  # d = logp - anchor of the term
    advantage: Tensor  # 1 for a term whose signal is "one"
    ref_logprob: Tensor | None
    sequences: Sequences


class Reduced(NamedTuple):
    """What a reduction makes of them; tensors are [N]. A token's loss is -weight · signal · factor · V(log_ratio)."""

    log_ratio: Tensor  # float, the d that the gate sees; its gradient is that of the token's own logprob
    factor: Tensor  # float, a constant
    flows: Tensor  # bool, False for a token whose loss counts and has no gradient


class Reduction:
    """A step over whole sequences before the gate; frozen dataclasses, so that an objective stays data.

    One of your own, here without sequences that are far from the policy which sampled them, makes a loss of two passes:

        @dataclass(frozen=True)
        class Near(Reduction):
            limit: float = 1.0
            formula = "only sequences whose mean |log r| is below {limit:g}"
            idle_on_policy = True

            def reduce(self, tokens):
                near = tokens.sequences.mean(tokens.log_ratio.abs()) < self.limit
                return Reduced(tokens.log_ratio, near.to(tokens.log_ratio.dtype), torch.ones_like(near))

        objective = Objective(rollout=Term(Clip(), anchor="old", signal="advantage", reduction=Near()), name="near")
    """

    formula: ClassVar[str] = ""
    reads: ClassVar[frozenset[str]] = frozenset()  # batch tensors that must be there besides sequence_id, such as "ref_logprob"
    needs_entropy: ClassVar[bool] = False  # whether it reads tokens.entropy
    idle_on_policy: ClassVar[bool] = False  # whether it changes nothing where all log-ratios are zero, and is then left out

    def reduce(self, tokens: Tokens) -> Reduced:
        """The pooled quantities of `tokens`."""
        raise NotImplementedError(f"{type(self).__name__} must implement reduce(tokens).")

    def applied(self, tokens: Tokens) -> Reduced:
        """`reduce`, in the dtype of the log-ratios: sums over sequences are fp64."""
        where, found, log_ratio = type(self).__name__, self.reduce(tokens), tokens.log_ratio
        checks.is_a(where, "what reduce returns", found, Reduced, "Reduced(log_ratio, factor, flows), tensors [N]")
        for name, value in found._asdict().items():
            dtypes = (torch.bool,) if name == "flows" else (log_ratio.dtype, torch.float64)
            checks.vector(where, name, value, len(log_ratio), log_ratio.device, dtypes)
        return Reduced(found.log_ratio.to(log_ratio.dtype), found.factor.to(log_ratio.dtype), found.flows)

    def __str__(self) -> str:
        return self.formula.format(**vars(self))


@dataclass(frozen=True)
class MeanRatio(Reduction):
    """The gate sees the length-mean log-ratio, r = (Π r_t)^(1/|y|): GSPO.

    `clip`: nats > 0; each token's log-ratio is first clipped pessimistically, at +clip for advantage ≥ 0 and at -clip below, and a
    clipped token carries no gradient: GMPO. Infinite by default.
    """

    clip: float = math.inf
    formula: ClassVar[str] = "r pooled to the geometric mean of its sequence"
    idle_on_policy: ClassVar[bool] = True

    def __post_init__(self):
        checks.in_range("MeanRatio", "clip", self.clip, 0.0, math.inf, open_low=True)

    def __str__(self):
        return self.formula + (
            "" if self.clip == math.inf else f" after log r ≤ {self.clip:g} where A ≥ 0, ≥ -{self.clip:g} elsewhere"
        )

    def reduce(self, tokens):
        d = tokens.log_ratio
        bounded = torch.where(tokens.advantage >= 0, d.clamp(max=self.clip), d.clamp(min=-self.clip))
        pooled = tokens.sequences.mean(bounded).to(d.dtype)
        return Reduced(pooled, torch.ones_like(d), bounded == d)


@dataclass(frozen=True)
class TrajectoryWeight(Reduction):
    """Loss times min(π(y)/π_ref(y), cap), the importance weight of the whole sequence: iw-SFT.

    `cap` > 0. `pool`: "sum" of the log-ratios, the weight of the trajectory, or their "mean", which does not shrink with length.
    """

    cap: float = 16.0
    pool: str = "sum"
    formula: ClassVar[str] = "times min(π(y)/π_ref(y), {cap:g}), log-ratios pooled by {pool}"
    reads: ClassVar[frozenset[str]] = frozenset({"ref_logprob"})

    def __post_init__(self):
        checks.in_range("TrajectoryWeight", "cap", self.cap, 0.0, math.inf, open_low=True)
        checks.one_of("TrajectoryWeight", "pool", self.pool, ("sum", "mean"))

    def reduce(self, tokens):
        pool = tokens.sequences.sum if self.pool == "sum" else tokens.sequences.mean
        log_weight = pool(tokens.logprob - tokens.ref_logprob).clamp(max=math.log(self.cap))
        d = tokens.log_ratio
        return Reduced(d, log_weight.exp().to(d.dtype), torch.ones_like(d, dtype=torch.bool))


@dataclass(frozen=True)
class TopEntropy(Reduction):
    """Only the `share` in (0, 1] of a sequence's tokens with the largest entropy is trained, at least one: Prefix-RFT."""

    share: float = 0.2
    formula: ClassVar[str] = "only the {share:.3g} of its sequence with the largest entropy"
    needs_entropy: ClassVar[bool] = True

    def __post_init__(self):
        checks.in_range("TopEntropy", "share", self.share, 0.0, 1.0, open_low=True)

    def reduce(self, tokens):
        kept = (self.share * tokens.sequences.count() - 1e-9).ceil().clamp(min=1)  # 0.28 · 25 is 7, and 7.000000000000001 in fp64
        factor = (tokens.sequences.rank(tokens.entropy) < kept).to(tokens.log_ratio.dtype)
        return Reduced(tokens.log_ratio, factor, torch.ones_like(factor, dtype=torch.bool))


@dataclass(frozen=True)
class EntropyWeight(Reduction):
    """Loss times coef · exp(sign · mean entropy of the sequence), on every token or only where the advantage is positive: SRFT.

    `coef` finite, `sign` is -1 or +1, `positive_only` leaves tokens with advantage ≤ 0 at factor 1.
    """

    coef: float
    sign: int = -1
    positive_only: bool = False
    formula: ClassVar[str] = "times {coef:g}·exp(mean H of its sequence)"
    needs_entropy: ClassVar[bool] = True

    def __post_init__(self):
        checks.finite("EntropyWeight", "coef", self.coef)
        checks.one_of("EntropyWeight", "sign", self.sign, (-1, 1))

    def __str__(self):
        text = super().__str__() if self.sign > 0 else super().__str__().replace("exp(", "exp(-")
        return text + (" where A > 0" if self.positive_only else "")

    def reduce(self, tokens):
        d = tokens.log_ratio
        factor = self.coef * (self.sign * tokens.sequences.mean(tokens.entropy)).exp().to(d.dtype)
        if self.positive_only:
            factor = torch.where(tokens.advantage > 0, factor, 1.0)
        return Reduced(d, factor, torch.ones_like(d, dtype=torch.bool))
