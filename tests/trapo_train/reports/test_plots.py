"""Every figure is drawn from metrics as the trainer records them, says what it shows, and refuses what is missing."""

import itertools
import json
import math
import sys
import tracemalloc
from types import SimpleNamespace

import pytest

from tests.trapo_train.test_train import build_config
from trapo_train import cli
from trapo_train.reports import figures, plots
from trapo_train.schema import UserError

matplotlib = pytest.importorskip("matplotlib")


def train_row(step, reward=0.3):
    row = {"kind": "train", "step": step, "reward/unguided": reward + 0.01 * (step % 3), "guided_share": 0.4}
    row["accuracy/unguided"] = row["reward/unguided"]
    row |= {f"guided_share/micro_group_{i}": 0.2 * i for i in (1, 2, 3, 4)}
    row |= {"entropy/rollout": 0.5, "entropy/expert": 0.7, "trsft/weight_histogram": [3.0] + [0.0] * 8 + [1.0]}
    return row


def eval_row(step, accuracy=0.5):
    return {"kind": "eval", "step": step, "accuracy": accuracy, "accuracy_stderr": 0.05, "accuracy/depth_2": 0.6}


@pytest.fixture
def run_dir(tmp_path):
    rows = [eval_row(0), *(train_row(step) for step in range(1, 7)), eval_row(6), {"kind": "event", "step": 6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, for looking inside."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def headroom_rows():
    return [
        SimpleNamespace(fraction=f, group=group, pass_rate=0.2 + 0.5 * f, n=32, standard_error=0.07)
        for f in (0.0, 0.25, 0.5, 0.75)
        for group in ("depth_10", "depth_9", "all")
    ]


def test_plot_run_draws_what_the_run_recorded(run_dir):
    paths = plots.plot_run(run_dir)
    names = ["unguided_reward.png", "guided_share.png", "entropy.png", "trsft_weights.png"]
    assert [path.name for path in paths] == names
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        width = int.from_bytes(path.read_bytes()[16:20], "big")
        assert width == 1800


def test_plot_run_without_guidance_leaves_those_figures_out(tmp_path):
    row = {"kind": "train", "step": 1, "reward/unguided": 0.5, "trsft/weight_histogram": []}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert [path.name for path in plots.plot_run(tmp_path)] == ["unguided_reward.png"]


def test_nothing_to_plot_is_told_who_asks_and_does_not_fail_a_run_that_trained_nothing(tmp_path, capsys):
    overrides = ["plan={name: sft}", "objective={name: prefix_rft}", "steps=1"]  # advantages of problems with one sample are 0
    config = build_config(tmp_path, "run")
    assert cli.main(["run", f"{tmp_path}/run.yaml", f"output_dir={config.output_dir}", *overrides]) == 0
    assert "nothing was trained" in capsys.readouterr().out and plots.plot_run(config.output_dir) == []
    assert cli.main(["plot", config.output_dir]) == 2
    assert "where no step trained anything. Train more." in " ".join(capsys.readouterr().err.split())


def test_a_missing_metric_is_named(tmp_path):
    with pytest.raises(ValueError, match="accuracy/unguided, reward/unguided or accuracy is not in these metrics"):
        plots.plot_unguided(sft_rows(), tmp_path / "x.png")


def test_headroom_labels_each_group_in_order_and_all(tmp_path, drawn):
    plots.plot_headroom(SimpleNamespace(rows=headroom_rows()), tmp_path / "headroom.png")
    shown = texts(drawn[0])
    assert shown.index("depth 9") < shown.index("depth 10") < shown.index("all problems")
    assert "pass rate" in shown and "expert prefix given, % of the trace" in shown


def test_trsft_histogram_is_normalised_per_window(tmp_path, drawn):
    plots.plot_trsft_weights([train_row(step) for step in range(1, 31)], tmp_path / "trsft.png")
    axes = drawn[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["steps 1–3", "steps 15–17", "steps 28–30"]
    for axis in axes:
        heights = [bar.get_height() for bar in axis.patches]
        assert heights[0] == pytest.approx(0.75) and sum(heights) == pytest.approx(1)


def test_trsft_histogram_of_one_step_is_one_panel(tmp_path, drawn):
    plots.plot_trsft_weights([train_row(1)], tmp_path / "trsft.png")
    assert len(drawn[0].axes) == 1


def test_comparison_says_which_run_was_not_evaluated(tmp_path, drawn):
    runs = {"trapo": [train_row(1), train_row(2), eval_row(2)], "grpo": [train_row(1), train_row(2)]}
    plots.plot_comparison(runs, tmp_path / "compare.png")
    assert len(drawn[0].axes) == 2
    assert {"trapo", "grpo (no accuracy)"} <= set(texts(drawn[0]))


def with_sum(row, more):
    return row | {"reward/unguided": row["accuracy/unguided"] + more}


def test_a_reward_that_is_not_the_accuracy_has_a_panel_of_its_own(tmp_path, drawn):
    rows = [with_sum(train_row(step), -0.7) for step in (1, 2, 3)]
    plots.plot_unguided([*rows, eval_row(3, accuracy=0.9)], tmp_path / "x.png")
    accuracy, reward = drawn[0].axes
    assert [list(line.get_ydata()) for line in accuracy.lines[:2]] == [[row["accuracy/unguided"] for row in rows]] * 2
    assert [list(line.get_ydata()) for line in reward.lines] == [[row["reward/unguided"] for row in rows]] * 2
    assert (accuracy.get_ylabel(), reward.get_ylabel()) == ("accuracy", "mean reward") and accuracy.get_ylim()[0] == 0
    assert "held-out" in texts(accuracy) and "held-out" not in texts(reward)
    plots.plot_unguided([train_row(1), eval_row(1)], tmp_path / "x.png")
    assert [axis.get_ylabel() for axis in drawn[1].axes] == ["accuracy"]
    old = {key: value for key, value in train_row(1).items() if key != "accuracy/unguided"}  # of an earlier version
    plots.plot_unguided([old], tmp_path / "x.png")
    assert [axis.get_ylabel() for axis in drawn[2].axes] == ["mean reward"]
    plots.plot_comparison({"sum": rows, "one": [train_row(1)]}, tmp_path / "compare.png")
    assert [axis.get_title(loc="left") for axis in drawn[3].axes] == ["training accuracy", "training reward"]


def test_panels_of_training_begin_at_0_and_sets_of_other_difficulty_share_no_axis(tmp_path, drawn):
    def sets(easy, hard):
        return [eval_row(1, easy) | {"set": "easy"}, eval_row(1, hard) | {"set": "hard"}]

    plots.plot_comparison({"a": sets(0.9, 0.01), "b": sets(0.95, 0.03)}, tmp_path / "x.png")
    easy, hard = drawn[0].axes
    assert easy.get_ylim()[0] > 0.5 and hard.get_ylim()[1] < 0.5
    trained = [with_sum(train_row(step, 0.5), 0.2) for step in (1, 2, 3)]
    plots.plot_comparison({"a": trained, "b": [*trained, *sets(0.9, 0.01)]}, tmp_path / "x.png")
    plots.plot_comparison({"a": trained, "b": [*trained, eval_row(1, 0.9)]}, tmp_path / "x.png")
    assert [axis.get_ylim()[0] == 0 for axis in drawn[1].axes] == [True, False, False, True]
    accuracy, held_out, reward = drawn[2].axes
    assert accuracy.get_ylim() == held_out.get_ylim() and accuracy.get_ylim()[0] == 0 and reward.get_ylim()[0] == 0


def test_the_subtitle_says_what_is_there(tmp_path, drawn):
    plots.plot_unguided([train_row(1)], tmp_path / "x.png")
    plots.plot_unguided([*(train_row(step) for step in range(1, 31)), eval_row(30)], tmp_path / "x.png")
    plots.plot_expert_nll([{**eval_row(1), "expert_nll": 1.0}], tmp_path / "x.png")
    assert [figure.texts[1].get_text() for figure in drawn] == [
        "training: micro-group 1",
        "training: micro-group 1, line is the mean over 3 steps · held-out: ± 1 standard error",
        "negative log-likelihood, nats per token · held-out: dots",
    ]


def test_sft_beside_a_run_with_a_reward_shares_the_panel_of_the_loss(tmp_path, drawn):
    grpo = [train_row(1), {**eval_row(1), "expert_nll": 1.5}]
    sft = [row for row in sft_rows() if row["kind"] == "train"] + [{"kind": "eval", "step": 1, "expert_nll": 1.2}]
    plots.plot_comparison({"grpo": grpo, "sft": sft}, tmp_path / "compare.png")
    assert [axis.get_title(loc="left") for axis in drawn[0].axes] == [
        "training accuracy",
        "held-out accuracy",
        "held-out expert_nll",
    ]
    assert [text for text in texts(drawn[0]) if text.startswith(("grpo", "sft"))] == ["grpo", "sft"]  # by the last panel, once
    plots.plot_comparison({"grpo": [grpo[0], eval_row(1)], "sft": sft}, tmp_path / "compare.png")
    assert "sft (no accuracy)" in texts(drawn[1]) and len(drawn[1].axes) == 2


def test_long_names_of_runs_are_whole_in_the_picture_and_on_no_panel(tmp_path, drawn):
    names = [f"qwen2.5-math-7b-sft-openr1-46k-lr5e-6-seed{i}" for i in range(3)]
    sets = [{**row, "set": which} for row in sft_rows() if row["kind"] == "eval" for which in ("a", "b", "c", "d")]
    path = plots.plot_comparison(dict.fromkeys(names, sets), tmp_path / "compare.png")
    figure = drawn[0]
    assert [bool(axis.get_ylabel()) for axis in figure.axes] == [True, False] * 2
    width = int.from_bytes(path.read_bytes()[16:20], "big") / figure.dpi
    labels = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() in names]
    assert [text.axes for text in labels] == [figure.axes[1]] * 3 + [figure.axes[3]] * 3
    assert 9 < max(text.get_window_extent().x1 for text in labels) / figure.dpi < width


def several_sets(step, shift=0.0):
    return [{**eval_row(step, accuracy + shift), "set": name} for name, accuracy in (("aime", 0.1), ("amc", 0.4), ("math", 0.7))]


def test_several_sets_have_a_line_each_and_in_a_comparison_a_panel_each(tmp_path, drawn):
    rows = [train_row(1), *several_sets(1), train_row(2), *several_sets(2)]
    plots.plot_unguided(rows, tmp_path / "x.png")
    assert {"training", "aime", "amc", "math"} <= set(texts(drawn[0]))
    other = [train_row(1), train_row(2), *several_sets(2)[:2]]
    plots.plot_comparison({"trapo": rows, "grpo": other}, tmp_path / "compare.png")
    headings = [axis.get_title(loc="left") for axis in drawn[1].axes]
    assert headings == ["training accuracy", "aime accuracy", "amc accuracy", "math accuracy"]
    assert [text for text in texts(drawn[1].axes[1]) if text in ("trapo", "grpo")] == ["trapo", "grpo"]
    assert "grpo (no accuracy)" in texts(drawn[1].axes[3])


def test_compare_runs_tells_equal_names_apart(tmp_path, drawn):
    for parent in ("a", "b"):
        directory = tmp_path / parent / "trapo"
        directory.mkdir(parents=True)
        (directory / "metrics.jsonl").write_text(json.dumps(eval_row(1)) + "\n")
    plots.compare_runs([tmp_path / "a" / "trapo", tmp_path / "b" / "trapo"], tmp_path / "compare.png")
    assert {"a/trapo", "b/trapo"} <= set(texts(drawn[0]))
    for parent in ("a", "b"):
        (tmp_path / parent / "seed" / "run").mkdir(parents=True)
        (tmp_path / parent / "seed" / "run" / "metrics.jsonl").write_text(json.dumps(eval_row(1)) + "\n")
    plots.compare_runs([tmp_path / "a" / "seed" / "run", tmp_path / "b" / "seed" / "run"], tmp_path / "compare.png")
    assert {"a/seed/run", "b/seed/run"} <= set(texts(drawn[1]))
    runs = [tmp_path / "a" / "trapo", tmp_path / "b" / "trapo"]
    assert plots.compare_runs(runs, tmp_path / "named").name == "named.png" and (tmp_path / "named.png").exists()
    with pytest.raises(UserError, match=r"a plot must be one of .*png, .*, got .*x\.foo\. Choose another suffix"):
        plots.compare_runs(runs, tmp_path / "x.foo")
    with pytest.raises(ValueError, match="each run must be given once"):
        plots.compare_runs([tmp_path / "a" / "trapo", tmp_path / "a" / ".." / "a" / "trapo"], tmp_path / "compare.png")


def test_held_out_accuracy_is_drawn_where_no_sample_is_unguided_and_every_rung_of_a_ladder_has_a_line(tmp_path, drawn):
    rows = [{"kind": "train", "step": step, "expert/logprob": -1.0, "guided_share": 0.3} for step in range(1, 5)]
    rows = [row | {f"guided_share/micro_group_{i}": 0.1 * (i - 1) for i in range(1, 7)} for row in rows] + [
        eval_row(2),
        eval_row(4),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "unguided_reward.png" in [path.name for path in plots.plot_run(tmp_path)]
    share = next(figure for figure in drawn if "all samples" in texts(figure))
    assert [text for text in texts(share) if text.startswith("micro-group")] == [f"micro-group {i}" for i in range(2, 7)]


def test_accuracy_by_group_skips_groups_a_run_lacks(tmp_path, drawn):
    evaluations = {"base": {"accuracy/depth_1": 0.2, "accuracy/depth_2": 0.1}, "TRAPO": {"accuracy/depth_2": 0.6}}
    plots.plot_accuracy_by_group(evaluations, tmp_path / "accuracy.png")
    assert {"base", "TRAPO", "depth 1", "depth 2"} <= set(texts(drawn[0]))


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"trapo\[train\]"):
        plots.plot_unguided([train_row(1)], tmp_path / "x.png")


def test_running_mean_is_centred_and_keeps_the_length():
    assert figures.running_mean([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
    assert figures.running_mean([1, 2], 1) == [1, 2]


@pytest.mark.parametrize("window", [1, 3, 7, 25])
@pytest.mark.parametrize("odd_ones", [{}, {4: math.nan}, {9: math.inf, 12: -math.inf}, {3: 1e30}, {0: -math.inf, 19: math.nan}])
def test_running_mean_of_a_window_knows_its_own_values_alone(window, odd_ones):
    values = [odd_ones.get(i, math.sin(i)) for i in range(20)]
    windows = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(20)]
    expected = [sum(part) / len(part) for part in windows]
    assert figures.running_mean(values, window) == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


def test_running_mean_of_a_long_run_takes_memory_for_its_values_and_not_for_its_windows():
    tracemalloc.start()
    figures.running_mean([0.5] * 20_000, figures.window_of(20_000))
    peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak_mib < 10  # the windows have 33 million values


def test_a_long_run_is_drawn_with_some_of_its_dots_and_all_of_its_mean():
    _, (axis,) = figures.new_figure("", "")
    values = [math.sin(step) for step in range(12_000)]
    values[-1] = 0.5  # neither the least nor the greatest of those around it
    spikes = {7001: 50.0, 7004: -50.0, 9002: 60.0, 9999: -60.0}
    for step, value in {**spikes, 9001: math.nan, 9003: math.inf, 9998: -math.inf}.items():
        values[step] = value
    figures.draw_smoothed(axis, list(range(12_000)), values, figures.INK)
    dots, line = axis.get_lines()
    drawn = dict(zip(dots.get_xdata(), dots.get_ydata(), strict=True))
    assert len(drawn) <= figures.MOST_DOTS + 1 and drawn.items() >= spikes.items() and drawn[11_999] == 0.5
    assert list(drawn) == sorted(drawn) and all(values[step] == value for step, value in drawn.items())
    assert len(line.get_xdata()) == 12_000


def test_a_long_run_that_changes_nothing_has_dots_all_along():
    _, (axis,) = figures.new_figure("", "")
    assert figures.draw_smoothed(axis, list(range(12_000)), [1.0] * 12_000, figures.INK) == 1.0
    assert list(axis.get_lines()[0].get_xdata()) == [*range(0, 12_000, 5), 11_999]


@pytest.mark.parametrize("positions", [[0.5, 0.5, 0.5], [1, 0, 0.05, 0.95], [0.0], [0.3, 0.31, 0.35, 0.36, 0.9]])
def test_spread_keeps_order_and_gap_and_mean(positions):
    placed = figures.spread(positions, 0.1)
    order = sorted(range(len(positions)), key=lambda i: (positions[i], -i))
    gaps = [placed[b] - placed[a] for a, b in itertools.pairwise(order)]
    assert all(gap >= 0.1 - 1e-9 for gap in gaps)
    assert math.isclose(sum(placed), sum(positions))


def test_spread_puts_the_first_of_equals_on_top():
    first, second = figures.spread([0.5, 0.5], 0.1)
    assert first > second


def test_spread_leaves_distant_labels_alone():
    assert figures.spread([0.9, 0.1], 0.1) == [0.9, 0.1]


def sft_rows(shift=0.0):
    rows = [{"kind": "train", "step": step, "expert/logprob": -2.0 / step - shift, "guided_share": 1.0} for step in range(1, 7)]
    for name in ("aime", "math"):
        rows += [{"kind": "eval", "step": step, "set": name, "expert_nll": 2.0 - step / 6 + shift} for step in (0, 3, 6)]
    return rows


def test_the_loss_of_expert_traces_in_training_and_held_out(drawn, tmp_path):
    plots.plot_expert_nll(sft_rows(), tmp_path / "expert_nll.png")
    lines = [line for line in drawn[0].axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in lines] == [[2.0, 1.5, 1.0]] * 2
    assert {"training", "aime", "math"} <= set(texts(drawn[0]))
    with pytest.raises(ValueError, match="expert_nll"):
        plots.plot_expert_nll([], tmp_path / "none.png")


def test_runs_without_a_reward_are_compared_by_their_held_out_loss(drawn, tmp_path):
    runs = {"first": sft_rows(), "second": [row for row in sft_rows(0.5) if row.get("set") != "math"]}
    plots.plot_comparison(runs, tmp_path / "compare.png")
    aime, math_set = drawn[0].axes
    assert [line.get_ydata()[-1] for line in aime.lines] == [1.0, 1.5] and len(math_set.lines) == 1
    with pytest.raises(ValueError, match="accuracy/unguided, reward/unguided, accuracy, expert_nll or expert/logprob"):
        plots.plot_comparison({"none": []}, tmp_path / "none.png")


def test_traces_alone_without_held_out_problems_show_their_loss_and_no_share_of_guided_samples(drawn, tmp_path):
    trained = [row for row in sft_rows() if row["kind"] == "train"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained))
    assert [path.name for path in plots.plot_run(tmp_path)] == ["expert_nll.png"]
    (lower, upper) = (line.get_ydata()[-1] for line in drawn[0].axes[0].lines)
    assert lower == upper == pytest.approx(2 / 6)  # dots and their running mean
    worse = [{**row, "expert/logprob": -3.0} for row in trained]
    plots.plot_comparison({"first": trained, "second": worse}, tmp_path / "compare.png")
    assert {"first", "second"} <= set(texts(drawn[1])) and drawn[1].axes[0].lines[-1].get_ydata()[-1] == 3.0
