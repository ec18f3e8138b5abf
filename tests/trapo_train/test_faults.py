"""What goes wrong outside the program: a full disk, a rank that dies or hangs, a dataset that changed between two runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.trapo_train.test_train import EVALUATED, TINY, build_config, train_to_end
from trapo_train import train
from trapo_train.checkpoints.checkpoint import CheckpointError, CheckpointStore
from trapo_train.checks import preflight
from trapo_train.reports.metrics_log import MetricsLog, read_metrics
from trapo_train.trainer import Trainer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
KIB = 1024


@contextmanager
def file_size_limit(size):
    """Inside, no file that this process writes grows beyond `size` bytes; a log of pytest's is such a file, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("where", ["state", "tensors"])
def test_a_file_that_cannot_grow_leaves_the_last_checkpoint(where, tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    small, large = torch.arange(8.0), torch.zeros(64 * KIB)
    store.save(1, {"x": small}, {}, {"w": small})
    error = pytest.raises(CheckpointError, match=r"step 2 could not be saved.*File too large.*The last one is .*step_00000001")
    with error, file_size_limit(128 * KIB):
        store.save(2, {"x": large if where == "state" else small}, {}, {"w": large if where == "tensors" else small})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert torch.equal(store.load({})[1]["x"], small)
    store.save(3, {"x": small}, {}, {"w": small})
    assert store.steps() == [1, 3]


def on_a_small_disk(directory: Path, script: str) -> subprocess.CompletedProcess:
    """Run a shell script in a namespace of its own in which `directory` is a disk of 600 KiB; skip where that is not permitted."""
    isolate = ["unshare", "--user", "--mount", "--map-root-user", "sh", "-c"]
    directory.mkdir()
    mount = f"mount -t tmpfs -o size=600k tmpfs {shlex.quote(str(directory))}"
    try:
        probe = subprocess.run([*isolate, mount], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not installed, so no small disk can be mounted")
    if probe.returncode:
        pytest.skip(f"no small disk can be mounted here: {probe.stderr.strip()}")
    return subprocess.run(
        [*isolate, f"{mount} && {script}"], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_disk_too_small_for_the_model_and_a_checkpoint_is_refused_before_the_first_rollout(tmp_path, monkeypatch):
    config = build_config(tmp_path, "run", "steps=5", "checkpoint={every: 2, keep: 2}")
    usage = shutil.disk_usage(tmp_path)

    def with_free(num_bytes):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage._replace(free=num_bytes))

    with_free(2**14)
    with pytest.raises(ValueError, match=r"output_dir must have room for the trained model and a checkpoint, .* got 0.0 MiB free"):
        train_to_end(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    trainer, store = Trainer(config), CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    for factor, note in ((4.1, "output_dir has"), (9.9, "output_dir has"), (10.1, None)):
        with_free(int(factor * weights))
        told = preflight.check_disk(config, trainer.model, store)  # the model and 3 checkpoints of 3 times its size
        assert told is None if note is None else told.startswith(note)
    sgd = replace(config, optimizer=replace(config.optimizer, name="SGD"))
    with_free(int(2.1 * weights))  # no state: a checkpoint has the size of the weights
    assert preflight.check_disk(sgd, trainer.model, store).startswith("output_dir has")
    store.path(5).mkdir(parents=True)  # what an export that failed leaves
    with_free(int(1.1 * weights))
    assert preflight.check_disk(config, trainer.model, store) is None
    for parameter in trainer.model.parameters():  # as the frozen weights beside an adapter are held
        parameter.data = parameter.data.bfloat16()
    with_free(int(0.9 * weights))
    with pytest.raises(ValueError, match="must have room for the trained model"):  # which is exported in float32
        preflight.check_disk(config, trainer.model, store)
    trainer.close()


def test_a_run_killed_between_saving_and_dropping_the_oldest_keeps_no_more_once_it_is_resumed(tmp_path, monkeypatch):
    overrides = ("steps=3", "checkpoint={every: 1, keep: 2, resume: true}")

    def killed(store):
        if 3 in store.steps():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_prune", killed)
        with pytest.raises(KeyboardInterrupt):
            train_to_end(build_config(tmp_path, "run", *overrides))
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    assert store.steps() == [1, 2, 3]
    train_to_end(build_config(tmp_path, "run", *overrides))
    assert store.steps() == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        (
            (PreTrainedModel, "save_pretrained"),
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "No space left",
        ),
        ((PreTrainedModel, "save_pretrained"), ValueError("`top_p` is set.\n\nFix this."), "ValueError: `top_p` is set."),
        ((train, "export_model"), torch.OutOfMemoryError("out of memory"), "OutOfMemoryError: out of memory"),
    ],
    ids=["full disk", "refused by transformers", "while weights are gathered"],
)
def test_a_model_that_cannot_be_written_is_not_lost(where, error, words, tmp_path, monkeypatch):
    """Without checkpoints of its own the run saves one then; resuming writes the model."""
    whole = build_config(tmp_path, "whole", "steps=2", "checkpoint.every=0")
    train_to_end(whole)

    def fails(model, *arguments, **options):
        if where[0] is PreTrainedModel:
            Path(arguments[0]).mkdir()
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(*where, fails)
        message = (
            rf"(?s)could not be written to .*{re.escape(words)}.*What was trained is in .*step_00000002.*checkpoint.resume=true"
        )
        with pytest.raises(CheckpointError, match=message):
            train_to_end(build_config(tmp_path, "run", "steps=2", "checkpoint.every=0"))
    assert not any("model" in path.name for path in (tmp_path / "run").iterdir())
    train_to_end(build_config(tmp_path, "run", "steps=2", "checkpoint={every: 0, resume: true}"))
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_rank_that_cannot_gather_the_model_does_not_wait_for_the_others(tmp_path, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train, "export_model", fails)
    trainer = SimpleNamespace(
        world=SimpleNamespace(size=2), config=SimpleNamespace(output_dir=tmp_path), model=None, tokenizer=None
    )
    with pytest.raises(torch.OutOfMemoryError):
        train._export(trainer, None, None, None)


RANK_WITHOUT_MEMORY = """
import os, sys
import torch
from trapo_train import cli, train
def fails(*arguments):
    raise torch.OutOfMemoryError("out of memory")
if os.environ["RANK"] == "1":
    train.export_model = fails
sys.exit(cli.main(sys.argv[1:]))
"""


def saved_by_two_ranks(directory: Path, program: str, message: str, *settings: str) -> list[int]:
    """The steps that a run without periodic checkpoints has saved which ends in an error with `message`; `program` is its CLI."""
    (directory / "run.yaml").write_text(yaml.safe_dump(TINY))
    (directory / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(directory / "program.py")]
    command += ["run", str(directory / "run.yaml"), f"output_dir={directory / 'run'}", "checkpoint.every=0", *settings]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0 and message in ended.stderr, ended.stderr[-3000:]
    return CheckpointStore(directory / "run" / "checkpoints", keep=2).steps()


@pytest.mark.slow
def test_ranks_of_which_one_cannot_gather_the_model_have_saved_the_last_step(tmp_path):
    assert saved_by_two_ranks(tmp_path, RANK_WITHOUT_MEMORY, "OutOfMemoryError: out of memory", "steps=2") == [2]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_remedy_and_it_goes_on_where_there_is_space(tmp_path):
    disk = tmp_path / "disk"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    # keep=12: the disk fills up with checkpoints. In the namespace root may enlarge it, which is what "free space" comes to.
    arguments = ["run", f"{tmp_path}/run.yaml", f"output_dir={disk}/run", "steps=12", "checkpoint={every: 1, keep: 12}"]
    run = shlex.join([sys.executable, "-m", "trapo_train", *arguments])
    done = on_a_small_disk(
        disk,
        f"{run}; echo first: $?; ls -A {disk}/run/checkpoints; mount -o remount,size=12m {disk}; "
        f"{run} checkpoint.resume=true; echo second: $?; ls -A {disk}/run/checkpoints",
    )
    _, second = done.stdout.split("first: 2\n")
    error = " ".join(done.stderr.split())
    assert "trapo-train: error: checkpoint: step" in error and "No space left on device" in error
    assert "Free space or make the directory writable, then resume with checkpoint.resume=true" in error
    kept = list(itertools.takewhile(lambda line: line.startswith(("step_", ".")), second.splitlines()))
    assert 0 < len(kept) < 12 and not any("unfinished" in name for name in kept)
    assert f"resumed from step {len(kept)}" in second and "second: 0\n" in second
    assert "step_00000012" in second.split("second: 0\n")[1]


def test_samples_that_cannot_be_written_cost_no_step(tmp_path, caplog):
    """They are for looking at; a directory of that name stands for a full disk."""
    config = build_config(
        tmp_path, "run", *EVALUATED, "steps=2", "tracking.samples_every=1", "evaluation={every: 2, save_samples: true}"
    )
    samples = Path(config.output_dir) / "samples"
    samples.parent.mkdir()
    samples.write_text("no directory")
    assert train_to_end(config).steps == 2
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert sum("the samples of step 2 could not be written: [Errno" in text for text in told) == 1
    assert "the responses of the evaluation could not be written: [Errno" in caplog.text


def test_metrics_that_cannot_be_written_wait_until_they_can(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"kind": "train", "step": 1})
    with file_size_limit(64):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                log.append({"kind": "train", "step": step, "text": "x" * 100})
        log.close()  # without a second error
        assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    log.append({"kind": "train", "step": 4})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4] and not log.waiting


@pytest.mark.slow
@pytest.mark.parametrize("until", [4, 100])
def test_metrics_that_cannot_be_written_cost_no_step(until, tmp_path, monkeypatch, capsys):
    """Those of steps 2 and 3 are written with step 4, or with none."""
    write, step = MetricsLog._write, 0

    def full(log, line):
        nonlocal step
        step = max(step, json.loads(line)["step"], json.loads(log.waiting[-1])["step"])
        if 2 <= step < until:
            raise OSError(28, "No space left on device")
        write(log, line)

    monkeypatch.setattr(MetricsLog, "_write", full)
    config = build_config(tmp_path, "run", "steps=5", "checkpoint.every=0")
    assert train_to_end(config).steps == 5 and (tmp_path / "run" / "model").is_dir()
    found = read_metrics(config.output_dir)
    assert [row["step"] for row in found if row["kind"] == "train"] == ([1, 2, 3, 4, 5] if until == 4 else [1])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("metrics.jsonl must take a row for every step, got [Errno 28] No space left on device. Free space") == 1
    assert sum("must take a row" in row.get("text", "") for row in found) == (until == 4)
    assert ("rows could not be written to" in said) == (until == 100)


def test_the_configuration_of_a_run_is_whole_or_what_it_was(tmp_path, monkeypatch):
    config = build_config(tmp_path, "run", "steps=1", "checkpoint.every=1")
    train_to_end(config)
    file, replace_file = Path(config.output_dir) / "config.yaml", Path.replace
    before = file.read_text()

    def killed(path, target):
        if Path(target) == file:
            raise OSError("killed here")
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(OSError, match="killed here"):
        train_to_end(build_config(tmp_path, "run", "steps=2", "checkpoint={every: 1, resume: true}"))
    assert file.read_text() == before


def test_a_dataset_edited_between_two_runs_is_refused(tmp_path):
    rows = [{"prompt": f"ab?a{depth}:", "solution": "de", "expert": "#de$", "depth": depth} for depth in (1, 2, 3)]
    data = tmp_path / "train.jsonl"
    overrides = ["data={path: " + str(data) + "}", "model.tokenizer=" + str(tmp_path / "tokenizer"), "reward=exact_match"]
    from trapo_train.tasks import build_tokenizer

    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_to_end(build_config(tmp_path, "run", *overrides, "steps=2"))
    rows[1]["solution"] = "df"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CheckpointError, match=r"belongs to a different run: data was '\w+', is '\w+'\. Set these back"):
        train_to_end(build_config(tmp_path, "run", *overrides, "steps=4", "checkpoint.resume=true"))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "words"), [("SIGKILL", "by peer|Broken pipe|Timed out"), ("SIGSTOP", "Timed out")])
def test_a_rank_that_dies_or_hangs_ends_the_other_within_the_timeout(how, words, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    arguments = ["run", f"{tmp_path}/run.yaml", f"output_dir={tmp_path}/run", "steps=100000", "parallel.timeout_s=8"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in "01":
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "trapo_train", *arguments]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=ENVIRONMENT | world, **streams))
    try:
        while not CheckpointStore(tmp_path / "run" / "checkpoints", keep=2).steps():  # from which a run goes on
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.2)
        os.kill(ranks[1].pid, getattr(signal, how))
        _, error = ranks[0].communicate(timeout=60)  # 8 s and what a busy machine needs to notice
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 2
    error = " ".join(error.split())
    assert re.search(f"trapo-train: error: parallel: rank 0 has lost another rank: .*({words})", error), error
    assert "continue with checkpoint.resume=true" in error
