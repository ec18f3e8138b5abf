"""Do the CUDA kernels of csrc compile for sm_80, sm_90a and sm_100 without spilling, with the intended instructions? Needs no GPU.

    python -m benchmarks.offline_native             # nvcc for every architecture; writes results/offline_native.md
    python -m benchmarks.offline_native --check     # the same without writing

Registers, stack, spills and shared memory come from ptxas, instructions from the disassembled object.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from csrc.build import OLDEST_TORCH, nvcc, torch_directory

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "offline_native.md"
ARCHITECTURES = ("80", "90a", "100")
HOST_WITH = "90a"
# What a kernel must contain: LDGSTS are copies to shared memory that no register waits for, UCGABAR cluster barriers, LD.E reads of
# another block's shared memory. Cluster kernels only trap below sm_90, the Hopper kernel everywhere but on it.
INTENDED = {
    "row_policy_kernel": {"80": ("LDG.E.128", "STG.E"), "90a": ("LDG.E.128", "STG.E"), "100": ("LDG.E.128", "STG.E")},
    "row_gradient_kernel": {"80": ("LDG.E.128", "STG.E"), "90a": ("LDG.E.128", "STG.E"), "100": ("LDG.E.128", "STG.E")},
    "scale_kernel": {arch: ("LDG.E.128", "STG.E") for arch in ARCHITECTURES},
    "scale_kernel<fp32, fp32, 4>": {arch: ("STG.E.128",) for arch in ARCHITECTURES},
    "scale_kernel<fp32, bf16, 4>": {arch: ("STG.E.64",) for arch in ARCHITECTURES},
    "cluster_policy_kernel": {arch: ("LDGSTS.E.BYPASS.128", "LDS.128", "UCGABAR", "LD.E ") for arch in ("90a", "100")},
    "hopper_scoring_kernel": {"90a": ("HGMMA", "UTMALDG", "SYNCS")},
    "hopper_scoring_kernel<2>": {"90a": ("UTMALDG.2D.MULTICAST",)},
}
COUNTED = ("LDG.E.128", "LDGSTS", "STG.E.128", "STG.E.64", "UCGABAR", "HGMMA", "UTMALDG", "UTMALDG.2D.MULTICAST")
_DTYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}  # else S_, S1_, …: the first again


def compile_source(source: Path, architecture: str, directory: Path) -> tuple[Path, str]:
    """The object of one .cu file for one architecture, and what ptxas says of it. Warnings are errors, spills are warnings. What
    runs on the host is the same for all of them and takes most of the time: it is compiled with one.
    """
    target = directory / f"{source.stem}_{architecture}.o"
    command = [nvcc(), "-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
    command += ["-DUSE_CUDA", "-isystem", str(torch_directory() / "include")]
    command += ["-c" if architecture == HOST_WITH else "-cubin", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or "instructions are serialized" in result.stderr:  # wgmma that ptxas waits for, one by one; no warning
        raise RuntimeError(f"{source.name} does not compile as it should for sm_{architecture}:\n{result.stderr}")
    return target, result.stderr


def resources(log: str) -> dict[str, dict[str, int]]:
    """Mangled kernel name → registers, stack and spill bytes, static shared bytes."""
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)' for[^\n]*\n(.*?)(?=ptxas info\s+: Compiling|\Z)", log, re.S):
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", text).groups()
        )
        shared = re.search(r"(\d+) bytes smem", text)
        found[name] = {
            "registers": int(re.search(r"Used (\d+) registers", text).group(1)),
            "stack_bytes": stack,
            "spill_bytes": stores + loads,
            "static_shared_bytes": int(shared.group(1)) if shared else 0,
        }
    return found


def instructions(target: Path) -> dict[str, str]:
    """Mangled kernel name → its disassembly."""
    sass = subprocess.run([_disassembler(), "--dump-sass", str(target)], capture_output=True, text=True, check=True).stdout
    return {part.split("\n", 1)[0].strip(): part for part in sass.split("Function : ")[1:]}


def _disassembler() -> str:
    found = shutil.which("cuobjdump", path=str(Path(nvcc()).parent)) or shutil.which("cuobjdump")
    if found:
        return found
    import triton.backends.nvidia as nvidia  # brings one along

    return str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")


def readable(mangled: str) -> str:
    """`row_policy_kernel<fp32, bf16, 4>` or `hopper_scoring_kernel<2>` from a mangled name."""
    name = re.search(r"[a-z]+(?:_[a-z]+)*_kernel", mangled).group()
    arguments = re.search(rf"{name}I(.*?)Li(\d+)E", mangled)
    if arguments is None:
        return name
    found = re.findall(r"13__nv_bfloat16|6__half|S\d*_|f", arguments.group(1))
    dtypes = [_DTYPES.get(x, _DTYPES[found[0]]) for x in found]
    return f"{name}<{', '.join([*dtypes, arguments.group(2)])}>"


def table() -> list[dict[str, object]]:
    """One row per kernel and architecture that it has code for; as many compilers at once as there are processors."""
    jobs = [(source, arch) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for arch in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as threads:
        return [row for rows in threads.map(lambda job: _compiled(*job, Path(scratch)), jobs) for row in rows]


def _compiled(source: Path, architecture: str, scratch: Path) -> list[dict[str, object]]:
    target, log = compile_source(source, architecture, scratch)
    code = instructions(target)
    rows = []
    for mangled, figures in resources(log).items():
        counts = {name: code[mangled].count(name) for name in COUNTED}
        rows.append({"kernel": readable(mangled), "sm": architecture, **figures, **counts, "sass": code[mangled]})
    return rows


def fault(row: dict[str, object]) -> str | None:
    """What is wrong with a compiled kernel, or None."""
    if row["spill_bytes"] or row["stack_bytes"]:
        return "spills registers"
    kernel, _, arguments = row["kernel"].partition("<")
    scalar = kernel.startswith(("row_", "scale_")) and arguments.endswith(" 1>")  # for rows that are not aligned
    for name in chain(*(INTENDED.get(entry, {}).get(row["sm"], ()) for entry in (kernel, row["kernel"]))):
        if name not in row["sass"] and not (scalar and ".128" in name):
            return f"has no {name}"
    return None


ACCOUNT = """
## What the kernels move and compute

Per logit with fp32 logits and bf16 gradients, V = 152064. Predictions, not measurements.

| kernel | HBM bytes per logit | these alone, at 4.3 TB/s, 4096 rows | exp per logit |
|---|---|---|---|
| Triton `row_policy`, row re-read from HBM | 4 + 4 + 2 | 1.45 ms | 2 |
| `row_policy_kernel`, row re-read from HBM | 4 + 4 + 2 | 1.45 ms | 2 |
| `cluster_policy_kernel`, row kept in the shared memory of 8 blocks | 4 + 2 | 0.87 ms | 2 |
| `hopper_scoring_kernel` | 0 (the chunked path: 4 written + 4 read) | – | 1 |

A chunk of 4096 rows at D = 3584 costs three GEMMs of 4.46 TFLOP, 17.0 ms at 790 TFLOP/s: the second reading of the row is 3 % of
that at most, and nothing where it comes from L2 (50 MB hold 82 fp32 rows of this width; 132 blocks of one row each need 80 MB). So
the cluster kernel would bring a step from 1.09 to 1.06 × the GEMMs, if it reached the bandwidth. Three of its blocks share a
multiprocessor (75.5 KiB each at this V): some wait for their slices, all of each asked for at once, while another computes.

Whether it reaches it is open. Counted in the disassembly (sm_90a, fp32 to bf16, no bias, no softcap), a warp issues about 76
instructions per 4 logits, 8 to copy, 42 to sum and 26 for the gradient, and about 800 besides: at 1.98 GHz and perfect issue 4096
rows take 0.55 ms on 132 multiprocessors, and their exponentials 0.30 ms. That is below the 0.87 ms of the bytes, but too close
to be sure that it hides behind them; what the two barriers of a cluster wait for once per row is not counted. Time both kernels
before believing either. What keeps it there: sums in powers of 2, so that a logit is one multiply-add and one
ex2 away from its exponential; a NaN-keeping maximum; the target's and the ragged packs out of the loop; one maximum for 32 lanes
before their sums are added; blocks of 256 threads, because of what is done once per thread.

`hopper_scoring_kernel`, D = 3584: a tile of 128 × 256 is 56 steps of 64, 2 · 128 · 256 · 3584 FLOP: 39 µs on one of 132
multiprocessors at the 790 TFLOP/s of the bare GEMM. Its epilogue is 840 instructions a warp where the tile lies inside V and
holds no target of the warp's 16 rows (1 420 elsewhere), two warps per scheduler; its 128 exponentials a warp, 8 cycles each,
take longer: 2 050 cycles in which no wgmma runs, 1.0 µs, 1.03 × the GEMM if the operands arrive in time, 1.13 × at D = 1024. It
is less where the two warpgroups drift apart, one's epilogue beside the other's products, as the four stages allow: to be tried
is that the second begins two steps later, which a named barrier would do. Each step brings a block 48 KiB: where every block
loads them for itself, 2.75 MB a tile from L2, 9.3 TB/s over all blocks; with the weight tile shared by the two blocks of a
cluster (`hopper_scoring_kernel<2>`, each loads half for both) 1.84 MB, 6.2 TB/s. How much of that the L2 gives decides: at 5.5
TB/s, a cautious guess, a tile takes 44 µs, 1.12 × the GEMM. The account of the chunked path
(`python -m benchmarks.account`) expects 1.10 to 1.15.

The vocabulary is split so that the clusters finish together, to a tile where it has tiles enough: at 132 multiprocessors and N
= 4096 (16 pairs of row tiles) 33 splits make 528 items of 18 tiles, 8 rounds of 66 clusters; a fixed number of 11 splits would
leave a third of the last of 3 rounds idle, 11 %. Where the splits are not equal the longer ones lie elsewhere in every group of
row tiles: at V = 128256 the busiest cluster has 1.004 × the mean from N = 8192 on, instead of 1.05.
"""


def main(arguments: list[str] | None = None) -> int:
    """`python -m benchmarks.offline_native`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compile and check, but write nothing")
    check = parser.parse_args(arguments).check
    rows = table()
    columns = [name for name in rows[0] if name != "sass"]
    version = re.search(
        r"release ([\d.]+)", subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    )
    head = f"`python -m benchmarks.offline_native`, nvcc {version.group(1)}, {len(rows)} compiled kernels."
    lines = [f"{head} A kernel that an architecture lacks only traps there.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
    text = "\n".join(lines) + "\n" + ACCOUNT
    print(text)
    if not check:
        RESULTS.write_text(text, encoding="utf-8")
    bad = [f"{row['kernel']} on sm_{row['sm']} {fault(row)}" for row in rows if fault(row)]
    print(*bad, sep="\n", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
