"""PNG plots of a run: headroom, unguided reward, guided share, entropy, TrSFT weights, and several runs in one figure.

Every figure is 9 inches wide at 200 dots per inch, so that its text stays readable at 900 pixels. Lines carry their
name at their right end, in their own colour; the colours can be told apart by the colour-blind, and ordered groups run
from light to dark.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trapo_train.display import read_metrics

Row = dict[str, Any]

INK, GREY, GRID = "#1a1a1a", "#6b6b6b", "#e4e4e4"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B07C00", "#2E91C9", "#7A5C46", "#5B5B5B")
STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def _new_figure(title: str, subtitle: str, *, panels: int = 1, right: float = 0.84, height: float = 4.8) -> tuple[Any, Any]:
    """A figure with a title, a line below that says how to read it, and `panels` axes side by side."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed. Run pip install 'trapo[train]'.") from error
    with rc_context(STYLE):
        figure = Figure(figsize=(9, height), dpi=200, facecolor="white")
        axes = figure.subplots(1, panels, sharey=panels > 1, squeeze=False)[0]
        for axis in axes:
            axis.grid(axis="x", visible=False)
    inch = 1 / height
    figure.subplots_adjust(left=0.105, right=right, bottom=0.7 * inch, top=1 - (1.2 if panels > 1 else 0.9) * inch)
    figure.subplots_adjust(wspace=0.12)
    figure.text(0.02, 1 - 0.38 * inch, title, fontsize=15, fontweight="bold", color=INK)
    figure.text(0.02, 1 - 0.66 * inch, subtitle, fontsize=11, color=GREY)
    return figure, axes


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move label positions at least `gap` apart, keeping their order and mean; of equal ones the first goes on top."""
    order = sorted(range(len(positions)), key=lambda i: (positions[i], -i))
    clusters: list[tuple[list[int], float]] = []  # members from low to high, centre
    for i in order:
        members, centre = [i], positions[i]
        while clusters:
            previous, previous_centre = clusters[-1]
            if centre - gap * (len(members) - 1) / 2 - (previous_centre + gap * (len(previous) - 1) / 2) >= gap:
                break
            clusters.pop()
            centre = (previous_centre * len(previous) + centre * len(members)) / (len(previous) + len(members))
            members = previous + members
        clusters.append((members, centre))
    placed = [0.0] * len(positions)
    for members, centre in clusters:
        for rank, i in enumerate(members):
            placed[i] = centre + gap * (rank - (len(members) - 1) / 2)
    return placed


def _label_right(axis: Any, labels: list[tuple[str, float, str]], fontsize: float = 11.5) -> None:
    """Write (text, y, colour) labels in the margin right of `axis`, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    axis_inches = axis.get_position().height * axis.figure.get_figheight()
    gap = (high - low) * 1.25 * fontsize / 72 / axis_inches
    for (text, y, colour), placed in zip(labels, spread([y for _, y, _ in labels], gap), strict=True):
        anchor = dict(xycoords=axis.get_yaxis_transform(), textcoords=axis.get_yaxis_transform())
        leader = dict(arrowstyle="-", color=colour, linewidth=0.8, shrinkA=2, shrinkB=0, relpos=(0, 0.5))
        arrow = leader if abs(placed - y) > 0.15 * gap else None
        axis.annotate(text, (1.0, y), (1.035, placed), color=colour, fontsize=fontsize, va="center", arrowprops=arrow, **anchor)


def _ramp(count: int) -> list[Any]:
    """`count` colours from light to dark for ordered groups, told apart by lightness alone."""
    from matplotlib import colormaps

    viridis = colormaps["viridis"]
    return [viridis(0.72 - 0.72 * i / max(count - 1, 1)) for i in range(count)]


def _run_colours(names: Iterable[str]) -> list[str]:
    """Grey for a run called "base", the palette in turn for the others: a run keeps its colour between figures."""
    colours = itertools.cycle(PALETTE)
    return [GREY if name == "base" else next(colours) for name in names]


def _series(rows: Iterable[Row], metric: str, kind: str = "train") -> tuple[list[int], list[float]]:
    points = [(row["step"], row[metric]) for row in rows if row["kind"] == kind and row.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values (odd); shorter at both ends, so that nothing is shifted."""
    half = window // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in windows]


def _window(count: int) -> int:
    return max(1, 2 * (count // 24) + 1)


def _draw_smoothed(axis: Any, steps: list[int], values: list[float], colour: Any, linewidth: float = 2.2) -> float:
    """Faint dots for each step and their running mean as a line; returns where the line ends."""
    smooth = running_mean(values, _window(len(values)))
    axis.plot(steps, values, ".", color=colour, alpha=0.3, markersize=6, markeredgewidth=0)
    axis.plot(steps, smooth, color=colour, linewidth=linewidth, solid_capstyle="round")
    return smooth[-1]


def _require(points: Sequence[Any], what: str) -> None:
    if not points:
        raise ValueError(f"plots: {what} is not in these metrics. Plot a run that records it.")


def _percent_axis(axis: Any, low: float = 0.0, high: float = 1.0) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_ylim(low, high)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def group_label(group: str) -> str:
    """`depth_3` → `depth 3`."""
    return str(group).replace("_", " ")


def group_order(group: str) -> tuple[Any, ...]:
    """Sort key that puts `depth_10` after `depth_9`."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(group)))


def plot_headroom(report: Any, path: str | Path) -> Path:
    """Pass rate against the fraction of the expert trace that is given, one line per group and one for all.

    `report.rows` carry fraction, group ("all" for every problem), pass_rate, n and standard_error.
    """
    _require(report.rows, "a headroom measurement")
    figure, (axis,) = _new_figure(
        "Headroom: what an expert prefix is worth to this model",
        "pass rate of completions sampled after a prefix of the expert trace · bars: ± 1 standard error",
        height=5.2,
    )
    names = sorted({row.group for row in report.rows}, key=group_order)
    groups = [name for name in names if name != "all"]
    colours = dict(zip(groups, _ramp(len(groups)), strict=True)) | {"all": INK}
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
    _percent_axis(axis, 0, 1.02)
    axis.set_xlabel("expert prefix given, % of the trace")
    axis.set_ylabel("pass rate")
    axis.set_xticks(sorted({100 * row.fraction for row in report.rows}))
    _label_right(axis, labels)
    return _save(figure, path)


def plot_unguided_reward(rows: Sequence[Row], path: str | Path) -> Path:
    """Reward of unguided samples (of micro-group 1) over steps, and held-out accuracy where the run evaluated."""
    steps, values = _series(rows, "reward/unguided")
    _require(steps, "reward/unguided")
    figure, (axis,) = _new_figure(
        "Reward without guidance",
        f"training: micro-group 1, line is the mean over {_window(len(steps))} steps · held-out: ± 1 standard error",
    )
    labels = [("training", _draw_smoothed(axis, steps, values, PALETTE[0]), PALETTE[0])]
    labels += _draw_held_out(axis, rows, PALETTE[1], "held-out")
    axis.set_ylim(min(0.0, *values), None)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("mean reward, accuracy")
    _label_right(axis, labels)
    return _save(figure, path)


def _draw_held_out(axis: Any, rows: Sequence[Row], colour: Any, name: str) -> list[tuple[str, float, Any]]:
    points = [row for row in rows if row["kind"] == "eval" and row.get("accuracy") is not None]
    if not points:
        return []
    errors = [row.get("accuracy_stderr") or 0.0 for row in points]
    steps, values = [row["step"] for row in points], [row["accuracy"] for row in points]
    axis.errorbar(steps, values, errors, color=colour, marker="o", markersize=7, linewidth=1.4, elinewidth=1.6, zorder=4)
    return [(name, values[-1], colour)]


def plot_guided_share(rows: Sequence[Row], path: str | Path) -> Path:
    """Share of samples that started from an expert prefix, by micro-group and over all samples."""
    figure, (axis,) = _new_figure(
        "How often the ladder reaches for the expert",
        "share of samples with an expert prefix · dots: one step · line: running mean",
    )
    labels = []
    for micro_group, colour in zip((2, 3, 4), _ramp(3), strict=True):
        steps, values = _series(rows, f"guided_share/micro_group_{micro_group}")
        if steps:
            labels.append((f"micro-group {micro_group}", _draw_smoothed(axis, steps, values, colour), colour))
    steps, values = _series(rows, "guided_share")
    _require(steps, "guided_share")
    labels.append(("all samples", _draw_smoothed(axis, steps, values, INK, linewidth=3), INK))
    _percent_axis(axis, 0, 1.02)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("guided samples")
    _label_right(axis, labels)
    return _save(figure, path)


def plot_entropy(rows: Sequence[Row], path: str | Path) -> Path:
    """Entropy of the policy on the tokens it wrote and on expert tokens, over steps."""
    figure, (axis,) = _new_figure(
        "Entropy of the policy",
        "mean over the tokens of each role · dots: one step · line: running mean",
    )
    labels = []
    for role, name, colour in (("rollout", "own tokens", PALETTE[0]), ("expert", "expert tokens", PALETTE[1])):
        steps, values = _series(rows, f"entropy/{role}")
        if steps:
            labels.append((name, _draw_smoothed(axis, steps, values, colour), colour))
    _require(labels, "entropy/rollout or entropy/expert")
    axis.set_ylim(0, None)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("entropy, nats per token")
    _label_right(axis, labels)
    return _save(figure, path)


def plot_trsft_weights(rows: Sequence[Row], path: str | Path) -> Path:
    """How much of each expert token's gradient TrSFT lets through, at the beginning, middle and end of the run."""
    found = [(r["step"], r["trsft/weight_histogram"]) for r in rows if r.get("trsft/weight_histogram")]
    found = [(step, counts) for step, counts in found if sum(counts) > 0]
    _require(found, "trsft/weight_histogram with a counted token")
    width = max(1, len(found) // 10)
    middle = max(0, len(found) // 2 - width // 2)
    windows = [found[:width], found[middle : middle + width], found[-width:]][: len(found)]
    figure, axes = _new_figure(
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
    return _save(figure, path)


def plot_comparison(runs: dict[str, Sequence[Row]], path: str | Path) -> Path:
    """Several runs in one figure: unguided reward on the left, held-out accuracy on the right."""
    _require(list(runs), "any run")
    evaluated = any(_series(rows, "accuracy", "eval")[0] for rows in runs.values())
    figure, axes = _new_figure(
        "Runs compared",
        "reward of training prompts: micro-group 1, running mean · held-out accuracy: ± 1 standard error",
        panels=1 + evaluated,
    )
    labels = []
    for (name, rows), colour in zip(runs.items(), _run_colours(runs), strict=True):
        steps, values = _series(rows, "reward/unguided")
        end = _draw_smoothed(axes[0], steps, values, colour) if steps else 0.0
        label = _draw_held_out(axes[1], rows, colour, name) if evaluated else []
        labels += label or [(f"{name}\n(not evaluated)", end, colour)]
    for axis, heading in zip(axes, ("reward without guidance", "held-out accuracy"), strict=False):
        axis.set_xlabel("optimizer step")
        axis.set_title(heading, fontsize=12, color=INK, loc="left")
    axes[0].set_ylabel("mean reward, accuracy")
    axes[0].set_ylim(min(0.0, axes[0].get_ylim()[0]), None)
    _label_right(axes[-1], labels)
    return _save(figure, path)


def plot_accuracy_by_group(evaluations: dict[str, Row], path: str | Path) -> Path:
    """Held-out accuracy by group, one line per evaluation, for example a base model and what training made of it."""
    names = sorted(
        {key.partition("/")[2] for row in evaluations.values() for key in row if key.startswith("accuracy/")},
        key=group_order,
    )
    _require(names, "accuracy by group")
    figure, (axis,) = _new_figure("Held-out accuracy", "bars: ± 1 standard error")
    labels = []
    for (name, row), colour in zip(evaluations.items(), _run_colours(evaluations), strict=True):
        known = [(i, row[f"accuracy/{group}"], row.get(f"accuracy_stderr/{group}") or 0.0)
                 for i, group in enumerate(names) if row.get(f"accuracy/{group}") is not None]  # fmt: skip
        x, y, error = zip(*known, strict=True)
        axis.errorbar(x, y, error, color=colour, marker="o", markersize=7, linewidth=1.8, elinewidth=1.6)
        labels.append((name, y[-1], colour))
    _percent_axis(axis, 0, 1.02)
    axis.set_xticks(range(len(names)), [group_label(group) for group in names])
    axis.set_ylabel("accuracy")
    _label_right(axis, labels)
    return _save(figure, path)


RUN_PLOTS: dict[str, tuple[str, Callable[[Sequence[Row], Path], Path]]] = {
    "unguided_reward.png": ("reward/unguided", plot_unguided_reward),
    "guided_share.png": ("guided_share", plot_guided_share),
    "entropy.png": ("entropy/", plot_entropy),
    "trsft_weights.png": ("trsft/weight_histogram", plot_trsft_weights),
}


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw every plot whose metrics the run recorded into `run_dir`/plots; returns the paths.

    Raises FileNotFoundError where there are no metrics, ValueError where none of them can be plotted.
    """
    rows = read_metrics(run_dir)
    recorded = {key for row in rows for key, value in row.items() if value not in (None, [])}
    directory = Path(run_dir) / "plots"
    paths = [
        draw(rows, directory / name)
        for name, (metric, draw) in RUN_PLOTS.items()
        if any(key == metric or (metric.endswith("/") and key.startswith(metric)) for key in recorded)
    ]
    if not paths:
        raise ValueError(f"{run_dir}: none of the {len(rows)} rows holds a metric that can be plotted. Train some steps first.")
    return paths


def compare_runs(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """One figure for several runs, named after their directories (with parents where two share a name)."""
    directories = [Path(run_dir).resolve() for run_dir in run_dirs]
    names = [directory.name for directory in directories]
    if len(set(names)) < len(names):
        names = [f"{directory.parent.name}/{directory.name}" for directory in directories]
    return plot_comparison({n: read_metrics(d) for n, d in zip(names, directories, strict=True)}, path)
