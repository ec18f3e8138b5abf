"""The text of results/TODO.md: the commands that await a GPU, and what the account predicts that they will show."""

from __future__ import annotations

from benchmarks.account import (
    H100,
    H200,
    L2_TBPS,
    LAUNCH_US,
    LAUNCHES,
    MULTIPROCESSORS,
    PLANS,
    SCORING,
    SINGLE_PASS,
    TILE,
    Plan,
    Rates,
    memory_formula,
    predict,
)
from benchmarks.problem import Case

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
            f"- {LAUNCHES} launches at most for the arithmetic of tokens, {LAUNCH_US:g} µs each: {p.launches_ms:.2f} ms, unless "
            "they take less",
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
        "extra traffic hidden behind their arithmetic, and chunks that fill the GPU as well as the whole, to none of that and",
        f"{LAUNCH_US:g} µs, a guess, for each of the small launches between; of the kernels whose logits stay on the chip from",
        f"arithmetic alone to operands from the L2 alone, at {L2_TBPS} TB/s, a cautious guess.",
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
