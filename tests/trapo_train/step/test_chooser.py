"""The step chooser: which objective an answer means, and what is refused."""

from dataclasses import replace

import pytest

from tests.trapo_train.test_train import build_config
from trapo_kernels import KL, Objective, objectives
from trapo_train.engines.engine import EngineError
from trapo_train.step.chooser import apply_choice, load_chooser
from trapo_train.trainer import Trainer


class Alternate:
    def __call__(self, step, metrics):
        return "expert" if step % 2 == 0 else "rollout"


class HalfState(Alternate):
    def state_dict(self):
        return {}


class OtherHalf(Alternate):
    def load_state_dict(self, state):
        """Of a state that nothing would save."""


def by_reward(step, metrics):
    return "rollout" if metrics.get("reward/mean", 0.0) > 0.5 else "expert"


def dapo(step, metrics):
    return "dapo"


class Remembers:
    """Hands out its own list as its state."""

    def __init__(self):
        self.seen = []

    def __call__(self, step, metrics):
        self.seen.append(step)
        return "both"

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


not_callable = 3


def test_both_is_the_objective_itself():
    assert apply_choice("both", objectives.trapo()) == objectives.trapo()


def test_one_role_keeps_its_terms_and_the_entropy_bonus():
    objective = objectives.trapo(alpha=0.3, entropy_coef=0.01)
    expert = apply_choice("expert", objective)
    assert (expert.expert, expert.rollout, expert.entropy_coef) == (objective.expert, None, 0.01)
    assert expert.name == "trapo/expert"
    rollout = apply_choice("rollout", objective)
    assert (rollout.expert, rollout.rollout) == (None, objective.rollout)


def test_the_kl_goes_with_the_rollouts():
    objective = objectives.uft(beta=0.1)
    assert apply_choice("expert", objective).kl is None
    assert apply_choice("rollout", objective).kl == KL(0.1, "k3")


def test_every_layer_is_looked_at():
    srft = objectives.srft()
    assert [layer.expert for layer in apply_choice("expert", srft).layers] == [layer.expert for layer in srft.layers]
    assert len(apply_choice("rollout", srft).layers) == 1
    nested = Objective(rollout=srft.rollout, plus=objectives.sft())
    assert apply_choice("expert", nested).expert == objectives.sft().expert


def test_a_preset_by_name():
    assert apply_choice("dft", objectives.trapo()) == objectives.dft()


def test_a_preset_has_the_configured_kl_where_it_has_rollouts(tmp_path):
    kl = KL(0.1)
    assert apply_choice("dapo", objectives.trapo(), kl) == replace(objectives.dapo(), kl=kl)
    assert apply_choice("sft", objectives.trapo(), kl) == objectives.sft()
    assert apply_choice("uft", objectives.trapo(), kl) == objectives.uft()
    chosen = f"objective={{name: dr_grpo, kl: {{beta: 0.1}}, chooser: '{__name__}:dapo'}}"
    metrics = Trainer(build_config(tmp_path, "run", "plan={name: grpo, num_samples: 2}", chosen)).train_step()
    assert metrics["rollout/kl_ref"] == pytest.approx(0)


def test_a_step_that_fails_leaves_a_chooser_as_it_was(tmp_path, monkeypatch):
    trainer = Trainer(build_config(tmp_path, "run", f"objective={{name: trapo, chooser: '{__name__}:Remembers'}}"))
    trainer.train_step()

    def away(*arguments):
        raise EngineError("the engine is away")

    monkeypatch.setattr(trainer, "_sample", away)
    with pytest.raises(EngineError, match="away"):
        trainer.train_step()
    assert trainer.chooser.seen == [0]


def test_choosers_are_functions_or_classes():
    assert load_chooser(f"{__name__}:Alternate")(1, {}) == "rollout"
    chooser = load_chooser(f"{__name__}:by_reward")
    assert [chooser(0, {}), chooser(1, {"reward/mean": 0.9})] == ["expert", "rollout"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("by_reward", "path like my_choosers:Alternate"),
        ("no_such_module:choose", "importing the module 'no_such_module' failed"),
        (f"{__name__}:missing", "has no function or class 'missing'"),
        (f"{__name__}:not_callable", "must be callable .* got int"),
        (f"{__name__}:HalfState", "both state_dict and load_state_dict"),
        (f"{__name__}:OtherHalf", "both state_dict and load_state_dict"),
    ],
)
def test_bad_paths_are_refused(path, message):
    with pytest.raises(ValueError, match=message):
        load_chooser(path)


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="must answer one of both, expert, rollout or a preset .*got 'sftt'"):
        apply_choice("sftt", objectives.trapo())
    with pytest.raises(ValueError, match=r"must answer one of .*got \['expert'\]"):
        apply_choice(["expert"], objectives.trapo())
    with pytest.raises(ValueError, match="chose 'expert', and the objective dr_grpo has no expert term"):
        apply_choice("expert", objectives.dr_grpo())
