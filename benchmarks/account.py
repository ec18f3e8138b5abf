"""Bytes and FLOP on paper: the peak memory formula beside each measurement, and predictions for a GPU that is not at hand.

    python -m benchmarks.account > benchmarks/results/TODO.md        # what awaits a GPU, with the arithmetic

A prediction is arithmetic, never a measurement. Its two rates per GPU are those of a bf16 GEMM and of a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.problem import Case
from trapo_kernels import head_memory
from trapo_kernels.backends.gemm import chunk_rows, grad_weight_dtype


class Rates(NamedTuple):
    """A GPU's bf16 GEMM, and bytes read plus bytes written per second of a large copy, as measured on that kind of machine."""

    gpu: str
    gemm_tflops: float
    copy_tbps: float

    def gemm_ms(self, flop: float) -> float:
        """Time of a GEMM, or of several."""
        return flop / (self.gemm_tflops * 1e12) * 1e3

    def copy_ms(self, num_bytes: float) -> float:
        """Time of moving so many bytes."""
        return num_bytes / (self.copy_tbps * 1e12) * 1e3


H200, H100 = Rates("H200", 790.0, 4.3), Rates("H100", 798.0, 3.0)
MULTIPROCESSORS, TILE = 132, (128, 256)  # of either, and of the GEMMs of a chunk, as far as known
L2_TBPS = 5.5  # what the L2 of either gives to all multiprocessors: a cautious guess


def memory_formula(contender: str, case: Case, device_type: str) -> dict[str, int] | None:
    """Bytes that our backends hold at their peak above the inputs, by what they hold: `head_memory`, and rows of dHidden that no
    GEMM reaches; None for contenders and settings whose allocations it does not state."""
    ours = contender.startswith("ours") and "reference" not in contender and "_fused" not in contender
    if not ours or case.chunk_rows or case.logits_dtype != "float32" or case.setting:
        return None
    dtype, scores = getattr(torch, case.dtype), case.job == "score"
    rows = max(1, int(case.num_rows * case.active))
    sizes, how = (rows, case.hidden_size, case.vocab_size), {"grad_weight": not scores, "in_place": "torch" not in contender}
    parts = head_memory(*sizes, dtype=dtype, device_type=device_type, **how)
    if scores:
        held = {name: parts[name] for name in ("logits", "weight")}
        copied = chunk_rows(*sizes, device_type) * case.hidden_size * dtype.itemsize
        return held if device_type == "cpu" else held | {"hidden chunk": copied}
    return parts | {"grad_hidden": case.num_rows * case.hidden_size * dtype.itemsize}


class Plan(NamedTuple):
    """A way through the head: its GEMMs and its floor's, bytes per fp32 logit that its row kernels move, GEMMs that write fp32
    logits, the share of rows that take part, whether the head is trained, rows per chunk (0: the backend's own rule), bytes from
    L2 for every 128 · 128 · 64 products of a kernel whose logits stay on the chip."""

    name: str
    gemms: float
    floor: int
    row_bytes: int
    wide_gemms: int
    active: float = 1.0
    trained: bool = True
    chunk: int = 0
    l2_bytes: int = 0


SINGLE_PASS = Plan("single pass, `triton`", 3, 3, 4 + 4 + 2, 1)
SCORING = Plan("scoring, `triton`", 1, 1, 4, 1, trained=False)
PLANS = [
    SINGLE_PASS,
    Plan("single pass, `native`: a row stays in shared memory", 3, 3, 4 + 2, 1),
    Plan("two passes, `triton`", 4, 3, 4 + 4 + 4 + 2, 2),
    SINGLE_PASS._replace(name="single pass, half of the rows active", active=0.5),
    Plan("single pass, frozen head", 2, 3, 4 + 4 + 2, 1, trained=False),
    SINGLE_PASS._replace(name="single pass, batch_invariant=True", chunk=1024),
    SCORING,
    Plan("scoring, `native_fused`", 1, 1, 0, 0, trained=False, l2_bytes=16 << 10),  # 128 × 256, weight tiles for two blocks
    Plan("scoring, `triton_fused`", 1, 1, 0, 0, trained=False, l2_bytes=32 << 10),  # 128 × 128
]


class Prediction(NamedTuple):
    """Milliseconds of the parts, and the ratio to the floor if the GEMMs' own extra traffic hides behind their arithmetic
    (`hidden`) or adds up (`exposed`)."""

    gemms_ms: float
    floor_ms: float
    row_kernels_ms: float
    rounding_ms: float
    wide_logits_ms: float
    grad_weight_ms: float
    waves_ms: float
    l2_ms: float
    chunks: int

    @property
    def hidden(self) -> float:
        return (self.gemms_ms + self.row_kernels_ms + self.rounding_ms) / self.floor_ms

    @property
    def exposed(self) -> float:
        more_ms = self.wide_logits_ms + self.grad_weight_ms + self.waves_ms
        return max(self.hidden + more_ms / self.floor_ms, self.l2_ms / self.floor_ms)


def rounds(rows: int, columns: int) -> float:
    """How much longer than its work a GEMM of [rows, columns] takes whose last round of tiles leaves multiprocessors idle."""
    tiles = -(-rows // TILE[0]) * -(-columns // TILE[1])
    return -(-tiles // MULTIPROCESSORS) * MULTIPROCESSORS * TILE[0] * TILE[1] / (rows * columns)


def predict(case: Case, plan: Plan = SINGLE_PASS, rates: Rates = H200) -> Prediction:
    """The account of a plan with fp32 logits and bf16 inputs on one GPU."""
    n, d, v = round(case.num_rows * plan.active), case.hidden_size, case.vocab_size
    rows = min(n, plan.chunk or chunk_rows(n, d, v, "cuda"))
    chunks = -(-n // rows)
    one = rates.gemm_ms(case.gemm_flop)
    forward_only = plan.gemms == 1
    held = grad_weight_dtype(n, d, v, torch.bfloat16, torch.bfloat16, "cuda", batch_invariant=plan.chunk > 0)
    in_fp32 = plan.trained and held == torch.float32
    return Prediction(
        gemms_ms=plan.gemms * one * plan.active,
        floor_ms=plan.floor * one,
        row_kernels_ms=rates.copy_ms(plan.row_bytes * n * v),
        rounding_ms=0.0 if forward_only else rates.copy_ms(6 * n * d + (6 * v * d if in_fp32 else 0)),
        wide_logits_ms=rates.copy_ms(2 * n * v * plan.wide_gemms),
        grad_weight_ms=rates.copy_ms((2 * chunks - 1) * 4 * v * d) if in_fp32 else 0.0,
        waves_ms=0.0 if forward_only else max(0.0, rounds(rows, d) / rounds(case.num_rows, d) - 1) * one * plan.active,
        l2_ms=plan.l2_bytes * (n * v * d / (128 * 128 * 64)) / (L2_TBPS * 1e12) * 1e3,
        chunks=chunks,
    )


SHAPES = [  # of several chunks, and of one
    (32768, 3584, 152064),
    (8192, 4096, 151936),
    (8192, 4096, 128256),
    (8192, 3584, 256000),
    (8192, 1024, 151936),
    (4096, 3584, 152064),
]
COMMANDS = [
    (
        "make -k gpu-native gpu-test gpu-bench GPU_SECONDS=200 GPU_MINUTES=4.5 "
        'QUESTIONS="trapo scoring active_rows settings --brief"',
        "where there are ten minutes: what the next two commands give, as far as it comes",
    ),
    (
        "make -k gpu-native gpu-test GPU_SECONDS=430",
        "builds the CUDA kernels of `csrc`, none of which has run yet, for this GPU (half a minute); then the kernel tests and, "
        "beside them, compute-sanitizer on the CUDA kernels: `tests.md`, `sanitizer.txt`",
    ),
    (
        'make -k gpu-native gpu-bench GPU_MINUTES=8 QUESTIONS="trapo scoring active_rows settings --brief"',
        "TRAPO's own micro-batch first, then scoring, inactive rows, a frozen head and batch-invariant rows",
    ),
    (
        "make -k gpu-native gpu-bench GPU_MINUTES=8",
        "the matrix; every call goes on where the last one stopped, so change nothing between them: rows belong to a revision",
    ),
    ('make gpu-bench QUESTIONS="scoring sweep"', "what `scoring_table` needs, if the matrix has not come that far"),
    ('make gpu-bench QUESTIONS="longest step compile"', "the long questions"),
    (
        "python -m benchmarks.memory_plan --device cuda",
        "`<gpu>/memory.md`: predicted and measured peak of a 0.5B model's step at 32k tokens, fused and eager head, tokens/s",
    ),
    ("python -m pytest -m gpu tests/trapo_train", "the trainer's tests that need a GPU, Liger's kernels among them"),
    ("python -m benchmarks.report benchmarks/results/<gpu>/results.jsonl", "tables and plots, on any machine"),
    ("python -m benchmarks.scoring_table benchmarks/results/<gpu>/results.jsonl", 'pins what `backend="auto"` scores with'),
]
NOTES = """
Each `make` call ends within 9 minutes and writes into `OUT` (an environment variable serves), else into `benchmarks/results`:
three small files per GPU, as things become known; in `tests.md` `crashed` is followed by what the process said last, `running` is
what the end of the time cut off. `gpu-bench` goes on from `benchmarks/results/<gpu>/results.jsonl`, so put what
came back there before the next call. Peers are measured where they import: put liger-kernel[cutedsl], cut-cross-entropy, trl with
datasets, quack-kernels and verl on PYTHONPATH. The GPU machine's own `python3` with torch, triton and pytest is enough; `-k` lets
tests and benchmarks run where the CUDA part does not build. A contender that crashes the GPU, or whose call hangs for half a
minute (2 minutes for a peer, which may try many settings first), is recorded and passed over in that case; after the second time,
in a call of under 6 minutes after the first, so are all contenders of its backend in what follows of the call.
"""


def arithmetic(case: Case, plan: Plan, rates: Rates) -> list[str]:
    """The prediction of one shape, line by line."""
    p, n, d, v = predict(case, plan, rates), case.num_rows, case.hidden_size, case.vocab_size
    second = f"; a row is {4 * v // 1024} KiB and hundreds are in flight, so the L2 serves no second read"
    one, moved = p.floor_ms / plan.floor, plan.row_bytes * n * v / 1e9
    lines = [
        f"- one GEMM: 2·{n}·{d}·{v} = {case.gemm_flop:.3e} FLOP / {rates.gemm_tflops:g} TFLOP/s = {one:.1f} ms; floor: "
        f"{plan.floor} of them = {p.floor_ms:.1f} ms",
        f"- row kernel: {plan.row_bytes} B per fp32 logit · {n}·{v} = {moved:.1f} GB / {rates.copy_tbps:g} TB/s = "
        f"{p.row_kernels_ms:.2f} ms{second if plan.row_bytes == 10 else ''}",
        f"- fp32 logits out of the GEMM: 2 B more per logit than bf16 = {p.wide_logits_ms:.2f} ms, unless hidden in its epilogue",
    ]
    if plan.trained:
        lines += [
            f"- fp32 dWeight written by {p.chunks} chunks and read by all but the first: {2 * p.chunks - 1}·4·{v}·{d} B = "
            f"{p.grad_weight_ms:.2f} ms, unless hidden in that GEMM",
            f"- dHidden of a chunk: its {TILE[0]} × {TILE[1]} tiles fill {MULTIPROCESSORS} multiprocessors worse than the floor's: "
            f"{p.waves_ms:.2f} ms, unless cuBLAS has other tiles or splits V",
            f"- both gradients rounded from fp32 to bf16, dWeight with the upstream factor: {p.rounding_ms:.2f} ms",
        ]
    return [
        *lines,
        f"- predicted ratio to the floor: **{p.hidden:.2f}** if all of what has an 'unless' hides, **{p.exposed:.2f}** if none",
    ]


def _table(rows: list[tuple[Case, Plan]]) -> list[str]:
    """Ratios to the floor on both GPUs, with the GEMMs' traffic hidden and exposed."""
    lines = [
        "| | N | D | V | floor ms, H200 | × floor, H200 | floor ms, H100 | × floor, H100 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, plan in rows:
        cells = []
        for rates in (H200, H100):
            p = predict(case, plan, rates)
            cells += [f"{p.floor_ms:.1f}", f"{p.hidden:.2f}" + (f"-{p.exposed:.2f}" if p.exposed - p.hidden >= 0.005 else "")]
        lines.append(f"| {plan.name} | {case.num_rows} | {case.hidden_size} | {case.vocab_size} | {' | '.join(cells)} |")
    return lines


def todo() -> str:
    """The text of results/TODO.md."""
    cases = [Case("todo", "trapo", *shape, "bfloat16") for shape in SHAPES]
    peak = memory_formula("ours (triton)", cases[1], "cuda")
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in peak.items() if size)
    lines = [
        "# What awaits a GPU",
        "",
        "No figure below was measured on a kernel of this project: each is arithmetic from two rates per GPU, "
        + " and ".join(
            f"{r.gemm_tflops:g} TFLOP/s for a bf16 GEMM and {r.copy_tbps:g} TB/s for a copy on one {r.gpu}" for r in (H200, H100)
        )
        + ". `python -m benchmarks.account > benchmarks/results/TODO.md` writes this file.",  # TODO is its name
        "",
        "## Commands, in this order",
        "",
        "| command | what it gives |",
        "|---|---|",
        *(f"| `{command}` | {gives} |" for command, gives in COMMANDS),
        NOTES,
        "## Predictions, bf16 inputs, fp32 logits, entropy gradient on",
        "",
        "Times the floor: the bare GEMMs of all rows, three for a loss, one for scoring. The range is from all of the GEMMs' own",
        "extra traffic hidden behind their arithmetic, and chunks that fill the GPU as well as the whole, to none of that; of the",
        f"kernels whose logits stay on the chip from arithmetic alone to operands from the L2 alone, at {L2_TBPS} TB/s, a cautious",
        "guess.",
        "",
        *_table([(case, SINGLE_PASS) for case in cases]),
        "",
        "Where all rows are one chunk, as in the last line, the GEMM of dWeight rounds it: there is no fp32 one to write and read.",
        "",
        *_table([(cases[0], plan) for plan in PLANS[1:]]),
        "",
    ]
    for plan in (SINGLE_PASS, SCORING):
        lines += [f"## {plan.name}, {cases[0].shape}, H200", "", *arithmetic(cases[0], plan, H200), ""]
    lines += [
        f"Peak memory at {cases[1].shape} by `head_memory`: {sum(peak.values()) / 2**30:.2f} GiB above the inputs ({parts}).",
        "",
        "What would disprove the account: a ratio above the range means that the row kernel does not reach the copy rate (look at "
        "`BLOCK_V` and the number of warps in `launch.py`, or at `row_kernels.cuh`) or that the GEMMs of a chunk do not reach the "
        "rate of whole ones (`chunk` times chunks of 4736 rows, 3.9 rounds of dHidden's tiles at D = 3584, against 4096, 3.4 of "
        "them). The row kept in shared memory may miss its range: see `offline_native.md` for why.",
        "",
        "To be timed before the tile of `launch.py` is pinned: the first sweep of the Triton row kernels reduces over the block in "
        "every tile and starts no load before that (read off the SASS). `tl.range(0, whole, BLOCK_V, num_stages=3)` in `row_sweep` "
        "compiles to asynchronous copies (row_policy of TRAPO on sm_90, triton 3.9: 64 registers, 16 KiB of shared memory, no "
        "spill, where the plain loop takes 40 and none; under triton 3.6 see `launch.py`); a maximum per lane, reduced once, needs "
        "no barriers.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(todo(), end="")
