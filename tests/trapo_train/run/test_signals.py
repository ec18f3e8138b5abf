"""SIGTERM, SIGHUP and Ctrl-C are noted and acted upon where a step ends; ranks agree on them."""

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest

from tests.trapo_train.test_train import EVALUATED, StopAfter, build_config, rows, train_to_end
from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.parallel.world import World
from trapo_train.run.signals import StopSignal
from trapo_train.train import run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_stop_signal_catches_a_signal_and_gives_it_back(default_sigint, default_sighup, capfd, number):
    before = signal.getsignal(number)
    with StopSignal("saving\n") as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == ("saving\n" if number == signal.SIGINT else "")


def test_a_second_ctrl_c_interrupts_and_what_came_first_is_named(default_sigint):
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # of a shell's job in the background, and under nohup
def test_what_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.received is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_ranks_agree_on_a_signal_and_none_is_forgotten():
    stop = StopSignal()
    others = [None, "SIGINT"]
    world = SimpleNamespace(gather=lambda mine: [mine, *others])
    assert stop.agree(world) == stop.received == "SIGINT"
    stop, others = StopSignal(), [None]

    def late(mine):
        stop.received = "SIGTERM"
        return [mine, *others]

    assert stop.agree(SimpleNamespace(gather=late)) is None
    assert stop.agree(World.alone()) == "SIGTERM"


def test_stop_signal_works_outside_the_main_thread():
    seen = []

    def body():
        with StopSignal() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_signal_in_the_last_step_leaves_its_evaluation_and_the_model_to_the_run_that_continues(tmp_path, default_sigint):
    config = build_config(tmp_path, "run", *EVALUATED, "steps=3")
    summary = run(config, StopAfter(config.output_dir, 3))
    assert summary.interrupted and not (tmp_path / "run" / "model").exists()
    again = train_to_end(build_config(tmp_path, "run", *EVALUATED, "steps=3", "checkpoint.resume=true"))
    assert not again.interrupted and (tmp_path / "run" / "model").is_dir()
    assert [row["step"] for row in rows(config) if row["kind"] == "eval"] == [0, 3]


def test_a_checkpoint_that_a_signal_left_without_its_evaluation_is_rated_by_the_run_that_continues(tmp_path, default_sigint):
    often = (EVALUATED[0], "evaluation={every: 1, sample: false}", "checkpoint={every: 1, keep: 3, keep_best: true}", "steps=3")
    config = build_config(tmp_path, "run", *often)
    run(config, StopAfter(config.output_dir, 2))
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    assert store.steps() == [1, 2] and store.best() == 1
    train_to_end(build_config(tmp_path, "run", *often, "checkpoint.resume=true"))
    loss = {row["step"]: row["expert_nll"] for row in rows(config) if row["kind"] == "eval"}
    scores = [json.loads((store.path(step) / "manifest.json").read_text())["score"] for step in (1, 2, 3)]
    assert scores == pytest.approx([-loss[step] for step in (1, 2, 3)])
