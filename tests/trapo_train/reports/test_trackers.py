"""Trackers get the numbers, a broken one ends nothing, and samples are written as tables."""

import shutil
import sys
import types
from functools import partial
from pathlib import Path

import pytest

from tests.trapo_train.test_train import StopAfter, build_config, train_to_end
from trapo_train.records import Problem, Sample
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.reports.trackers import Trackers, TrackingConfig
from trapo_train.rollouts.samples import write_samples
from trapo_train.schema import UserError
from trapo_train.tasks import build_tokenizer
from trapo_train.train import run


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def _stand_in(name, monkeypatch, fails=False):
    """A module with wandb's and trackio's interface that remembers what it was told."""
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **options: calls.append(("init", options))
    module.finish = lambda: calls.append(("finish",))

    def log(metrics, step):
        if fails:
            raise ConnectionError("the service is down")
        calls.append(("log", step, metrics))

    module.log = log
    monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_project_name_settings_and_numbers(name, monkeypatch, tmp_path):
    calls = _stand_in(name, monkeypatch)
    trackers = Trackers(TrackingConfig([name], project="p"), tmp_path / "run7", {"seed": 1})
    trackers.log(3, {"step": 3, "loss": 0.5, "histogram": [1, 2], "note": "text"})
    trackers.close()
    assert calls[0][1]["project"] == "p" and calls[0][1]["name"] == "run7" and calls[0][1]["config"] == {"seed": 1}
    assert calls[1:] == [("log", 3, {"loss": 0.5}), ("finish",)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_resumes_goes_on_in_its_hosted_run(name, monkeypatch, configure):
    calls = _stand_in(name, monkeypatch)
    config = partial(configure, "run", f"tracking.to=[{name}]", "checkpoint={every: 2, resume: true}")
    train_to_end(config("steps=2"))
    train_to_end(config("steps=4"))
    train_to_end(configure("other", f"tracking.to=[{name}]", "steps=1"))
    first, resumed, other = [call[1] for call in calls if call[0] == "init"]
    assert [call[1] for call in calls if call[0] == "log"] == [1, 2, 3, 4, 1]
    if name == "wandb":
        assert first["id"] == resumed["id"] != other["id"] and {first["resume"], resumed["resume"]} == {"allow"}
    else:
        assert (first["resume"], resumed["resume"], other["resume"]) == ("never", "allow", "never")
        assert first["name"] == resumed["name"]


def test_a_tracker_that_fails_is_left_out_with_one_warning(monkeypatch, tmp_path, caplog):
    _stand_in("wandb", monkeypatch, fails=True)
    works = _stand_in("trackio", monkeypatch)
    trackers = Trackers(TrackingConfig(["wandb", "trackio"]), tmp_path, {})
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1.0})
    assert [call[1] for call in works if call[0] == "log"] == [1, 2, 3]
    assert caplog.text.count("wandb failed and is left out from here on: ConnectionError: the service is down") == 1


class CommError(Exception):
    """Named as wandb's, of what it cannot reach."""


class AuthenticationError(CommError):
    """Named as wandb's, of what it may not."""


@pytest.mark.parametrize("error", [TimeoutError, CommError])
def test_a_service_that_is_away_when_a_run_starts_ends_nothing(error, monkeypatch, configure):
    def away(**options):
        raise error("initialization timed out")

    _stand_in("wandb", monkeypatch)
    monkeypatch.setattr(sys.modules["wandb"], "init", away)
    works = _stand_in("trackio", monkeypatch)
    config = configure("run", "tracking.to=[wandb, trackio]", "steps=2")
    assert train_to_end(config).steps == 2
    assert [call[1] for call in works if call[0] == "log"] == [1, 2]
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event" and "left out" in row["text"]]
    assert told == [f"tracking: wandb failed and is left out from here on: {error.__name__}: initialization timed out"]
    assert not Path(config.output_dir, "wandb_run_id").exists()


@pytest.mark.parametrize("error", [ValueError, AuthenticationError])
def test_a_service_that_refuses_a_run_ends_it_before_the_first_step(error, monkeypatch, configure):
    def refuses(**options):
        raise error("api_key not configured")

    begun = _stand_in("trackio", monkeypatch)
    _stand_in("wandb", monkeypatch)
    monkeypatch.setattr(sys.modules["wandb"], "init", refuses)
    config = configure("run", "tracking.to=[trackio, wandb]", "steps=2")
    message = (
        rf"tracking.to: wandb must take the run before it begins, got {error.__name__}: api_key not configured\. Mend that, or"
    )
    with pytest.raises(UserError, match=message):
        train_to_end(config)
    assert [call[0] for call in begun] == ["init", "finish"]
    assert not Path(config.output_dir, "metrics.jsonl").exists()
    train_to_end(configure("run", "steps=1"))  # into the same directory


def test_a_run_whose_id_cannot_be_written_is_ended_there(monkeypatch, tmp_path):
    calls = _stand_in("wandb", monkeypatch)
    (tmp_path / "run").write_text("a file in the place of the directory")
    trackers = Trackers(TrackingConfig(["wandb"]), tmp_path / "run", {})
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert [call[0] for call in calls] == ["init", "finish"] and "wandb failed and is left out" in trackers.notes[0]


@pytest.mark.parametrize("name", ["wandb", "torch.utils.tensorboard"])
def test_a_package_that_does_not_load_is_told_with_its_own_error(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    tracker = name.split(".")[-1]
    with pytest.raises(UserError, match=rf"tracking.to: {tracker} must take the run before .*got ModuleNotFoundError: .*{name}"):
        Trackers(TrackingConfig([tracker]), tmp_path, {})


def test_a_run_writes_tensorboard_and_samples(configure):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed (extra [tensorboard])"
    )
    config = configure("run", "tracking={to: [tensorboard], samples_every: 2}", "steps=4")
    train_to_end(config)
    events = accumulator.EventAccumulator(f"{config.output_dir}/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    tables = sorted(Path(config.output_dir, "samples").iterdir())
    assert [path.name for path in tables] == [f"step_0000000{step}.{kind}" for step in (2, 4) for kind in ("jsonl", "md")]
    tables = [path for path in tables if path.suffix == ".md"]
    assert tables[0].read_text().count("## Problem") == config.prompts_per_step


@pytest.mark.slow
def test_tensorboard_hides_the_steps_that_a_resumed_run_takes_again(monkeypatch, configure):
    made = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step=None):
            made.append((purge_step, []))

        def add_scalar(self, name, value, step):
            made[-1][1].append(step)

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    writer = types.ModuleType("torch.utils.tensorboard")
    writer.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    settings = ("tracking.to=[tensorboard]", "steps=4")
    config = configure("run", *settings)
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        run(config, StopAfter(config.output_dir, 3, KeyboardInterrupt("power cut")))
    train_to_end(configure("run", *settings, "checkpoint.resume=true"))
    for name in ("checkpoints", "model"):
        shutil.rmtree(Path(config.output_dir) / name)
    train_to_end(configure("run", *settings, "checkpoint.resume=true"))  # there is nothing to go on from
    assert [(purge_step, sorted(set(steps))) for purge_step, steps in made] == [
        (None, [1, 2, 3]),
        (3, [3, 4]),
        (0, [1, 2, 3, 4]),
    ]


def test_a_sample_table_says_what_a_sample_is(tmp_path):
    tokenizer = build_tokenizer()
    ids = tuple(tokenizer("a|b$")["input_ids"])
    problem = Problem(4, "line one\nline <two>", (1,), "x")
    sample = Sample(problem, 2, 0.25, (1, 2), ids, (0.0,) * len(ids), "stop", reward=1.0, advantage=0.5)
    text = write_samples([[sample], []], tokenizer, tmp_path, 7).read_text()
    assert "## Problem 4" in text and "line one ⏎ line \\<two>" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| 2 |"))
    assert row.endswith(r"| a\|b$ |")  # with the token that ends it
    assert "2 tokens, 0.25" in row and "+0.500" in row and row.replace("\\|", "").count("|") == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": ["mlflow"]}, "to must be a list of one of tensorboard, wandb, trackio, got"),
        ({"samples_every": -1}, "samples_every must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrackingConfig(**settings)
