"""GRPO's clipped loss, forward and backward: what does a step without an entropy term cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "grpo" at the main shapes."""
    return main_cases("grpo", "grpo", device, small)
