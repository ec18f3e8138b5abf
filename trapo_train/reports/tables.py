"""Tables that the commands print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trapo_train.reports.metrics_log import group_accuracies, group_label

if TYPE_CHECKING:
    from trapo_train.evaluation.headroom import HeadroomReport
    from trapo_train.settings import Setting


def evaluation_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Group:
    """Accuracy of each set and group, with several sets their mean too; below it a line per set with pass@k and the rest, which is
    all where nothing was sampled.

    Args:
        evaluations: what `evaluate` returned, by the name of the set; the name of a single one may be empty.
    """
    if not all("accuracy" in row for row in evaluations.values()):
        return Group(*(_line(name, row) for name, row in evaluations.items()))
    table = Table(title="held-out accuracy", title_justify="left")
    table.add_column("set", no_wrap=True)
    for heading in ("problems", "samples", "accuracy", "± standard error"):
        table.add_column(heading, justify="right")
    for name, row in evaluations.items():
        counts = f"{row['num_problems']:.0f}", f"{round(row['samples_per_problem'], 1):g}"
        table.add_row(name or "all", *counts, f"{row['accuracy']:.3f}", _error(row["accuracy_stderr"]), style="bold")
        for group, (value, error) in group_accuracies(row).items():
            label = group_label(f"{name} {group}".strip())
            table.add_row(label, "", "", f"{value:.3f}", _error(error))
    if len(evaluations) > 1:
        mean = fmean(row["accuracy"] for row in evaluations.values())
        table.add_row("mean of the sets", "", "", f"{mean:.3f}", style="bold")
    return Group(table, *(_line(name, row) for name, row in evaluations.items()))


def _line(name: str, row: Mapping[str, Any]) -> Text:
    """What the table does not show of a set."""
    tabled = ("num_problems", "samples_per_problem")
    rest = [f"{key} {value:.4g}" for key, value in row.items() if not key.startswith("accuracy") and key not in tabled]
    return Text("  ".join([name, *rest] if name else rest))


def _error(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def recipes_table(found: Mapping[str, str]) -> Table:
    """Each recipe, by its name, with its first comment line."""
    table = Table.grid("", "", padding=(0, 2))
    for name, text in found.items():
        table.add_row(f"[bold]{name}[/]", text.partition("\n")[0].removeprefix("# "))
    return table


def settings_table(found: Sequence[Setting]) -> Group:
    """A paragraph for each setting: its key, type and default, and below them what it does."""
    parts: list[Text | Padding] = []
    for setting in found:
        default = f" = {setting.default}" if setting.default else ""
        parts.append(Text.assemble((setting.key, "bold"), (f"  {setting.type}", "dim"), default))
        parts.append(Padding(Text(setting.about), (0, 0, 1, 4)))
    return Group(*parts)


def headroom_table(report: HeadroomReport) -> Table:
    """Pass rates by group and by share of the expert trace, ± 1 standard error; whose, is in the caption."""
    table = Table("pass rate after …", *(f"{row.fraction:.0%}" for row in report.overall()))
    for group in dict.fromkeys(row.group for row in report.rows):
        rows = [row for row in report.rows if row.group == group]
        table.add_row(group_label(group), *(accuracy_cell(row.pass_rate, row.standard_error) for row in rows))
    stated = [f"{row.answer_in_prefix:.0%}" for row in report.overall()]
    table.add_row("answer in the prefix", *stated, style="dim")
    table.caption = f"{report.overall()[0].n} problems of {report.section}"
    return table


def accuracy_cell(value: float, standard_error: float | None) -> str:
    """An accuracy and its standard error, where it is known."""
    known = standard_error is not None and standard_error == standard_error
    return f"{value:.2f} ± {standard_error:.2f}" if known else f"{value:.2f}"
