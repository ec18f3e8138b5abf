"""What the plots are drawn with: figures that say how to read them, colours, labels beside lines, axes and running means.

Every figure is 9 inches wide at 200 dots per inch, so that its text stays readable at 900 pixels; only long names make it
wider. Lines carry their name at their right end, in their own colour; the colours can be told apart by the colour-blind, and
ordered groups run from light to dark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy

from trapo_train.schema import MissingPackage, UserError

LABEL_SIZE = 11.5  # points, of the names beside lines
MOST_DOTS = 5000  # of one series, beside its last: more lie on top of each other
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


def new_figure(
    title: str,
    subtitle: str,
    *,
    panels: int = 1,
    columns: int = 3,
    share_y: bool = True,
    right: float = 0.84,
    height: float = 4.8,
) -> tuple[Any, Any]:
    """A figure with a title, a line below that says how to read it, and `panels` axes, at most `columns` of them side by side.

    Args:
        share_y: one y axis for all axes of a row.
        height: of a figure with one row, inches.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage("plots need matplotlib, which is not installed. Run pip install 'trapo[train]'.") from error
    rows = -(-panels // columns)
    height *= 1 + 0.8 * (rows - 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(9, height), dpi=200, facecolor="white")
        grid = figure.subplots(rows, min(panels, columns), sharey="row" if share_y else False, squeeze=False)
        axes = list(grid.flat)
        for axis in axes:
            axis.grid(axis="x", visible=False)
            axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[panels:]:
        axis.remove()
    inch = 1 / height
    figure.subplots_adjust(left=0.105, right=right, bottom=0.7 * inch, top=1 - (1.2 if panels > 1 else 0.9) * inch)
    figure.subplots_adjust(wspace=0.12 if share_y else 0.3, hspace=0.35)
    figure.text(0.02, 1 - 0.38 * inch, title, fontsize=15, fontweight="bold", color=INK)
    figure.text(0.02, 1 - 0.66 * inch, subtitle, fontsize=11, color=GREY)
    return figure, axes[:panels]


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write the figure, wider by what its labels reach beyond its right edge, and return its path; without a suffix it is a PNG.

    Raises: UserError for a suffix of no kind of picture.
    """
    from matplotlib.transforms import Bbox

    path = Path(path) if Path(path).suffix else Path(f"{path}.png")
    if path.suffix[1:] not in (kinds := figure.canvas.get_supported_filetypes()):
        raise UserError(f"a plot must be one of {', '.join(sorted(kinds))}, got {path}. Choose another suffix.")
    path.parent.mkdir(parents=True, exist_ok=True)
    (width, height), reached = figure.get_size_inches(), figure.get_tightbbox().x1
    figure.savefig(path, bbox_inches=Bbox([[0, 0], [reached + 0.1, height]]) if reached > width else None)
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


def label_right(axis: Any, labels: Sequence[tuple[str, float, str]], absent: Sequence[tuple[str, str]] = ()) -> None:
    """Write (text, y, colour) labels, of one line each, in the margin right of `axis`, moved apart where they would overlap.

    Args:
        absent: texts and colours of what has no line here; they stand at the bottom.
    """
    low, high = axis.get_ylim()
    axis_inches = axis.get_position().height * axis.figure.get_figheight()
    gap = (high - low) * 1.25 * LABEL_SIZE / 72 / axis_inches
    there = [(text, min(max(y, low), high), colour) for text, y, colour in labels]
    labels = [*there, *((text, low, colour) for text, colour in absent)]
    for number, ((text, y, colour), placed) in enumerate(zip(labels, spread([y for _, y, _ in labels], gap), strict=True)):
        anchor = dict(xycoords=axis.get_yaxis_transform(), textcoords=axis.get_yaxis_transform())
        leader = dict(arrowstyle="-", color=colour, linewidth=0.8, shrinkA=2, shrinkB=0, relpos=(0, 0.5))
        arrow = leader if abs(placed - y) > 0.15 * gap and number < len(there) else None
        axis.annotate(text, (1.0, y), (1.035, placed), color=colour, fontsize=LABEL_SIZE, va="center", arrowprops=arrow, **anchor)


def ramp(count: int) -> list[Any]:
    """`count` colours from light to dark for ordered groups, told apart by lightness alone."""
    from matplotlib import colormaps

    viridis = colormaps["viridis"]
    return [viridis(0.72 - 0.72 * i / max(count - 1, 1)) for i in range(count)]


def run_colours(names: Iterable[str]) -> list[str]:
    """Grey for a run called "base", the palette in turn for the others: a run keeps its colour between figures."""
    colours = itertools.cycle(PALETTE)
    return [GREY if name == "base" else next(colours) for name in names]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values (odd); shorter at both ends, so that nothing is shifted. What is not finite, or huge, is in
    the means of its own windows alone."""
    half, ones = window // 2, numpy.ones(window)
    with numpy.errstate(over="ignore", invalid="ignore"):  # ∞ and -∞ in one window: NaN
        sums, counts = (numpy.convolve(x, ones)[half : half + len(values)] for x in (values, numpy.ones(len(values))))
        return (sums / counts).tolist()


def window_of(count: int) -> int:
    """The window of `running_mean` for so many values: about a twelfth of them, odd."""
    return max(1, 2 * (count // 24) + 1)


def draw_smoothed(axis: Any, steps: list[int], values: list[float], colour: Any, linewidth: float = 2.2) -> float:
    """Faint dots for each step, of more than MOST_DOTS for some (see `_dots`), and the running mean of all as a line; returns its
    end."""
    smooth = running_mean(values, window_of(len(values)))
    dots = _dots(values)
    where = [steps[i] for i in dots], [values[i] for i in dots]
    axis.plot(*where, ".", color=colour, alpha=0.3, markersize=6, markeredgewidth=0)
    axis.plot(steps, smooth, color=colour, linewidth=linewidth, solid_capstyle="round")
    return smooth[-1]


def _dots(values: Sequence[float]) -> Sequence[int]:
    """Positions of the values to draw: all, or of more than MOST_DOTS the last, and the least and the greatest of each few finite
    ones in a row, so that every spike is seen."""
    if len(values) <= MOST_DOTS:
        return range(len(values))
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    apart = -(-2 * len(values) // MOST_DOTS)
    kept = {len(values) - 1}
    for start in range(0, len(finite), apart):
        block = finite[start : start + apart]
        kept |= {min(block, key=values.__getitem__), max(block, key=values.__getitem__)}
    return sorted(kept)


def require(points: Sequence[Any], what: str) -> None:
    """Raise UserError where there is nothing to draw."""
    if not points:
        raise UserError(f"plots: {what} is not in these metrics. Plot a run that records it.")


def percent_axis(axis: Any) -> None:
    """Write the y axis as percentages from 0 to 100, with room for a line at 100."""
    from matplotlib.ticker import PercentFormatter

    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
