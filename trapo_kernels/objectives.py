"""Presets: each method of the field as data for the same kernels. `print(objectives.trapo())` shows its formula."""

from __future__ import annotations

from trapo_kernels.gates import Clip, One, Ratio, Shape, Truncate
from trapo_kernels.objective import KL, Objective, Term


def trapo(alpha: float = 0.1, entropy_coef: float = 0.001) -> Objective:
    """TRAPO: TrSFT on expert tokens, the unclipped ratio loss on rollout tokens, an entropy bonus.

    TrSFT has dL/dlogp = -min(p/α, 1), with the potential V = p/α below α and 1 + log(p/α) above. The authors' code reports the
    value -p/max(sg(p), α) instead; the gradient is the same. α in (0, 1]: α → 0 is SFT, α = 1 is DFT.

    Source: arXiv 2512.17636, sections 3.1 (TrSFT) and 3.3 (the mixed objective).
    """
    _alpha_range("trapo", alpha)
    return Objective(
        expert=Term(Truncate(high=alpha, scale=1.0 / alpha)),
        rollout=Term(Ratio(), anchor="old", signal="advantage"),
        entropy_coef=entropy_coef,
        name="trapo",
    )


def sft(entropy_coef: float = 0.0) -> Objective:
    """SFT: -logp on expert tokens, the cross-entropy."""
    return Objective(expert=Term(One()), entropy_coef=entropy_coef, name="sft")


def trsft(alpha: float = 0.1, entropy_coef: float = 0.0) -> Objective:
    """TrSFT alone, TRAPO's expert term on a dataset of expert traces. Source: arXiv 2512.17636, section 3.1."""
    _alpha_range("trsft", alpha)
    return Objective(expert=Term(Truncate(high=alpha, scale=1.0 / alpha)), entropy_coef=entropy_coef, name="trsft")


def dft(entropy_coef: float = 0.0) -> Objective:
    """DFT: SFT with every token's gradient scaled by its probability, dL/dlogp = -p. Source: arXiv 2508.05629, equation 9."""
    return Objective(expert=Term(Truncate(high=1.0)), entropy_coef=entropy_coef, name="dft")


def grpo(
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, beta: float = 0.0, kl: str = "k3", entropy_coef: float = 0.0
) -> Objective:
    """GRPO: PPO's clip on group-normalised advantages, KL to a reference when `beta` > 0.

    The paper averages over each sequence, then over sequences: pack with `aggregate(mode="sequence_mean")`.
    Source: arXiv 2402.03300, equation 3.
    """
    return _clipped("grpo", epsilon_low, epsilon_high, beta, kl, entropy_coef)


def dr_grpo(epsilon_low: float = 0.2, epsilon_high: float = 0.2, entropy_coef: float = 0.0) -> Objective:
    """Dr.GRPO: GRPO's clip without its biases: advantages without std, and `aggregate(mode="constant")`.

    Source: arXiv 2503.20783, section 3.2.
    """
    return _clipped("dr_grpo", epsilon_low, epsilon_high, 0.0, "k3", entropy_coef)


def dapo(epsilon_low: float = 0.2, epsilon_high: float = 0.28, entropy_coef: float = 0.0) -> Objective:
    """DAPO: the clip-higher asymmetric clip, no KL; pack with `aggregate(mode="token_mean")`.

    Source: arXiv 2503.14476, equation 8.
    """
    return _clipped("dapo", epsilon_low, epsilon_high, 0.0, "k3", entropy_coef)


def luffy(gamma: float = 0.1, entropy_coef: float = 0.0) -> Objective:
    """LUFFY: shaped off-policy loss A·p/(p+γ) on the demonstration, unclipped ratio on rollouts.

    Source: arXiv 2504.14945, equation 7.
    """
    return Objective(
        expert=Term(Shape(gamma), signal="advantage"),
        rollout=Term(Ratio(), anchor="old", signal="advantage"),
        entropy_coef=entropy_coef,
        name="luffy",
    )


def _clipped(name: str, epsilon_low: float, epsilon_high: float, beta: float, kl: str, entropy_coef: float) -> Objective:
    return Objective(
        rollout=Term(Clip(epsilon_low, epsilon_high), anchor="old", signal="advantage"),
        kl=KL(beta, kl) if beta else None,
        entropy_coef=entropy_coef,
        name=name,
    )


def _alpha_range(name: str, alpha: float) -> None:
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"objectives.{name}: alpha must lie in (0, 1], got {alpha}. The paper uses 0.1; 1 is DFT.")


PRESETS = {preset.__name__: preset for preset in (trapo, sft, trsft, dft, grpo, dr_grpo, dapo, luffy)}
