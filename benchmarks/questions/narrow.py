"""bfloat16 on a CPU, in float32, or by its bf16 instructions where it has them: how fast, and at what accuracy?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_FLOORS, CPU_LONG, CPU_MAIN, SMALL

ABOUT = __doc__
_CHOICE = (*CPU_FLOORS, "eager", "torch.compile", "F.linear_cross_entropy", "ours (native)")


def cases(device: str, small: bool) -> list[Case]:
    """Cross-entropy and TRAPO's loss with bfloat16 inputs; nothing on a GPU, where every question is asked in bfloat16."""
    if device == "cuda":
        return []
    shapes = [SMALL] if small else [CPU_MAIN, CPU_LONG]
    return [Case("narrow", job, *shape, "bfloat16", contenders=_CHOICE) for shape in shapes for job in ("sft", "trapo")]
