"""The commands do what they say on a tiny model, and what the user can correct is told in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trapo_train.step.test_optimizer_step import make_model
from trapo_train import cli, dry_run, train
from trapo_train.data import sources
from trapo_train.evaluation.held_out import model_label
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.schema import UserError
from trapo_train.settings import settings
from trapo_train.step.optimizer import OptimizerConfig
from trapo_train.tasks import build_tokenizer

README = Path(cli.__file__).with_name("README.md").read_text()
TINY = """
output_dir: {output}
steps: 2
prompts_per_step: 2
reward: pointer_chasing
model: {{scratch: {{hidden_size: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 16, max_position: 128}}}}
data: {{task: pointer_chasing, num_problems: 8}}
eval_data: {{task: pointer_chasing, split: test, num_problems: 6}}
plan: {{name: paper}}
objective: {{name: trapo}}
rollout: {{max_response_tokens: 32, paragraph_break: "|"}}
evaluation: {{every: 1, group_by: depth}}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(output=tmp_path / "run"))
    return str(path)


@pytest.mark.parametrize(
    ("own", "overrides", "expected"),
    [
        ({}, [], "expandable_segments:True"),
        ({}, ["rollout.engine=vllm"], None),
        ({}, ["rollout.engine=vllm", "rollout.vllm.sleep=false"], "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, [], "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, [], None),
    ],
)
def test_segments_grow_but_where_vllm_sleeps_or_the_user_says_otherwise(config, own, overrides, expected, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever the command does
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    cli._load(cli._parse(["run", config, *overrides]), finished_run=False)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.fixture
def finished_run(config, tmp_path):
    assert cli.main(["run", config]) == 0
    return tmp_path / "run"


def test_run_writes_metrics_plots_and_the_model(finished_run, capsys):
    assert [row["step"] for row in read_metrics(finished_run) if row["kind"] == "train"] == [1, 2]
    assert (finished_run / "plots" / "unguided_reward.png").exists()
    assert (finished_run / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_what_a_run_leaves_is_documented(config, tmp_path):
    settings = ["reward=[{name: pointer_chasing}]", "evaluation.samples_per_prompt=2", "updates.correction={name: tis}"]
    assert cli.main(["run", config, "steps=1", *settings]) == 0
    files, steps, evaluations = re.findall(r"\|---\|---\|\n(.*?)\n(?:\n|$)", README.split("What a run leaves")[1], re.S)
    named = re.findall(r"^\| `([\w.]+)", files, re.M)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= set(named)
    recorded = {kind: set() for kind in ("train", "eval", "event")}
    for row in read_metrics(tmp_path / "run"):
        recorded[row["kind"]] |= set(row)
    needs = {"reward/timeouts", "reward/crashes", "reward/failed_share/<reward>", "rollout/kl_ref"}  # a reward in workers, a KL
    assert metric_names(steps) - recorded["train"] == needs
    assert {"epoch", "micro_batches", "loss_passes", "num_samples", "accuracy/unguided"} <= metric_names(steps)
    assert {name.replace("@k", "@2") for name in metric_names(evaluations)} <= recorded["eval"]


def metric_names(table):
    """The metrics that the first column names."""
    return {name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


def test_overrides_reach_the_run_which_says_what_it_does_before_its_first_step(config, tmp_path, capsys):
    assert cli.main(["run", config, "steps=1", "plan.name=grpo", "objective.name=dr_grpo"]) == 0
    trained = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert len(trained) == 1 and trained[0]["guided_share"] == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["loading a model from scratch", "reading pointer_chasing and the held-out sets"]
    assert said.count("evaluating") == 1  # before the first step alone


@pytest.mark.slow
def test_eval_of_a_finished_run_agrees_with_its_last_evaluation(finished_run, capsys):
    assert cli.main(["eval", str(finished_run)]) == 0
    last = [row for row in read_metrics(finished_run) if row["kind"] == "eval"][-1]
    said = capsys.readouterr().out.splitlines()
    assert "reading the held-out sets" in said
    shown = next(line for line in said if " all " in line)
    assert f"{last['accuracy']:.3f}" in shown


@pytest.mark.slow
def test_an_evaluation_of_a_run_that_was_moved_writes_beside_it(finished_run, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(finished_run, moved)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = set(finished_run.rglob("*"))
    assert cli.main(["eval", str(moved), "evaluation.save_samples=true"]) == 0
    assert list((moved / "samples").glob("eval*_of_*.jsonl")) and set(finished_run.rglob("*")) == before
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_evaluations_of_two_models_leave_two_files(finished_run, tmp_path, capsys):
    other = tmp_path / "base" / "model"
    shutil.copytree(finished_run / "model", other)
    for overrides in ([], [f"model.name_or_path={other}"]):
        assert cli.main(["eval", str(finished_run), *overrides, "evaluation.save_samples=true"]) == 0
    files = {path.name for path in (finished_run / "samples").iterdir()}
    assert files == {f"eval_of_{model_label(str(path))}.jsonl" for path in (finished_run / "model", other)} and len(files) == 2


@pytest.mark.slow
def test_eval_needs_no_training_data(finished_run, tmp_path, capsys):
    problems = [{"prompt": f"ab?a{depth}:", "solution": "de", "depth": depth} for depth in (1, 2)]
    data = tmp_path / "held_out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in problems))
    gone = ["data={path: gone.jsonl}", "evaluation.group_by=depth", "reward=exact_match"]
    assert cli.main(["eval", str(finished_run), *gone, f"eval_data={{path: {data}}}"]) == 0
    assert "depth" in capsys.readouterr().out


def test_headroom_of_a_random_model_fails_and_says_so(config, tmp_path, capsys):
    assert cli.main(["headroom", config, "--num-problems", "4", "--samples", "1"]) == 1
    out = capsys.readouterr().out
    assert "No headroom" in out and "4 problems of eval_data" in out
    assert (tmp_path / "run" / "headroom.png").exists()
    assert json.loads((tmp_path / "run" / "headroom.json").read_text())["section"] == "eval_data"


def test_inspect_prints_a_group_without_training(config, tmp_path, capsys):
    assert cli.main(["inspect", config, "--problem", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("micro-group 1") == 4 and out.count("micro-group 4") == 1
    assert "problem 3" in out and out.count("⟦") > 1  # once in the legend
    assert not (tmp_path / "run").exists()
    assert cli.main(["inspect", config, "--problem", "3", "objective.name=dr_grpo"]) == 0  # which has no term on expert tokens
    out = capsys.readouterr().out
    assert out.count("⟦") == 1 and out.count("⟨") > 1


@pytest.mark.slow
def test_plot_and_compare(finished_run, tmp_path, capsys):
    assert cli.main(["plot", str(finished_run)]) == 0
    capsys.readouterr()
    path = tmp_path / "[a] :eyes:.png"  # no markup
    assert cli.main(["compare", str(finished_run), "--output", str(path)]) == 0
    assert path.exists() and capsys.readouterr().out == f"wrote {path}\n"
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    assert cli.main(["compare", str(finished_run), str(other)]) == 0
    assert (finished_run.parent / "compare.png").exists()


DOWN = "{base_url: 'http://127.0.0.1:9', max_retries: 0}"


def truncated_model(directory):
    """A model whose download broke off."""
    make_model().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return directory


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "no_such_recipe"], "no recipe of that name"),
        (["run", "CONFIG", "step=3"], "Did you mean 'steps'"),
        (["run", "CONFIG", "optimizer.learning_rate=fast"], "optimizer.learning_rate must be float"),
        (["run", "CONFIG", "reward=no_module:reward"], "no_module"),
        (["run", "CONFIG", "model.scratch=null", "model.name_or_path=/no/such/model"], "'/no/such/model', which does not exist"),
        (["run", "CONFIG", "model.tokenizer=./nowhere"], "model.tokenizer must be a hub name"),
        (["run", "CONFIG", "model.scratch=null", "model.name_or_path=EMPTY"], "a directory with config.json, got"),
        (["plan-memory", "demo_trapo", "model.name_or_path=runs/nowhere/model"], f"which does not exist in {Path.cwd()}. Give"),
        (["eval", "CONFIG", "eval_data=null"], "eval_data"),
        (["inspect", "CONFIG", "--problem", "8"], "must be in [0, 7], got 8"),
        (["inspect", "CONFIG", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["run", "CONFIG", "rollout.engine=vllm_server", "rollout.vllm_server=DOWN"], "GET http://127.0.0.1:9/"),
        (["plot", "no_such_run"], "no_such_run"),
        (["plan-memory", "CONFIG", "--context", "-5"], "context must be at least 2 tokens, a prompt and a response, got -5"),
        (["plan-memory", "CONFIG", "--memory-gib", "nan"], "--memory-gib must be a finite number above 0, got nan"),
        (["eval", "EMPTY"], "config.yaml"),
        (["run", "CONFIG", "objective.options={alpha: 2}"], "objective: trapo refuses its options: "),
        (["run", "CONFIG", "objective.options={alpha: much}"], "objective: trapo refuses its options: "),
        (["run", "CONFIG", "updates.correction={name: tis, options: {cap: -1}}"], "updates.correction: tis refuses its options: "),
        (["run", "CONFIG", "model.scratch=null", "model.name_or_path=UNKNOWN"], "cannot be loaded: "),
        (["run", "CONFIG", "model.scratch=null", "model.name_or_path=TRUNCATED"], "cannot be loaded: "),
        (["run", "CONFIG", "eval_data={path: nowhere.jsonl}"], "there is no file 'nowhere.jsonl'"),
        (["run", "CONFIG", "reward=math_verify"], "pip install 'trapo[math]'"),
    ],
)
def test_what_the_user_can_correct_is_one_line_and_exit_code_2(arguments, words, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as where it is not installed
    (tmp_path / "empty").mkdir()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "no_such_type"}')
    places = {"CONFIG": config, "EMPTY": str(tmp_path / "empty"), "UNKNOWN": str(tmp_path / "unknown"), "DOWN": DOWN}
    if "model.name_or_path=TRUNCATED" in arguments:
        places["TRUNCATED"] = str(truncated_model(tmp_path / "truncated"))
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("trapo-train: error: ") and words in error
    assert "Traceback" not in error


def test_overrides_may_stand_behind_options(config, capsys):
    assert cli.main(["plan-memory", config, "--gpus", "1", "packing.max_tokens=3000"]) == 0
    assert "micro-batches of 3000 tokens" in " ".join(capsys.readouterr().out.split())
    for wrong in (["plan-memory", config, "--gpu", "1", "word"], ["settings", "model", "steps=1"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(wrong)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"trapo-train {wrong[0]}: error: unrecognized arguments: {wrong[-1]}" in error


def test_export_s_directory_may_stand_behind_options(capsys):
    for words in (["out", "--step", "3"], ["--step", "3", "out"], ["--adapter", "--dtype", "bfloat16", "out"], ["--adapter"]):
        assert cli._parse(["export", "runs/my", *words]).directory == ("out" if "out" in words else None)
    for wrong in (["out", "--step", "3", "again"], ["--step", "3", "out", "again"], ["--steps", "3", "out"], ["--stp=3"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", "runs/my", *wrong])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("usage: trapo-train export") and "unrecognized arguments" in error


def test_a_step_that_is_none_is_said_to_be(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "runs/my", "--step", "abc"])
    assert stop.value.code == 2 and "argument --step: must be a step or best, got 'abc'" in capsys.readouterr().err


def test_no_progress_bars_of_others_but_where_the_user_wants_them(monkeypatch):
    for own, expected in ((None, "1"), ("0", "0")):
        monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", own or "")  # put back afterwards
        if own is None:
            monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS")
        cli._quiet_libraries()
        assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == expected


def test_traceback_on_request(config, capsys):
    assert cli.main(["run", "--traceback", config, "step=3"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [ZeroDivisionError, ValueError, TypeError, ImportError, RuntimeError, KeyError])
def test_a_bug_keeps_its_traceback(bug, config, monkeypatch):
    def run(*arguments):
        raise bug("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(bug):
        cli.main(["run", config])


def test_a_bug_in_a_check_of_the_configuration_keeps_its_traceback(config, monkeypatch):
    def check(self):
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr(OptimizerConfig, "__post_init__", check)
    with pytest.raises(ValueError, match=r"^zip\(\) argument 2"):
        cli.main(["run", config])


def test_a_bug_in_reading_data_is_not_told_as_unreadable_data(config, monkeypatch):
    monkeypatch.setattr(sources, "FILE_SUFFIXES", None)
    with pytest.raises(TypeError):
        cli.main(["run", config, "eval_data={path: data.jsonl}"])


def test_ctrl_c_ends_cleanly(config, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert cli.main(["run", config]) == 130
    assert capsys.readouterr().err == "trapo-train: interrupted\n"


@pytest.mark.parametrize(("stopped_by", "code"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143), (None, 0)])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_that_a_signal_stopped_says_so_by_its_exit_code(config, monkeypatch, tmp_path, stopped_by, code, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(train, "run", lambda *arguments: train.RunSummary(0, stopped_by, tmp_path))
    assert cli.main(["run", config]) == code


def test_a_dry_run_that_was_stopped_has_not_passed(config, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "run", lambda *arguments: train.RunSummary(0, "SIGINT", Path()))
    assert cli.main(["run", config, "--dry-run"]) == 130
    assert "passed" not in capsys.readouterr().out


def test_every_setting_is_listed_with_its_default_and_what_it_does(capsys):
    assert cli.main(["settings", "rollout"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rollout.max_response_tokens int = 1024" in out and "rollout.vllm_server VllmServerConfig" in out
    seen, sections = set(), [""]
    for section in sections:
        for setting in settings(section):
            seen.add(setting.key)
            assert setting.about, f"{setting.key} says nothing"
        sections += [name for name in (entry.key for entry in settings(section)) if _is_section(name)]
    some = "steps data.max_prompt_tokens plan.name evaluation.pass_at model.lora.alpha rollout.vllm.sleep reward[].in_worker"
    assert set(some.split()) <= seen
    assert cli.main(["settings", "rolout"]) == 2 and "Did you mean 'rollout'" in capsys.readouterr().err


def _is_section(name):
    try:
        return bool(settings(name))
    except UserError:
        return False


def test_a_dry_run_has_no_warm_up(config):
    schedule = ("steps=100", "optimizer.schedule=polynomial", "optimizer.warmup_steps=10")
    assert cli.main(["run", config, *schedule, "--dry-run"]) == 0
    assert cli.main(["run", config, "model.lora={rank: 2, target_modules: [qkv_proj]}", "--dry-run"]) == 0  # another model's names


COMMANDS = "run recipes settings eval export headroom inspect plan-memory plot compare demo"


@pytest.mark.parametrize("command", COMMANDS.split())
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: trapo-train" in capsys.readouterr().out


def test_help_does_not_load_torch():
    code = "import sys, trapo_train.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("module", ["trapo_train", "trapo_train.cli"])
def test_both_modules_are_the_command_line(module):
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "usage: trapo-train" in result.stdout


@pytest.mark.slow
def test_a_run_that_was_moved_goes_on_where_it_is_or_not_at_all(config, tmp_path, capsys, monkeypatch):
    assert cli.main(["run", config, "steps=1", "checkpoint.every=1"]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = ["run", str(tmp_path / "moved" / "config.yaml"), "checkpoint.resume=true", "steps=2"]
    assert cli.main(moved) == 2
    told = capsys.readouterr().err
    assert f"output_dir is {tmp_path / 'run'}. Add output_dir={tmp_path / 'moved'}, or" in told and not (tmp_path / "run").exists()
    assert cli.main([*moved, f"output_dir={tmp_path / 'moved'}"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "moved") if row["kind"] == "train"] == [1, 2]
    monkeypatch.chdir(tmp_path)
    relative = ["run", "moved/config.yaml", "checkpoint.resume=true", "steps=3"]  # whose output_dir is the new place by now
    assert cli.main(relative) == 0
    assert cli.main(["run", config, "output_dir=here", "steps=1", "checkpoint.every=1"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["run", "../here/config.yaml", "checkpoint.resume=true", "steps=2"]) == 2
    assert f"output_dir is {tmp_path / 'elsewhere' / 'here'}. Add" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["recipes", "recipes sft", "run nowhere", "run demo_base steps", "eval . a"])
def test_what_needs_no_torch_does_not_wait_for_it(line):
    code = f"import sys; from trapo_train import cli; cli.main({line.split()}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
