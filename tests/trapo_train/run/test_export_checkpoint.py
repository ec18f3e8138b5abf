"""Out of a checkpoint the bits that training had, with LoRA and from several ranks."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.trapo_train.parallel.test_parallel import ranks_train
from tests.trapo_train.test_train import EVALUATED, StopAfter, build_config, train_to_end
from trapo_train import cli
from trapo_train.checkpoints.checkpoint import CheckpointError
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.run.export_checkpoint import export_checkpoint
from trapo_train.train import run


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of four steps with checkpoints of the second and the last."""
    config = build_config(tmp_path_factory.mktemp("finished"), "run", "steps=4")
    train_to_end(config)
    return Path(config.output_dir)


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "model.safetensors")


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_newest_checkpoint_of_a_finished_run_is_its_model_and_an_older_one_is_not(finished, tmp_path):
    directory, step, _ = export_checkpoint(finished, tmp_path / "newest")
    assert step == 4 and equal(weights(directory), weights(finished / "model"))
    directory, step, _ = export_checkpoint(finished, tmp_path / "deep" / "older", step=2)
    assert step == 2 and weights(directory).keys() == weights(finished / "model").keys()
    assert not equal(weights(directory), weights(finished / "model"))
    AutoModelForCausalLM.from_pretrained(directory)
    directory, _, _ = export_checkpoint(finished, tmp_path / "newest", dtype="bfloat16")  # an export may replace an export
    assert equal(weights(directory), {name: value.bfloat16() for name, value in weights(finished / "model").items()})
    for path, dtype in ((directory, torch.bfloat16), (finished / "model", torch.float32)):
        assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == dtype


def test_the_best_evaluation_is_kept_and_exported(configure, tmp_path):
    worse = (
        "optimizer={learning_rate: 0.05, schedule: linear}",
        "plan.name=sft",
        "objective.name=sft",
        "packing.aggregation=token_mean",
    )
    often = ("evaluation={every: 1, sample: false}", "checkpoint={every: 1, keep: 1, keep_best: true}", "steps=6")
    config = configure("best", *EVALUATED, *worse, *often)
    train_to_end(config)
    loss = {row["step"]: row["expert_nll"] for row in read_metrics(config.output_dir) if row["kind"] == "eval"}
    del loss[0]
    best = min(loss, key=loss.get)
    steps = [int(path.name[-8:]) for path in sorted(Path(config.output_dir, "checkpoints").iterdir())]
    assert steps == sorted({best, 6})
    directory, step, _ = export_checkpoint(config.output_dir, step="best")
    assert step == best and directory.name == f"model_step_{best}"


@pytest.mark.slow
@pytest.mark.parametrize(("learning_rate", "worse"), [(5.0, True), (1e-3, False)])
def test_a_model_that_was_better_before_training_is_told_by_the_run_and_by_an_export_of_the_best(configure, learning_rate, worse):
    sft = ("plan.name=sft", "objective.name=sft", "packing.aggregation=token_mean")
    settings = (*EVALUATED, *sft, f"optimizer={{learning_rate: {learning_rate}}}")
    often = ("evaluation={every: 1, sample: false}", "checkpoint={every: 1, keep_best: true}", "steps=4")
    config = configure("run", *settings, *often)
    run(config, StopAfter(config.output_dir, 2))
    train_to_end(configure("run", *settings, *often, "checkpoint.resume=true"))  # which knows of step 0, too
    found = read_metrics(config.output_dir)
    before, *after = (row["expert_nll"] for row in found if row["kind"] == "eval")
    said = [row["text"] for row in found if row["kind"] == "event" and "before training" in row["text"]]
    notes = export_checkpoint(config.output_dir, step="best")[2]
    assert said == notes and len(notes) == worse == (before < min(after))
    if worse:
        assert f"scored higher: minus expert_nll, {-before:.3f} against {-min(after):.3f} of step" in notes[0]
    assert export_checkpoint(config.output_dir)[2] == []  # of the newest, as asked for


@pytest.mark.slow
def test_an_interrupted_run_is_exported_then_evaluated(configure, capsys):
    config = configure("run", *EVALUATED)
    assert run(config, StopAfter(config.output_dir, 3)).interrupted
    assert cli.main(["eval", config.output_dir]) == 2
    assert f"Export a checkpoint first, `trapo-train export {config.output_dir}`" in capsys.readouterr().err
    assert cli.main(["export", config.output_dir]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert f"step 3: wrote {config.output_dir}/model_step_3" in shown
    assert cli.main(shown[shown.index("eval ") :].split()) == 0  # the command that it names
    assert "held-out accuracy" in capsys.readouterr().out
    train_to_end(configure("run", *EVALUATED, "checkpoint.resume=true"))  # which an export in its directory does not disturb


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "--step", "3"], "--step must be one that has a checkpoint, 2, 4, got 3"),
        (["RUN", "--step", "best"], "--step best must find an evaluated step among [2, 4], it has none"),
        (["RUN/model"], "must be the output_dir of a run and hold config.yaml"),
        (["RUN", "RUN/checkpoints"], "must be empty or an export of trapo-train"),
    ],
)
def test_what_cannot_be_exported_is_said(arguments, words, finished, capsys):
    assert cli.main(["export", *(argument.replace("RUN", str(finished)) for argument in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_several_processes_are_refused(finished, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["export", str(finished)]) == 2
    assert "must run in one process, got 2 ranks" in capsys.readouterr().err


def test_a_run_without_checkpoints_and_a_damaged_one(configure):
    config = configure("none", "steps=1", "checkpoint.every=0")
    train_to_end(config)
    with pytest.raises(CheckpointError, match=r"must hold a checkpoint, it has none\. What it trained is in .*model"):
        export_checkpoint(config.output_dir)
    config = configure("damaged", "steps=2")
    train_to_end(config)
    state = next(Path(config.output_dir).glob("checkpoints/step_00000002/state.pt"))
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged: state.pt has .* bytes"):
        export_checkpoint(config.output_dir)
    assert not (Path(config.output_dir) / "model_step_2").exists()


def test_the_model_that_a_run_started_from_is_not_replaced(finished, configure):
    base = f"model={{name_or_path: {json.dumps(str(finished / 'model'))}}}"
    config = configure("second", base, "steps=2")
    train_to_end(config)
    with pytest.raises(ValueError, match="DIRECTORY must not be the model that the run started from"):
        export_checkpoint(config.output_dir, finished / "model")


def test_settings_of_the_device_that_trained_do_not_matter(finished, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(copy)], check=True)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(
        text.replace("attention: auto", "attention: flash_attention_2").replace("liger: false", "liger: true")
    )
    directory, _, _ = export_checkpoint(copy)
    assert directory == copy / "model_step_4" and equal(weights(directory), weights(finished / "model"))


def test_lora_is_added(configure, tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    config = configure("lora", "model.lora={rank: 2}", "steps=2", "optimizer.warmup_steps=0")
    train_to_end(config)
    directory, _, _ = export_checkpoint(config.output_dir)
    assert equal(weights(directory), weights(Path(config.output_dir) / "model"))


def test_an_adapter_alone_is_what_peft_loads_beside_the_base(configure, finished, capsys, recwarn):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    base = str(finished / "model")
    lora = (
        f"model={{name_or_path: {json.dumps(base)}, lora: {{rank: 2, rank_stabilised: true, target_modules: [q_proj, down_proj]}}}}"
    )
    config = configure("adapter", lora, "steps=2", "optimizer.warmup_steps=0")
    train_to_end(config)
    assert cli.main(["export", config.output_dir, "--adapter"]) == 0
    assert not [told for told in recwarn if told.category is FutureWarning]  # of libraries to each other
    directory = Path(config.output_dir) / "adapter_step_2"
    assert f"step 2: wrote {directory}" in capsys.readouterr().out.replace("\n", "")
    saved = load_file(directory / "adapter_model.safetensors")
    of_the_run = load_file(Path(config.output_dir) / "adapter" / "adapter_model.safetensors")
    assert equal(saved, of_the_run), "a finished run has it without a checkpoint"
    assert len(saved) == 4 and all(".lora_" in name for name in saved)  # A and B of two layers, nothing of the base
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    assert loaded.peft_config["default"].base_model_name_or_path == base
    merged = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "model").state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, value in loaded.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-6, atol=1e-7)
    assert not all(torch.equal(plain[name], value) for name, value in merged.items())


def test_an_adapter_is_refused_where_there_is_none_or_no_base(configure, finished):
    with pytest.raises(ValueError, match=r"--adapter needs a run with model\.lora .*, got one with no model\.lora"):
        export_checkpoint(finished, adapter=True)
    pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    config = configure("scratch", "model.lora={rank: 2}", "steps=2")
    train_to_end(config)
    with pytest.raises(ValueError, match=r"started from a model\.name_or_path, got one with model\.scratch"):
        export_checkpoint(config.output_dir, adapter=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [("model.lora={rank: 2}",), ("parallel.vocab_parallel_head=true",)], ids=["lora", "vocabulary"]
)
def test_of_a_run_of_two_ranks(settings, tmp_path):
    if "lora" in settings[0]:
        pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    ranks_train(2, tmp_path, "steps=2", "checkpoint.every=1", "optimizer.warmup_steps=0", *settings)
    directory, step, _ = export_checkpoint(tmp_path / "run")
    assert step == 2 and equal(weights(directory), weights(tmp_path / "run" / "model"))


@pytest.mark.parametrize(
    ("fewer", "message"),
    [
        (("steps=3",), r"4, got 3\. Raise it; .*trapo-train export .*\[2, 4\]"),
        # 3 problems of 8 for each step
        (("steps=null", "epochs=1"), r"4, got 3, of epochs = 1\. Raise epochs; .*trapo-train export .*\[2, 4\]"),
    ],
)
def test_fewer_steps_than_the_checkpoint_has_are_refused_with_the_way_to_an_earlier_model(fewer, message, finished):
    config = build_config(finished.parent, "run", *fewer, "checkpoint.resume=true")
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"steps must be at least those of the checkpoint .*, {message}"):
        train_to_end(config)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
