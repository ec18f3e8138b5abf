"""Mean cross-entropy, forward and backward: what does plain SFT cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_CROSS_ENTROPY, CPU_MATRIX, cpu_cases, main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "sft" at the main shapes; on a CPU also at other heads."""
    main = main_cases("sft", "sft", device, small)
    return main if small or device == "cuda" else [*main, *cpu_cases("sft", "sft", CPU_MATRIX[1:], CPU_CROSS_ENTROPY)]
