"""Plots of a results file; one with fewer than two points is left out. A contender has one colour in all of them, ours are blue."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.store import Row
from benchmarks.tables import required_mib

OURS, OURS_TRITON, OURS_LIGHT, FLOOR, GRID = "#1f5fbf", "#0d94c9", "#6f9fd8", "#222222", "#dddddd"
COLOURS = {
    "eager": "#6f6f6f",
    "torch.compile": "#e08214",
    "TRL chunked logprob": "#7b3294",
    "TRL logprob on logits": "#c2a5cf",
    "F.linear_cross_entropy": "#1b9e77",
    "F.linear_cross_entropy, chunked": "#66c2a5",
    "Liger FLCE": "#d6604d",
    "Liger FLCE, fp32 dWeight": "#b2182b",
    "Liger FLCE, large chunks": "#67001f",
    "Liger FLCE, sm_90": "#a6761d",
    "Liger scaled CE, sm_90": "#e7298a",
    "Liger scaled CE, fallback": "#fa9fb5",
    "Liger fused GRPO": "#f4a582",
    "cut-cross-entropy": "#8c510a",
    "quack": "#01665e",
    "verl": "#c51b7d",
}
LABELS = {
    "TRL chunked logprob": "TRL chunked",
    "F.linear_cross_entropy": "F.linear_CE",
    "F.linear_cross_entropy, chunked": "F.linear_CE chunked",
}
JOBS = {"trapo": "TRAPO loss with entropy gradient, forward and backward", "score": "Scoring, forward only"}


def draw(groups: list[list[Row]], folder: Path) -> list[tuple[str, str]]:
    """Write the plots into `folder`; returns (name, caption) of those that were drawn."""
    drawn = [found for job in JOBS for found in (_time(groups, job, folder), _memory(groups, job, folder))]
    return [found for found in [_heads(groups, folder), *drawn, _accuracy(groups, folder)] if found is not None]


def _colour(name: str) -> str:
    if name.startswith("floor"):
        return FLOOR
    if name.startswith("ours"):
        return OURS if "native" in name and "nothing kept" not in name else OURS_TRITON if "triton" in name else OURS_LIGHT
    return COLOURS.get(name, "#999999")


def _main(name: str) -> bool:
    """Whether this is what a user of ours gets by default: one pass in compiled rows."""
    return name in ("ours (native)", "ours (triton)")


def _timed(groups: list[list[Row]], job: str) -> list[Row]:
    """The plain timed rows of a job, one per contender and shape."""
    found = {}
    for group in groups:
        for row in group:
            case = row["case"]
            plain = (
                case["measure"] == "time"
                and case["active"] == 1.0
                and not (case["chunk_rows"] or case.get("setting"))
                and case["logits_dtype"] == "float32"
            )
            if row["status"] == "ok" and plain and case["job"] == job and case["question"] not in ("active_rows", "narrow"):
                found[row["contender"], case["num_rows"], *_head(row)] = row
    return list(found.values())


def _head(row: Row) -> tuple[int, int]:
    return row["case"]["hidden_size"], row["case"]["vocab_size"]


def _lengths(groups: list[list[Row]], job: str) -> list[Row]:
    """The rows at the head that has been measured with the most lengths; two at least."""
    rows = _timed(groups, job)
    lengths: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        lengths.setdefault(_head(row), set()).add(row["case"]["num_rows"])
    head = max(lengths, key=lambda found: len(lengths[found]), default=None)
    return [row for row in rows if _head(row) == head] if head and len(lengths[head]) > 1 else []


def _lines(rows: list[Row], value) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if value(row) is not None and not row["contender"].startswith("floor"):
            lines.setdefault(row["contender"], []).append((row["case"]["num_rows"], value(row)))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    return dict(sorted(lines.items(), key=lambda item: _main(item[0])))  # ours last, on top


def _time(groups: list[list[Row]], job: str, folder: Path) -> tuple[str, str] | None:
    rows = _lengths(groups, job)
    lines = _lines(rows, lambda row: row.get("ratio"))
    if not lines:
        return None
    axes = _axes("time / bare GEMMs", f"{JOBS[job]}\n{_where(rows[0])}")
    axes.axhline(1.0, color=FLOOR, linestyle=":", linewidth=1.2)
    _plot(axes, lines)
    low, high = (pick(y for points in lines.values() for _, y in points) for pick in (min, max))
    axes.set_ylim(min(0.9, low - 0.05), min(high, 4.0) + 0.1)
    ends = {name: points[-1][1] for name, points in lines.items()} | {"the bare GEMMs": 1.0}
    _label_ends(axes, ends, "{:.2f}")
    return _save(
        axes, folder, f"time_{job}", "Time over the bare GEMMs against N; lower is better, the number is that of the largest N."
    )


def _memory(groups: list[list[Row]], job: str, folder: Path) -> tuple[str, str] | None:
    rows = _lengths(groups, job)
    lines = _lines(rows, lambda row: row.get("peak_mib"))
    if not lines:
        return None
    unit, scale = ("GiB", 1024.0) if max(y for points in lines.values() for _, y in points) > 16384 else ("MiB", 1.0)
    lines = {name: [(x, y / scale) for x, y in points] for name, points in lines.items()}
    axes = _axes(f"peak {unit} above the inputs", f"{JOBS[job]}\n{_where(rows[0])}")
    axes.set_yscale("log", base=2)
    _plot(axes, lines)
    ends = {name: points[-1][1] for name, points in lines.items()}
    formula = {(r["case"]["num_rows"], r["formula_mib"] / scale) for r in rows if _main(r["contender"]) and "formula_mib" in r}
    axes.scatter(*zip(*sorted(formula), strict=True) if formula else ([], []), color=OURS, marker="_", s=260, linewidths=2)
    if job != "score":
        gradients = sorted({(row["case"]["num_rows"], required_mib(row) / scale) for row in rows})
        axes.plot(*zip(*gradients, strict=True), color=FLOOR, linestyle=":", linewidth=1.2)
        ends["the gradients alone"] = gradients[-1][1]
    values = [y for points in lines.values() for _, y in points] + list(ends.values())
    axes.yaxis.set_major_locator(FixedLocator([2.0**k for k in range(-4, 24) if min(values) / 2 <= 2**k <= max(values) * 2]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _label_ends(axes, ends, "{:.1f}" if unit == "GiB" else "{:.0f}")
    return _save(axes, folder, f"memory_{job}", "Peak memory above the inputs against N, log-log; the blue bars are our formula.")


def _heads(groups: list[list[Row]], folder: Path) -> tuple[str, str] | None:
    """A line per shape, a dot per contender."""
    rows = [row for row in _timed(groups, "trapo") if "ratio" in row and row["case"]["question"] == "trapo"]
    shapes = list(dict.fromkeys((row["case"]["num_rows"], *_head(row)) for row in rows))
    everywhere = _everywhere(rows, shapes)
    if len(shapes) < 2 or not everywhere:
        return None
    figure, axes = pyplot.subplots(figsize=(8.5, 1.6 + 0.45 * len(shapes)), layout="constrained")
    axes.axvline(1.0, color=FLOOR, linestyle=":", linewidth=1.2)
    for name in everywhere:
        found = {(row["case"]["num_rows"], *_head(row)): row for row in rows if row["contender"] == name}
        x = [found[shape]["ratio"] for shape in shapes]
        spread = [
            [v - found[s]["ratio_p20"] for v, s in zip(x, shapes, strict=True)],
            [found[s]["ratio_p80"] - v for v, s in zip(x, shapes, strict=True)],
        ]
        y, size = range(len(shapes)), 11 if _main(name) else 7
        axes.errorbar(
            x, y, xerr=spread, fmt="o", color=_colour(name), markersize=size, elinewidth=1, alpha=0.95, label=LABELS.get(name, name)
        )
        for value, place in zip(x, y, strict=True):
            if _main(name):
                axes.annotate(
                    f"{value:.2f}",
                    (value, place),
                    xytext=(0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=OURS,
                    weight="bold",
                )
    axes.set_yticks(range(len(shapes)), [f"N={n}  D={d}  V={v}" for n, d, v in shapes])
    axes.set_ylim(len(shapes) - 0.4, -0.7)
    axes.set(xlabel="time / bare GEMMs (dot: median, bar: p20 to p80)")
    axes.set_title(f"{JOBS['trapo']}\n{rows[0]['case']['dtype']}, {rows[0]['environment']['device']}", fontsize=11, loc="left")
    axes.grid(axis="x", color=GRID)
    _bare(axes)
    figure.legend(loc="outside lower center", ncols=min(6, len(everywhere)), fontsize=8.5, frameon=False)
    return _save(
        axes,
        folder,
        "heads_trapo",
        "Time over the bare GEMMs for heads of several sizes; lower is better, ours carries its number.",
    )


def _everywhere(rows: list[Row], shapes: list[tuple[int, int, int]]) -> list[str]:
    """Contenders with a row at every shape, the floor left out, ours last."""
    names = dict.fromkeys(row["contender"] for row in rows if not row["contender"].startswith("floor"))
    counts = {name: sum(row["contender"] == name for row in rows) for name in names}
    return sorted((name for name in names if counts[name] == len(shapes)), key=_main)


def _accuracy(groups: list[list[Row]], folder: Path) -> tuple[str, str] | None:
    """Error of dWeight against the ratio to the floor, at the case of TRAPO's question with the most contenders."""
    groups = [group for group in groups if group[0]["case"]["question"] == "trapo"]
    rows = max(
        ([row for row in group if row["status"] == "ok" and "ratio" in row and _error(row)] for group in groups),
        key=len,
        default=[],
    )
    if len(rows) < 2:
        return None
    axes = _axes("relative L2 error of dWeight", f"Accuracy and time: {rows[0]['title']}", log_x=False)
    axes.set(yscale="log", xlabel="time / bare GEMMs")
    axes.axvline(1.0, color=FLOOR, linestyle=":", linewidth=1.2)
    for row in rows:
        axes.scatter(row["ratio"], _error(row), s=110 if _main(row["contender"]) else 45, color=_colour(row["contender"]), zorder=3)
    low, high = min(map(_error, rows)), max(map(_error, rows))
    axes.set_ylim(low / 3, high * 3)
    axes.set_xlim(min(0.85, min(row["ratio"] for row in rows) - 0.1), max(row["ratio"] for row in rows) * 1.12)
    _label_points(axes, [(row["ratio"], _error(row), row["contender"]) for row in rows])
    return _save(axes, folder, "accuracy_time", "Error against fp64 and time; down and left is better.")


def _error(row: Row) -> float:
    return row.get("errors", {}).get("grad_weight_relative", 0.0)


def _where(row: Row) -> str:
    device = row["environment"]["device"]
    return f"D={row['case']['hidden_size']}, V={row['case']['vocab_size']}, {row['case']['dtype']}, {device}"


def _axes(y_label: str, title: str, log_x: bool = True) -> Axes:
    _, axes = pyplot.subplots(figsize=(8.5, 4.8), layout="constrained")
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set(xlabel="N, tokens", ylabel=y_label)
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color=GRID)
    _bare(axes)
    return axes


def _bare(axes: Axes) -> None:
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _plot(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in lines.items():
        style = "--" if "two-phase" in name else "-"
        width = 3.0 if _main(name) else 1.5
        axes.plot(
            *zip(*points, strict=True), color=_colour(name), linestyle=style, linewidth=width, marker="o", markersize=2.5 * width
        )
    lengths = sorted({x for points in lines.values() for x, _ in points})
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _label_ends(axes: Axes, ends: dict[str, float], number: str) -> None:
    """Names and last values beside the right end of the lines, pushed apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    order = sorted(ends, key=ends.get)
    places = _spread([to_axes.transform((x, ends[name]))[1] for name in order], 0.052)
    for name, place in zip(order, places, strict=True):
        text = f"{LABELS.get(name, name)}  {number.format(ends[name])}"
        weight, colour = "bold" if _main(name) else "normal", FLOOR if name.startswith("the ") else _colour(name)
        axes.annotate(
            text,
            (1.01, place),
            xycoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            weight=weight,
            annotation_clip=False,
        )


def _spread(places: list[float], gap: float) -> list[float]:
    """The same ascending places at least `gap` apart, inside 0…1 where they fit."""
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    over = max(0.0, places[-1] - 1.0)
    places[-1] -= over
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    return places


def _label_points(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Names above or below their points, at the nearest height where they cover no other name and no point."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [(*map(float, to_axes.transform((x, y))), name) for x, y, name in sorted(points)]
    taken = [(x, y, 0.012, 0.02) for x, y, _ in places]  # boxes: centre, half width, half height
    for (x, y, name), (x_data, y_data, _) in zip(places, sorted(points), strict=True):
        half = 0.0062 * len(LABELS.get(name, name))
        boxes = {
            offset: (x, y + offset / 280, half, 0.02) for offset in (14, -14, 27, -27, 40, -40, 53)
        }  # the axes are 280 pt high
        offset = next((o for o, box in boxes.items() if not any(_overlap(box, other) for other in taken)), 66)
        taken.append(boxes.get(offset, (x, y, half, 0.02)))
        axes.annotate(
            LABELS.get(name, name),
            (x_data, y_data),
            xytext=(0, offset),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=_colour(name),
            weight="bold" if _main(name) else "normal",
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return abs(a[0] - b[0]) < a[2] + b[2] and abs(a[1] - b[1]) < a[3] + b[3]


def _save(axes: Axes, folder: Path, name: str, caption: str) -> tuple[str, str]:
    axes.figure.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(axes.figure)
    return name, caption
