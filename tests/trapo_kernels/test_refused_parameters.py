"""What gates, terms, objectives and presets refuse: the rule and the value are in the message."""

import math

import pytest

from trapo_kernels import KL, Objective, Term, gates, objectives
from trapo_kernels.gates import Clip, One


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: objectives.trapo(alpha=0.0), r"alpha must lie in \[1e-30, 1\], got 0.0"),
        (lambda: objectives.trapo(alpha=1.5), r"alpha must lie in \[1e-30, 1\], got 1.5"),
        (lambda: objectives.trapo(entropy_coef=float("nan")), "entropy_coef must be a finite number in float32, got nan"),
        (lambda: objectives.grpo(epsilon_low=-0.1), r"objectives.grpo: epsilon_low must lie in \[0, 1\], got -0.1"),
        (lambda: objectives.dapo(epsilon_high=None), r"objectives.dapo: epsilon_high must lie in \[0, inf\], got None"),
        (lambda: objectives.luffy(gamma=0.0), r"gamma must lie in \(0, inf\), got 0.0"),
        (lambda: KL(0.1, "k4"), "estimator must be one of 'k1'.*got 'k4'"),
        (lambda: Term(One(), anchor="past"), "anchor must be one of .*got 'past'"),
        (lambda: Objective(), "needs a term for expert or rollout tokens"),
        (lambda: KL(0.1, "k3+"), 'got verl\'s "k3\\+". Use "k2", which has the same gradient'),
        (lambda: KL(0.1, clamp=0.0), r"clamp must lie in \(0, inf\], got 0.0"),
        (lambda: KL(0.1, cap=0.0), r"cap must lie in \(0, inf\], got 0.0"),
        (lambda: KL(0.1, "k2", cap=10), "cap is of the estimator \"k3\", got 10 with 'k2'. Bound that by clamp"),
        (lambda: Objective(rollout=Term(One()), kl=KL(0.1, "k3_corrected")), 'needs a rollout term with anchor "old"'),
        (lambda: objectives.chord_mu(mu=1.2), r"chord_mu: mu must lie in \[0, 1\], got 1.2"),
        (lambda: objectives.cispo(bounds="open"), "bounds must be one of 'absolute', 'relative', got 'open'"),
        (lambda: objectives.cispo(epsilon_low=0.2), 'epsilon_low must be None with bounds="absolute".*got 0.2'),
        (lambda: objectives.cispo(bounds="relative", epsilon_low=2.0), r"cispo: epsilon_low must lie in \[0, 1\], got 2.0"),
        (lambda: objectives.sapo(tau_positive=math.inf), r"tau_positive must lie in \[1e-06, inf\), got inf"),
        (lambda: KL(math.inf), r"beta must lie in \[0, inf\), got inf"),
        (lambda: Objective(expert=Clip()), "expert must be a Term, got Clip. Pass Term\\(gate\\), or None"),
        (lambda: Objective(rollout=Term(One()), kl=0.1), "kl must be a KL, got float. Pass KL\\(beta\\), or None"),
        (lambda: Term(One(), reduction="mean"), "reduction must be a Reduction, got str. Pass"),
        (lambda: objectives.grpo(0.05, None, delta=1.04), r"grpo: delta must lie in \[1.05, inf\], got 1.04"),
        (lambda: objectives.grpo(delta=1.1), r"grpo: delta must lie in \[1.2, inf\], got 1.1"),
        (lambda: objectives.psft(epsilon=1.5), r"psft: epsilon must lie in \[0, 1\], got 1.5"),
        (lambda: objectives.iw_sft_token(cap=0.0), r"iw_sft_token: cap must lie in \(0, inf\], got 0.0"),
        (lambda: objectives.trapo(alpha="0.1"), r"alpha must lie in \[1e-30, 1\], got '0.1'"),
        (lambda: objectives.trapo(alpha=1e-31), r"alpha must lie in \[1e-30, 1\], got 1e-31"),
        (lambda: objectives.sft(entropy_coef=1e39), r"entropy_coef must be a finite number in float32, got 1e\+39"),
        (lambda: gates.Truncate(high=1e39), r"high must lie in \(0, inf\] in float32, got 1e\+39"),
        (lambda: KL(1e39), r"beta must lie in \[0, inf\) in float32, got 1e\+39"),
        (lambda: gates.Shape(1e-45), r"gamma must lie in \(0, inf\) in float32, got 1e-45"),
        (lambda: objectives.grpo(kl="zz"), "objectives.grpo: kl must be one of 'k1'.*got 'zz'"),
        (lambda: objectives.grpo(kl_clamp=-1), r"objectives.grpo: kl_clamp must lie in \(0, inf\], got -1"),
        (lambda: objectives.grpo(kl="k3+"), 'got verl\'s "k3\\+". Use "k2", which has the same gradient'),
        (lambda: objectives.reinforce_pp(kl="zz"), "objectives.reinforce_pp: kl must be one of 'k1'.*got 'zz'"),
        (lambda: objectives.gspo(epsilon_low=2), r"objectives.gspo: epsilon_low must lie in \[0, 1\], got 2"),
        (lambda: objectives.uft(beta=False), r"beta must lie in \[0, inf\), got False"),
        (lambda: objectives.trapo(alpha=True), r"alpha must lie in \[1e-30, 1\], got True"),
        (lambda: Clip(True), r"low must lie in \[0, 1\], got True"),
        (lambda: objectives.sft(entropy_coef=True), "entropy_coef must be a finite number in float32, got True"),
    ],
)
def test_bad_parameters_say_the_rule_and_the_value(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
