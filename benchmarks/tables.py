"""The tables of a report: one per case, and those that gather one figure over all cases."""

from __future__ import annotations

from math import inf

from benchmarks.store import Row

_FEW_ROUNDS = 8
EAGER_ERROR_FACTOR = 2.0  # an error above this many times eager's is marked


def of_case(group: list[Row]) -> list[str]:
    """Those that ran, best first; then those that cannot do the job or failed, with the reason."""
    ran = [row for row in group if row["status"] == "ok" and not _empty(row)]
    ran.sort(key=lambda row: (row.get("ratio", row.get("first_call_ms", -row.get("longest_tokens", -inf))), row["contender"]))
    columns = [(title, cell) for title, cell in _COLUMNS if any(cell(row, group) for row in ran)]
    lines = []
    if columns:
        titles = ("× body alone" if title == "× floor" and _measure(group) == "step" else title for title, _ in columns)
        lines = ["| contender | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in ran:
        name = f"**{row['contender']}**" if row["contender"].startswith("ours") else row["contender"]
        lines.append(f"| {name} | " + " | ".join(cell(row, group) or "–" for _, cell in columns) + " |")
    refused = [row for row in group if row["status"] not in ("ok", "absent") and not row["contender"].startswith("floor")]
    said = [f"{row['contender']}: {'' if row['status'] == 'cannot' else row['status'] + ': '}{row['reason']}" for row in refused]
    said += [f"{row['contender']}: {row['note']}" for row in ran if row.get("note")]
    said += [f"{row['contender']} stopped: {row['stopped_by']}" for row in ran if row.get("stopped_by")]
    lines += [""] * bool(said) + [f"- {sentence}" for sentence in said]
    if any(row.get("partial") for row in group):
        lines += ["", "The budget ended before this case was whole: some figures are missing."]
    return lines


def spread(row: Row) -> tuple[float, float]:
    """Between what the ratio to the floor lay: p20 and p80, of few rounds all of them: of two samples of 3 rounds of one thing the
    former are apart in a quarter of the cases."""
    few = row["rounds"] < _FEW_ROUNDS and "ratio_min" in row
    return (row["ratio_min"], row["ratio_max"]) if few else (row["ratio_p20"], row["ratio_p80"])


def over(row: Row, mine: Row) -> list[float]:
    """Times of one contender over another's, round by round; of rows that have no rounds in common the quotient of their ratios to
    the floor."""
    rounds = [r.get("rounds_ms", []) for r in (row, mine)]
    if not all(rounds) or len(rounds[0]) != len(rounds[1]) or row["measured_at"] != mine["measured_at"]:
        return [row["ratio"] / mine["ratio"]]
    return [theirs / ours for theirs, ours in zip(*rounds, strict=True)]


def _measure(group: list[Row]) -> str:
    return group[0]["case"]["measure"]


def _empty(row: Row) -> bool:
    """A floor where nothing is timed."""
    return row["contender"].startswith("floor") and row.get("ratio") is None


def required_mib(row: Row) -> float:
    """dHidden and dWeight in the inputs' dtype, which every contender must return; nothing where there is no backward."""
    case = row["case"]
    item = {"float32": 4, "float64": 8}.get(case["dtype"], 2)
    rows = case["num_rows"] + (0 if case.get("setting") == "frozen head" else case["vocab_size"])
    return 0.0 if case["job"] == "score" else item * case["hidden_size"] * rows / 2**20


def extra_mib(row: Row) -> float | None:
    """Peak memory beyond the inputs and the gradients that are returned."""
    return None if row.get("peak_mib") is None else row["peak_mib"] - required_mib(row)


def memory(groups: list[list[Row]]) -> list[str]:
    """What each contender needs beyond the gradients, beside the total and the formula, wherever memory was measured."""
    lines = []
    for group in groups:
        rows = [row for row in group if row["status"] == "ok" and extra_mib(row) is not None and row["case"]["measure"] == "time"]
        eager = next((extra_mib(row) for row in rows if row["contender"] == "eager"), None)
        for row in sorted(rows, key=lambda row: (extra_mib(row), row["contender"])):
            extra = extra_mib(row)
            formula = f"{row['formula_mib'] - required_mib(row):.0f}" if "formula_mib" in row else "–"
            share = "–" if eager is None or min(eager, extra) < 1.0 else _share(extra / eager)
            cells = (
                row["title"],
                row["contender"],
                f"{row['peak_mib']:.0f}",
                f"{required_mib(row):.0f}",
                f"{extra:.0f}",
                formula,
                share,
            )
            lines.append("| " + " | ".join(cells) + " |")
    head = "| case | contender | peak MiB above inputs | gradients | extra | extra by formula | extra, of eager's |"
    return [head, "|---" * 7 + "|", *lines] if lines else []


def _share(value: float) -> str:
    return f"1/{1 / value:.1f}" if value < 1.0 else f"{value:.1f} ×"


def data(groups: list[list[Row]]) -> list[str]:
    """What the rows of each job are like, at its first case with peaked logits."""
    lines, seen = [], set()
    for group in groups:
        found = next((row["data"] for row in group if "data" in row and row["case"]["peaked"]), None)
        case = group[0]["case"]
        if found is None or case["job"] in seen:
            continue
        seen.add(case["job"])
        low, middle, high = found["p_quantiles"]
        cells = (
            group[0]["title"],
            f"{found['mean_logprob']:.2f}",
            f"{found['mean_entropy']:.2f}",
            f"{low:.2g} / {middle:.2g} / {high:.4f}",
            f"{found['sure_share']:.0%}",
            f"{found['below_alpha_share']:.0%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    head = "| case | mean logprob, nats | mean entropy, nats | p of the target, p20 / p50 / p80 | p > 0.9 | p < α = 0.1 |"
    return [head, "|---" * 6 + "|", *lines] if lines else []


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
        text = f"{value:.1e}"
        return f"{text} (!)" if too_large(row, group, key) else text

    return cell


def too_large(row: Row, group: list[Row], key: str) -> bool:
    """Whether an error is more than EAGER_ERROR_FACTOR times eager's."""
    eager = next((r.get("errors", {}).get(key) for r in group if r["contender"] == "eager" and r["status"] == "ok"), None)
    return eager is not None and row.get("errors", {}).get(key, 0.0) > EAGER_ERROR_FACTOR * eager


def peak(row: Row) -> str:
    """The peak in MiB, the formula's in brackets; "" where none was measured."""
    if row.get("peak_mib") is None:
        return ""
    return f"{row['peak_mib']:.0f}" + (f" ({row['formula_mib']:.0f})" if "formula_mib" in row else "")


def _longest(row: Row, group: list[Row]) -> str:
    if row.get("longest_tokens") is None:
        return ""
    return f"{row['longest_tokens']}" if row.get("stopped_by") else f"≥ {row['longest_tokens']}, as far as was tried"


ERRORS = {
    "logprob, nats": "logprob_max_nats",
    "entropy, nats": "entropy_max_nats",
    "dHidden": "grad_hidden_relative",
    "dWeight": "grad_weight_relative",
}
_COLUMNS = [
    ("× floor", _spread("ratio", 2)),
    ("ms", _spread("ms", 1)),
    ("× floor, cold L2", _plain("cold_ratio", "{:.2f}")),
    ("ms, cold L2", _plain("cold_median_ms", "{:.1f}")),
    ("head's share", _plain("head_share", "{:.0%}")),
    ("peak MiB above inputs (formula)", lambda row, group: peak(row)),
    ("first call ms", _plain("first_call_ms", "{:.0f}")),
    ("second call ms", _plain("second_call_ms", "{:.0f}")),
    ("longest, tokens", _longest),
    *((title, _error(key)) for title, key in ERRORS.items()),
    ("launches", _plain("launches", "{}")),
    ("host syncs", _plain("host_syncs", "{}")),
    ("SM clock", _plain("sm_clock", "{}")),
    ("power", _plain("power", "{}")),
    ("rounds", _plain("rounds", "{}")),
]
