"""Whatever error ends a run, the last whole step is saved, and the run that goes on has the bits of one that never failed."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.trapo_train.test_faults import saved_by_two_ranks
from tests.trapo_train.test_random_states import DICE
from tests.trapo_train.test_train import EVALUATED, build_config, exported, rows, train_to_end
from trapo_train import trainer
from trapo_train.checkpoints.checkpoint import CheckpointError, CheckpointStore
from trapo_train.data.problems import ProblemSet
from trapo_train.reports.display import Reporter
from trapo_train.schema import UserError
from trapo_train.step import optimizer_step
from trapo_train.trainer import Trainer

SETTINGS = (*DICE, EVALUATED[0], "steps=4", "evaluation.every=3", "checkpoint.every=0")
DROPPED_OUT = ("model.lora={rank: 2, dropout: 0.2}", "optimizer.schedule=linear", "packing.max_tokens=2000")


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


@pytest.fixture
def failing(monkeypatch):
    """Makes one call of what the name in a module or class stands for raise an error, counted from 1 once it is asked to."""

    def fail(where, name: str, call: int, error: BaseException):
        real, calls = getattr(where, name), []

        def instead(*arguments, **options):
            calls.append(name)
            if len(calls) == call:
                raise error
            return real(*arguments, **options)

        monkeypatch.setattr(where, name, instead)

    return fail


def saved(config) -> list[int]:
    return CheckpointStore.of(config.output_dir).steps()


FAILURES = {
    "in a pass": ((optimizer_step, "policy_forward", 3, MemoryError()), 2),
    "before the passes": ((trainer, "pack", 3, ZeroDivisionError("a bug")), 2),
    "in clipping": ((optimizer_step.nn.utils, "clip_grad_norm_", 3, RuntimeError("a kernel failed")), 2),
    "a row": ((ProblemSet, "__getitem__", 24, OSError("Stale file handle")), 2),
    "a report": ((Reporter, "step", 2, TypeError("values must be numbers")), 2),
    "an evaluation": ((Trainer, "evaluate", 2, MemoryError()), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_an_error_of_any_kind_loses_no_whole_step(name, configure, failing, monkeypatch):
    pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    whole, config = (configure(run, *SETTINGS, *DROPPED_OUT) for run in ("whole", "failed"))
    train_to_end(whole)
    failure, step = FAILURES[name]
    failing(*failure)
    with pytest.raises(type(failure[-1])):
        train_to_end(config)
    assert saved(config) == [step]
    monkeypatch.undo()
    train_to_end(configure("failed", *SETTINGS, *DROPPED_OUT, "checkpoint.resume=true"))
    assert exported(config) == exported(whole)
    assert name == "a report" or rows(config) == rows(whole)


def test_a_gpu_that_is_full_is_told_with_what_may_change_where_the_run_goes_on(configure, failing, monkeypatch):
    settings = (*DICE, "steps=3", "checkpoint.every=0")
    config = configure("run", *settings, "packing.max_tokens=2000")
    failing(optimizer_step, "policy_forward", 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"))
    with pytest.raises(UserError, match=r"step 3 must fit .* got CUDA out of memory\. Lower packing\.max_tokens = 2000 or"):
        train_to_end(config)
    assert saved(config) == [2]
    monkeypatch.undo()
    narrower = ("packing.max_tokens=200", "model.gradient_checkpointing=true", "checkpoint.resume=true")
    assert train_to_end(configure("run", *settings, *narrower)).steps == 3


@pytest.mark.parametrize(
    ("where", "name", "call"),
    [(optimizer_step, "policy_forward", 6), (torch.optim.AdamW, "_init_group", 5), (optimizer_step, "_advance", 5)],
    ids=["second update", "within an update", "after an update"],
)
def test_what_is_between_two_steps_is_not_saved(where, name, call, configure, failing):
    config = configure("run", *DICE, "updates.epochs=2", "packing.max_tokens=2000", "checkpoint.every=0")
    failing(where, name, call, RuntimeError("unlucky"))
    with pytest.raises(RuntimeError, match="unlucky"):
        train_to_end(config)
    assert saved(config) == []


def test_an_update_that_was_skipped_counts(configure, failing, monkeypatch):
    """The schedule is a step ahead of the weights by then."""
    monkeypatch.setattr(optimizer_step, "math", SimpleNamespace(isfinite=lambda value: False))
    failing(optimizer_step, "policy_forward", 2, RuntimeError("unlucky"))
    trained = Trainer(configure("run", *DICE, "updates.epochs=2", "packing.max_tokens=2000"))
    with pytest.raises(RuntimeError, match="unlucky"):
        trained.train_step()
    assert not trained.undo.intact


def test_an_error_at_the_first_step_and_a_second_ctrl_c_save_nothing(configure, failing):
    config = configure("first", *DICE, "checkpoint.every=0")
    failing(trainer, "pack", 1, RuntimeError("unlucky"))
    with pytest.raises(RuntimeError, match="unlucky"):
        train_to_end(config)
    interrupted = configure("second", *DICE, "checkpoint.every=0")
    failing(trainer, "pack", 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train_to_end(interrupted)
    assert saved(config) == saved(interrupted) == []


def test_what_could_not_be_saved_is_not_tried_again(configure, monkeypatch):
    tried = []

    def refused(*arguments, **options):
        tried.append("save")
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(CheckpointStore, "save", refused)
    with pytest.raises(CheckpointError):
        train_to_end(configure("run", *DICE, "checkpoint.every=1"))
    assert tried == ["save"]


UNREADABLE = """
import os, sys
from trapo_train import cli
from trapo_train.data.problems import ProblemSet
from trapo_train.trainer import Trainer
step = Trainer._train_step
def takes(trainer):
    if trainer.step == 2 and os.environ["RANK"] == "1":
        def fails(problems, place):
            raise OSError("Stale file handle")
        ProblemSet.__getitem__ = fails
    return step(trainer)
Trainer._train_step = takes
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_of_two_ranks_of_which_one_cannot_read_a_row_both_save(tmp_path):
    assert saved_by_two_ranks(tmp_path, UNREADABLE, "Stale file handle", "prompts_per_step=4") == [2]
