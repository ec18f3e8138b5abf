"""What moved between two result sets."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.store import Row

THRESHOLD = 1.05  # smaller changes of a ratio or a peak are not worth a line


def compare(old: list[list[Row]], new: list[list[Row]]) -> str:
    """A Markdown table of every case and contender in both sets whose status changed, whose peak moved by over 5 %, or
    whose ratio to the floor did so with ranges that do not overlap (`tables.spread`)."""
    before = {_key(row): row for group in old for row in group}
    lines = ["| question | case | contender | × floor, old | new | change | peak MiB, old | new |", "|---" * 8 + "|"]
    for row in (row for group in new for row in group if _key(row) in before):
        was = before[_key(row)]
        verdict = _verdict(was, row)
        if verdict:
            ratios = [f"{r['ratio']:.2f}" if r.get("ratio") else "–" for r in (was, row)]
            peaks = [f"{r['peak_mib']:.0f}" if r.get("peak_mib") else "–" for r in (was, row)]
            cells = (row["case"]["question"], row["title"], row["contender"], *ratios, verdict, *peaks)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines if len(lines) > 2 else ["No ratio and no peak moved by more than 5 % and its own spread."])


def _key(row: Row) -> tuple:
    return row["title"], row["case"]["question"], row["contender"]


def _verdict(was: Row, now: Row) -> str:
    """ "" where nothing moved."""
    if was["status"] != now["status"]:
        return f"{was['status']} → {now['status']}"
    said = []
    if was.get("ratio") and now.get("ratio"):
        change = now["ratio"] / was["ratio"]
        (low, high), (low_before, high_before) = tables.spread(now), tables.spread(was)
        apart = low > high_before or high < low_before
        if apart and not 1 / THRESHOLD <= change <= THRESHOLD:
            said.append(f"{change - 1:+.0%} {'slower' if change > 1 else 'faster'}")
    if was.get("peak_mib") and now.get("peak_mib"):
        growth = now["peak_mib"] / was["peak_mib"]
        if not 1 / THRESHOLD <= growth <= THRESHOLD:
            said.append(f"{growth - 1:+.0%} memory")
    return ", ".join(said)
