"""`Objective`: one formula for the whole family of SFT/RL losses, as frozen data.

    L   = Σ_t w_t (-a_t · V(d_t)) + β Σ_t wK_t · KL(d_ref,t) - entropy_coef · Σ_t wH_t · H_t
    c_t = dL/dlogp_t = -w_t a_t G(d_t) + β wK_t K(d_ref,t)         e_t = dL/dH_t = -entropy_coef · wH_t

with a batch's weight w, kl_weight wK and entropy_weight wH, d = logp - anchor, r = exp(d) and a gate (V, G), V' = G. What needs a
whole sequence first is a term's `reduction`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from trapo_kernels import checks
from trapo_kernels.gates import GATES, Gate, bounded
from trapo_kernels.roles import Role
from trapo_kernels.sequence import MeanRatio, Reduction

Anchor = Literal["zero", "self", "old", "rollout", "ref"]
ANCHORS = get_args(Anchor)
Signal = Literal["one", "advantage"]
SIGNALS = get_args(Signal)
Estimator = Literal["k1", "k2", "k3", "k3_corrected"]
KL_ESTIMATORS = get_args(Estimator)


@dataclass(frozen=True)
class Term:
    """The loss of one role: -scale · weight · signal · V(logp - anchor).

    `anchor`: what the ratio compares with: "zero" (behaviour probability 1, so r = p), "old" (`old_logprob`; the current policy
    itself where the batch has none), "rollout", "ref", or "self" (r = 1 in value, gradient of logprob).
    `signal`: "one" (imitation) or "advantage"; its sign chooses the side of a clip. `scale`: mixing coefficient, finite.
    `reduction`: a step over whole sequences before the gate, from `trapo_kernels.sequence`; it needs `batch.sequence_id`.
    """

    gate: Gate
    anchor: Anchor = "zero"
    signal: Signal = "one"
    scale: float = 1.0
    reduction: Reduction | None = None

    def __post_init__(self):
        checks.is_a("Term", "gate", self.gate, Gate, "one of trapo_kernels.gates, such as Clip()")
        checks.one_of("Term", "anchor", self.anchor, ANCHORS)
        checks.one_of("Term", "signal", self.signal, SIGNALS)
        checks.finite("Term", "scale", self.scale)
        if self.reduction is not None:
            checks.is_a("Term", "reduction", self.reduction, Reduction, "one of trapo_kernels.sequence, such as MeanRatio()")

    def __str__(self):
        scale = "-" if self.scale == 1.0 else f"{-self.scale:g}·"
        value = self.gate.times("A" if self.signal == "advantage" else "")
        anchor = {"zero": "p", "self": "π/sg(π)"}.get(self.anchor, f"π/π_{self.anchor}")
        pooled = f"; {self.reduction}" if self.reduction else ""
        return f"{scale}{value}, r = {anchor}{pooled}"

    def reduces(self, on_policy: bool) -> bool:
        """Whether the whole sequence is needed; `on_policy`: the batch has no old_logprob, so ratios to "old" are 1."""
        at_one = self.anchor == "self" or (self.anchor == "old" and on_policy)
        return self.reduction is not None and not (self.reduction.idle_on_policy and at_one)

    def reads(self, on_policy: bool) -> set[str]:
        """Names of the optional `TokenBatch` tensors that the term reads."""
        names = {f"{self.anchor}_logprob"} if self.anchor in ("old", "rollout", "ref") else set()
        names |= {"advantage"} if self.signal == "advantage" else set()
        return names | ({"sequence_id"} | self.reduction.reads if self.reduces(on_policy) else set())


def k3(d: Tensor) -> Tensor:
    """The one-sample estimate e^(-d) - 1 + d ≥ 0 in nats of KL(p ‖ q) from d = log p - log q of a sample of p."""
    return torch.expm1(-d) + d


@cache
def _d_of_k3(value: float) -> tuple[float, float]:
    """Both d in nats, below and above 0, of k3 = value > 0, by bisection in fp64."""
    if value == math.inf:
        return -math.inf, math.inf

    def root(far: float) -> float:
        near = 0.0
        while (middle := (near + far) / 2) not in (near, far):
            near, far = (middle, far) if math.expm1(-middle) + middle <= value else (near, middle)
        return near

    return root(-100.0), root(value + 1.0)  # e^100 is more than fp32 has, and k3 is at least d - 1


@dataclass(frozen=True)
class KL:
    """β · KL(π ‖ π_ref) on rollout tokens, by a one-sample estimator of d = logp - ref_logprob.

    "k1": d; "k2": d²/2; "k3": e^(-d) - 1 + d; "k3_corrected": r·k3 with r = π/π_old. As losses they differ from what they estimate.
    Over samples of π the slope d of "k2" gives the gradient of KL(π ‖ π_ref), 1 - e^(-d) of "k3" that of KL(π_ref ‖ π), and 1 of
    "k1" zero: it holds nothing. The slope r·d of "k3_corrected" gives that of KL(π ‖ π_ref) over samples of π_old, too. Beside
    a term with the reduction MeanRatio r is that of the sequence, as TRL has it, and its gradient is part of the slope.
    `clamp`: nats > 0; d is held within ±clamp, and beyond it the estimate is flat; infinite by default. `cap`: nats > 0, the most
    that the estimate "k3" can be, flat beyond; infinite by default. verl's low_var_kl is k3 with clamp 20 and cap 10, and its "k3+"
    has the value of that and the gradient of "k2". With β = 0 it is only watched: it reads `ref_logprob` for the metric
    `rollout/kl_ref`.
    """

    beta: float
    estimator: Estimator = "k3"
    clamp: float = math.inf
    cap: float = math.inf

    def __post_init__(self):
        checks.in_range("KL", "beta", self.beta, 0.0, math.inf, open_high=True)
        if self.estimator == "k3+":
            raise ValueError('KL: estimator must be one of ours, got verl\'s "k3+". Use "k2", which has the same gradient.')
        checks.one_of("KL", "estimator", self.estimator, KL_ESTIMATORS)
        checks.in_range("KL", "clamp", self.clamp, 0.0, math.inf, open_low=True)
        checks.in_range("KL", "cap", self.cap, 0.0, math.inf, open_low=True)
        if self.cap < math.inf and self.estimator != "k3":
            raise ValueError(f'KL: cap is of the estimator "k3", got {self.cap:g} with {self.estimator!r}. Bound that by clamp.')

    def __str__(self):
        held = "" if self.clamp == math.inf else f", |log π/π_ref| ≤ {self.clamp:g}"
        estimate = f"{self.estimator}(π ‖ π_ref)"
        estimate = estimate if self.cap == math.inf else f"min({estimate}, {self.cap:g})"
        return f"{self.beta:g} · Σ w_K · {estimate} on rollout tokens{held}"

    @property
    def reads(self) -> frozenset[str]:
        """Names of the optional `TokenBatch` tensors that the estimate reads."""
        return frozenset({"ref_logprob", "old_logprob"} if self.estimator == "k3_corrected" else {"ref_logprob"})

    def value(self, d: Tensor, log_ratio: Tensor) -> Tensor:
        """The estimate [N] in nats; `log_ratio` = logp - old_logprob is used by "k3_corrected" alone."""
        d = bounded(d, -self.clamp, self.clamp)
        if self.estimator == "k1":
            return d
        if self.estimator == "k2":
            return d * d / 2
        if self.cap < math.inf:
            beyond = (k3(d) > self.cap) | (d == -math.inf)  # no clamp(max=cap), whose gradient is 0 · inf where k3 overflows
            return torch.where(beyond, self.cap, k3(torch.where(beyond, 0.0, d)))
        if self.estimator == "k3":
            return k3(d)
        # r·k3 as π_ref/π_old + r (d - 1): e^(-d) can overflow where r·e^(-d) does not. Where r is the token's own, no logprob moves
        # π_ref/π_old, and autograd that took it from itself would lose the slope r·d.
        ratio, far, of_ref = log_ratio.exp(), d < -1.0, log_ratio - d
        if log_ratio.requires_grad:
            of_ref = torch.where(d > -self.clamp, of_ref.detach(), of_ref)
        apart = torch.where(far, of_ref, 0.0).exp() + ratio * (d - 1.0)
        return torch.where(far, apart, ratio * k3(torch.where(far, 0.0, d)))

    @property
    def bounds(self) -> tuple[float, float]:
        """The d in nats between which the estimate has a slope, the clamp's or, where they are narrower, those of k3 = cap."""
        low, high = _d_of_k3(self.cap)
        return max(low, -self.clamp), min(high, self.clamp)

    def slope(self, d: Tensor, log_ratio: Tensor) -> Tensor:
        """K = d(value)/dlogp [N]."""
        low, high = self.bounds
        free = (d >= low) & (d <= high)
        if self.estimator == "k1":
            return free.to(d.dtype)
        if self.estimator == "k2":
            return torch.where(free, d, 0.0)
        if self.estimator == "k3":
            return torch.where(free, -torch.expm1(-d.clamp(low, high)), 0.0)
        return torch.where(free, log_ratio.exp() * d, self.value(d, log_ratio))


@dataclass(frozen=True)
class Objective:
    """One policy loss: a term per role, an optional KL to a reference on rollout tokens, an entropy bonus. Printing one shows its
    formula.

    A role without a term enters no policy loss; its tokens can still carry the entropy bonus, and rollout tokens the KL. `plus`
    adds another objective on the same batch, for a second term on one role.
    """

    expert: Term | None = None
    rollout: Term | None = None
    kl: KL | None = None
    entropy_coef: float = 0.0
    plus: Objective | None = None
    name: str = field(default="custom", compare=False)

    def __post_init__(self):
        checks.finite("Objective", "entropy_coef", self.entropy_coef)
        parts = (("expert", Term, "Term(gate)"), ("rollout", Term, "Term(gate)"), ("kl", KL, "KL(beta)"))
        for name, expected, example in (*parts, ("plus", Objective, "another Objective")):
            if getattr(self, name) is not None:
                checks.is_a("Objective", name, getattr(self, name), expected, f"{example}, or None")
        if self.expert is None and self.rollout is None:
            raise ValueError("Objective: needs a term for expert or rollout tokens, got neither. Pass expert= or rollout=.")
        if self.kl and self.kl.estimator == "k3_corrected":
            term = self.rollout
            if term is None or term.anchor != "old" or not isinstance(term.reduction, MeanRatio | None):
                raise ValueError(
                    'Objective: the KL estimator "k3_corrected" needs a rollout term with anchor "old" and no reduction but '
                    f'MeanRatio, got {term}. Use the estimator "k3", or such a term.'
                )

    def __str__(self):
        lines = [f"{self.name}:"]
        for layer in self.layers:
            if layer.expert:
                lines.append(f"  expert   Σ w · ({layer.expert})")
            if layer.rollout:
                lines.append(f"  rollout  Σ w · ({layer.rollout})")
            if layer.kl:
                lines.append(f"  KL       {layer.kl}")
            if layer.entropy_coef:
                lines.append(f"  entropy  {-layer.entropy_coef:g} · Σ w_H · H")
        reason = self.why_two_passes(on_policy=False)
        if reason:
            lines.append(f"  2 passes: {reason}")
        return "\n".join(lines)

    @property
    def layers(self) -> tuple[Objective, ...]:
        """The objectives whose losses add up to this one: itself and those it was given as `plus`."""
        return (self, *(self.plus.layers if self.plus else ()))

    @property
    def expert_terms(self) -> list[Term]:
        """The terms on expert tokens, of every layer."""
        return [layer.expert for layer in self.layers if layer.expert]

    @property
    def rollout_terms(self) -> list[Term]:
        """The terms on rollout tokens, of every layer."""
        return [layer.rollout for layer in self.layers if layer.rollout]

    @property
    def terms(self) -> list[Term]:
        """Every term of every layer."""
        return self.expert_terms + self.rollout_terms

    @property
    def has_kl(self) -> bool:
        """Whether a layer has a KL term."""
        return any(layer.kl for layer in self.layers)

    @property
    def why_a_kl_is_idle(self) -> str | None:
        """Why a KL has nothing to hold where only the tokens of the terms train, or None where a term is of rollouts."""
        return None if self.rollout_terms else f"a KL is of rollout tokens, and {self.name!r} trains on expert tokens alone"

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether a layer has an entropy bonus."""
        return any(layer.entropy_coef for layer in self.layers)

    def why_two_passes(self, on_policy: bool) -> str | None:
        """Why a batch cannot go through the single pass, or None when it can; `on_policy`: the batch has no old_logprob."""
        for term in self.terms:
            if not _has_code(term.gate):
                return f"the gate {type(term.gate).__name__} has no compiled form and runs on the reference formula."
            if term.reduces(on_policy):
                return f"{type(term.reduction).__name__} needs the logprobs of whole sequences first."
        if any(layer.pools_kl for layer in self.layers):
            return 'the KL "k3_corrected" is times the ratio of its sequence, whose gradient needs the KL of all its tokens first.'
        if max(len(self.expert_terms), len(self.rollout_terms)) > 1:
            return "a role has two terms, and the compiled loss has one gate per role."
        return "it adds an objective as `plus`, and the compiled loss takes one: give its terms to one." if self.plus else None

    @property
    def pools_kl(self) -> bool:
        """Whether this layer's KL is times a ratio of whole sequences, whose gradient reaches all of their tokens."""
        trained = self.kl is not None and self.kl.beta > 0
        return trained and self.kl.estimator == "k3_corrected" and self.rollout.reduction is not None

    @property
    def pools(self) -> bool:
        """Whether a term pools over whole sequences, on-policy, where every ratio is 1, as well: the logprobs of silent tokens are
        then wanted all the same, as the old_logprob of a later pass."""
        return any(term.reduction is not None for term in self.terms)

    def reads(self, on_policy: bool = False) -> set[str]:
        """Names of the optional `TokenBatch` tensors that the objective reads; "old_logprob" may still be absent."""
        needed = set().union(*(term.reads(on_policy) for term in self.terms))
        for layer in self.layers:
            needed |= layer.kl.reads if layer.kl else set()
            needed |= {"sequence_id"} if layer.pools_kl else set()
        return needed

    def lives_by_advantage(self, role: int) -> bool:
        """Whether all that trains tokens of Role.ROLLOUT or Role.EXPERT is times their advantage, but for an entropy bonus."""
        checks.one_of("lives_by_advantage", "role", role, (Role.ROLLOUT, Role.EXPERT))
        terms, has_kl = (self.rollout_terms, self.has_kl) if role == Role.ROLLOUT else (self.expert_terms, False)
        return bool(terms) and not has_kl and all(term.signal == "advantage" for term in terms)

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss reads the entropy: for the bonus, or in a reduction."""
        return self.has_entropy_bonus or any(term.reduction.needs_entropy for term in self.terms if term.reduction)


def _has_code(gate: Gate) -> bool:
    return GATES.get(gate.code) is type(gate)
