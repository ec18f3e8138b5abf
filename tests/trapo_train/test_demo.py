"""The demo runs every stage on a tiny model, and says no where the answer is no."""

import io

import pytest
from rich.console import Console

from trapo_train import demo
from trapo_train.config import load_config
from trapo_train.records import Problem, Sample
from trapo_train.train import RunSummary

RECIPES = ("demo_base", "demo_trapo", "demo_grpo", "demo_sft")
TINY_MODEL = ["hidden_size=16", "num_layers=1", "num_heads=2", "num_kv_heads=2", "intermediate_size=16"]


@pytest.fixture
def overrides():
    training = ["steps=2", "prompts_per_step=2", "data.num_problems=8", "eval_data.num_problems=6", "evaluation.every=1"]
    tiny = {recipe: training for recipe in RECIPES}
    return tiny | {"demo_base": [*training, *(f"model.scratch.{setting}" for setting in TINY_MODEL)]}


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160, color_system=None)


def evaluation(accuracy, error=0.02, **groups):
    return {"accuracy": accuracy, "accuracy_stderr": error} | {f"accuracy/{name}": value for name, value in groups.items()}


def group_of(*specs):
    """One sample per (guided, completed, reward)."""
    problem = Problem(0, "p", (1,))
    return [
        Sample(problem, 1, 0.5 * guided, (1,) * guided, (2,) * completed, (), "stop", reward=reward)
        for guided, completed, reward in specs
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_load(recipe):
    assert load_config(recipe).reward == "pointer_chasing"


def test_methods_are_compared_on_the_same_problems_and_budget():
    trapo, grpo, sft = (load_config(f"demo_{name}") for name in ("trapo", "grpo", "sft"))
    for other in (grpo, sft):
        for section in ("data", "eval_data", "evaluation", "steps", "prompts_per_step", "rollout", "model", "optimizer"):
            assert getattr(other, section) == getattr(trapo, section), section


def test_a_base_without_headroom_stops_the_demo(tmp_path, console, overrides):
    assert not demo.run_demo(tmp_path, seeds=[0], compare=False, console=console, overrides=overrides)
    out = console.file.getvalue()
    assert "No headroom" in out
    assert (tmp_path / "headroom.png").exists()
    assert not (tmp_path / "trapo").exists()


def test_a_demo_whose_run_was_stopped_ends_there(tmp_path, console, overrides, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda *arguments: RunSummary(1, "SIGINT", tmp_path))
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, seeds=[0], compare=False, console=console, overrides=overrides)
    assert "2/4 headroom" not in console.file.getvalue()


@pytest.mark.slow
def test_all_stages_run_and_a_run_that_did_not_learn_is_said(tmp_path, console, overrides, monkeypatch):
    show = demo.show_headroom
    monkeypatch.setattr(demo, "show_headroom", lambda *arguments: show(*arguments) or True)
    for _ in range(2):  # the second time replaces the first
        assert not demo.run_demo(tmp_path, seeds=[0], compare=True, console=console, overrides=overrides)
    out = console.file.getvalue()
    for words in ("1/6 base model", "2/6 headroom", "3/6 TRAPO", "4/6 GRPO", "5/6 SFT", "6/6 held-out", "took 0:"):
        assert words in out
    assert "TRAPO is not clearly above its base" in out
    assert "micro-group 4" in out
    for name in ("headroom.png", "headroom.json", "accuracy.png", "compare.png", "trapo/plots/guided_share.png"):
        assert (tmp_path / name).exists()


def test_a_directory_that_is_no_run_is_left_alone(tmp_path, console, overrides):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "thesis.tex").write_text("years of work")
    demo.run_demo(tmp_path, seeds=[0], compare=False, console=console, overrides=overrides)
    assert (tmp_path / "base" / "thesis.tex").exists()


@pytest.mark.parametrize(("base", "trapo", "learned"), [(0.2, 0.3, True), (0.2, 0.25, False), (0.3, 0.2, False)])
def test_learned_means_two_standard_errors_above_the_base(base, trapo, learned):
    result = demo.SeedResult(0, {"base": evaluation(base), "trapo": evaluation(trapo)})
    assert result.gain_standard_error == pytest.approx(0.02 * 2**0.5)
    assert result.learned is learned


def test_the_table_orders_groups_and_shows_errors(console):
    evaluations = {"base": evaluation(0.2, depth_10=0.1, depth_9=0.2), "trapo": evaluation(0.5, depth_9=0.6)}
    console.print(demo.result_table(demo.SeedResult(0, evaluations)))
    lines = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells == [["depth 9", "0.20", "0.60"], ["depth 10", "0.10", "–"], ["all", "0.20 ± 0.02", "0.50 ± 0.02"]]


def test_the_most_telling_group_has_every_kind_of_sample():
    dull = group_of((False, True, 1.0), (False, True, 1.0))
    rich = group_of((False, True, 0.0), (True, True, 1.0), (True, False, 1.0))
    assert demo.most_telling([dull, rich, dull]) is rich


@pytest.mark.slow
def test_several_seeds_go_to_their_own_directories(tmp_path, console, overrides, monkeypatch):
    show = demo.show_headroom
    monkeypatch.setattr(demo, "show_headroom", lambda *arguments: show(*arguments) or True)
    demo.run_demo(tmp_path, seeds=[3, 4], compare=False, console=console, overrides=overrides)
    assert (tmp_path / "seed_3" / "trapo" / "model").exists() and (tmp_path / "seed_4" / "trapo" / "model").exists()
    assert "mean" in console.file.getvalue()
