"""Bytes and FLOP on paper: the peak memory formula beside each measurement, and predictions for a GPU that is not at hand.

    python -m benchmarks.account > benchmarks/results/TODO.md        # what awaits a GPU, with the arithmetic

A prediction is arithmetic, never a measurement. The two rates are those of the machine's bf16 GEMM and copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.problem import JOBS, Case
from trapo_kernels.backends.gemm import chunk_rows

GEMM_TFLOPS = 790.0  # bf16 GEMM rate of one H200, as measured on that kind of machine
COPY_TBPS = 4.3  # bytes read plus bytes written per second of a large copy there, in TB/s


def memory_formula(contender: str, case: Case, device_type: str) -> tuple[float, str] | None:
    """(MiB, formula) of our backends' peak above the inputs; None for contenders whose allocations are not ours to predict.

    C chunk rows, M active rows, b bytes per input element. The PyTorch backend needs the chunk three times: logits, their
    exponentials, one temporary. Triton and native work in place.
    Single pass: the peak is either the sweep, which holds one chunk beside dHidden and the fp32 dWeight, or the backward, which
    holds both gradients and, for a 16-bit head, dWeight once more in its dtype.
    """
    if not contender.startswith("ours") or "reference" in contender or "_fused" in contender:
        return None
    b = getattr(torch, case.dtype).itemsize
    host = device_type == "cpu"
    n, d, v = case.num_rows, case.hidden_size, case.vocab_size
    m = round(n * case.active) if host else n  # a GPU knows the active rows too when the packer passes them
    c = min(m, case.chunk_rows or chunk_rows(m, v, device_type))
    logit_bytes = getattr(torch, case.logits_dtype).itemsize
    copies = 3 if "torch" in contender else 1
    chunk = copies * c * v * (4 if copies > 1 else logit_bytes)
    chunk_text = f"{copies}·4·C·V" if copies > 1 else f"{logit_bytes}·C·V"
    upcast = 4 * v * d if host and b < 4 else 0
    grads, extra = b * n * d + 4 * v * d, "" if not upcast else " + 4·V·D"
    if case.job == "score":
        return (chunk + upcast) / 2**20, f"{chunk_text}{extra}, C={c}"
    if "two-phase" in contender:
        cast = b * v * d if b < 4 else 0
        return (max(chunk + grads + upcast, grads + cast + upcast)) / 2**20, f"{chunk_text} + b·N·D + 4·V·D{extra}, C={c}"
    if b >= 4:
        return (chunk + grads + upcast) / 2**20, f"{chunk_text} + b·N·D + 4·V·D{extra}, C={c}"
    text = f"max({chunk_text} + b·N·D + 4·V·D{extra}, b·N·D + (4+b)·V·D), C={c}"
    return max(chunk + grads + upcast, grads + b * v * d) / 2**20, text


class Prediction(NamedTuple):
    """Milliseconds of the parts, and the ratio to the floor if the GEMMs' own extra traffic hides behind their arithmetic
    (`hidden`) or adds up (`exposed`)."""

    gemm_ms: float
    floor_ms: float
    row_kernel_ms: float
    wide_logits_ms: float
    grad_weight_ms: float
    backward_ms: float
    chunks: int
    hidden: float
    exposed: float


def predict(case: Case) -> Prediction:
    """The byte account of our Triton path with fp32 logits and bf16 inputs."""
    n, d, v = case.num_rows, case.hidden_size, case.vocab_size
    chunks = -(-n // chunk_rows(n, v, "cuda"))
    gemms = JOBS[case.job].gemms
    gemm_ms = case.gemm_flop / (GEMM_TFLOPS * 1e12) * 1e3
    per_logit = 4 if case.job == "score" else 4 + 4 + 2
    row_kernel_ms = _copy_ms(per_logit * n * v)
    wide_logits_ms = _copy_ms(2 * n * v)  # fp32 instead of bf16 out of the first GEMM
    grad_weight_ms = 0.0 if case.job == "score" else _copy_ms((2 * chunks - 1) * 4 * v * d)  # fp32, written by the first chunk
    backward_ms = (
        0.0 if case.job == "score" else _copy_ms((4 + 2) * v * d + (4 + 2) * n * d)
    )  # round dWeight to its dtype in the backward, dHidden chunk by chunk
    floor_ms = gemms * gemm_ms
    sure = floor_ms + row_kernel_ms + backward_ms
    return Prediction(
        gemm_ms,
        floor_ms,
        row_kernel_ms,
        wide_logits_ms,
        grad_weight_ms,
        backward_ms,
        chunks,
        sure / floor_ms,
        (sure + wide_logits_ms + grad_weight_ms) / floor_ms,
    )


def _copy_ms(num_bytes: float) -> float:
    return num_bytes / (COPY_TBPS * 1e12) * 1e3


SHAPES = [
    ("trapo", 32768, 3584, 152064),
    ("trapo", 8192, 4096, 151936),
    ("trapo", 8192, 4096, 128256),
    ("trapo", 8192, 3584, 256000),
    ("trapo", 8192, 1024, 151936),
    ("score", 32768, 3584, 152064),
]

COMMANDS = [
    (
        "make gpu-native",
        "builds the native backend's CUDA kernels, none of which has run yet; then gpu-test and gpu-bench include them",
    ),
    (
        "pip install --no-deps liger-kernel cut-cross-entropy trl",
        "small pure-Python wheels, to be brought along: those peers compete; quack and verl do where they are installed",
    ),
    ("make gpu-test", "tests/trapo_kernels on the GPU: counts and failures into `<gpu>/tests.md`"),
    ("make gpu-bench", "the matrix, resumable: repeat until it prints that nothing is left"),
    ("python -m benchmarks trapo --device cuda --budget 8.5 --out benchmarks/results", "TRAPO's own micro-batch first"),
    ("python -m benchmarks longest step compile --device cuda --budget 8.5 --out benchmarks/results", "the long questions"),
    ("python -m benchmarks.report benchmarks/results/<gpu>/results.jsonl", "tables and plots from what is there"),
]


def arithmetic(case: Case, p: Prediction) -> list[str]:
    """The prediction of one shape, line by line."""
    n, d, v = case.num_rows, case.hidden_size, case.vocab_size
    per_logit = 4 if case.job == "score" else 10
    second = (
        "" if case.job == "score" else f"; a row is {4 * v // 1024} KiB and hundreds are in flight, so the L2 serves no second read"
    )
    parts = "4 read" if case.job == "score" else "4 read + 4 read again + 2 written"
    lines = [
        f"- one GEMM: 2·{n}·{d}·{v} = {case.gemm_flop:.3e} FLOP / {GEMM_TFLOPS:g} TFLOP/s = {p.gemm_ms:.1f} ms; floor: "
        f"{JOBS[case.job].gemms} of them = {p.floor_ms:.1f} ms",
        f"- row kernel: {parts} = {per_logit} B per fp32 logit · {n}·{v} = {per_logit * n * v / 1e9:.1f} GB / {COPY_TBPS:g} TB/s = "
        f"{p.row_kernel_ms:.2f} ms{second}",
        f"- fp32 logits out of the GEMM: 2 B more per logit than bf16 = {p.wide_logits_ms:.2f} ms, unless hidden in its epilogue",
    ]
    if case.job != "score":
        lines += [
            f"- fp32 dWeight written by {p.chunks} chunks and read by all but the first: {2 * p.chunks - 1}·4·{v}·{d} B = "
            f"{p.grad_weight_ms:.2f} ms, unless hidden in that GEMM",
            f"- both gradients rounded from fp32 to bf16, dWeight with the upstream factor: {p.backward_ms:.2f} ms",
        ]
    return [
        *lines,
        f"- predicted ratio to the floor: **{p.hidden:.2f}** if all of the GEMMs' traffic hides, **{p.exposed:.2f}** if none",
    ]


def todo() -> str:
    """The text of results/TODO.md."""
    lines = [
        "# What awaits a GPU",
        "",
        "No figure below was measured on a kernel of this project: each is arithmetic from two rates of one H200, "
        f"{GEMM_TFLOPS:g} TFLOP/s for a bf16 GEMM and {COPY_TBPS:g} TB/s for a copy. `python -m benchmarks.account` writes this "
        "file.",
        "",
        "## Commands",
        "",
        "| command | what it gives |",
        "|---|---|",
        *(f"| `{command}` | {gives} |" for command, gives in COMMANDS),
        "",
        "## Predictions for backend `triton`, bf16 inputs, fp32 logits, entropy gradient on",
        "",
        "| job | N | D | V | floor ms | row kernel ms | ratio, all hidden | ratio, none hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = [Case("todo", job, n, d, v, "bfloat16") for job, n, d, v in SHAPES]
    for case in cases:
        p = predict(case)
        lines.append(
            f"| {case.job} | {case.num_rows} | {case.hidden_size} | {case.vocab_size} | {p.floor_ms:.1f} | {p.row_kernel_ms:.2f} | "
            f"{p.hidden:.2f} | {p.exposed:.2f} |"
        )
    for case in (cases[0], cases[-1]):
        lines += ["", f"## {case.job}, {case.shape}", "", *arithmetic(case, predict(case))]
    formula = memory_formula("ours (triton)", cases[1], "cuda")
    lines += ["", f"Peak memory at {cases[1].shape}: {formula[1]} = {formula[0] / 1024:.2f} GiB above the inputs.", ""]
    lines += [
        "What would disprove the account: a ratio above the last column means the row kernel does not reach the copy rate (look at "
        "`BLOCK_V` and the number of warps in `launch.py`) or the GEMMs of a chunk do not reach the rate of whole ones.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(todo(), end="")
