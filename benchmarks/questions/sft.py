"""Mean cross-entropy, forward and backward"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "sft" at the main shapes."""
    return main_cases("sft", "sft", device, small, cpu_shapes= what does plain SFT cost?:2)
