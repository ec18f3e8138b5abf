"""TRAPO's loss with entropy gradient, forward and backward: what does one micro-batch cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_CHOICE, CPU_LARGE_VOCAB, CPU_LONG, CPU_MATRIX, cpu_cases, main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "trapo" at the main shapes; on a CPU also long rows and other heads."""
    main = main_cases("trapo", "trapo", device, small)
    if small or device == "cuda":
        return main
    others = [shape for shape in (CPU_LONG, *CPU_MATRIX[1:]) if shape != CPU_LARGE_VOCAB]
    tiled = (*CPU_CHOICE, "TRL chunked logprob")  # whose tile of 32768 columns is all of the other vocabulary
    return [*main, *cpu_cases("trapo", "trapo", others, CPU_CHOICE), *cpu_cases("trapo", "trapo", [CPU_LARGE_VOCAB], tiled)]
