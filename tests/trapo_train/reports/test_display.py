"""metrics.jsonl survives kills and resumes; the console says the same things with and without a terminal."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from trapo_train.config import RunConfig
from trapo_train.data.dataset import DataConfig, DataReport
from trapo_train.models.model import ModelConfig
from trapo_train.reports.display import NullReporter, Reporter, evaluation_line, format_seconds
from trapo_train.reports.metrics_log import MetricsLog, group_accuracies, read_metrics

REPORT = DataReport(problems=4, without_expert=0, experts=4, dropped_experts=0, dropped_prompts=0)


def config_of(output_dir, steps):
    model, data = ModelConfig("some/model"), DataConfig(task="pointer_chasing")
    return RunConfig(output_dir=str(output_dir), steps=steps, prompts_per_step=1, data=data, model=model)


def reporter_to(tmp_path, *, terminal=False, **options):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)
    return Reporter(tmp_path, console, **options)


def run_steps(reporter, first, last, total=60):
    reporter.start(config_of(reporter.log.path.parent, steps=total), REPORT)
    for step in range(first, last + 1):
        reporter.step({"step": step, "loss": 0.5, "reward/mean": 0.25, "guided_share": 0.5, "tokens_per_s": 1234.0})


def output_of(reporter):
    return reporter.console.file.getvalue().replace(f"{REPORT}\n", "")  # which every start prints


def test_every_call_leaves_one_row_of_valid_json(tmp_path):
    reporter = reporter_to(tmp_path)
    run_steps(reporter, 1, 3)
    reporter.evaluation({"step": 3, "accuracy": 0.5, "accuracy/depth_3": 0.25})
    reporter.event("checkpoint saved")
    rows = read_metrics(tmp_path)  # flushed: readable while the file is still open
    assert [row["kind"] for row in rows] == ["train", "train", "train", "eval", "event"]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 3]
    assert rows[-1]["text"] == "checkpoint saved"
    assert rows[3]["accuracy/depth_3"] == 0.25


def test_tensors_become_numbers_and_non_finite_values_are_named(tmp_path):
    reporter = reporter_to(tmp_path)
    reporter.start(config_of(tmp_path, steps=1), REPORT)
    values = {"step": 1, "loss": torch.tensor(0.5), "grad_norm": float("nan"), "histogram": [1, float("inf")]}
    reporter.step(values)
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] == 0.5
    assert row["grad_norm"] is None and row["histogram"] == [1, None]
    assert row["non_finite"] == ["grad_norm", "histogram"]


def test_a_value_json_cannot_hold_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"Tensor for 'reward'.*tolist"):
        reporter_to(tmp_path).step({"step": 1, "reward": torch.zeros(2)})


def test_a_torn_last_line_is_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert read_metrics(path) == [{"kind": "train", "step": 1}]
    assert "1 torn last line (12 bytes) after 1 complete rows" in caplog.text


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind"\n{"kind": "train", "step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_a_missing_file_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="output directory of a run"):
        read_metrics(tmp_path)


def test_appending_after_a_kill_cuts_the_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    MetricsLog(path).append({"kind": "train", "step": 2})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_rewind_drops_what_came_after_and_continues(tmp_path):
    reporter = reporter_to(tmp_path)
    run_steps(reporter, 1, 5)
    reporter.evaluation({"step": 4, "accuracy": 0.5})
    reporter.rewind(3)
    run_steps(reporter, 4, 4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert "dropped 3 rows after step 3" in output_of(reporter)
    assert not list(tmp_path.glob(".unfinished_*"))


def test_a_run_that_left_no_checkpoint_starts_anew_and_its_metrics_are_kept(tmp_path):
    reporter = reporter_to(tmp_path)
    run_steps(reporter, 1, 5)
    reporter.rewind(-1)
    run_steps(reporter, 1, 1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl.old")] == [1, 2, 3, 4, 5]
    assert "the 5 rows of before are in" in output_of(reporter)
    reporter.rewind(-1)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl.old")] == [1, 2, 3, 4, 5, 1]  # every life of the run


def test_rewind_of_a_run_without_metrics_is_nothing(tmp_path):
    reporter_to(tmp_path).rewind(10)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_without_a_terminal_about_twenty_rows_and_no_control_codes(tmp_path):
    reporter = reporter_to(tmp_path)
    run_steps(reporter, 1, 60)
    reporter.finish(None)
    lines = output_of(reporter).splitlines()
    steps = [int(line.split()[0]) for line in lines if " % " in line]
    assert steps == [1, *range(3, 61, 3)]
    assert "\x1b" not in output_of(reporter)


def test_a_slow_run_shows_every_step(tmp_path):
    reporter = reporter_to(tmp_path, row_seconds=0.0)
    run_steps(reporter, 1, 7, total=1000)
    assert [line.split()[0] for line in output_of(reporter).splitlines()] == ["step", *"1234567"]


def test_only_recorded_metrics_get_a_column(tmp_path):
    reporter = reporter_to(tmp_path)
    run_steps(reporter, 1, 1)
    heading, row = output_of(reporter).splitlines()
    assert heading.split() == ["step", "reward", "guided", "loss", "tokens/s", "ETA"]
    assert row.split()[:4] == ["1", "0.250", "50", "%"]
    assert len(heading) == len(row)


def test_a_metric_that_is_missing_later_leaves_a_dash(tmp_path):
    reporter = reporter_to(tmp_path, row_seconds=0.0)
    run_steps(reporter, 1, 1)
    reporter.step({"step": 2, "loss": float("nan")})
    assert output_of(reporter).splitlines()[-1].split()[:4] == ["2", "–", "–", "nan"]


def test_on_a_terminal_the_bar_is_gone_after_close(tmp_path):
    reporter = reporter_to(tmp_path, terminal=True)
    with reporter:
        run_steps(reporter, 1, 2)
        assert reporter._progress is not None
    assert reporter._progress is None
    assert output_of(reporter).rstrip().endswith("\x1b[2K")  # the live line erased


@pytest.mark.parametrize("width", [60, 80, 110])
def test_beside_the_bar_stand_the_steps_in_full_however_much_follows(tmp_path, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with Reporter(tmp_path, console) as reporter:
        reporter.start(config_of(tmp_path, steps=420), REPORT)
        reporter.step({"step": 20, **dict.fromkeys(ROLLOUT_METRICS, 0.5)})
        reporter._progress.refresh()
        live = output_of(reporter).split("\x1b[2K")[-1]
    assert " 20/420 0:00:00 ETA" in live and live.endswith("…") and len(live) == width


def test_what_takes_a_while_is_said_before_the_first_step_and_beside_the_bar(tmp_path):
    reporter = reporter_to(tmp_path)
    reporter.doing("loading some/model")
    run_steps(reporter, 1, 1)
    reporter.doing("evaluating")
    assert output_of(reporter).splitlines()[0] == "loading some/model" and "evaluating" not in output_of(reporter)
    assert [row["kind"] for row in read_metrics(tmp_path)] == ["train"]  # nothing to keep
    with reporter_to(tmp_path / "terminal", terminal=True) as reporter:
        run_steps(reporter, 1, 1)
        task = reporter._progress.tasks[0]
        between = task.description
        reporter.doing("evaluating")
        assert task.description == "evaluating"
        reporter.evaluation({"step": 1, "accuracy": 0.5})
        assert task.description == between


def test_a_named_set_says_its_name_everywhere(tmp_path, monkeypatch):
    reporter = reporter_to(tmp_path)
    tracked = []
    monkeypatch.setattr(
        reporter, "_trackers", SimpleNamespace(log=lambda step, metrics: tracked.append(metrics), close=lambda: None)
    )
    reporter.evaluation({"step": 3, "accuracy": 0.5, "pass@2": 0.6, "pass@8": 0.7}, "aime")
    assert read_metrics(tmp_path) == [{"kind": "eval", "step": 3, "set": "aime", "accuracy": 0.5, "pass@2": 0.6, "pass@8": 0.7}]
    assert tracked == [{"eval/aime/accuracy": 0.5, "eval/aime/pass@2": 0.6, "eval/aime/pass@8": 0.7}]
    assert output_of(reporter) == "     3  aime accuracy 0.500  pass@8 0.700\n"


def test_evaluation_line_shows_groups_and_the_standard_error():
    row = {"kind": "eval", "step": 3, "accuracy": 0.5, "accuracy_stderr": 0.03, "accuracy/depth_3": 0.25}
    assert evaluation_line(row) == "accuracy 0.500 ± 0.030  depth 3 0.250"
    row |= {"accuracy_stderr/depth_3": 0.1, "accuracy/depth_4": None, "accuracy/a_b/c": 1.0}
    assert group_accuracies(row) == {"depth_3": (0.25, 0.1), "a_b/c": (1.0, None)}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3700, "1:01:40"), (-1, "0:00")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_null_reporter_answers_every_call_of_the_reporter():
    public = {name for name in vars(Reporter) if not name.startswith("_")} - {"close"}
    assert public == {name for name in vars(NullReporter) if not name.startswith("_")}


def test_kl_and_clip_shares_are_shown_where_there_are_any(tmp_path):
    reporter = reporter_to(tmp_path)
    reporter.start(config_of(tmp_path, steps=3), REPORT)
    for step, low, high in ((1, 0.0, 0.0), (2, 0.01, 0.02), (3, 0.0, 0.0)):
        clips = {"rollout/clip_low": low, "rollout/clip_high": high}
        reporter.step({"step": step, "loss": 0.5, "rollout/kl_ref": 0.00123 * step, **clips})
    first, one, second, two, three = (line.split() for line in output_of(reporter).splitlines()[-5:])
    assert first == ["step", "loss", "KL", "ETA"] and one[1:3] == ["0.5000", "0.0012"]
    assert second == ["step", "loss", "KL", "clipped", "ETA"] and two[1:5] == ["0.5000", "0.0025", "3", "%"]
    assert three[2:5] == ["0.0037", "0", "%"]


def test_a_metric_that_comes_later_gets_its_column_under_a_new_heading(tmp_path):
    reporter = reporter_to(tmp_path, row_seconds=0.0)
    run_steps(reporter, 1, 1)
    reporter.step({"step": 2, "loss": 0.5, "entropy/rollout": 1.5})
    reporter.step({"step": 3, "loss": 0.5})
    lines = [line.split() for line in output_of(reporter).splitlines()]
    assert [line[0] for line in lines] == ["step", "1", "step", "2", "3"]
    assert lines[0] == ["step", "reward", "guided", "loss", "tokens/s", "ETA"]
    assert lines[2] == ["step", "reward", "guided", "loss", "entropy", "tokens/s", "ETA"]
    assert lines[3][:5] == ["2", "–", "–", "0.5000", "1.500"] and lines[4][:5] == ["3", "–", "–", "0.5000", "–"]


ROLLOUT_METRICS = (
    "reward/mean", "reward/unguided", "guided_share", "finished_share", "loss", "expert/logprob", "entropy/rollout",
    "entropy/expert", "grad_norm", "tokens_per_s", "peak_memory_mib",
)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (200, set()),
        (106, {"MiB"}),
        (80, {"MiB", "tokens/s", "expert"}),
        (79, {"MiB", "tokens/s", "expert"}),
        (78, {"MiB", "tokens/s", "expert", "finished"}),
        (40, {"MiB", "tokens/s", "expert", "finished", "norm"}),
    ],
)
def test_a_narrow_terminal_shows_what_matters_most(tmp_path, width, left_out):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with Reporter(tmp_path, console) as reporter:
        reporter.start(config_of(tmp_path, steps=1), REPORT)
        reporter.step({"step": 1, **dict.fromkeys(ROLLOUT_METRICS, 0.5)})
    heading = next(line for line in output_of(reporter).splitlines() if "reward" in line)
    everything = {"reward", "unguided", "guided", "finished", "loss", "entropy", "expert", "norm", "tokens/s", "MiB"}
    assert {word for word in everything if word in heading.split()} == everything - left_out
    assert "expert logp" not in heading
    assert width == 40 or len(heading.split("\x1b[2K")[-1].rstrip()) <= width
