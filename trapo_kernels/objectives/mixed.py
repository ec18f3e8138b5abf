"""Presets for expert and rollout tokens in one loss: the hybrids of SFT and RL."""

from __future__ import annotations

from dataclasses import replace

from trapo_kernels import checks
from trapo_kernels.gates import One, Phi, Ratio, Shape
from trapo_kernels.objective import Objective, Term
from trapo_kernels.objectives.imitation import trsft_term
from trapo_kernels.objectives.on_policy import clip_term, kl_or_none
from trapo_kernels.sequence import EntropyWeight, TopEntropy


def trapo(alpha: float = 0.1, entropy_coef: float = 0.001) -> Objective:
    """TRAPO: TrSFT on expert tokens, the unclipped ratio loss on rollout tokens, an entropy bonus.

    TrSFT has dL/dlogp = -min(p/α, 1), with the potential V = p/α below α and 1 + log(p/α) above. The authors' code reports the
    value -p/max(sg(p), α) instead; the gradient is the same. α → 0 is SFT, α = 1 is DFT.

    Paper and release share this loss. They differ in the prefix schedule, and the release sums over tokens and divides by the
    longest response alone: `aggregate(mode="length", max_tokens=8192)`.

    Ranges: `alpha` in [1e-30, 1], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2512.17636, sections 3.1 (TrSFT) and 3.3 (the mixed objective).
    """
    return Objective(expert=trsft_term("trapo", alpha), rollout=_ratio_term(), entropy_coef=entropy_coef, name="trapo")


def luffy(gamma: float = 0.1, entropy_coef: float = 0.0) -> Objective:
    """LUFFY: shaped off-policy loss A·p/(p+γ) on the demonstration, unclipped ratio on rollouts.

    Ranges: `gamma` in (0, inf), `entropy_coef` finite; ValueError outside.
    Source: arXiv 2504.14945, equation 7.
    """
    expert = Term(Shape(gamma), signal="advantage")
    return Objective(expert=expert, rollout=_ratio_term(), entropy_coef=entropy_coef, name="luffy")


def exgrpo(gamma: float = 0.1, epsilon_low: float = 0.2, epsilon_high: float = 0.2, entropy_coef: float = 0.0) -> Objective:
    """ExGRPO: A·r/(r+γ) on replayed experience, which has the expert role, and GRPO's clip on fresh rollouts.

    r of the experience is π/π_rollout, against the past policy that sampled it: `rollout_logprob` must be that policy's.

    Ranges: `gamma` in (0, inf), `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2510.02245.
    """
    expert = Term(Shape(gamma), anchor="rollout", signal="advantage")
    rollout = clip_term("exgrpo", epsilon_low, epsilon_high)
    return Objective(expert=expert, rollout=rollout, entropy_coef=entropy_coef, name="exgrpo")


def prefix_rft(epsilon_low: float = 0.2, epsilon_high: float = 0.2, share: float = 0.2, entropy_coef: float = 0.0) -> Objective:
    """Prefix-RFT: PPO's clip on completion and expert prefix alike; of a prefix only the `share` of largest entropy trains.

    The quantile is taken per prefix, so that it does not depend on the micro-batch. Expert tokens carry the sample's advantage, and
    their ratio is against the policy at the start of the batch's updates.

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `share` in (0, 1], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2507.01679.
    """
    rollout = clip_term("prefix_rft", epsilon_low, epsilon_high)
    expert = replace(rollout, reduction=TopEntropy(share))
    return Objective(expert=expert, rollout=rollout, entropy_coef=entropy_coef, name="prefix_rft")


def chord_mu(mu: float = 0.1, epsilon_low: float = 0.2, epsilon_high: float = 0.2, entropy_coef: float = 0.0) -> Objective:
    """CHORD-μ: μ·SFT + (1-μ)·GRPO, each a mean over its own tokens: pack as `PUBLISHED` says.

    `mu` is scheduled in the paper, warm-up then decay: build the objective with the value of the step.

    Ranges: `mu` in [0, 1], `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2508.11408.
    """
    return _chord("chord_mu", Term(One(), scale=mu), mu, epsilon_low, epsilon_high, entropy_coef)


def chord_phi(mu: float = 0.1, epsilon_low: float = 0.2, epsilon_high: float = 0.2, entropy_coef: float = 0.0) -> Objective:
    """CHORD-φ: `chord_mu` with each expert token's gradient scaled by φ = p(1-p), at a constant `mu`.

    The paper's value is -sg(φ)·logp, ours the potential p - p²/2 with the same gradient. Pack as `PUBLISHED` says.

    Ranges: `mu` in [0, 1], `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2508.11408.
    """
    return _chord("chord_phi", Term(Phi(), scale=mu), mu, epsilon_low, epsilon_high, entropy_coef)


def srft(gamma: float = 0.1, expert_coef: float = 0.5, positive_coef: float = 0.1, entropy_coef: float = 0.0) -> Objective:
    """SRFT: entropy-weighted SFT plus LUFFY's shaped loss on the demonstration, REINFORCE on rollouts.

    Demonstration: expert_coef·e^(-H)·(-logp) - A·p/(p+γ). Rollouts: -A·logp, times positive_coef·e^(H) where A > 0; the paper has
    rewards ±1 in the place of A. H is the entropy without gradient, pooled here over the sequence, so that it does not depend
    on the micro-batch.

    Ranges: `gamma` in (0, inf), `expert_coef` finite, `positive_coef` finite, `entropy_coef` finite; ValueError outside.
    Source: arXiv 2506.19767.
    """
    for name, coef in (("expert_coef", expert_coef), ("positive_coef", positive_coef)):
        checks.finite("objectives.srft", name, coef)
    return Objective(
        expert=Term(One(), reduction=EntropyWeight(expert_coef, sign=-1)),
        rollout=Term(One(), signal="advantage", reduction=EntropyWeight(positive_coef, sign=1, positive_only=True)),
        plus=Objective(expert=Term(Shape(gamma), signal="advantage")),
        entropy_coef=entropy_coef,
        name="srft",
    )


def uft(
    hint_coef: float = 0.001,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.001,
    entropy_coef: float = 0.0,
) -> Objective:
    """UFT: hint_coef·SFT on the hint, GRPO's clip with a k3 KL on the completion.

    Each is a mean over its own tokens: pack as `PUBLISHED` says. The length of the hint is scheduled.

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `beta` in [0, inf), `hint_coef` finite,
        `entropy_coef` finite; ValueError outside.
    Source: arXiv 2505.16984.
    """
    checks.finite("objectives.uft", "hint_coef", hint_coef)
    return Objective(
        expert=Term(One(), scale=hint_coef),
        rollout=clip_term("uft", epsilon_low, epsilon_high),
        kl=kl_or_none("uft", beta, "k3"),
        entropy_coef=entropy_coef,
        name="uft",
    )


def relift(entropy_coef: float = 0.0) -> Objective:
    """ReLIFT: the unclipped ratio loss on rollouts, interleaved with SFT steps on demonstrations of the hardest prompts.

    Ranges: `entropy_coef` finite; ValueError outside.
    Source: arXiv 2506.07527.
    """
    return Objective(expert=Term(One()), rollout=_ratio_term(), entropy_coef=entropy_coef, name="relift")


def hpt(entropy_coef: float = 0.0) -> Objective:
    """HPT: per prompt either SFT on the demonstration or the ratio loss on its rollouts, switched by their success.

    Ranges: `entropy_coef` finite; ValueError outside.
    Source: arXiv 2509.04419.
    """
    return Objective(expert=Term(One()), rollout=_ratio_term(), entropy_coef=entropy_coef, name="hpt")


def reft(epsilon_low: float = 0.2, epsilon_high: float = 0.2, entropy_coef: float = 0.0) -> Objective:
    """ReFT: SFT on expert tokens as the warm-up, then PPO's clip on rollouts with a critic, as `PUBLISHED` says, and a k1 KL in the
    reward.

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2401.08967.
    """
    rollout = clip_term("reft", epsilon_low, epsilon_high)
    return Objective(expert=Term(One()), rollout=rollout, entropy_coef=entropy_coef, name="reft")


def _ratio_term() -> Term:
    return Term(Ratio(), anchor="old", signal="advantage")


def _chord(name: str, expert: Term, mu: float, epsilon_low: float, epsilon_high: float, entropy_coef: float) -> Objective:
    checks.in_range(f"objectives.{name}", "mu", mu, 0.0, 1.0)
    rollout = replace(clip_term(name, epsilon_low, epsilon_high), scale=1.0 - mu)
    return Objective(expert=expert, rollout=rollout, entropy_coef=entropy_coef, name=name)


PRESETS = (trapo, luffy, exgrpo, prefix_rft, chord_mu, chord_phi, srft, uft, relift, hpt, reft)
