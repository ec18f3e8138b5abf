"""Gates as (V, G) pairs with V' = G exactly: how strongly a token of ratio r = exp(d), d = logp - anchor, is trained.

token loss = -weight · signal · V(d)          dL/dlogp = -weight · signal · G(d)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trapo_kernels import checks

__all__ = ["Band", "Clip", "Gate", "One", "Phi", "Power", "Ratio", "Sapo", "Shape", "Truncate", "bounded"]


class Gate:
    """How strongly a token is trained, as a potential V(d) and its derivative G(d) = dV/dd.

    A gate of your own works in any `Term`; without a `code` it has no compiled form, runs on the reference formula only and takes
    two passes (`linear_logprob`, then the loss), which the objective says when printed and `passes` says in the output. Its loss
    is `value`, whose gradient autograd finds; `slope` is what the metric expert/slope shows of expert tokens:

        class Tempered(Gate):
            formula = "3·r^(1/3)"

            def value(self, d, advantage):
                return 3 * (d / 3).exp()

            def slope(self, d, advantage):
                return (d / 3).exp()

        objective = Objective(rollout=Term(Tempered(), anchor="old", signal="advantage"), name="tempered")
    """

    code: ClassVar[int | None] = None  # what the compiled backends switch on
    formula: ClassVar[str] = "V(d)"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).items()))

    def value(self, d: Tensor, advantage: Tensor) -> Tensor:
        """V(d) [N], differentiable by autograd to exactly `slope`."""
        raise NotImplementedError(f"{type(self).__name__} must implement value(d, advantage).")

    def slope(self, d: Tensor, advantage: Tensor) -> Tensor:
        """G(d) = dV/dd [N]; of a gate without a `code` for metrics alone."""
        raise NotImplementedError(f"{type(self).__name__} must implement slope(d, advantage).")

    def clipped(self, d: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """[N] bool masks: tokens held back at the lower and at the upper bound of the gate; none by default."""
        nowhere = torch.zeros_like(d, dtype=torch.bool)
        return nowhere, nowhere

    @property
    def scalars(self) -> tuple[float, float, float]:
        """The gate's parameters in the order that the compiled backends read them."""
        return (0.0, 0.0, 0.0)

    def __str__(self) -> str:
        return self.formula.format(**vars(self))

    def times(self, advantage: str) -> str:
        """The formula of a·V for `advantage` "A", or "" where it is 1."""
        return f"{advantage}·{self}" if advantage else str(self)


@dataclass(frozen=True)
class One(Gate):
    """V = d, G = 1: the plain log-likelihood of SFT and REINFORCE."""

    code: ClassVar[int] = 1
    formula: ClassVar[str] = "log r"

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

    `low` in [0, 1] and `high` ≥ 0, each with its own width. `dual` ≥ 1 caps r for negative advantages too: the dual clip (arXiv
    1912.09729), called two-sided clip and δ by others; infinite by default.
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

    def times(self, advantage):
        if not advantage:
            return f"min(r, 1+{self.high:g})"
        return f"min(A·r, A·{self})" + ("" if self.dual == math.inf else f", r ≤ {self.dual:g} where A < 0")

    @property
    def scalars(self):
        return (1.0 - self.low, 1.0 + self.high, self.dual)

    def value(self, d, advantage):
        floor, ceiling, dual = self.scalars
        ratio = torch.where(advantage >= 0, bounded(d, high=math.log(ceiling)), bounded(d, high=_log(dual))).exp()
        return torch.where(advantage >= 0, ratio, bounded(ratio, low=floor))

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
    formula: ClassVar[str] = "∫ clamp(r, {low:g}, {high:g}) d log r"

    def __post_init__(self):
        checks.in_range("Truncate", "low", self.low, 0.0, math.inf)
        checks.in_range("Truncate", "high", self.high, self.low, math.inf, open_low=True)
        checks.finite("Truncate", "scale", self.scale)

    def __str__(self):
        return ("" if self.scale == 1.0 else f"{self.scale:g}·") + super().__str__()

    @property
    def scalars(self):
        return (self.low, self.high, self.scale)

    def value(self, d, advantage):
        log_low, log_high = _log(self.low), _log(self.high)
        value = bounded(d, log_low, log_high).exp()  # r within the bounds, the bound itself outside: no overflow, no NaN gradient
        if self.low > 0:
            value = value - self.low * torch.relu(log_low - d)  # relu, whose gradient at a bound is 0: there the other counts
        if self.high < math.inf:
            value = value + self.high * torch.relu(d - log_high)
        return self.scale * value

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
    formula: ClassVar[str] = "clamp(r, {low:g}, {high:g})"

    def __post_init__(self):
        checks.in_range("Band", "low", self.low, 0.0, math.inf)
        checks.in_range("Band", "high", self.high, self.low, math.inf, open_low=True)

    @property
    def scalars(self):
        return (self.low, self.high, 0.0)

    def value(self, d, advantage):
        return bounded(d, _log(self.low), _log(self.high)).exp()

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
        checks.in_range("Shape", "gamma", self.gamma, 0.0, math.inf, open_low=True, open_high=True)

    @property
    def scalars(self):
        return (math.log(self.gamma), 0.0, 0.0)

    def value(self, d, advantage):
        return _sigmoid(d - math.log(self.gamma))  # r/(r+γ) without ever forming r

    def slope(self, d, advantage):
        x = d - math.log(self.gamma)
        return torch.sigmoid(x) * torch.sigmoid(-x)


@dataclass(frozen=True)
class Power(Gate):
    """V = r^k, G = k·r^k."""

    exponent: float = 0.5
    code: ClassVar[int] = 7
    formula: ClassVar[str] = "r^{exponent:g}"

    def __post_init__(self):
        checks.in_range("Power", "exponent", self.exponent, 0.0, math.inf, open_low=True, open_high=True)

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
    formula: ClassVar[str] = "(r - r²/2)"

    def value(self, d, advantage):
        ratio = d.clamp(max=0.0).exp()
        near_one = (1.0 - torch.expm1(d) ** 2) / 2  # the same, with the digits of 1 - r
        return torch.where(d > -0.5, near_one, ratio - ratio * ratio / 2)

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
        checks.in_range("Sapo", "tau_positive", self.tau_positive, 1e-6, math.inf, open_high=True)
        checks.in_range("Sapo", "tau_negative", self.tau_negative, 1e-6, math.inf, open_high=True)

    @property
    def scalars(self):
        return (self.tau_positive, self.tau_negative, 0.0)

    def _excess(self, d, advantage):
        positive, negative = torch.full_like(d, self.tau_positive), torch.full_like(d, self.tau_negative)
        tau = torch.where(advantage >= 0, positive, negative)
        d = d.clamp(max=20.0)  # beyond it the sigmoid is exactly 1, and only r could overflow
        excess = d.exp() - 1.0  # not expm1, whose gradient, expm1 + 1, loses the digits of a small r
        return tau * excess, tau

    def value(self, d, advantage):
        excess, tau = self._excess(d, advantage)
        return 4.0 * _sigmoid(excess) / tau

    def slope(self, d, advantage):
        excess, _ = self._excess(d, advantage)
        return 4.0 * torch.sigmoid(excess) * torch.sigmoid(-excess) * d.clamp(max=20.0).exp()


GATES = {gate.code: gate for gate in (One, Ratio, Clip, Truncate, Band, Shape, Power, Phi, Sapo)}


def bounded(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """x.clamp(low, high) whose gradient is 1 at the bounds, too: that of torch's own is 0 there from 2.14 on."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def _sigmoid(x: Tensor) -> Tensor:
    """σ(x), whose gradient keeps its digits as σ → 1."""
    return torch.where(x > 0, 1.0 - torch.sigmoid(-x), torch.sigmoid(x))


def _log(x: float) -> float:
    return math.log(x) if 0 < x < math.inf else (-math.inf if x == 0 else math.inf)
