"""dL/dlogp of a token inside a kernel: the slopes G of `trapo_kernels.gates`, compiled in by their codes.

The functions are elementwise: they serve one row's scalar and a block of tokens alike.
"""

import triton
import triton.language as tl

from trapo_kernels import terms
from trapo_kernels.objective import Objective


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0 with the digits of a small x kept."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 with the digits of a small x kept; -1 at -inf."""
    u = tl.exp(x)
    regular = (u != 1.0) & (u > 1e-7) & (u < 1e30)
    safe_log = tl.log(tl.where(regular, u, 2.0))
    return tl.where(u == 1.0, x, tl.where(regular, (u - 1.0) * (x / safe_log), u - 1.0))


@triton.jit
def slope(GATE: tl.constexpr, d, advantage, s0, s1, s2):
    """G(d) of gate code GATE with its scalars; 0 for code 0, a role without a term. NaN for NaN, which a GPU's min drops."""
    ratio = tl.exp(d)
    if GATE == 1:  # One
        g = 1.0  # where d is -inf, too
    elif GATE == 2:  # Ratio
        g = ratio
    elif GATE == 3:  # Clip: floor, ceiling, dual
        g = tl.where(tl.where(advantage < 0, (ratio >= s0) & (ratio <= s2), ratio <= s1), ratio, 0.0)
    elif GATE == 4:  # Truncate: low, high, scale
        g = s2 * tl.minimum(tl.maximum(ratio, s0), s1)
    elif GATE == 5:  # Band: low, high
        g = tl.where((ratio >= s0) & (ratio <= s1), ratio, 0.0)
    elif GATE == 6:  # Shape: log γ
        g = sigmoid(d - s0) * sigmoid(s0 - d)  # 1 - σ would lose its digits
    elif GATE == 7:  # Power: exponent
        g = s0 * tl.exp(s0 * d)
    elif GATE == 8:  # Phi
        g = -ratio * expm1(d)
    elif GATE == 9:  # Sapo: τ for advantage ≥ 0, τ below
        capped = tl.minimum(d, 20.0)  # beyond it 4σ(1-σ) is exactly 0 in fp32, and only r could overflow
        excess = tl.where(advantage < 0, s1, s0) * expm1(capped)
        g = 4.0 * sigmoid(excess) * sigmoid(-excess) * tl.exp(capped)
    else:
        g = 0.0
    return tl.where(d == d, g, d)


@triton.jit
def coefficient(
    logprob, role, anchor, signal, advantage, kl_weight, ref_logprob,
    e0, e1, e2, r0, r1, r2, k0, k1,
    EXPERT_GATE: tl.constexpr, ROLLOUT_GATE: tl.constexpr, KL_CODE: tl.constexpr,
):  # fmt: skip
    """c = dL/dlogp = -signal · G(d) + kl_weight · K(logp - ref); the anchor is +inf where it is the policy itself (d = 0).

    k0 and k1 bound logp - ref: beyond them the estimate is flat, and of k3_corrected only r still has a slope.
    """
    d = tl.where(anchor == float("inf"), 0.0, logprob - anchor)
    g = tl.where(role == 2, slope(EXPERT_GATE, d, advantage, e0, e1, e2), slope(ROLLOUT_GATE, d, advantage, r0, r1, r2))
    c = tl.where(signal == 0, 0.0, -signal * g)  # 0 however large the ratio is
    if KL_CODE > 0:
        weighted = (role == 1) & (kl_weight != 0)
        d_ref = tl.where(weighted, logprob - ref_logprob, 0.0)
        held = tl.minimum(tl.maximum(d_ref, k0), k1)
        beyond = 0.0
        if KL_CODE == 1:
            k = 1.0
        elif KL_CODE == 2:
            k = d_ref
        elif KL_CODE == 3:
            k = -expm1(-held)
        else:
            k = tl.exp(d) * d_ref
            beyond = tl.exp(d) * (expm1(-held) + held)
        k = tl.where(d_ref == d_ref, tl.where(held == d_ref, k, beyond), d_ref)
        c += tl.where(weighted, kl_weight * k, 0.0)
    return c


def gate_arguments(objective: Objective) -> dict[str, float | int]:
    """The scalars and codes that `coefficient` takes, as keyword arguments of a kernel."""
    codes, scalars = terms.gate_scalars(objective)
    names = ("e0", "e1", "e2", "r0", "r1", "r2", "k0", "k1")
    return dict(zip(names, scalars, strict=True)) | dict(zip(("EXPERT_GATE", "ROLLOUT_GATE", "KL_CODE"), codes, strict=True))
