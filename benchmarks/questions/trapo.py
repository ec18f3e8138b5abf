"""TRAPO's loss with entropy gradient, forward and backward: what does one micro-batch cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "trapo" at the main shapes."""
    return main_cases("trapo", "trapo", device, small, cpu_shapes=6)
