"""An objective of one's own, by the path of its function, and a KL for objectives that have none."""

import json
import math
import sys
from functools import partial

import pytest

from tests.trapo_train.test_train import build_config, train_to_end
from trapo_kernels import KL, Objective, objectives
from trapo_train import cli, dry_run
from trapo_train.run.export_checkpoint import export_checkpoint
from trapo_train.schema import UserError
from trapo_train.step.objective import KLConfig, ObjectiveConfig, build_objective, extreme_objectives
from trapo_train.tasks import build_tokenizer
from trapo_train.trainer import Trainer

MODULE = """
from dataclasses import replace
from trapo_kernels import KL, Objective, Term, gates, objectives

class Short(gates.Ratio):
    code = None

    def value(self, d, advantage):
        return d[1:].exp()

def short():
    return Objective(rollout=Term(Short(), signal="advantage", anchor="old"))

def mine(epsilon=0.1):
    return objectives.ppo(epsilon_low=epsilon, epsilon_high=2 * epsilon)

def sum():
    return replace(objectives.sft(), plus=objectives.dr_grpo())

def apart():
    rollout = Term(gates.Ratio(), anchor="old", signal="advantage")
    return Objective(expert=Term(gates.One()), plus=Objective(rollout=rollout))

def held():
    return replace(objectives.sft(), kl=KL(0.1))

def none():
    return 3
"""


@pytest.fixture
def module(own_module):
    return own_module("odd_objectives", MODULE)


def test_a_function_by_its_path_is_an_objective_with_options_and_schedules(module, tmp_path):
    ramp = {"schedule": "linear", "start": 0.1, "end": 0.3, "steps": 2}
    config = ObjectiveConfig(f"{module}:mine", {"epsilon": ramp})
    assert build_objective(config, 1) == objectives.ppo(epsilon_low=0.2, epsilon_high=0.4)
    assert extreme_objectives(config)[1] == objectives.ppo(epsilon_low=0.3, epsilon_high=0.6)
    run = partial(build_config, tmp_path, "run", "plan={name: grpo, num_samples: 2}")
    assert Trainer(run(f"objective={{name: {module}:mine, kl: {{beta: 0.1}}}}")).train_step()["rollout/kl_ref"] == pytest.approx(0)


@pytest.mark.parametrize("name", ["gspo", "dapo", "cispo", "sapo", "grpo", "trapo", "luffy"])
def test_a_kl_joins_an_objective_of_rollouts(name):
    kl = KLConfig(0.02, "k2", 5.0)
    plain, objective = build_objective(ObjectiveConfig(name)), build_objective(ObjectiveConfig(name, kl=kl))
    assert isinstance(objective, Objective) and "ref_logprob" in objective.reads() - plain.reads()
    (layer,) = [layer for layer in objective.layers if layer.kl is not None]
    assert layer.kl == KL(0.02, "k2", 5.0) and layer.rollout is not None and objective.name == plain.name
    assert KLConfig(0.02).term().clamp == KLConfig(0.02).term().cap == math.inf
    assert KLConfig(0.02, clamp=20.0, cap=10.0).term() == KL(0.02, "k3", 20.0, 10.0)


def test_a_kl_joins_the_rollout_term_of_a_sum_whose_first_has_none(module):
    objective = build_objective(ObjectiveConfig(f"{module}:sum", kl=KLConfig(0.02)))
    assert [layer.kl for layer in objective.layers] == [None, KL(0.02)]
    assert [layer.rollout is None for layer in objective.layers] == [True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ObjectiveConfig("grpo", {"beta": 0.04}, kl=KLConfig(0.1)),
            "kl must be null where the objective has one, got",
        ),
        (
            lambda: ObjectiveConfig("sft", kl=KLConfig(0.1)),
            r"objective sft: a KL is of rollout tokens, and 'sft' trains on expert tokens alone\. Leave the KL out",
        ),
        (lambda: KLConfig(1e39), r"the kernels refuse it: KL: beta must lie in \[0, inf\) in float32, got 1e\+39"),
        (lambda: KLConfig(-1.0), "beta must be a finite number of at least 0, got -1"),
        (lambda: KLConfig(0.1, clamp=0.0), "clamp must be null or above 0, got 0"),
        (lambda: KLConfig(0.1, cap=0.0), "cap must be null or above 0, got 0"),
        (lambda: KLConfig(0.1, "k2", cap=10.0), 'the kernels refuse it: KL: cap is of the estimator "k3", got 10 with'),
        (
            lambda: ObjectiveConfig("dapoo"),
            r"or a path to a function, .*got 'dapoo'\. Did you mean 'dapo'",
        ),
        (
            lambda: ObjectiveConfig("mine:", {"epsilon": {"schedule": "linear", "start": 1}}),
            "linear.end, linear.steps must be set",
        ),
    ],
)
def test_what_is_no_objective_is_refused(module, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            "{name: 'odd_objectives:nothing'}",
            "^objective.name 'odd_objectives:nothing': the module 'odd_objectives' has no function",
        ),
        ("{name: 'odd_objectives:none'}", r"^objective.name 'odd_objectives:none' must return a trapo_kernels\.Objective, got int"),
        (
            "{name: 'odd_objectives:held'}",
            "^objective odd_objectives:held: a KL is of rollout tokens, and 'sft' trains on expert tokens alone",
        ),
        (
            "{name: 'odd_objectives:mine', options: {alpha: 1}}",
            "^objective: options of odd_objectives:mine are epsilon, got 'alpha'",
        ),
        ("{name: 'odd_objectives:mine', options: {epsilon: -1}}", "^objective: odd_objectives:mine refuses its options: "),
        ("{name: 'broken_objectives:mine'}", "^invalid literal for int"),
    ],
)
def test_an_own_objective_is_asked_for_where_one_trains_and_not_before(objective, message, module, tmp_path):
    (tmp_path / "broken_objectives.py").write_text("int('x')\n")
    config = build_config(tmp_path, "run", "plan.name=grpo", f"objective={objective}")
    with pytest.raises(ValueError, match=message) as error:
        Trainer(config)
    assert isinstance(error.value, UserError) == ("broken" not in objective)  # a bug in it shows its traceback


@pytest.mark.parametrize(("plan", "guided"), [("grpo", False), ("luffy", True)])
def test_a_rollout_term_trains_wherever_in_the_sum_it_stands(plan, guided, module, tmp_path):
    rows = [{"prompt": "ab?a1:", "solution": "b", "expert": "b"}, {"prompt": "ab?a2:", "solution": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = (f"data={{path: {tmp_path / 'rows.jsonl'}, expert_column: expert}}", f"model.tokenizer={tmp_path / 'tokenizer'}")
    settings = (*data, "reward=exact_match", f"plan={{name: {plan}, num_samples: 2}}", f"objective.name={module}:apart")
    built = Trainer(build_config(tmp_path, "run", *settings))
    assert len(built.problems) == 2
    assert "left out" not in " ".join(built.notes) and "are no means over tokens" not in " ".join(built.notes)
    built.train_step()
    assert any(sample.guided for group in built.last_groups for sample in group) == guided


def test_a_run_with_an_own_objective_is_exported_where_its_module_is_not(module, tmp_path, monkeypatch):
    objective = f"objective.name={module}:mine"
    train_to_end(build_config(tmp_path, "run", "steps=2", "plan={name: grpo, num_samples: 2}", objective))
    sys.modules.pop(module)
    (tmp_path / f"{module}.py").unlink()
    directory, step, _ = export_checkpoint(tmp_path / "run", tmp_path / "exported")
    assert step == 2 and (directory / "model.safetensors").is_file()


def test_a_dry_run_computes_the_loss(module, capsys, monkeypatch):
    """Of a random model, for which no reward would differ within a group."""
    settings = ("qwen2.5_math_7b_paper", "plan.name=grpo", "objective.options={}", "--dry-run")
    with pytest.raises(RuntimeError, match="size of tensor"):
        cli.main(["run", *settings, f"objective.name={module}:short"])
    untried = "no token was in the loss"
    assert cli.main(["run", *settings, "objective.name=dr_grpo"]) == 0 and untried not in capsys.readouterr().out
    monkeypatch.setattr(dry_run, "stand_in_reward", lambda completions, **columns: [0.0] * len(completions))
    assert cli.main(["run", *settings, "objective.name=dr_grpo"]) == 0 and untried in capsys.readouterr().out
