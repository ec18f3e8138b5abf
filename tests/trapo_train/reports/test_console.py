"""A command goes on where what reads its output has left: the other end of a pipe, or the terminal."""

import os
import signal
import subprocess
import sys

import pytest

from tests.trapo_train.test_cli import TINY
from trapo_train import cli
from trapo_train.reports import display
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.rewards.builtin import REWARDS


@pytest.fixture
def left(monkeypatch):
    """Makes stdout, or another stream, a pipe or a terminal of its own; returns the end that reads."""
    opened = []

    def replace(opener, *names):
        reader, writer = opener()
        opened.append(os.fdopen(writer, "w", buffering=1 if "stderr" in names else -1))
        for name in names or ["stdout"]:
            monkeypatch.setattr(sys, name, opened[-1])
        return reader

    yield replace
    for stream in opened:
        stream.close()  # which would raise for what it still holds


@pytest.fixture
def command(monkeypatch):
    """Puts a function in place of what `trapo-train recipes` does."""
    return lambda body: monkeypatch.setattr(cli, "_recipes", lambda args, console: body(console) or 0)


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_a_reward_prints_does_not_end_the_run_either(tmp_path, left, monkeypatch):
    reader = left(os.pipe)
    calls = iter(range(100))

    def printing(completions, **columns):
        if next(calls) == 0:
            os.close(reader)
        print("graded", flush=True)
        sys.stdout.writelines(["twice\n"])
        return [0.5] * len(completions)

    monkeypatch.setitem(REWARDS, "pointer_chasing", printing)
    (tmp_path / "tiny.yaml").write_text(TINY.format(output=tmp_path / "run"))
    assert cli.main(["run", str(tmp_path / "tiny.yaml")]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"] == [1, 2]


def test_streams_are_as_they_were_after_a_command_and_hold_nothing_that_it_printed(left, command):
    reader = left(os.pipe)
    stdout, stderr = sys.stdout, sys.stderr
    command(lambda console: print("from anyone"))
    assert cli.main(["recipes"]) == 0
    os.set_blocking(reader, False)
    assert os.read(reader, 100) == b"from anyone\n"
    assert sys.stdout is stdout and sys.stderr is stderr
    os.close(reader)
    assert cli.main(["recipes"]) == 0
    stdout.flush()  # what the interpreter does at its end
    with pytest.raises(SystemExit, match="0"):
        cli.main(["recipes", "--help"])


def test_a_rank_that_has_finished_ends_with_its_exit_code_without_its_reader(left, command, monkeypatch):
    os.close(left(os.pipe))
    ended = []
    command(lambda console: print("not flushed"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["trapo-train", "recipes"])
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit):
        cli.run_and_exit()
    assert ended == [0]


def test_the_exit_code_is_the_same_where_stderr_has_left_as_well(left, command):
    os.close(left(os.pipe, "stdout", "stderr"))
    assert cli.main(["run", "nosuch.yaml"]) == 2
    assert cli.main(["run", "nosuch.yaml", "--traceback"]) == 2

    def interrupted(console):
        raise KeyboardInterrupt

    command(interrupted)
    assert cli.main(["recipes"]) == 130


def test_a_command_works_without_streams(monkeypatch, command):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    command(lambda console: console.print("nowhere"))
    assert cli.main(["recipes"]) == 0


@pytest.mark.parametrize("closed", [[1], [2], [1, 2]])
def test_what_is_printed_after_a_stream_was_closed_is_in_no_other_file(tmp_path, closed):
    code = f"""
import os, sys
from trapo_train.reports.console import outlived_readers
with outlived_readers():
    for number in {closed}:
        os.close(number)
    print("lost", flush=True)
    print("lost", file=sys.stderr)
    with open({str(tmp_path / "data")!r}, "w"):
        print("lost, too", flush=True)
        print("lost, too", file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and (tmp_path / "data").read_text() == ""
