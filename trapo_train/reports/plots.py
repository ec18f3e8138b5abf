"""PNG plots of a run: headroom, unguided accuracy and reward, guided share, loss of expert traces, entropy, TrSFT weights, and
several runs in one figure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trapo_train.reports.figures import (
    INK,
    PALETTE,
    draw_smoothed,
    label_right,
    new_figure,
    percent_axis,
    ramp,
    require,
    run_colours,
    save_figure,
    window_of,
)  # fmt: skip
from trapo_train.reports.metrics_log import group_accuracies, group_label, group_order, read_metrics
from trapo_train.schema import UserError

if TYPE_CHECKING:
    from trapo_train.evaluation.headroom import HeadroomReport

Row = dict[str, Any]

UNGUIDED, UNGUIDED_REWARD = "accuracy/unguided", "reward/unguided"
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


def plot_unguided(rows: Sequence[Row], path: str | Path) -> Path:
    """Accuracy of unguided samples (of micro-group 1) and held-out accuracy over steps, and in a panel of its own the reward where
    that is another number, as a weighted sum is."""
    accuracy, reward, held_out = _series(rows, UNGUIDED), _series(rows, UNGUIDED_REWARD), _held_out(rows)
    require(accuracy[0] or reward[0] or held_out, f"{UNGUIDED}, {UNGUIDED_REWARD} or accuracy")
    panels = [name for name, shown in (("accuracy", accuracy[0] or held_out), ("reward", reward != accuracy)) if shown]
    steps = accuracy[0] or reward[0]
    window = window_of(len(steps))
    explained = ["training: micro-group 1" + (f", line is the mean over {window} steps" if window > 1 else "")] * bool(steps)
    figure, axes = new_figure(
        f"{' and '.join(panels).capitalize()} without guidance",
        " · ".join(explained + ["held-out: ± 1 standard error"] * bool(held_out)),
        panels=len(panels),
        columns=1,
    )
    for axis, name in zip(axes, panels, strict=True):
        steps, values = accuracy if name == "accuracy" else reward
        labels = [("training", draw_smoothed(axis, steps, values, PALETTE[0]), PALETTE[0])] if steps else []
        for (which, evaluations), colour in zip(held_out.items() if name == "accuracy" else (), itertools.cycle(PALETTE[1:])):
            labels.append((which, _draw_held_out(axis, evaluations, colour), colour))
        if min(values, default=0.0) >= 0:
            axis.set_ylim(0.0, None)
        axis.set_ylabel(f"mean {name}" if name == "reward" else name)
        label_right(axis, labels)
    axes[-1].set_xlim(axes[0].get_xlim())
    axes[-1].set_xlabel("step")
    return save_figure(figure, path)


def _save_over_steps(figure: Any, axis: Any, labels: Sequence[tuple[str, float, str]], ylabel: str, path: str | Path) -> Path:
    axis.set_xlabel("step")
    axis.set_ylabel(ylabel)
    label_right(axis, labels)
    return save_figure(figure, path)


def plot_expert_nll(rows: Sequence[Row], path: str | Path) -> Path:
    """Negative log-likelihood of expert tokens over steps: of those that training saw, and of held-out traces."""
    (steps, values), held_out = _series(rows, "expert/logprob"), _held_out(rows, "expert_nll")
    explained = ["training: tokens of the step, running mean"] * bool(steps) + ["held-out: dots"] * bool(held_out)
    figure, (axis,) = new_figure("Loss of expert traces", " · ".join(["negative log-likelihood, nats per token", *explained]))
    labels = []
    if steps:
        labels.append(("training", draw_smoothed(axis, steps, [-value for value in values], PALETTE[0]), PALETTE[0]))
    for (name, evaluations), colour in zip(held_out.items(), itertools.cycle(PALETTE[1:])):
        labels.append((name, _draw_held_out(axis, evaluations, colour, "expert_nll"), colour))
    require(labels, "expert_nll")
    return _save_over_steps(figure, axis, labels, "nats per token", path)


def plot_guided_share(rows: Sequence[Row], path: str | Path) -> Path:
    """Share of samples that started from an expert prefix, by micro-group and over all samples."""
    figure, (axis,) = new_figure(
        "How often the ladder reaches for the expert",
        "share of samples with an expert prefix · dots: one step · line: running mean",
    )
    labels = []
    prefix = "guided_share/micro_group_"
    groups = sorted({int(key.removeprefix(prefix)) for row in rows for key in row if key.startswith(prefix)})
    found = {group: _series(rows, f"{prefix}{group}") for group in groups}
    found = {group: series for group, series in found.items() if group > 1 or any(series[1])}  # the first mostly has no prefix
    for (micro_group, (steps, values)), colour in zip(found.items(), ramp(len(found)), strict=True):
        labels.append((f"micro-group {micro_group}", draw_smoothed(axis, steps, values, colour), colour))
    steps, values = _series(rows, "guided_share")
    require(steps, "guided_share")
    labels.append(("all samples", draw_smoothed(axis, steps, values, INK, linewidth=3), INK))
    percent_axis(axis)
    return _save_over_steps(figure, axis, labels, "guided samples", path)


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
    return _save_over_steps(figure, axis, labels, "entropy, nats per token", path)


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


@dataclass(frozen=True)
class _Panel:
    """One axis of a comparison."""

    heading: str
    what: str
    """What it shows of a run, and what a run that is not in it has none of."""
    note: str
    """How to read it, below the title of the figure."""
    draw: dict[str, Callable[[Any, Any], float]]
    """By the name of each run that has it: draws it onto an axis in a colour, and returns where its line ends."""
    of_training: bool
    """Whether it shows training, and not held-out sets."""


def plot_comparison(runs: dict[str, Sequence[Row]], path: str | Path) -> Path:
    """Several runs in one figure: accuracy without guidance, in training and held-out, a panel for each set; the reward where that
    is another number; the loss of held-out expert traces where two runs have it, or there is nothing else, or that in training."""
    require(list(runs), "any run")
    panels = _panels(runs)
    require(panels, f"{UNGUIDED}, {UNGUIDED_REWARD}, accuracy, expert_nll or expert/logprob")
    figure, axes = new_figure(
        "Runs compared",
        " · ".join(dict.fromkeys(panel.note for panel in panels)),
        panels=len(panels),
        columns=2 if len(panels) in (2, 4) else 3,
        share_y=False,  # several sets differ more in difficulty than the runs do on one of them
    )
    colours = dict(zip(runs, run_colours(runs), strict=True))
    ends = []
    for axis, panel in zip(axes, panels, strict=True):
        ends.append([(name, draw(axis, colours[name]), colours[name]) for name, draw in panel.draw.items()])
        axis.set_title(panel.heading if len(panels) > 1 else "", fontsize=12, color=INK, loc="left")
        axis.set_xlabel("step")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("nats per token" if panel.what == "expert_nll" else panel.what)
        if panel.of_training and panel.what != "expert_nll" and axis.dataLim.ymin >= 0:
            axis.set_ylim(0.0, None)
    accuracies = [axis for axis, panel in zip(axes, panels, strict=True) if panel.what == "accuracy"]
    if len(accuracies) == 2 and panels[0].of_training:  # training and the one held-out set
        highest = max(axis.get_ylim()[1] for axis in accuracies)
        for axis in accuracies:
            axis.set_ylim(0.0, highest)
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        # The runs are named right of the last panel of each row.
        if number + 1 == len(axes) or axes[number + 1].get_position().x0 < axis.get_position().x0:
            absent = [(f"{name} (no {panel.what})", colours[name]) for name in runs if name not in panel.draw]
            label_right(axis, ends[number], absent)
    return save_figure(figure, path)


def _panels(runs: dict[str, Sequence[Row]]) -> list[_Panel]:
    found = [_training_panel(runs, UNGUIDED, "accuracy"), *_held_out_panels(runs, "accuracy")]
    if any(_series(rows, UNGUIDED_REWARD) != _series(rows, UNGUIDED) for rows in runs.values()):
        found.append(_training_panel(runs, UNGUIDED_REWARD, "reward"))
    found = [panel for panel in found if panel.draw]
    losses = _held_out_panels(runs, "expert_nll")
    found += [panel for panel in losses if len(panel.draw) > 1 or not found]
    trained = _training_panel(runs, "expert/logprob", "expert_nll")
    return found or [trained] * bool(trained.draw)


def _training_panel(runs: dict[str, Sequence[Row]], metric: str, what: str) -> _Panel:
    traces = what == "expert_nll"

    def drawer(steps: list[int], values: list[float]) -> Callable[[Any, Any], float]:
        return lambda axis, colour: draw_smoothed(axis, steps, [-value if traces else value for value in values], colour)

    series = {name: _series(rows, metric) for name, rows in runs.items()}
    note = f"training: {'expert tokens' if traces else 'unguided'}, running mean"
    return _Panel(f"training {what}", what, note, {name: drawer(*points) for name, points in series.items() if points[0]}, True)


def _held_out_panels(runs: dict[str, Sequence[Row]], metric: str) -> list[_Panel]:
    """A panel for each set that any run was evaluated on."""

    def drawer(evaluations: list[Row]) -> Callable[[Any, Any], float]:
        return lambda axis, colour: _draw_held_out(axis, evaluations, colour, metric)

    held_out = {name: _held_out(rows, metric) for name, rows in runs.items()}
    sets = dict.fromkeys(which for evaluations in held_out.values() for which in evaluations)
    note = "held-out: ± 1 standard error" if metric == "accuracy" else "held-out expert_nll: nats per token"
    draws = {which: {name: drawer(found[which]) for name, found in held_out.items() if which in found} for which in sets}
    return [_Panel(f"{which} {metric}", metric, note, draw, False) for which, draw in draws.items()]


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
    "unguided_reward.png": ((UNGUIDED, UNGUIDED_REWARD, "accuracy"), plot_unguided),
    "guided_share.png": (("guided_share",), plot_guided_share),
    "expert_nll.png": (("expert_nll", "expert/logprob"), plot_expert_nll),
    "entropy.png": (("entropy/sampled", "entropy/rollout", "entropy/expert"), plot_entropy),
    "trsft_weights.png": (("trsft/weight_histogram",), plot_trsft_weights),
}


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw every plot whose metrics the run recorded into `run_dir`/plots; returns the paths, none of a run that trained nothing.

    Raises FileNotFoundError where there are no metrics.
    """
    rows = read_metrics(run_dir)
    recorded = {key for row in rows for key, value in row.items() if value not in (None, [])}
    if set(_series(rows, "guided_share")[1]) in ({0.0}, {1.0}):  # by the plan, which needs no figure
        recorded.remove("guided_share")
    directory = Path(run_dir) / "plots"
    return [draw(rows, directory / name) for name, (metrics, draw) in RUN_PLOTS.items() if recorded.intersection(metrics)]


def compare_runs(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """One figure for several runs, named after their directories (with as many parents as tell them apart)."""
    directories = [Path(run_dir).resolve() for run_dir in run_dirs]
    if len(set(directories)) < len(directories):
        raise UserError(f"compare: each run must be given once, got {', '.join(map(str, run_dirs))}.")
    names, parts = [], 0
    while len(set(names)) < len(directories):
        parts += 1
        names = ["/".join(directory.parts[-parts:]) for directory in directories]
    return plot_comparison({n: read_metrics(d) for n, d in zip(names, directories, strict=True)}, path)
