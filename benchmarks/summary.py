"""What a results file says in sentences: what a user gains, and where we lose."""

from __future__ import annotations

from statistics import median

from benchmarks import peers, tables
from benchmarks.store import Row

GPU_TARGETS = {"score": 1.10, "sft": 1.12, "grpo": 1.12, "trapo": 1.14}  # ratio to the floor on one H200, N ≥ 4096, D ≥ 3584
SETTING_TARGETS = {"frozen head": 0.75, "batch_invariant": 1.25}  # the same
NEW_GRADIENTS = "floor, 3 GEMMs, new gradients"
CPU_TARGET = 1.10  # forward and backward, D ≥ 896
EXTRA_MEMORY_TARGET = 1 / 8  # of eager's
_TARGETS = f"forward and backward on a CPU, float32, D ≥ 896: {CPU_TARGET:.2f} × the bare GEMMs; on an H200: 1.10 to 1.14 ×"


def ours(group: list[Row]) -> Row | None:
    """The row of what `backend="auto"` runs, in one pass: native on a CPU, Triton on a GPU."""
    names = ("ours (triton)", "ours (native)") if _on_gpu(group) else ("ours (native)", "ours (torch)")
    rows = {row["contender"]: row for row in group if row["status"] == "ok" and row.get("ratio") is not None}
    return next((rows[name] for name in names if name in rows), None)


def _on_gpu(group: list[Row]) -> bool:
    return group[0]["environment"]["driver"] is not None


def _peers(group: list[Row]) -> list[Row]:
    return [
        row
        for row in group
        if row["status"] == "ok" and row.get("ratio") is not None and not row["contender"].startswith(("ours", "floor", "body"))
    ]


def in_short(groups: list[list[Row]]) -> list[str]:
    """One sentence on time and one on memory: each peer over ours, from the smallest to the largest among the cases."""
    times: dict[str, list[float]] = {}
    extras: dict[str, list[float]] = {}
    untiled: set[int] = set()  # vocabularies that TRL does not divide
    name = ""
    for group in groups:
        mine = ours(group)
        if mine is None or group[0]["case"]["measure"] != "time":
            continue
        name = mine["contender"]
        for row in _peers(group):
            times.setdefault(row["contender"], []).append(median(tables.over(row, mine)))
            if tables.extra_mib(row) is not None and tables.extra_mib(mine) is not None:
                extras.setdefault(row["contender"], []).append(tables.extra_mib(row) / max(1.0, tables.extra_mib(mine)))
                vocab_size = row["case"]["vocab_size"]
                untiled |= {vocab_size} if row["contender"] == peers.TRL and vocab_size <= peers.TRL_TILE else set()
    if not times:
        return []
    said = f"Peers over {name}, time: {_ranges(times)}."
    if extras:
        widths = " and ".join(f"V={size}" for size in sorted(untiled))
        whole = f" (its tile of {peers.TRL_TILE} columns is the whole vocabulary at {widths})" if untiled else ""
        said += f" Memory beyond the gradients: {_ranges(extras, {peers.TRL: whole})}."
    return [said]


def _ranges(values: dict[str, list[float]], notes: dict[str, str] | None = None) -> str:
    ranked = sorted(values.items(), key=lambda item: -max(item[1]))
    return "; ".join(f"{name} {_range(found)}{(notes or {}).get(name, '')}" for name, found in ranked)


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    if len(values) == 1:
        return f"{low} × (one case)"
    return f"{low} ×" if low == high else f"{low} to {high} ×"


def losses(groups: list[list[Row]]) -> list[str]:
    """Where a peer is faster, where a target is missed in time or memory, where our error is large."""
    timed = [group for group in groups if group[0]["case"]["measure"] == "time" and not group[0]["case"]["chunk_rows"]]
    parts = {
        "A peer is faster": [sentence for group in timed for sentence in _slower(group)],
        f"Above the target in time ({_TARGETS})": [sentence for group in timed for sentence in _above_target(group)],
        "Above the target in memory (an eighth of eager's beyond the gradients)": [s for group in timed for s in _heavy(group)],
        f"An error over {tables.EAGER_ERROR_FACTOR:g} times eager's": [s for group in groups for s in _inexact(group)],
        "Did not run": [s for group in groups for s in _failed(group)],
    }
    lines = []
    for title, said in parts.items():
        if said:
            lines += [f"**{title}**", "", *(f"- {sentence}" for sentence in dict.fromkeys(said)), ""]
    return lines[:-1] or ["Nowhere among the measured cases."]


def _title(group: list[Row]) -> str:
    return group[0]["title"]


def _slower(group: list[Row]) -> list[str]:
    mine = ours(group)
    if mine is None:
        return []
    said = []
    for row in _peers(group):
        times = tables.over(row, mine)
        if median(times) < 1.0:
            faster = sum(time < 1.0 for time in times)
            how = f"in {faster} of {len(times)} rounds" if len(times) > 1 else f"ranges {_overlap(row, mine)}"
            said.append(
                f"{_title(group)}: {row['contender']} takes {median(times):.2f} × the time of {mine['contender']}, which is "
                f"{mine['ratio']:.2f} × floor ({how})."
            )
    return said


def _overlap(row: Row, mine: Row) -> str:
    return "overlap" if tables.spread(row)[1] >= tables.spread(mine)[0] else "apart"


def _above_target(group: list[Row]) -> list[str]:
    mine, case = ours(group), group[0]["case"]
    if mine is None or case["active"] < 1.0:
        return []
    if _on_gpu(group):
        large = case["num_rows"] >= 4096 and case["hidden_size"] >= 3584
        target = SETTING_TARGETS.get(case.get("setting"), GPU_TARGETS[case["job"]]) if large else None
    else:
        trained = case["job"] != "score" and case["dtype"] == "float32" and not case.get("setting")
        target = CPU_TARGET if case["hidden_size"] >= 896 and trained else None
    if target is None or mine["ratio"] <= target:
        return []
    bare = next((row for row in group if row["contender"] == NEW_GRADIENTS and row.get("ratio") is not None), None)
    beside = "" if bare is None else f"; the bare GEMMs with new gradients {bare['ratio']:.2f}"
    return [f"{_title(group)}: {mine['contender']} takes {mine['ratio']:.2f} × floor, the target is {target:.2f}{beside}."]


def _heavy(group: list[Row]) -> list[str]:
    mine = ours(group)
    eager = next((row for row in group if row["contender"] == "eager" and row["status"] == "ok"), None)
    extras = [None if row is None else tables.extra_mib(row) for row in (mine, eager)]
    if None in extras or extras[0] <= EXTRA_MEMORY_TARGET * extras[1]:
        return []
    return [
        f"{_title(group)}: {mine['contender']} {extras[0]:.0f} MiB, eager {extras[1]:.0f}: 1/{extras[1] / max(extras[0], 1):.1f}."
    ]


def _inexact(group: list[Row]) -> list[str]:
    said = []
    for row in group:
        large = [title for title, key in tables.ERRORS.items() if row["status"] == "ok" and tables.too_large(row, group, key)]
        if large and row["contender"].startswith("ours"):
            said.append(f"{_title(group)}: {row['contender']} in {', '.join(large)}.")
    return said


def _failed(group: list[Row]) -> list[str]:
    return [
        f"{_title(group)}: {row['contender']}, {row['status']}: {row['reason']}"
        for row in group
        if row["contender"].startswith("ours") and row["status"] not in ("ok", "cannot", "absent")
    ]
