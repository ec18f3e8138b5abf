"""The gates and KL terms that every compiled backend has, and the check that its coefficients are theirs."""

import math

import torch

from tests.trapo_kernels import cases
from trapo_kernels import KL, Objective, Term, terms
from trapo_kernels.gates import Band, Clip, One, Phi, Power, Ratio, Sapo, Shape, Truncate
from trapo_kernels.objective import KL_ESTIMATORS

GATE_CASES = [
    One(),
    Ratio(),
    Clip(0.2, 0.28),
    Clip(0.2, 0.2, dual=3.0),
    Truncate(high=0.1, scale=10.0),
    Truncate(high=1.0),
    Truncate(low=0.8, high=1.28),
    Band(0.5, 2.0),
    Shape(0.1),
    Power(0.5),
    Power(2.0),
    Phi(),
    Sapo(1.0, 1.5),
]
KL_CASES = [
    None,
    *(KL(0.3, estimator, clamp) for estimator in KL_ESTIMATORS for clamp in (math.inf, 0.8)),
    *(KL(0.3, "k3", clamp, cap=0.5) for clamp in (math.inf, 0.8)),
]


def check_coefficients(compute, gate, kl):
    """`compute` is a backend's `coefficients`. Both roles, both signs of the advantage, ratios on both sides of every bound; own
    anchor and policy itself."""
    n = 512
    logprob = torch.linspace(-7.0, -0.01, n, device=cases.DEVICE)
    old = torch.where(torch.arange(n) % 5 == 0, terms.SELF, -4 * torch.rand(n))
    b = cases.batch(n, 50, torch.float32, old_logprob=old)
    objective = Objective(expert=Term(gate, anchor="old"), rollout=Term(gate, anchor="old", signal="advantage"), kl=kl)
    s = terms.streams(b, objective)
    expected = terms.coefficients(logprob, s, objective)
    compiled = compute(logprob, s, objective)
    assert (compiled[b.role == 0] == 0).all() and (compiled[b.role == 1] != 0).any()
    torch.testing.assert_close(compiled, expected, rtol=3e-6, atol=3e-6 * expected.abs().max().item())

    read = (s.signal != 0) & (s.anchor != terms.SELF) & (not isinstance(gate, One))  # whose slope is 1 whatever d is
    broken = compute(torch.full_like(logprob, torch.nan), s, objective)
    assert broken[read].isnan().all(), "a NaN must show, though comparisons drop it, and min and max of a GPU"
