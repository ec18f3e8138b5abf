"""Every packaged recipe loads, says what it is, and passes a dry run that downloads nothing."""

import socket

import pytest

from trapo_kernels import objectives
from trapo_train.cli import main
from trapo_train.config import load_config
from trapo_train.config_file import recipes
from trapo_train.dry_run import dry_config
from trapo_train.rollouts.plans import plan_rungs
from trapo_train.step.objective import build_objective


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a dry run asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", recipes())
def test_a_dry_run_of_every_recipe(name, offline, capsys, tmp_path, monkeypatch):
    if "lora" in name:
        pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    monkeypatch.chdir(tmp_path)
    assert main(["run", name, "--dry-run"]) == 0
    assert "dry run passed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed_with_a_line_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert {line.split("  ")[0] for line in printed.splitlines()} == {*recipes(), ""}  # what is wrapped is indented
    assert all(name in printed for name in recipes()) and all(text.startswith("# ") for text in recipes().values())


def test_a_recipe_is_printed_as_the_start_of_a_file_of_one_s_own(capsys, tmp_path):
    assert main(["recipes", "sft"]) == 0
    own = tmp_path / "own.yaml"
    own.write_text(capsys.readouterr().out)
    assert own.read_text() == recipes()["sft"] and load_config(own) == load_config("sft")
    assert main(["recipes", "stf"]) == 2
    assert "There is no recipe 'stf'. The recipes are: demo_base, " in capsys.readouterr().err


# Of the models on the hub, which a dry run does not look at.
POSITIONS = {"Elliott/Qwen2.5-Math-7B-16k-think": 16384, "Qwen/Qwen2.5-Math-1.5B": 4096}


def test_the_authors_two_settings():
    """Against the values of the paper and of the authors' release: exp_scripts/train_trapo.sh and the defaults of its code."""
    paper, release = (load_config(f"qwen2.5_math_7b_{name}") for name in ("paper", "release"))
    assert (paper.plan.name, paper.prompts_per_step, paper.optimizer.learning_rate) == ("paper", 128, 5e-6)
    assert (release.plan.name, release.prompts_per_step, release.optimizer.learning_rate) == ("release", 8, 1e-6)
    assert (release.packing.aggregation, paper.packing.aggregation) == ("length", "constant")  # Σ loss / 8192, and a mean
    ladders = [[(rung.samples, rung.prefix_ratio, rung.threshold) for rung in plan_rungs(each.plan)] for each in (paper, release)]
    assert ladders[0] == [(4, 0.0, None), (2, 0.2, 0.5), (1, 0.5, 0.7), (1, 1.0, 0.9)]
    assert ladders[1] == [(4, 0.0, None), (2, 0.25, 0.5), (1, 0.5, 4 / 6), (1, 1.0, 1.0)]
    for config in (paper, release):
        assert build_objective(config.objective) == objectives.trapo(alpha=0.1, entropy_coef=0.001)
        assert (config.advantage.center, config.advantage.normalise) == ("mean", "none")
        assert (config.rollout.max_response_tokens, config.data.max_prompt_tokens, config.packing.max_tokens) == (8192, 1024, 32768)
        assert (config.rollout.temperature, config.rollout.top_p, config.rollout.snap_window) == (1.0, 1.0, 0.3)
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.weight_decay, optimizer.max_grad_norm, optimizer.betas) == ("AdamW", 0.01, 1.0, None)
        assert (optimizer.schedule, optimizer.warmup_steps, config.updates.per_step) == ("constant_with_warmup", 0, 1)
        assert config.data.solution_column == "reward_model.ground_truth" and config.evaluation.temperature == 0.6


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("qwen")])
def test_prompt_and_response_fit_into_the_models_positions(name):
    config = load_config(name)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    assert longest <= min(POSITIONS[config.model.name_or_path], config.packing.max_tokens, config.rollout.max_batch_tokens)


def test_a_dry_run_keeps_what_the_configuration_decides(tmp_path):
    config = load_config("qwen2.5_1.5b_lora", ["updates.mini_batches=2"])
    dry = dry_config(config, str(tmp_path))
    for section in ("plan", "objective", "advantage", "optimizer", "updates"):
        assert getattr(dry, section) == getattr(config, section)
    assert dry.model.lora == config.model.lora and dry.model.name_or_path is None


def test_a_dry_run_of_several_rewards_and_the_one_that_says_what_is_correct(capsys):
    rewards = "reward=[{name: math_verify}, {name: overlong, options: {max_tokens: 8192, buffer: 2048}}]"
    settings = ("rollout.correct_by=math_verify", "rollout.on_truncated=mask", "plan.name=grpo", "objective={name: dapo}")
    assert main(["run", "qwen2.5_math_7b_paper", rewards, *settings, "--dry-run"]) == 0
    assert "dry run passed" in capsys.readouterr().out
    assert main(["run", "qwen2.5_math_7b_paper", rewards.replace("8192", "8"), "--dry-run"]) != 0
    assert "overlong needs whole numbers 1 <= buffer <= max_tokens" in capsys.readouterr().err


def test_a_dry_run_finds_what_the_run_would_refuse(capsys):
    assert main(["run", "qwen2.5_math_7b_paper", "objective={name: sft}", "plan.name=grpo", "--dry-run"]) != 0
    assert "trains on expert tokens alone" in " ".join(capsys.readouterr().err.split())
