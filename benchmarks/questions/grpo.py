"""GRPO's clipped loss, forward and backward: what does a step without an entropy term cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_CHOICE, CPU_MAIN, cpu_cases, main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "grpo" at the main shapes; on a CPU one way of ours, because SFT and TRAPO have them all."""
    if small or device == "cuda":
        return main_cases("grpo", "grpo", device, small)
    return cpu_cases("grpo", "grpo", [CPU_MAIN], (*CPU_CHOICE, "F.linear_cross_entropy", "Liger fused GRPO"))
