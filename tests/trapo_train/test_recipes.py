"""Every packaged recipe loads, says what it is, and passes a dry run that downloads nothing."""

import socket

import pytest

from trapo_train.cli import main
from trapo_train.config import load_config, recipes
from trapo_train.dry_run import dry_config


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


def test_recipes_are_listed_with_a_line_each(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipes()) and all(about for about in recipes().values())


def test_the_authors_two_settings():
    paper, release = (load_config(f"qwen2.5_math_7b_{name}") for name in ("paper", "release"))
    assert (paper.plan.name, paper.prompts_per_step, paper.optimizer.learning_rate) == ("paper", 128, 5e-6)
    assert (release.plan.name, release.prompts_per_step, release.optimizer.learning_rate) == ("release", 8, 1e-6)
    assert release.packing.aggregation == "length" and release.rollout.max_response_tokens == 8192
    assert paper.data.solution_column == "reward_model.ground_truth"


def test_a_dry_run_keeps_what_the_configuration_decides(tmp_path):
    config = load_config("qwen2.5_1.5b_lora", ["updates.mini_batches=2"])
    dry = dry_config(config, str(tmp_path))
    for section in ("plan", "objective", "advantage", "optimizer", "updates"):
        assert getattr(dry, section) == getattr(config, section)
    assert dry.model.lora == config.model.lora and dry.model.name_or_path is None


def test_a_dry_run_finds_what_the_run_would_refuse(capsys):
    assert main(["run", "qwen2.5_math_7b_paper", "objective={name: sft}", "plan.name=grpo", "--dry-run"]) != 0
    assert "trains on expert tokens alone" in " ".join(capsys.readouterr().err.split())
