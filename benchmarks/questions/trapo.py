"""TRAPO's loss with entropy gradient, forward and backward: what does one micro-batch cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_CHOICE, CPU_LONG, CPU_MATRIX, cpu_cases, main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "trapo" at the main shapes; on a CPU also long rows and other heads."""
    main = main_cases("trapo", "trapo", device, small)
    if small or device == "cuda":
        return main
    return [*main, *cpu_cases("trapo", "trapo", [CPU_LONG, *CPU_MATRIX[1:]], CPU_CHOICE)]
