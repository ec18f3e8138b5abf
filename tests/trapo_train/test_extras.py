"""Packages of the extras that are missing: named, with the command that installs them, before anything is read or written."""

import subprocess
import sys

import pytest

from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train.__main__ import NEEDED
from trapo_train.cli import main
from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.extras import is_installed, missing_packages
from trapo_train.schema import MissingPackage
from trapo_train.tasks import build_tokenizer

NEEDS = {
    "wandb": "tracking.to=[wandb]",
    "trackio": "tracking.to=[trackio]",
    "peft": "model.lora={rank: 2}",
    "liger_kernel": "model.liger=true",
    "vllm": "rollout.engine=vllm",
    "math_verify": "reward=math_verify",
}


@pytest.mark.parametrize("package", NEEDS)
def test_a_run_names_the_extra_of_a_package_that_is_missing_before_anything_is_written(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    extra = package.removesuffix("_kernel").removesuffix("_verify")
    words = rf"{NEEDS[package].split('=')[0]}.* needs the package .*pip install 'trapo\[{extra}\]'"
    with pytest.raises(MissingPackage, match=words):
        train_to_end(build_config(tmp_path, "run", NEEDS[package]))
    assert not (tmp_path / "run").exists()


def test_one_of_several_rewards_needs_its_package_too(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    config = build_config(tmp_path, "run", "reward=[{name: math_verify}, {name: exact_match}]")
    assert missing_packages(config) == ["reward math_verify needs the package math-verify: pip install 'trapo[math]'."]


def test_a_folder_of_its_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "trapo_no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("trapo_no_package")
    (tmp_path / "trapo_no_package" / "__init__.py").touch()
    assert is_installed("trapo_no_package") and is_installed("sys")


def test_a_dry_run_passes_without_them_and_says_what_the_run_would_miss(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["run", "demo_base", "rollout.engine=vllm", "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "dry run passed" in shown and "would end at once: rollout.engine=vllm needs the package vllm: pip install" in shown


def test_data_in_files_needs_datasets(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"data.path needs the package datasets: pip install 'trapo\[train\]'"):
        load_problems(DataConfig(path=str(tmp_path / "train.jsonl")), build_tokenizer(), None)


@pytest.mark.parametrize("missing", NEEDED)
def test_the_command_says_so_in_one_line_where_trapo_was_installed_without_the_trainer(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from trapo_train.__main__ import entry; entry()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr == f"trapo-train: error: it needs {missing}: pip install 'trapo[train]'.\n"
