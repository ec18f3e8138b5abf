"""The README's table: TRAPO's loss at every shape, generated from a results file between two markers."""

from __future__ import annotations

import re

from benchmarks import summary, tables
from benchmarks.contenders import CONTENDERS
from benchmarks.problem import JOBS
from benchmarks.store import Row

QUESTION = "trapo"
LABELS = {  # of a contender, for who has not read the report
    summary.NEW_GRADIENTS: "floor, outputs not reused",
    "ours, nothing kept (native)": "ours, buffers not reused (native)",
}


def table(groups: list[list[Row]]) -> str:
    """Ratio to the floor of every contender that was measured at each shape, the memory beyond the gradients, and the origin."""
    mine = [group for group in groups if group[0]["case"]["question"] == QUESTION]
    if not mine:
        raise ValueError(f"the results have no rows of question {QUESTION!r}: run python -m benchmarks {QUESTION}.")
    found = {(row["contender"], i): row for i, group in enumerate(mine) for row in group if row.get("ratio") is not None}
    names = dict.fromkeys(name for name, _ in found)
    everywhere = [name for name in names if all((name, i) in found for i in range(len(mine)))]
    weighed = [i for i, group in enumerate(mine) if any(row.get("peak_mib") is not None for row in group)]
    weighed = max(weighed, key=lambda i: mine[i][0]["case"]["num_rows"], default=None)
    cases = [group[0]["case"] for group in mine]
    titles = [f"N={case['num_rows']} D={case['hidden_size']} V={case['vocab_size']}" for case in cases]
    titles += [f"extra MiB, N={cases[weighed]['num_rows']}"] if weighed is not None else []
    lines = [
        f"{JOBS[cases[0]['job']].about}. Time relative to its three matrix products alone (median of interleaved rounds); N "
        "tokens, hidden size D, vocabulary V. Last column: peak memory beyond inputs and gradients.",
        "",
        f"| | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for name in sorted(everywhere, key=lambda name: sum(found[name, i]["ratio"] for i in range(len(mine)))):
        cells = [f"{found[name, i]['ratio']:.2f}" for i in range(len(mine))]
        extra = None if weighed is None else tables.extra_mib(found[name, weighed])
        cells += ["–" if extra is None else f"{extra:.0f}"] * (weighed is not None)
        bold = "**" if name.startswith("ours") else ""
        lines.append(f"| {bold}{_label(name)}{bold} | {' | '.join(cells)} |")
    lines += ["", *summary.in_short(mine), *_left_out(mine, names, everywhere)]
    env = mine[0][0]["environment"]
    commands: dict[str, dict[str, None]] = {}  # by revision; a later run measures what one before has left
    for run in (row["environment"] for group in mine for row in group):
        commands.setdefault(run["revision"], {})[f"`{run['command']}`"] = None
    measured = "; ".join(f"revision {revision}: {', then '.join(runs)}" for revision, runs in commands.items())
    lines += ["", f"{env['device']}, torch {env['versions']['torch']}, {measured}"]
    return "\n".join(lines)


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _left_out(mine: list[list[Row]], names: dict[str, None], everywhere: list[str]) -> list[str]:
    """Who is not in the table, and why."""
    rows = [row for group in mine for row in group if not row["contender"].startswith("floor")]
    cannot = {row["contender"]: row["reason"] for row in rows if row["status"] == "cannot"}
    failed = {row["contender"]: f"{row['status']}." for row in rows if row["status"] not in ("ok", "cannot", "absent")}
    some = [name for name in names if name not in everywhere and not name.startswith("floor")]
    tried = {row["contender"] for row in rows if row["status"] != "absent"}
    untried = [contender.name for contender in CONTENDERS if not (contender.ours or contender.floor or contender.name in tried)]
    by_reason = {reason: [name for name in cannot if cannot[name] == reason] for reason in cannot.values()}
    excused = [f"{' and '.join(names)} ({reason.removesuffix('.')})" for reason, names in by_reason.items()]
    said = [f"Not in the table: {'; '.join(excused)}."] if cannot else []
    said += [f"Did not get through: {' '.join(f'{name} {reason}' for name, reason in failed.items())}"] if failed else []
    said += [f"Measured at some of these shapes only (see the report): {'; '.join(map(_label, some))}."] if some else []
    said += [f"Not measured here (see the report): {'; '.join(untried)}."] if untried else []
    return [line for sentence in said for line in ("", sentence)]


def _markers(device: str) -> re.Pattern:
    return re.compile(rf"(<!-- bench:{device} -->\n).*?(<!-- /bench:{device} -->)", re.S)


def insert(text: str, device: str, body: str) -> str:
    """`text` with `body` between the markers of `device`; ValueError when they are missing."""
    if not _markers(device).search(text):
        raise ValueError(
            f"the README has no <!-- bench:{device} --> … <!-- /bench:{device} --> markers; add them where the table goes."
        )
    return _markers(device).sub(lambda match: match[1] + body + "\n" + match[2], text)
