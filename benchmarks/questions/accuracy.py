"""Distance from fp64 on peaked and on flat logits: whose gradients can be trusted?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import SMALL

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """Every job on both kinds of logits; nothing is timed. Long rows on a GPU, because accumulation errors grow with N."""
    shape = SMALL if small else (16384, 3584, 152064) if device == "cuda" else (256, 256, 32768)
    dtype = "bfloat16" if device == "cuda" and not small else "float32"
    # On a CPU whoever computes in another way; two phases and a compiler change nothing there.
    other = ("eager", "F.linear_cross_entropy", "F.linear_cross_entropy, chunked", "Liger fused GRPO", "TRL chunked logprob")
    names = (*other, "ours (torch)", "ours (native)", "ours (reference)") if device == "cpu" and not small else ()
    jobs = ("trapo", "score") if small else ("trapo", "sft", "grpo", "score")
    return [
        Case("accuracy", job, *shape, dtype, peaked=peaked, logits_dtype=logits, measure="error", contenders=names)
        for job in jobs
        for peaked in (True, False)
        for logits in (("float32",) if dtype == "float32" else ("float32", "bfloat16"))
    ]
