"""Plots of a results file: time against N, memory against N, accuracy against time; one with fewer than two points is left out."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.store import Row


def draw(groups: list[list[Row]], folder: Path) -> list[str]:
    """Write the plots into `folder`; returns the names of those that were drawn."""
    sweep = [row for group in groups for row in group if row["case"]["question"] == "sweep" and row["status"] == "ok"]
    jobs = {"trapo": "TRAPO, forward and backward", "score": "scoring, forward"}
    drawn = []
    for job, title in jobs.items():
        rows = [row for row in sweep if row["case"]["job"] == job and _head(row) == _commonest(sweep, job)]
        for key, label, logarithmic in (("ratio", "time / bare GEMMs", False), ("peak_mib", "peak MiB above inputs", True)):
            lines = _lines(rows, key)
            if any(len(points) > 1 for points in lines.values()):
                drawn.append(
                    _line_plot(lines, label, f"{title}, D={rows[0]['case']['hidden_size']}", logarithmic, folder, job, key)
                )
    return drawn + _accuracy(groups, folder)


def _head(row: Row) -> tuple[int, int]:
    return row["case"]["hidden_size"], row["case"]["vocab_size"]


def _commonest(rows: list[Row], job: str) -> tuple[int, int] | None:
    heads = [_head(row) for row in rows if row["case"]["job"] == job]
    return max(heads, key=heads.count) if heads else None


def _lines(rows: list[Row], key: str) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get(key) is not None:
            lines.setdefault(row["contender"], []).append((row["case"]["num_rows"], row[key]))
    return {name: sorted(points) for name, points in sorted(lines.items())}


def _line_plot(lines: dict, label: str, title: str, logarithmic: bool, folder: Path, job: str, key: str) -> str:
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines.items():
        style = {"color": "black", "linestyle": ":"} if name.startswith("floor") else {"marker": "o", "markersize": 4}
        axes.plot(*zip(*points, strict=True), label=name, linewidth=2.5 if name.startswith("ours") else 1.2, **style)
    axes.set(xscale="log", yscale="log" if logarithmic else "linear", xlabel="N, tokens", ylabel=label, title=title)
    if not logarithmic:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, folder, f"{'time' if key == 'ratio' else 'memory'}_{job}")


def _accuracy(groups: list[list[Row]], folder: Path) -> list[str]:
    """Error of dWeight against the ratio to the floor, at the first timed case of TRAPO's question."""
    rows = next((group for group in groups if group[0]["case"]["question"] == "trapo"), [])
    rows = [row for row in rows if row["status"] == "ok" and "ratio" in row and row.get("errors", {}).get("grad_weight_relative")]
    if len(rows) < 2:
        return []
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        error = row["errors"]["grad_weight_relative"]
        axes.scatter(row["ratio"], error, marker="*" if row["contender"].startswith("ours") else "o")
        axes.annotate(row["contender"], (row["ratio"], error), textcoords="offset points", xytext=(6, 3), fontsize=8)
    axes.set(yscale="log", xlabel="time / bare GEMMs", ylabel="relative L2 error of dWeight", title=rows[0]["title"])
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    return [_save(figure, folder, "accuracy_time")]


def _save(figure, folder: Path, name: str) -> str:
    figure.savefig(folder / f"{name}.png", dpi=110)
    pyplot.close(figure)
    return name
