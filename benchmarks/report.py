"""From a results file to tables and plots that a person can read.

python -m benchmarks.report RESULTS.jsonl                   # report.md and plots beside it
python -m benchmarks.report RESULTS.jsonl --readme README.md    # rewrite the table between its <!-- bench:FOLDER --> markers
python -m benchmarks.report OLD.jsonl --compare NEW.jsonl   # regressions between two result sets
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from benchmarks import questions, readme, regressions, store, summary, tables
from benchmarks.contenders import BY_NAME

Row = store.Row


def write(path: Path) -> Path:
    """Write report.md, and plots where matplotlib is installed, beside the results file; returns the report's path."""
    groups = store.latest(store.read(path))
    out = path.parent / "report.md"
    if importlib.util.find_spec("matplotlib"):
        from benchmarks import plots

        pictures = plots.draw(groups, path.parent)
    else:
        pictures = []
        print("report: matplotlib is not installed, so no plots; pip install matplotlib.", file=sys.stderr)
    out.write_text(render(groups, pictures))
    return out


def render(groups: list[list[Row]], pictures: list[tuple[str, str]]) -> str:
    """The report as Markdown; `pictures` are (name, caption)."""
    lines = [*_header(groups), *_in_short(groups, pictures), "", "## Where we lose", "", *summary.losses(groups)]
    for title, about, table in (
        ("Memory", _MEMORY, tables.memory(groups)),
        ("The data", _DATA, tables.data(groups)),
    ):
        if table:
            lines += ["", f"## {title}", "", about, "", *table]
    for name in questions.NAMES:
        mine = [group for group in groups if group[0]["case"]["question"] == name]
        if mine:
            lines += ["", f"## {name}", "", questions.load(name).ABOUT]
        for group in mine:
            lines += ["", f"### {group[0]['title']}", "", *tables.of_case(group)]
    return "\n".join([*lines, *_contenders(groups)]) + "\n"


_MEMORY = (
    "Gradients are dHidden and dWeight in the inputs' dtype, which every contender returns; `extra` is what it needs "
    "beside them and the inputs. Contenders under a MiB of extra memory have no share."
)
_DATA = (
    "Hidden states, head and text come from a small language model that has learned its text (`benchmarks/trained.py`), lifted "
    "to the shape. Targets of rollout tokens are drawn from the model, those of expert tokens are the text's, 5 % of them from "
    "elsewhere in it."
)


def _environments(groups: list[list[Row]]) -> list[dict]:
    seen = {str(row["environment"]): row["environment"] for group in groups for row in group}
    return list(seen.values())


def _header(groups: list[list[Row]]) -> list[str]:
    lines = ["# Benchmark report", ""]
    for env in _environments(groups):
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        driver = f", driver {env['driver']}" if env["driver"] else ""
        waiting = f" ({env['wait_policy']})" if env.get("wait_policy") else ""
        lines.append(
            f"- {env['device']}{driver}, {env['threads']} threads{waiting}, revision {env['revision']}, Python {env['python']}, "
            f"{versions}: `{env['command']}`"
        )
    return [
        *lines,
        "",
        "Every contender ran on the same inputs and agreed with fp64 before it was timed. `× floor` is the time over that of the "
        "bare GEMMs, torch.mm on all rows at once, in the same round: median (p20-p80); below 1 means that GEMMs in smaller pieces "
        "suit the machine better. Errors are relative L2 distances from fp64, largest distances for logprob "
        f"and entropy; (!) is more than {tables.EAGER_ERROR_FACTOR:g} times eager's. On a shared CPU only ratios mean anything.",
    ]


def _in_short(groups: list[list[Row]], pictures: list[tuple[str, str]]) -> list[str]:
    lines = []
    for name in questions.NAMES:
        mine = [group for group in groups if group[0]["case"]["question"] == name and name not in ("chunk", "sweep", "active_rows")]
        lines += [f"- {name}, {len(mine)} case{'s' * (len(mine) > 1)}. {sentence}" for sentence in summary.in_short(mine)]
    for name, caption in pictures:
        lines += ["", f"![{caption}]({name}.png)", "", f"*{caption}*"]
    return ["", "## In short", "", *lines] if lines else []


def _contenders(groups: list[list[Row]]) -> list[str]:
    names = dict.fromkeys(row["contender"] for group in groups for row in group if row["contender"] in BY_NAME)
    lines = ["", "## Who competes", "", *(f"- {name}: {BY_NAME[name].about}" for name in names)]
    reasons = {row["contender"]: row["reason"] for group in groups for row in group if row["status"] == "absent"}
    missing = "; ".join(name for name in BY_NAME if name not in names)
    said = [f"- {name}: {reason}" for name, reason in reasons.items()]
    said += [f"- No row in these results, left out of the run or newer than it: {missing}."] if missing else []
    return [*lines, "", "## Not measured here", "", *said] if said else lines


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
        print(regressions.compare(groups, store.latest(store.read(options.compare))))
    elif options.readme:
        device = options.results.resolve().parent.name
        options.readme.write_text(readme.insert(options.readme.read_text(), device, readme.table(groups)))
    else:
        print(write(options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
