"""Presets for rollout tokens alone: the policy losses of reinforcement learning."""

from __future__ import annotations

import math
from dataclasses import replace

from trapo_kernels import checks
from trapo_kernels.gates import Clip, One, Ratio, Sapo, Truncate
from trapo_kernels.objective import KL, KL_ESTIMATORS, Estimator, Objective, Term
from trapo_kernels.sequence import MeanRatio


def ppo(epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual: float = math.inf, entropy_coef: float = 0.0) -> Objective:
    """PPO: -min(r·A, clip(r, 1-ε_low, 1+ε_high)·A), on advantages from a critic, as `PUBLISHED` says, or elsewhere.

    `dual` also caps r at it where A < 0: the dual clip of arXiv 1912.09729.

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `dual` in [1, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 1707.06347, equation 7.
    """
    return Objective(rollout=clip_term("ppo", epsilon_low, epsilon_high, dual), entropy_coef=entropy_coef, name="ppo")


def grpo(
    epsilon_low: float = 0.2,
    epsilon_high: float | None = 0.2,
    beta: float = 0.0,
    kl: Estimator = "k3",
    entropy_coef: float = 0.0,
    kl_clamp: float = math.inf,
    delta: float | None = math.inf,
    kl_cap: float = math.inf,
) -> Objective:
    """GRPO: PPO's clip on group-normalised advantages, KL to a reference when `beta` > 0.

    The paper averages over each sequence, then over sequences: pack as `PUBLISHED` says. `kl`: the estimator, as in `KL`; TRL's
    default since 1.16, `use_bias_correction_kl`, is "k3_corrected". `kl_clamp`: nats, bound on |log π/π_ref| in the KL. `kl_cap`:
    nats, the most that "k3" can be; verl's low_var_kl has 20 and 10. With a `beta` of 0, where a schedule may begin or end, there
    is no KL: all three are checked and do nothing else. `delta`: cap on r where A < 0, the two-sided clip of arXiv 2505.07291; at
    least 1 + `epsilon_high`, below which TRL's formula caps there, and ours would at `delta`. None is what TRL's configuration
    means by it: an `epsilon_high` of `epsilon_low`, and no cap.

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `beta` in [0, inf), `kl_clamp` in (0, inf],
        `kl_cap` in (0, inf], `delta` in [1 + epsilon_high, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2402.03300, equation 3.
    """
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    delta = math.inf if delta is None else delta
    term = clip_term("grpo", epsilon_low, epsilon_high)
    checks.in_range("objectives.grpo", "delta", delta, 1.0 + epsilon_high, math.inf)
    term = replace(term, gate=replace(term.gate, dual=delta))
    return Objective(rollout=term, kl=kl_or_none("grpo", beta, kl, kl_clamp, kl_cap), entropy_coef=entropy_coef, name="grpo")


def dr_grpo(epsilon_low: float = 0.2, epsilon_high: float = 0.2, entropy_coef: float = 0.0) -> Objective:
    """Dr.GRPO: GRPO's clip without its biases: advantages without std and a constant divisor, as `PUBLISHED` says.

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2503.20783, section 3.2.
    """
    return Objective(rollout=clip_term("dr_grpo", epsilon_low, epsilon_high), entropy_coef=entropy_coef, name="dr_grpo")


def dapo(epsilon_low: float = 0.2, epsilon_high: float = 0.28, entropy_coef: float = 0.0) -> Objective:
    """DAPO: the clip-higher asymmetric clip, no KL; pack as `PUBLISHED` says.

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2503.14476, equation 8.
    """
    return Objective(rollout=clip_term("dapo", epsilon_low, epsilon_high), entropy_coef=entropy_coef, name="dapo")


def cispo(
    epsilon_high: float | None = None, epsilon_low: float | None = None, bounds: str = "absolute", entropy_coef: float = 0.0
) -> Objective:
    """CISPO: dL/dlogp = -A·sg(clip(r)): the importance weight is clipped, the gradient of the token never is.

    `bounds`: what the two numbers mean, which differs between libraries. "absolute", as in TRL: r ≤ `epsilon_high` (5 by default)
    and no floor. "relative", as in verl: 1 - `epsilon_low` ≤ r ≤ 1 + `epsilon_high` (0.2 each by default). The published value is
    -sg(clip(r))·A·logp, ours the potential with the same gradient. Pack as `PUBLISHED` says.

    Ranges: `epsilon_high` in (0, inf], `epsilon_low` in [0, 1] where relative, `entropy_coef` finite; ValueError outside.
    Source: arXiv 2506.13585.
    """
    checks.one_of("objectives.cispo", "bounds", bounds, ("absolute", "relative"))
    if bounds == "absolute" and epsilon_low is not None:
        raise ValueError(
            f'objectives.cispo: epsilon_low must be None with bounds="absolute", which have no floor, got {epsilon_low}. '
            'Use bounds="relative" for 1 ± ε.'
        )
    absolute = bounds == "absolute"
    low = (1.0 if absolute else 0.2) if epsilon_low is None else epsilon_low  # a floor of 1 - 1 is none
    high = (5.0 if absolute else 0.2) if epsilon_high is None else epsilon_high
    checks.in_range("objectives.cispo", "epsilon_low", low, 0.0, 1.0)
    checks.in_range("objectives.cispo", "epsilon_high", high, 0.0, math.inf, open_low=True)
    gate = Truncate(low=1.0 - low, high=high if absolute else 1.0 + high)
    return Objective(rollout=Term(gate, anchor="old", signal="advantage"), entropy_coef=entropy_coef, name="cispo")


def sapo(tau_positive: float = 1.0, tau_negative: float = 1.05, entropy_coef: float = 0.0) -> Objective:
    """SAPO: a sigmoid instead of a clip, -A·4σ(τ(r-1))/τ; τ by the sign of the advantage. Pack as `PUBLISHED` says.

    Ranges: `tau_positive` in [1e-06, inf), `tau_negative` in [1e-06, inf), `entropy_coef` finite; ValueError outside.
    Source: arXiv 2511.20347.
    """
    term = Term(Sapo(tau_positive, tau_negative), anchor="old", signal="advantage")
    return Objective(rollout=term, entropy_coef=entropy_coef, name="sapo")


def rloo(entropy_coef: float = 0.0) -> Objective:
    """RLOO: REINFORCE, -A·logp, on advantages with a leave-one-out baseline (`PUBLISHED`); no ratio, so one update per batch.

    Ranges: `entropy_coef` finite; ValueError outside.
    Source: arXiv 2402.14740.
    """
    return Objective(rollout=Term(One(), signal="advantage"), entropy_coef=entropy_coef, name="rloo")


def reinforce_pp(
    epsilon_low: float = 0.2, epsilon_high: float = 0.2, beta: float = 0.0, kl: Estimator = "k2", entropy_coef: float = 0.0
) -> Objective:
    """REINFORCE++: PPO's clip on advantages normalised over the whole batch instead of the group (`PUBLISHED`).

    The KL is part of the reward in the plain version; the version with a baseline has it in the loss: `beta` > 0, `kl` "k2".

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `beta` in [0, inf), `entropy_coef` finite; ValueError outside.
    Source: arXiv 2501.03262.
    """
    term = clip_term("reinforce_pp", epsilon_low, epsilon_high)
    return Objective(rollout=term, kl=kl_or_none("reinforce_pp", beta, kl), entropy_coef=entropy_coef, name="reinforce_pp")


def gspo(epsilon_low: float = 3e-4, epsilon_high: float = 4e-4, entropy_coef: float = 0.0) -> Objective:
    """GSPO: PPO's clip on the sequence ratio s = exp(mean_t log r_t).

    Written as GSPO-token, s = sg(s)·π/sg(π), whose gradient is that of GSPO where advantage and weight are constant in a sequence.
    Pack as `PUBLISHED` says. `replace(gspo(), kl=KL(beta, "k3_corrected"))` has TRL's KL beside it, which is times s as well.

    Ranges: `epsilon_low` in [0, 1], `epsilon_high` in [0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2507.18071.
    """
    term = replace(clip_term("gspo", epsilon_low, epsilon_high), reduction=MeanRatio())
    return Objective(rollout=term, entropy_coef=entropy_coef, name="gspo")


def gmpo(clip: float = 0.4, entropy_coef: float = 0.0) -> Objective:
    """GMPO: -A·(Π_t r_t)^(1/|y|), each token's log-ratio first clipped to `clip` nats on the side that its advantage pushes.

    Pack as `PUBLISHED` says.

    Ranges: `clip` in (0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2507.20673.
    """
    term = Term(Ratio(), anchor="old", signal="advantage", reduction=MeanRatio(clip))
    return Objective(rollout=term, entropy_coef=entropy_coef, name="gmpo")


def clip_term(preset: str, epsilon_low: float, epsilon_high: float, dual: float = math.inf) -> Term:
    """PPO's clip of π/π_old on the advantage."""
    checks.in_range(f"objectives.{preset}", "epsilon_low", epsilon_low, 0.0, 1.0)
    checks.in_range(f"objectives.{preset}", "epsilon_high", epsilon_high, 0.0, math.inf)
    return Term(Clip(epsilon_low, epsilon_high, dual), anchor="old", signal="advantage")


def kl_or_none(preset: str, beta: float, estimator: Estimator, clamp: float = math.inf, cap: float = math.inf) -> KL | None:
    """The KL term, or None where its β is 0: an objective without one reads no `ref_logprob`."""
    if estimator != "k3+":  # of which `KL` says more
        checks.one_of(f"objectives.{preset}", "kl", estimator, KL_ESTIMATORS)
    for name, bound in (("kl_clamp", clamp), ("kl_cap", cap)):
        checks.in_range(f"objectives.{preset}", name, bound, 0.0, math.inf, open_low=True)
    kl = KL(beta, estimator, clamp, cap)
    return kl if kl.beta else None


PRESETS = (ppo, grpo, dr_grpo, dapo, cispo, sapo, rloo, reinforce_pp, gspo, gmpo)
