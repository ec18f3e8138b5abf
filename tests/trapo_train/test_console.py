"""A command goes on where what reads its output has left: the other end of a pipe, or the terminal."""

import os
import signal
import sys

import pytest

from tests.trapo_train.test_cli import TINY
from trapo_train import cli, display
from trapo_train.console import stdout_console
from trapo_train.display import read_metrics


@pytest.fixture
def left(monkeypatch):
    """Makes stdout a pipe or a terminal of its own; returns the end that reads."""
    opened = []

    def stdout(opener):
        reader, writer = opener()
        opened.append(os.fdopen(writer, "w"))
        monkeypatch.setattr(sys, "stdout", opened[-1])
        return reader

    yield stdout
    for stream in opened:
        stream.close()  # which would raise for what it still holds


@pytest.fixture
def default_sighup():
    """A closed terminal as Python has it, however pytest was started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("opener", "number", "code"),
    [(os.pipe, None, 0), (os.pipe, signal.SIGINT, 130), (os.openpty, None, 0), (os.openpty, signal.SIGHUP, 129)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_run_goes_on_or_saves_without_its_reader(
    tmp_path, left, monkeypatch, capfd, default_sigint, default_sighup, opener, number, code
):
    reader = left(opener)

    class Leaving(display.Reporter):
        def step(self, metrics):
            if metrics["step"] == 1:
                os.close(reader)
                if number is not None:
                    os.kill(os.getpid(), number)
            super().step(metrics)

    monkeypatch.setattr(display, "Reporter", Leaving)
    (tmp_path / "tiny.yaml").write_text(TINY.format(output=tmp_path / "run"))
    assert cli.main(["run", str(tmp_path / "tiny.yaml")]) == code
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    if number is None:
        assert steps == [1, 2] and (tmp_path / "run" / "model" / "model.safetensors").exists()
    else:
        assert steps == [1] and [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000001"]
    assert capfd.readouterr().err.count("stdout takes nothing more") == 1


def test_stderr_that_has_left_as_well_takes_nothing_more_either(left, capfd):
    os.close(left(os.pipe))
    reader, writer = os.pipe()
    os.close(reader)
    before = os.dup(2)
    os.dup2(writer, 2)
    try:
        console = stdout_console()
        for _ in range(2):
            console.print("lost")
        assert os.write(2, b"lost") == 4
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(writer)
