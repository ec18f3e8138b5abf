"""What `backend="auto"` scores with on a GPU: the medians of the question `scoring`, pinned in the package.

    make gpu-bench                                                                  # measures, on the GPU
    python -m benchmarks.scoring_table benchmarks/results/<gpu>/results.jsonl       # writes trapo_kernels/scoring.json

Entries of other GPUs stay; those of this one are replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import provenance, store
from trapo_kernels.backends.fences import has_fences

TABLE = provenance.ROOT / "trapo_kernels" / "scoring.json"
CONTENDERS = {f"ours ({backend})": backend for backend in ("triton", "triton_fused", "native_fused")}


def entries(rows: list[store.Row]) -> tuple[list[dict[str, object]], list[str]]:
    """An entry per GPU, dtype and shape where the chunked path and at least one fused kernel were timed, most recent rows only; and
    a sentence for every kernel that was timed under other conditions than the chunked path, whose milliseconds say nothing here."""
    found, left_out = [], []
    for group in store.latest(rows):
        case = group[0]["case"]
        timed = {
            CONTENDERS[row["contender"]]: row
            for row in group
            if row["contender"] in CONTENDERS and row["status"] == "ok" and not row.get("partial")
            if "cold_median_ms" in row  # as only a GPU's clock has it
        }
        if case["job"] != "score" or case["logits_dtype"] != "float32" or "triton" not in timed:
            continue
        shape = [case["num_rows"], case["hidden_size"], case["vocab_size"]]
        environment = timed["triton"]["environment"]
        median_ms = {name: row["median_ms"] for name, row in timed.items() if _conditions(row) == _conditions(timed["triton"])}
        left_out += [
            f"{shape} {case['dtype']}: {name} is left out, because it was not measured where and as triton was. Measure both again."
            for name in timed
            if name not in median_ms
        ]
        if len(median_ms) > 1:
            measured = {"device": environment["device"], "dtype": case["dtype"], "shape": shape, "median_ms": median_ms}
            fences = has_fences(environment["versions"]["triton"])
            found.append(measured | {"fences": fences, "revision": environment["revision"]})
    return found, left_out


def _conditions(row: store.Row) -> dict[str, object]:
    """Device, driver, revision, versions and so on; one run may go on under another command."""
    return {name: value for name, value in row["environment"].items() if name != "command"}


def merged(table: dict, new: list[dict[str, object]], command: str) -> dict[str, object]:
    """The table with the entries of the GPUs in `new` replaced."""
    devices = {entry["device"] for entry in new}
    kept = [entry for entry in table["entries"] if entry["device"] not in devices]
    return {
        "command": command,
        "entries": sorted([*kept, *new], key=lambda entry: (entry["device"], entry["dtype"], entry["shape"])),
    }


def main(arguments: list[str] | None = None) -> int:
    """`python -m benchmarks.scoring_table`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring_table", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    parser.add_argument("--table", type=Path, default=TABLE, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    new, left_out = entries(store.read(options.results))
    for sentence in left_out:
        print(f"scoring_table: {sentence}", file=sys.stderr)
    if not new:
        print(f"scoring_table: {options.results} has no GPU timings of `ours (triton)` beside a fused kernel.", file=sys.stderr)
        return 1
    command = f"python -m benchmarks.scoring_table benchmarks/results/{options.results.parent.name}/{options.results.name}"
    table = merged(json.loads(options.table.read_text()), new, command)
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    options.table.write_text(f'{{"command": {json.dumps(table["command"])}, "entries": [\n{lines}\n]}}\n')
    for entry in new:
        print(f"{entry['shape']} {entry['dtype']}: " + ", ".join(f"{k} {v:.2f} ms" for k, v in entry["median_ms"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
