"""PNG plots of a run: headroom, unguided reward, guided share, loss of expert traces, entropy, TrSFT weights, and several runs in
one figure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trapo_train.display import read_metrics
from trapo_train.figures import (
    INK,
    PALETTE,
    draw_smoothed,
    group_accuracies,
    group_label,
    group_order,
    label_right,
    new_figure,
    percent_axis,
    ramp,
    require,
    run_colours,
    save_figure,
    window_of,
)  # fmt: skip
from trapo_train.schema import UserError

if TYPE_CHECKING:
    from trapo_train.headroom import HeadroomReport

Row = dict[str, Any]

HELD_OUT = "held-out"  # the set of a run that evaluates one without a name


def _series(rows: Iterable[Row], metric: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[metric]) for row in rows if row["kind"] == "train" and row.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _held_out(rows: Iterable[Row], metric: str = "accuracy") -> dict[str, list[Row]]:
    """The evaluations of each set that have `metric` by its name, in the order in which they were recorded."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "eval" and row.get(metric) is not None:
            found.setdefault(row.get("set", HELD_OUT), []).append(row)
    return found


def _draw_held_out(axis: Any, evaluations: Sequence[Row], colour: Any, metric: str = "accuracy") -> float:
    """`metric` over steps, with its standard error where that is known; returns where the line ends."""
    errors = [row.get(f"{metric}_stderr") or 0.0 for row in evaluations]
    steps, values = [row["step"] for row in evaluations], [row[metric] for row in evaluations]
    axis.errorbar(steps, values, errors, color=colour, marker="o", markersize=7, linewidth=1.4, elinewidth=1.6, zorder=4)
    return values[-1]


def plot_headroom(report: HeadroomReport, path: str | Path) -> Path:
    """Pass rate against the fraction of the expert trace that is given, one line per group and one for all.

    `report.rows` carry fraction, group ("all" for every problem), pass_rate, n and standard_error.
    """
    require(report.rows, "a headroom measurement")
    figure, (axis,) = new_figure(
        "Headroom: what an expert prefix is worth to this model",
        "pass rate of completions sampled after a prefix of the expert trace · bars: ± 1 standard error",
        height=5.2,
    )
    names = sorted({row.group for row in report.rows}, key=group_order)
    groups = [name for name in names if name != "all"]
    colours = dict(zip(groups, ramp(len(groups)), strict=True)) | {"all": INK}
    labels = []
    for name in [*groups, *(["all"] if "all" in names else [])]:
        rows = sorted((row for row in report.rows if row.group == name), key=lambda row: row.fraction)
        x, y, error = zip(*[(100 * row.fraction, row.pass_rate, row.standard_error) for row in rows], strict=True)
        whole = name == "all"
        axis.errorbar(
            x, y, error, color=colours[name], marker="o", markersize=6 if whole else 4.5, linewidth=3 if whole else 1.8,
            elinewidth=1.6 if whole else 0.7, zorder=4 if whole else 3,
        )  # fmt: skip
        labels.append(("all problems" if whole else group_label(name), y[-1], colours[name]))
    percent_axis(axis)
    axis.set_xlabel("expert prefix given, % of the trace")
    axis.set_ylabel("pass rate")
    axis.set_xticks(sorted({100 * row.fraction for row in report.rows}))
    label_right(axis, labels)
    return save_figure(figure, path)


def plot_unguided_reward(rows: Sequence[Row], path: str | Path) -> Path:
    """Reward of unguided samples (of micro-group 1) over steps, and held-out accuracy where the run evaluated."""
    steps, values = _series(rows, "reward/unguided")
    require(steps, "reward/unguided")
    figure, (axis,) = new_figure(
        "Reward without guidance",
        f"training: micro-group 1, line is the mean over {window_of(len(steps))} steps · held-out: ± 1 standard error",
    )
    labels = [("training", draw_smoothed(axis, steps, values, PALETTE[0]), PALETTE[0])]
    for (name, evaluations), colour in zip(_held_out(rows).items(), itertools.cycle(PALETTE[1:])):
        labels.append((name, _draw_held_out(axis, evaluations, colour), colour))
    axis.set_ylim(min(0.0, *values), None)
    axis.set_xlabel("rollout step")
    axis.set_ylabel("mean reward, accuracy")
    label_right(axis, labels)
    return save_figure(figure, path)


def plot_expert_nll(rows: Sequence[Row], path: str | Path) -> Path:
    """Negative log-likelihood of expert tokens over steps: of those that training saw, and of held-out traces."""
    figure, (axis,) = new_figure(
        "Loss of expert traces",
        "negative log-likelihood, nats per token · training: tokens of the step, running mean · held-out: dots",
    )
    labels = []
    steps, values = _series(rows, "expert/logprob")
    if steps:
        labels.append(("training", draw_smoothed(axis, steps, [-value for value in values], PALETTE[0]), PALETTE[0]))
    for (name, evaluations), colour in zip(_held_out(rows, "expert_nll").items(), itertools.cycle(PALETTE[1:])):
        labels.append((name, _draw_held_out(axis, evaluations, colour, "expert_nll"), colour))
    require(labels, "expert_nll")
    axis.set_xlabel("rollout step")
    axis.set_ylabel("nats per token")
    label_right(axis, labels)
    return save_figure(figure, path)


def plot_guided_share(rows: Sequence[Row], path: str | Path) -> Path:
    """Share of samples that started from an expert prefix, by micro-group and over all samples."""
    figure, (axis,) = new_figure(
        "How often the ladder reaches for the expert",
        "share of samples with an expert prefix · dots: one step · line: running mean",
    )
    labels = []
    for micro_group, colour in zip((2, 3, 4), ramp(3), strict=True):
        steps, values = _series(rows, f"guided_share/micro_group_{micro_group}")
        if steps:
            labels.append((f"micro-group {micro_group}", draw_smoothed(axis, steps, values, colour), colour))
    steps, values = _series(rows, "guided_share")
    require(steps, "guided_share")
    labels.append(("all samples", draw_smoothed(axis, steps, values, INK, linewidth=3), INK))
    percent_axis(axis)
    axis.set_xlabel("rollout step")
    axis.set_ylabel("guided samples")
    label_right(axis, labels)
    return save_figure(figure, path)


def plot_entropy(rows: Sequence[Row], path: str | Path) -> Path:
    """Entropy of the policy over steps: on the tokens it wrote, on expert tokens, and by its sampler on all that it wrote."""
    figure, (axis,) = new_figure(
        "Entropy of the policy",
        "mean over the tokens with a gradient, and over all sampled ones · dots: one step · line: running mean",
    )
    labels = []
    kinds = (
        ("sampled", "all sampled", PALETTE[7]),
        ("rollout", "own tokens", PALETTE[0]),
        ("expert", "expert tokens", PALETTE[1]),
    )
    for role, name, colour in kinds:
        steps, values = _series(rows, f"entropy/{role}")
        if steps:
            labels.append((name, draw_smoothed(axis, steps, values, colour), colour))
    require(labels, "entropy/sampled, entropy/rollout or entropy/expert")
    axis.set_ylim(0, None)
    axis.set_xlabel("rollout step")
    axis.set_ylabel("entropy, nats per token")
    label_right(axis, labels)
    return save_figure(figure, path)


def plot_trsft_weights(rows: Sequence[Row], path: str | Path) -> Path:
    """How much of each expert token's gradient TrSFT lets through, at the beginning, middle and end of the run."""
    found = [(r["step"], r["trsft/weight_histogram"]) for r in rows if r.get("trsft/weight_histogram")]
    found = [(step, counts) for step, counts in found if sum(counts) > 0]
    require(found, "trsft/weight_histogram with a counted token")
    width = max(1, len(found) // 10)
    middle = max(0, len(found) // 2 - width // 2)
    windows = [found[:width], found[middle : middle + width], found[-width:]][: len(found)]
    figure, axes = new_figure(
        "TrSFT weight of expert tokens",
        "1: learned as in SFT, p ≥ α · towards 0: a token the policy would hardly write, held back",
        panels=len(windows),
        right=0.975,
    )
    for axis, window in zip(axes, windows, strict=True):
        bins = len(window[0][1])
        totals = [sum(counts[i] for _, counts in window) for i in range(bins)]
        share = [total / sum(totals) for total in totals]
        colours = [PALETTE[5]] * (bins - 1) + [PALETTE[0]]
        axis.bar([(i + 0.5) / bins for i in range(bins)], share, width=0.86 / bins, color=colours)
        axis.annotate(f"{100 * share[-1]:.1f} %", (1 - 0.5 / bins, share[-1]), (0, 4), ha="center", color=PALETTE[0],
                      textcoords="offset points", fontsize=11.5, fontweight="bold")  # fmt: skip
        first, last = window[0][0], window[-1][0]
        axis.set_title(f"step {first}" if first == last else f"steps {first}–{last}", fontsize=12, color=INK, loc="left")
        axis.set_xticks([0, 0.5, 1])
    # A policy that knows its expert puts nearly every token into the last bin; the few held back show on a log scale only.
    axes[0].set_yscale("log")
    axes[0].set_ylim(5e-4, 2.0)
    axes[0].set_yticks([0.001, 0.01, 0.1, 1.0], ["0.1 %", "1 %", "10 %", "100 %"])
    axes[0].minorticks_off()
    axes[len(axes) // 2].set_xlabel("TrSFT weight  min(p / α, 1)")
    axes[0].set_ylabel("expert tokens, log scale")
    return save_figure(figure, path)


def plot_comparison(runs: dict[str, Sequence[Row]], path: str | Path) -> Path:
    """Several runs in one figure: unguided reward in the first panel, then held-out accuracy, a panel for each set; of runs without
    a reward the loss of expert traces, held-out ones if there are any."""
    require(list(runs), "any run")
    if not any(_series(rows, "reward/unguided")[0] or _held_out(rows) for rows in runs.values()):
        return _compare_expert_nll(runs, path)
    held_out = {name: _held_out(rows) for name, rows in runs.items()}
    sets = list(dict.fromkeys(which for evaluations in held_out.values() for which in evaluations))
    figure, axes = new_figure(
        "Runs compared",
        "reward of training prompts: micro-group 1, running mean · held-out accuracy: ± 1 standard error",
        panels=1 + len(sets),
        columns=2 if len(sets) in (1, 3) else 3,
        share_y=len(sets) == 1,  # several sets differ more in difficulty than the runs do on one of them
    )
    labels: list[list[tuple[str, float, Any]]] = [[] for _ in axes]
    for (name, rows), colour in zip(runs.items(), run_colours(runs), strict=True):
        steps, values = _series(rows, "reward/unguided")
        labels[0].append((name, draw_smoothed(axes[0], steps, values, colour) if steps else 0.0, colour))
        for axis, which, found in zip(axes[1:], sets, labels[1:], strict=True):
            evaluations = held_out[name].get(which)
            if evaluations:
                found.append((name, _draw_held_out(axis, evaluations, colour), colour))
    for axis, heading in zip(axes, ("reward without guidance", *(f"{which} accuracy" for which in sets)), strict=True):
        axis.set_title(heading, fontsize=12, color=INK, loc="left")
        axis.set_xlabel("rollout step")
    axes[0].set_ylim(min(0.0, axes[0].get_ylim()[0]), None)
    _label_runs(axes, labels)
    return save_figure(figure, path)


def _compare_expert_nll(runs: dict[str, Sequence[Row]], path: str | Path) -> Path:
    losses = {name: _held_out(rows, "expert_nll") for name, rows in runs.items()}
    sets = list(dict.fromkeys(which for evaluations in losses.values() for which in evaluations))
    if not sets:
        return _compare_training_nll(runs, path)
    figure, axes = new_figure(
        "Runs compared", "loss of held-out expert traces, nats per token", panels=len(sets), columns=min(3, len(sets))
    )
    for axis, which in zip(axes, sets, strict=False):
        found = [
            (name, losses[name][which], colour)
            for name, colour in zip(runs, run_colours(runs), strict=True)
            if which in losses[name]
        ]
        label_right(axis, [(name, _draw_held_out(axis, rows, colour, "expert_nll"), colour) for name, rows, colour in found])
        axis.set_title(which if len(sets) > 1 else "", fontsize=12, color=INK, loc="left")
        axis.set_xlabel("rollout step")
    axes[0].set_ylabel("nats per token")
    return save_figure(figure, path)


def _compare_training_nll(runs: dict[str, Sequence[Row]], path: str | Path) -> Path:
    figure, (axis,) = new_figure("Runs compared", "loss of expert traces in training, nats per token · line: running mean")
    labels = []
    for (name, rows), colour in zip(runs.items(), run_colours(runs), strict=True):
        steps, values = _series(rows, "expert/logprob")
        if steps:
            labels.append((name, draw_smoothed(axis, steps, [-value for value in values], colour), colour))
    require(labels, "reward/unguided, accuracy, expert_nll or expert/logprob")
    axis.set_xlabel("rollout step")
    axis.set_ylabel("nats per token")
    label_right(axis, labels)
    return save_figure(figure, path)


def _label_runs(axes: Sequence[Any], labels: Sequence[list[tuple[str, float, Any]]]) -> None:
    """Name the runs right of the last panel of each row; one that is not in it says so."""
    for number, axis in enumerate(axes):
        last_of_row = number + 1 == len(axes) or axes[number + 1].get_position().x0 < axis.get_position().x0
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("mean reward, accuracy" if number == 0 else "accuracy")
        if last_of_row:
            missing = [label for label in labels[0] if label[0] not in {name for name, _, _ in labels[number]}]
            label_right(axis, labels[number] + [(f"{name}\n(not evaluated)", end, colour) for name, end, colour in missing])


def plot_accuracy_by_group(evaluations: dict[str, Row], path: str | Path) -> Path:
    """Held-out accuracy by group, one line per evaluation, for example a base model and what training made of it."""
    found = {name: group_accuracies(row) for name, row in evaluations.items()}
    names = sorted({group for groups in found.values() for group in groups}, key=group_order)
    require(names, "accuracy by group")
    figure, (axis,) = new_figure("Held-out accuracy", "bars: ± 1 standard error")
    labels = []
    for (name, groups), colour in zip(found.items(), run_colours(evaluations), strict=True):
        x = [i for i, group in enumerate(names) if group in groups]
        y, error = zip(*(groups[names[i]] for i in x), strict=True)
        axis.errorbar(
            x, y, [value or 0.0 for value in error], color=colour, marker="o", markersize=7, linewidth=1.8, elinewidth=1.6
        )
        labels.append((name, y[-1], colour))
    percent_axis(axis)
    axis.set_xticks(range(len(names)), [group_label(group) for group in names])
    axis.set_ylabel("accuracy")
    label_right(axis, labels)
    return save_figure(figure, path)


RUN_PLOTS: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Row], Path], Path]]] = {  # with the metrics, one of which is needed
    "unguided_reward.png": (("reward/unguided",), plot_unguided_reward),
    "guided_share.png": (("guided_share",), plot_guided_share),
    "expert_nll.png": (("expert_nll", "expert/logprob"), plot_expert_nll),
    "entropy.png": (("entropy/sampled", "entropy/rollout", "entropy/expert"), plot_entropy),
    "trsft_weights.png": (("trsft/weight_histogram",), plot_trsft_weights),
}


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw every plot whose metrics the run recorded into `run_dir`/plots; returns the paths.

    Raises FileNotFoundError where there are no metrics, UserError where none of them can be plotted.
    """
    rows = read_metrics(run_dir)
    recorded = {key for row in rows for key, value in row.items() if value not in (None, [])}
    if set(_series(rows, "guided_share")[1]) in ({0.0}, {1.0}):  # by the plan, which needs no figure
        recorded.remove("guided_share")
    directory = Path(run_dir) / "plots"
    paths = [draw(rows, directory / name) for name, (metrics, draw) in RUN_PLOTS.items() if recorded.intersection(metrics)]
    if not paths:
        raise UserError(f"{run_dir}: none of the {len(rows)} rows holds a metric that can be plotted. Train some steps first.")
    return paths


def compare_runs(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """One figure for several runs, named after their directories (with parents where two share a name)."""
    directories = [Path(run_dir).resolve() for run_dir in run_dirs]
    names = [directory.name for directory in directories]
    if len(set(names)) < len(names):
        names = [f"{directory.parent.name}/{directory.name}" for directory in directories]
    return plot_comparison({n: read_metrics(d) for n, d in zip(names, directories, strict=True)}, path)
