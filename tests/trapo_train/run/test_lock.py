"""One run at a time in an output_dir, and nothing else is kept out of it."""

import errno
import fcntl
import os
import signal
import socket
from functools import partial
from pathlib import Path

import pytest

from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train import train
from trapo_train.parallel.world import World
from trapo_train.reports.display import Reporter
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.reports.plots import plot_run
from trapo_train.run.export_checkpoint import export_checkpoint
from trapo_train.run.output_dir import held
from trapo_train.schema import UserError

OWN = rf"process {os.getpid()} on {socket.gethostname()} writes\. Wait for its end"


class Meanwhile(Reporter):
    """Does something once step 2 has been reported."""

    def __init__(self, output_dir, act) -> None:
        super().__init__(output_dir)
        self.act = act

    def step(self, metrics):
        super().step(metrics)
        if metrics["step"] == 2:
            self.act()


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def test_a_second_run_is_refused_before_it_loads_anything_and_takes_nothing_from_the_first(configure, monkeypatch):
    config = configure("run", "steps=4", "checkpoint={every: 1, resume: true}")

    def begin_another():
        with monkeypatch.context() as patched:
            patched.setattr(train, "Trainer", lambda *arguments, **options: pytest.fail("it loads"))
            with pytest.raises(UserError, match=rf"output_dir must belong to one run at a time, .*, to which {OWN}"):
                train_to_end(config)

    train.run(config, Meanwhile(config.output_dir, begin_another))
    assert [row["step"] for row in read_metrics(config.output_dir) if row["kind"] == "train"] == [1, 2, 3, 4]
    train_to_end(configure("run", "steps=5", "checkpoint.resume=true"))  # the first has ended


@pytest.mark.parametrize("settings", [("checkpoint.every=0",), ("checkpoint={every: 1, resume: true}",)])
def test_from_its_first_look_none_begins_beside_a_run_that_loads_and_one_that_fails_frees_the_directory(
    settings, configure, monkeypatch
):
    config, other = (configure("run", *settings, f"steps={steps}") for steps in (2, 1))

    def begin_another(*arguments):
        with pytest.raises(UserError, match=OWN):
            train_to_end(other)

    def load(*arguments, **options):
        begin_another()
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(train, "check_output_dir", begin_another)
        patched.setattr(train, "Trainer", load)
        with pytest.raises(MemoryError):
            train_to_end(config)
    assert [path.name for path in Path(config.output_dir).iterdir()] == [".lock"]
    train_to_end(other)


def test_a_process_that_was_killed_holds_no_lock_through_what_it_forked(tmp_path):
    """The child of a run lives on, as a worker of a data loader may."""
    ready, finish = os.pipe(), os.pipe()
    run = os.fork()
    if run == 0:
        try:
            with held(tmp_path, World.alone()):
                if os.fork() == 0:
                    os.write(ready[1], b"x")
                    os.read(finish[0], 1)
                else:
                    os.read(ready[0], 1)
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(0)
    try:
        assert os.WIFSIGNALED(os.waitpid(run, 0)[1])
        with held(tmp_path, World.alone()):
            pass
    finally:
        os.write(finish[1], b"x")


def test_a_fork_inside_leaves_the_lock_to_its_process(tmp_path):
    output_dir = tmp_path / "nowhere" / "yet"
    with held(output_dir, World.alone()):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(UserError, match=OWN), held(output_dir, World.alone()):
            pytest.fail("two hold it")


@pytest.mark.slow
def test_what_only_reads_works_beside_a_run(configure):
    config = configure("run", "steps=3", "checkpoint.every=1")

    def read():
        assert plot_run(config.output_dir)
        assert export_checkpoint(config.output_dir)[1] == 1

    train.run(config, Meanwhile(config.output_dir, read))
    assert (Path(config.output_dir) / "model_step_1").is_dir()


def test_an_output_dir_that_cannot_be_made_is_named_as_such(tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "run"
    told = rf"^output_dir must be a directory that can be written to, got {place}\. Choose another, or mend what it lacks: \[Errno"
    with pytest.raises(UserError, match=told), held(place, World.alone()):
        pytest.fail("it is held")


def test_a_disk_without_locks_is_noted_and_the_run_goes_on(configure, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    config = configure("run", "steps=1")
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert any(text.startswith("nothing keeps a second run out of output_dir: its disk takes no locks") for text in told)
