"""From a results file to tables and plots that a person can read.

python -m benchmarks.report RESULTS.jsonl                   # report.md and plots beside it
python -m benchmarks.report RESULTS.jsonl --readme README.md    # rewrite the table between <!-- bench:cpu --> markers
python -m benchmarks.report OLD.jsonl --compare NEW.jsonl   # regressions between two result sets
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from benchmarks import questions, store
from benchmarks.contenders import BY_NAME
from benchmarks.problem import JOBS

Row = store.Row
TARGETS = {"score": 1.10, "sft": 1.12, "grpo": 1.12, "trapo": 1.14}  # ratio to the floor on one H200, N ≥ 4096, D ≥ 3584
EAGER_ERROR_FACTOR = 2.0  # an error above this many times eager's is marked
REGRESSION = 1.05  # a ratio to the floor above this many times the old one is a regression
README_QUESTION = "trapo"


def write(path: Path) -> Path:
    """Write report.md, and plots where matplotlib is installed, beside the results file; returns the report's path."""
    groups = store.latest(store.read(path))
    out = path.parent / "report.md"
    text = render(groups)
    if importlib.util.find_spec("matplotlib"):
        from benchmarks import plots

        pictures = plots.draw(groups, path.parent)
    else:
        pictures = []
        print("report: matplotlib is not installed, so no plots; pip install matplotlib.", file=sys.stderr)
    text += "".join(f"\n![{name}]({name}.png)\n" for name in pictures)
    out.write_text(text)
    return out


def render(groups: list[list[Row]]) -> str:
    """The report as Markdown, plots left out."""
    lines = [*_header(groups), *_losses(groups)]
    for name in questions.NAMES:
        mine = [group for group in groups if group[0]["case"]["question"] == name]
        if mine:
            lines += ["", f"## {name}", "", questions.load(name).ABOUT]
        for group in mine:
            lines += ["", f"### {group[0]['title']}", "", *_table(group)]
    return "\n".join([*lines, *_contenders(groups)]) + "\n"


def _environments(groups: list[list[Row]]) -> list[dict]:
    seen = {str(row["environment"]): row["environment"] for group in groups for row in group}
    return list(seen.values())


def _header(groups: list[list[Row]]) -> list[str]:
    lines = ["# Benchmark report", ""]
    for env in _environments(groups):
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        driver = f", driver {env['driver']}" if env["driver"] else ""
        lines.append(
            f"- {env['device']}{driver}, {env['threads']} threads, revision {env['revision']}, Python {env['python']}, {versions}: "
            f"`{env['command']}`"
        )
    return [
        *lines,
        "",
        "Every contender ran on the same inputs and agreed with fp64 before it was timed. `× floor` is the time over that of the "
        "bare GEMMs in the same round: median (p20-p80). Errors are relative L2 distances from fp64; "
        f"**bold** is more than {EAGER_ERROR_FACTOR:g} times eager's. On a shared CPU only ratios mean anything.",
    ]


def _table(group: list[Row]) -> list[str]:
    """Those that ran, best first; then those that cannot do the job, with the reason."""
    ran = [row for row in group if row["status"] == "ok"]
    ran.sort(key=lambda row: (row.get("ratio", row.get("first_call_ms", 0.0)), row["contender"]))
    columns = [(title, cell) for title, cell in _COLUMNS if any(cell(row, group) for row in ran)]
    lines = []
    if columns:
        lines = ["| contender | " + " | ".join(title for title, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in ran:
        lines.append(f"| {row['contender']} | " + " | ".join(cell(row, group) or "–" for _, cell in columns) + " |")
    refused = [row for row in group if row["status"] not in ("ok", "absent") and not row["contender"].startswith("floor")]
    lines += [""] * bool(refused)
    for row in refused:
        said = row["reason"] if row["status"] == "cannot" else f"{row['status']}: {row['reason']}"
        lines.append(f"- {row['contender']}: {said}")
    lines += [f"- {row['contender']}: {row['note']}" for row in ran if row.get("note")]
    if any(row.get("partial") for row in group):
        lines += ["", "The budget ended before this case was whole: some figures are missing."]
    return lines


def _spread(name: str, digits: int):
    def cell(row: Row, group: list[Row]) -> str:
        middle = "ratio" if name == "ratio" else f"median_{name}"
        if row.get(middle) is None:
            return ""
        low, high = (row[f"{name}_p20"], row[f"{name}_p80"]) if name == "ratio" else (row[f"p20_{name}"], row[f"p80_{name}"])
        return f"{row[middle]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    return cell


def _plain(key: str, text: str):
    return lambda row, group: "" if row.get(key) is None else text.format(row[key])


def _error(key: str):
    def cell(row: Row, group: list[Row]) -> str:
        value = row.get("errors", {}).get(key)
        if value is None:
            return ""
        eager = next((r["errors"].get(key) for r in group if r["contender"] == "eager" and r["status"] == "ok"), None)
        text = f"{value:.1e}"
        return f"**{text}**" if eager is not None and value > EAGER_ERROR_FACTOR * eager else text

    return cell


def _peak(row: Row, group: list[Row]) -> str:
    if row.get("peak_mib") is None:
        return ""
    return f"{row['peak_mib']:.0f}" + (f" ({row['formula_mib']:.0f})" if "formula_mib" in row else "")


_COLUMNS = [
    ("× floor", _spread("ratio", 2)),
    ("ms", _spread("ms", 1)),
    ("ms, cold L2", _plain("cold_median_ms", "{:.1f}")),
    ("head's share", _plain("head_share", "{:.0%}")),
    ("peak MiB above inputs (formula)", _peak),
    ("first call ms", _plain("first_call_ms", "{:.0f}")),
    ("second call ms", _plain("second_call_ms", "{:.0f}")),
    ("longest, tokens", _plain("longest_tokens", "{}")),
    ("logprob, nats", _error("logprob_max_nats")),
    ("entropy, nats", _error("entropy_max_nats")),
    ("dHidden", _error("grad_hidden_relative")),
    ("dWeight", _error("grad_weight_relative")),
    ("launches", _plain("launches", "{}")),
    ("host syncs", _plain("host_syncs", "{}")),
]


def _best_ours(group: list[Row]) -> Row | None:
    ours = [row for row in group if row["contender"].startswith("ours") and row.get("ratio") is not None]
    return min(ours, key=lambda row: row["ratio"]) if ours else None


def _losses(groups: list[list[Row]]) -> list[str]:
    """Where a peer is faster, where we miss a target, where our error is large: said before the tables."""
    said = []
    for group in groups:
        best, title = _best_ours(group), group[0]["title"]
        if best is None or group[0]["case"]["measure"] != "time":
            continue
        for row in group:
            peer = not row["contender"].startswith(("ours", "floor")) and row["status"] == "ok"
            if peer and row["ratio"] < best["ratio"]:
                said.append(
                    f"{title}: {row['contender']} takes {row['ratio']:.2f} × floor, {best['contender']} {best['ratio']:.2f}."
                )
        target = TARGETS[group[0]["case"]["job"]]
        large = group[0]["case"]["num_rows"] >= 4096 and group[0]["case"]["hidden_size"] >= 3584
        if large and group[0]["case"]["active"] == 1.0 and best["ratio"] > target:
            said.append(f"{title}: {best['contender']} takes {best['ratio']:.2f} × floor, the target is {target:.2f}.")
    for group in groups:
        for row in group:
            marked = [title for title, cell in _COLUMNS if row["status"] == "ok" and "**" in (cell(row, group) or "")]
            if marked and row["contender"].startswith("ours"):
                said.append(f"{group[0]['title']}: the error of {row['contender']} in {', '.join(marked)} is over twice eager's.")
    body = [f"- {sentence}" for sentence in said] or ["Nowhere among the measured cases."]
    return ["", "## Where we lose", "", *body]


def _contenders(groups: list[list[Row]]) -> list[str]:
    names = dict.fromkeys(row["contender"] for group in groups for row in group if row["contender"] in BY_NAME)
    lines = ["", "## Who competes", "", *(f"- {name}: {BY_NAME[name].about}" for name in names)]
    reasons = {row["contender"]: row["reason"] for group in groups for row in group if row["status"] == "absent"}
    if reasons:
        lines += ["", "## Not measured here", "", *(f"- {name}: {reason}" for name, reason in reasons.items())]
    return lines


def readme_table(groups: list[list[Row]]) -> str:
    """The table of README's question: ratio to the floor per contender and shape, peak memory at the first one, and its origin."""
    mine = [group for group in groups if group[0]["case"]["question"] == README_QUESTION]
    if not mine:
        raise ValueError(f"the results have no rows of question {README_QUESTION!r}: run python -m benchmarks {README_QUESTION}.")
    cells: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for index, group in enumerate(mine):
        for row in group:
            if row["status"] == "ok" and "ratio" in row:
                cells.setdefault(row["contender"], ["–"] * len(mine))[index] = f"{row['ratio']:.2f}"
            elif row["status"] not in ("absent", "ok") and not row["contender"].startswith("floor"):
                reasons[row["contender"]] = row["reason"] if row["status"] == "cannot" else f"{row['status']}."
    peaks = {row["contender"]: _peak(row, mine[0]) for row in mine[0]}
    shapes = [f"N={c['num_rows']} D={c['hidden_size']} V={c['vocab_size']}" for c in (group[0]["case"] for group in mine)]
    lines = [
        f"{JOBS[mine[0][0]['case']['job']].about}; time over the bare GEMMs' (3 of them), median of interleaved rounds.",
        "",
        f"| | {' | '.join(shapes)} | peak MiB above inputs, first shape (formula) |",
        "|---" * (len(shapes) + 2) + "|",
    ]
    ordered = sorted(cells.items(), key=lambda item: (item[1][0] == "–", item[1][0]))
    lines += [f"| {name} | {' | '.join(values)} | {peaks.get(name) or '–'} |" for name, values in ordered]
    if reasons:
        lines += ["", "Cannot do this job: " + " ".join(f"{name} {reason}" for name, reason in reasons.items())]
    env = mine[-1][-1]["environment"]
    lines += ["", f"{env['device']}, torch {env['versions']['torch']}, revision {env['revision']}: `{env['command']}`"]
    return "\n".join(lines)


def _markers(device: str) -> re.Pattern:
    return re.compile(rf"(<!-- bench:{device} -->\n).*?(<!-- /bench:{device} -->)", re.S)


def insert(text: str, device: str, table: str) -> str:
    """`text` with `table` between the markers of `device`; ValueError when they are missing."""
    if not _markers(device).search(text):
        raise ValueError(
            f"the README has no <!-- bench:{device} --> … <!-- /bench:{device} --> markers; add them where the table goes."
        )
    return _markers(device).sub(lambda match: match[1] + table + "\n" + match[2], text)


def compare(old: list[list[Row]], new: list[list[Row]]) -> str:
    """A Markdown table of every case and contender in both result sets whose ratio to the floor or peak memory moved over 5 %."""
    before = {(row["title"], row["case"]["question"], row["contender"]): row for group in old for row in group}
    lines = ["| question | case | contender | × floor, old | new | change | peak MiB, old | new |", "|---" * 8 + "|"]
    for group in new:
        for row in group:
            was = before.get((row["title"], row["case"]["question"], row["contender"]))
            if was is None:
                continue
            change = row["ratio"] / was["ratio"] if row.get("ratio") and was.get("ratio") else 1.0
            growth = row["peak_mib"] / was["peak_mib"] if row.get("peak_mib") and was.get("peak_mib") else 1.0
            if all(1 / REGRESSION <= moved <= REGRESSION for moved in (change, growth)) and row["status"] == was["status"]:
                continue
            verdict = (
                "slower" if change > REGRESSION else "faster" if change < 1 / REGRESSION else "memory" if growth != 1.0 else ""
            )
            verdict = f"{was['status']} → {row['status']}" if row["status"] != was["status"] else f"{change - 1:+.0%} {verdict}"
            values = [f"{r['ratio']:.2f}" if r.get("ratio") else "–" for r in (was, row)]
            peaks = [f"{r['peak_mib']:.0f}" if r.get("peak_mib") else "–" for r in (was, row)]
            name = row["case"]["question"]
            lines.append(
                f"| {name} | {row['title']} | {row['contender']} | {' | '.join(values)} | {verdict} | {' | '.join(peaks)} |"
            )
    return "\n".join(lines if len(lines) > 2 else ["No ratio or peak moved by more than 5 %."])


def main() -> int:
    """`python -m benchmarks.report`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    parser.add_argument("--readme", type=Path, metavar="README.md", help="rewrite the table between the device's markers")
    parser.add_argument("--compare", type=Path, metavar="NEW.jsonl", help="print what moved since RESULTS")
    options = parser.parse_args()
    groups = store.latest(store.read(options.results))
    if not groups:
        parser.error(f"{options.results} holds no results; run python -m benchmarks.")
    if options.compare:
        print(compare(groups, store.latest(store.read(options.compare))))
    elif options.readme:
        device = options.results.resolve().parent.name
        options.readme.write_text(insert(options.readme.read_text(), device, readme_table(groups)))
    else:
        print(write(options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
