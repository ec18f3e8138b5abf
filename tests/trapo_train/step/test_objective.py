"""The objective by name: what its options make of it, and what is refused."""

from __future__ import annotations

import pytest

from trapo_kernels import objectives
from trapo_train.schema import UserError
from trapo_train.step.objective import KLConfig, ObjectiveConfig, build_objective, extreme_objectives, scheduled_options


def test_objective_options_reach_the_preset():
    assert build_objective(ObjectiveConfig("trapo", {"alpha": 0.3})) == objectives.trapo(alpha=0.3)


def test_options_may_be_schedules():
    cosine = {"schedule": "cosine", "start": 0.9, "end": 0.1, "steps": 10}
    config = ObjectiveConfig("chord_mu", {"mu": cosine, "epsilon_low": 0.1})
    assert build_objective(config) == objectives.chord_mu(mu=0.9, epsilon_low=0.1)
    assert build_objective(config, step=5).expert.scale == pytest.approx(0.5)
    assert build_objective(config, step=10) == objectives.chord_mu(mu=0.1, epsilon_low=0.1)
    assert scheduled_options(config, 10) == {"mu": 0.1}
    assert extreme_objectives(config) == [objectives.chord_mu(mu=mu, epsilon_low=0.1) for mu in (0.1, 0.9)]


def test_a_kl_that_an_objective_cannot_have_is_refused_by_name():
    with pytest.raises(UserError, match=r'objective\.kl does not go with rloo: .*the KL estimator "k3_corrected" needs'):
        ObjectiveConfig("rloo", kl=KLConfig(0.01, "k3_corrected"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trappo",), "name must be one of trapo, sft, .*got 'trappo'"),
        (("trapo", {"alhpa": 0.1}), "options of trapo are alpha, entropy_coef, got 'alhpa'. Did you mean 'alpha'"),
        (("trapo", {"alpha": 2.0}), r"alpha must lie in \[1e-30, 1\], got 2"),
        (
            ("trapo", {"alpha": {"schedule": "linear", "start": 1, "end": 0, "steps": 9}}),
            r"alpha must lie in \[1e-30, 1\], got 0",
        ),
        (("trapo", {"alpha": {"schedule": "linear", "start": 1}}), "linear.end, linear.steps must be set"),
        (("trapo", {}, ""), "chooser must be a path"),
    ],
)
def test_objective_config_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(*arguments)
