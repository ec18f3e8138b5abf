"""Gates as (V, G) pairs and `Objective`: one formula for the whole family of SFT/RL losses.

    L   = Σ_t w_t (-a_t · V(d_t)) + β Σ_t w_t · KL(d_ref,t) - entropy_coef · Σ_t wH_t · H_t
    c_t = dL/dlogp_t = -w_t a_t G(d_t) + β w_t K(d_ref,t)          e_t = dL/dH_t = -entropy_coef · wH_t

with d = logp - anchor, r = exp(d) and V' = G exactly. A gate bends how strongly a token of ratio r is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from trapo_kernels import checks

ANCHORS = ("zero", "self", "old", "rollout", "ref")
SIGNALS = ("one", "advantage")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_corrected")


class Gate:
    """How strongly a token is trained, as a potential V(d) and its derivative G(d) = dV/dd.

    Subclass it, implement `value` and `slope` in PyTorch, and any objective can use it; without a `code` it runs on the
    reference formula only and takes two phases (`linear_logprob`, then the loss).
    """

    code: ClassVar[int | None] = None  # what the compiled backends switch on
    formula: ClassVar[str] = "V(d)"

    def value(self, d: Tensor, advantage: Tensor) -> Tensor:
        """V(d) [N], differentiable by autograd to exactly `slope`."""
        raise NotImplementedError(f"{type(self).__name__} must implement value(d, advantage).")

    def slope(self, d: Tensor, advantage: Tensor) -> Tensor:
        """G(d) = dV/dd [N]."""
        raise NotImplementedError(f"{type(self).__name__} must implement slope(d, advantage).")

    def clipped(self, d: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """[N] bool masks: tokens held back at the lower and at the upper bound of the gate; none by default."""
        nowhere = torch.zeros_like(d, dtype=torch.bool)
        return nowhere, nowhere

    @property
    def scalars(self) -> tuple[float, float, float]:
        """The gate's parameters in the order that the compiled backends read them."""
        return (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class One(Gate):
    """V = d, G = 1: the plain log-likelihood of SFT and REINFORCE."""

    code: ClassVar[int] = 1
    formula: ClassVar[str] = "logp"

    def value(self, d, advantage):
        return d

    def slope(self, d, advantage):
        return torch.ones_like(d)


@dataclass(frozen=True)
class Ratio(Gate):
    """V = G = r: the importance ratio without a clip."""

    code: ClassVar[int] = 2
    formula: ClassVar[str] = "r"

    def value(self, d, advantage):
        return d.exp()

    def slope(self, d, advantage):
        return d.exp()


@dataclass(frozen=True)
class Clip(Gate):
    """PPO's pessimistic clip: min(r, 1 + high) for advantage ≥ 0, max(r, 1 - low) capped at `dual` below.

    `low`, `high` ≥ 0; `dual` > 1 is the dual clip's cap on r for negative advantages, infinite by default.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float = math.inf
    code: ClassVar[int] = 3
    formula: ClassVar[str] = "clip(r, 1-{low:g}, 1+{high:g})"

    def __post_init__(self):
        checks.in_range("Clip", "low", self.low, 0.0, 1.0)
        checks.in_range("Clip", "high", self.high, 0.0, math.inf)
        checks.in_range("Clip", "dual", self.dual, 1.0, math.inf)

    @property
    def scalars(self):
        return (1.0 - self.low, 1.0 + self.high, self.dual)

    def value(self, d, advantage):
        floor, ceiling, dual = self.scalars
        ratio = torch.where(advantage >= 0, d.clamp(max=math.log(ceiling)), d.clamp(max=_log(dual))).exp()
        return torch.where(advantage >= 0, ratio, ratio.clamp(min=floor))

    def slope(self, d, advantage):
        low, high = self.clipped(d, advantage)
        return torch.where(low | high, 0.0, d.exp())

    def clipped(self, d, advantage):
        floor, ceiling, dual = self.scalars
        ratio = d.exp()
        negative = advantage < 0
        return negative & (ratio < floor), torch.where(negative, ratio > dual, ratio > ceiling)


@dataclass(frozen=True)
class Truncate(Gate):
    """G = scale · clamp(r, low, high): the gradient keeps flowing outside the bounds, at a bounded strength.

    CISPO on rollouts; on expert tokens with anchor zero (r = p), `high = α` and `scale = 1/α` it is TrSFT, `high = 1` DFT.
    """

    low: float = 0.0
    high: float = math.inf
    scale: float = 1.0
    code: ClassVar[int] = 4
    formula: ClassVar[str] = "∫ {scale:g}·clamp(r, {low:g}, {high:g})"

    def __post_init__(self):
        checks.in_range("Truncate", "low", self.low, 0.0, math.inf)
        checks.in_range("Truncate", "high", self.high, self.low, math.inf, open_low=True)

    @property
    def scalars(self):
        return (self.low, self.high, self.scale)

    def value(self, d, advantage):
        log_low, log_high = _log(self.low), _log(self.high)
        inside = d.clamp(log_low, log_high).exp()  # r within the bounds, the bound itself outside: no overflow, no NaN gradient
        below = self.low * (d - log_low) if self.low > 0 else torch.zeros_like(d)
        above = self.high * (d - log_high) if self.high < math.inf else torch.zeros_like(d)
        tail = torch.where(d < log_low, below, torch.where(d > log_high, above, torch.zeros_like(d)))
        return self.scale * (inside + tail)

    def slope(self, d, advantage):
        return self.scale * d.exp().clamp(self.low, self.high)

    def clipped(self, d, advantage):
        ratio = d.exp()
        return ratio < self.low, ratio > self.high


@dataclass(frozen=True)
class Band(Gate):
    """G = r where low ≤ r ≤ high, else 0, whatever the sign of the advantage: IcePop-like masks."""

    low: float = 0.5
    high: float = 5.0
    code: ClassVar[int] = 5
    formula: ClassVar[str] = "r·1[{low:g} ≤ r ≤ {high:g}]"

    def __post_init__(self):
        checks.in_range("Band", "low", self.low, 0.0, math.inf)
        checks.in_range("Band", "high", self.high, self.low, math.inf, open_low=True)

    @property
    def scalars(self):
        return (self.low, self.high, 0.0)

    def value(self, d, advantage):
        return d.clamp(_log(self.low), _log(self.high)).exp()

    def slope(self, d, advantage):
        low, high = self.clipped(d, advantage)
        return torch.where(low | high, 0.0, d.exp())

    def clipped(self, d, advantage):
        ratio = d.exp()
        return ratio < self.low, ratio > self.high


@dataclass(frozen=True)
class Shape(Gate):
    """V = r/(r+γ), G = rγ/(r+γ)²: LUFFY's policy shaping, strongest where r = γ."""

    gamma: float = 0.1
    code: ClassVar[int] = 6
    formula: ClassVar[str] = "r/(r+{gamma:g})"

    def __post_init__(self):
        checks.in_range("Shape", "gamma", self.gamma, 0.0, math.inf, open_low=True)

    @property
    def scalars(self):
        return (math.log(self.gamma), 0.0, 0.0)

    def value(self, d, advantage):
        return torch.sigmoid(d - math.log(self.gamma))  # r/(r+γ) without ever forming r

    def slope(self, d, advantage):
        shaped = self.value(d, advantage)
        return shaped * (1.0 - shaped)


@dataclass(frozen=True)
class Power(Gate):
    """V = r^k, G = k·r^k."""

    exponent: float = 0.5
    code: ClassVar[int] = 7
    formula: ClassVar[str] = "r^{exponent:g}"

    def __post_init__(self):
        checks.in_range("Power", "exponent", self.exponent, 0.0, math.inf, open_low=True)

    @property
    def scalars(self):
        return (self.exponent, 0.0, 0.0)

    def value(self, d, advantage):
        return (self.exponent * d).exp()

    def slope(self, d, advantage):
        return self.exponent * (self.exponent * d).exp()


@dataclass(frozen=True)
class Phi(Gate):
    """V = r - r²/2, G = r(1-r): CHORD-φ, which trains neither what the model knows nor what it finds impossible."""

    code: ClassVar[int] = 8
    formula: ClassVar[str] = "r - r²/2"

    def value(self, d, advantage):
        ratio = d.exp()
        return ratio - ratio * ratio / 2

    def slope(self, d, advantage):
        return -d.exp() * torch.expm1(d)


@dataclass(frozen=True)
class Sapo(Gate):
    """V = 4σ(τ(r-1))/τ, G = 4s(1-s)r with s = σ(τ(r-1)): SAPO's soft clip; τ differs by the sign of the advantage."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    code: ClassVar[int] = 9
    formula: ClassVar[str] = "4σ(τ(r-1))/τ, τ = {tau_positive:g}/{tau_negative:g}"

    def __post_init__(self):
        checks.in_range("Sapo", "tau_positive", self.tau_positive, 0.0, math.inf, open_low=True)
        checks.in_range("Sapo", "tau_negative", self.tau_negative, 0.0, math.inf, open_low=True)

    @property
    def scalars(self):
        return (self.tau_positive, self.tau_negative, 0.0)

    def _soft(self, d, advantage):
        tau = torch.where(advantage >= 0, self.tau_positive, self.tau_negative)
        return torch.sigmoid(tau * torch.expm1(d)), tau

    def value(self, d, advantage):
        soft, tau = self._soft(d, advantage)
        return 4.0 * soft / tau

    def slope(self, d, advantage):
        d = d.clamp(max=20.0)  # beyond it s(1-s) is exactly 0, and only r could overflow
        soft, _ = self._soft(d, advantage)
        return 4.0 * soft * (1.0 - soft) * d.exp()


GATES = {gate.code: gate for gate in (One, Ratio, Clip, Truncate, Band, Shape, Power, Phi, Sapo)}


@dataclass(frozen=True)
class Term:
    """The loss of one role: -scale · weight · signal · V(logp - anchor).

    `anchor`: what the ratio compares with: "zero" (behaviour probability 1, so r = p), "old" (`old_logprob`; the current policy
    itself where the batch has none), "rollout", "ref", or "self" (r = 1 in value, gradient of logprob).
    `signal`: "one" (imitation) or "advantage". `scale`: mixing coefficient, finite.
    """

    gate: Gate
    anchor: str = "zero"
    signal: str = "one"
    scale: float = 1.0

    def __post_init__(self):
        checks.one_of("Term", "anchor", self.anchor, ANCHORS)
        checks.one_of("Term", "signal", self.signal, SIGNALS)
        checks.finite("Term", "scale", self.scale)

    def __str__(self):
        scale = "" if self.scale == 1.0 else f"{self.scale:g}·"
        signal = "A·" if self.signal == "advantage" else ""
        anchor = {"zero": "p", "self": "π/sg(π)"}.get(self.anchor, f"π/π_{self.anchor}")
        return f"-{scale}{signal}{self.gate.formula.format(**vars(self.gate))}, r = {anchor}"


@dataclass(frozen=True)
class KL:
    """β · KL(π ‖ π_ref) on rollout tokens, by a one-sample estimator of d = logp - ref_logprob.

    "k1": d; "k2": d²/2; "k3": e^(-d) - 1 + d; "k3_corrected": r·k3 with r = π/π_old, whose slope r·d is the unbiased gradient.
    """

    beta: float
    estimator: str = "k3"

    def __post_init__(self):
        checks.in_range("KL", "beta", self.beta, 0.0, math.inf)
        checks.one_of("KL", "estimator", self.estimator, KL_ESTIMATORS)

    def value(self, d: Tensor, log_ratio: Tensor) -> Tensor:
        """The estimate [N] in nats; `log_ratio` = logp - old_logprob is used by "k3_corrected" alone."""
        if self.estimator == "k1":
            return d
        if self.estimator == "k2":
            return d * d / 2
        estimate = torch.expm1(-d) + d
        return estimate if self.estimator == "k3" else log_ratio.exp() * estimate

    def slope(self, d: Tensor, log_ratio: Tensor) -> Tensor:
        """K = d(value)/dlogp [N]."""
        if self.estimator == "k1":
            return torch.ones_like(d)
        if self.estimator == "k2":
            return d
        return -torch.expm1(-d) if self.estimator == "k3" else log_ratio.exp() * d


@dataclass(frozen=True)
class Objective:
    """One policy loss: a term per role, an optional KL to a reference, an entropy bonus. Printing one shows its formula.

    A role without a term enters no policy loss; its tokens can still carry the entropy bonus.
    """

    expert: Term | None = None
    rollout: Term | None = None
    kl: KL | None = None
    entropy_coef: float = 0.0
    name: str = field(default="custom", compare=False)

    def __post_init__(self):
        checks.in_range("Objective", "entropy_coef", self.entropy_coef, -math.inf, math.inf)
        if self.expert is None and self.rollout is None:
            raise ValueError("Objective: needs a term for expert or rollout tokens, got neither. Pass expert= or rollout=.")

    def __str__(self):
        lines = [f"{self.name}:"]
        if self.expert:
            lines.append(f"  expert   Σ w · ({self.expert})")
        if self.rollout:
            lines.append(f"  rollout  Σ w · ({self.rollout})")
        if self.kl:
            lines.append(f"  KL       {self.kl.beta:g} · Σ w · {self.kl.estimator}(π ‖ π_ref) on rollout tokens")
        if self.entropy_coef:
            lines.append(f"  entropy  -{self.entropy_coef:g} · Σ w_H · H")
        return "\n".join(lines)

    @property
    def compiled(self) -> bool:
        """True when every gate is one that the compiled backends know."""
        return all(term is None or GATES.get(term.gate.code) is type(term.gate) for term in (self.expert, self.rollout))

    @property
    def streams(self) -> set[str]:
        """Names of the optional `TokenBatch` tensors that the objective reads; "old_logprob" may still be absent."""
        terms = [term for term in (self.expert, self.rollout) if term]
        needed = {f"{term.anchor}_logprob" for term in terms if term.anchor in ("old", "rollout", "ref")}
        if self.kl:
            needed |= {"ref_logprob"} | ({"old_logprob"} if self.kl.estimator == "k3_corrected" else set())
        return needed


def _log(x: float) -> float:
    return math.log(x) if 0 < x < math.inf else (-math.inf if x == 0 else math.inf)
