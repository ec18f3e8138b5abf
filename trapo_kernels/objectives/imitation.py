"""Presets for expert tokens alone: supervised fine-tuning and its trust-region relatives."""

from __future__ import annotations

import math

from trapo_kernels import checks
from trapo_kernels.gates import Clip, One, Truncate
from trapo_kernels.objective import Objective, Term
from trapo_kernels.sequence import TrajectoryWeight


def sft(entropy_coef: float = 0.0) -> Objective:
    """SFT: -logp on expert tokens, dL/dlogp = -1.

    Ranges: `entropy_coef` finite; ValueError outside.
    Source: cross-entropy.
    """
    return Objective(expert=Term(One()), entropy_coef=entropy_coef, name="sft")


def trsft(alpha: float = 0.1, entropy_coef: float = 0.0) -> Objective:
    """TrSFT: TRAPO's expert term alone, dL/dlogp = -min(p/α, 1), on a dataset of expert traces.

    Ranges: `alpha` in [1e-30, 1], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2512.17636, section 3.1.
    """
    return Objective(expert=trsft_term("trsft", alpha), entropy_coef=entropy_coef, name="trsft")


def dft(entropy_coef: float = 0.0) -> Objective:
    """DFT: SFT with every token's gradient scaled by its probability, dL/dlogp = -p. The paper's value is -sg(p)·logp, ours -p.

    Ranges: `entropy_coef` finite; ValueError outside.
    Source: arXiv 2508.05629, equation 9.
    """
    return Objective(expert=Term(Truncate(high=1.0)), entropy_coef=entropy_coef, name="dft")


def iw_sft_token(cap: float = 16.0, entropy_coef: float = 0.0) -> Objective:
    """iw-SFT per token: dL/dlogp = -min(π/π_ref, cap), an importance weight for each token by itself.

    The token-wise form of `iw_sft`, in one pass. The reference is the model that fine-tuning starts from.

    Ranges: `cap` in (0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2507.12856.
    """
    checks.in_range("objectives.iw_sft_token", "cap", cap, 0.0, math.inf, open_low=True)
    return Objective(expert=Term(Truncate(high=cap), anchor="ref"), entropy_coef=entropy_coef, name="iw_sft_token")


def iw_sft(cap: float = 16.0, pool: str = "sum", entropy_coef: float = 0.0) -> Objective:
    """iw-SFT: SFT whose sequences are weighted by sg(min(π(y)/π_ref(y), cap)).

    `pool`: "sum" of the log-ratios, the ratio of the whole sequence, or "mean", which does not shrink with its length.

    Ranges: `cap` in (0, inf], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2507.12856.
    """
    term = Term(One(), reduction=TrajectoryWeight(cap, pool))
    return Objective(expert=term, entropy_coef=entropy_coef, name="iw_sft")


def psft(epsilon: float = 0.2, entropy_coef: float = 0.0) -> Objective:
    """PSFT: PPO's clip with advantage 1 on expert tokens; a token stops training once r > 1 + ε.

    `old_logprob` is the policy at the start of the batch's updates; with a single update the ratio is 1 and this is SFT.

    Ranges: `epsilon` in [0, 1], `entropy_coef` finite; ValueError outside.
    Source: arXiv 2508.17784.
    """
    checks.in_range("objectives.psft", "epsilon", epsilon, 0.0, 1.0)
    return Objective(expert=Term(Clip(epsilon, epsilon), anchor="old"), entropy_coef=entropy_coef, name="psft")


def trsft_term(preset: str, alpha: float) -> Term:
    """V = p/α below α and 1 + log(p/α) above; α in [1e-30, 1], where weight/α is finite in float32: the paper's is 0.1, and 1 is
    DFT."""
    checks.in_range(f"objectives.{preset}", "alpha", alpha, 1e-30, 1.0)
    return Term(Truncate(high=alpha, scale=1.0 / alpha))


PRESETS = (sft, trsft, dft, iw_sft_token, iw_sft, psft)
