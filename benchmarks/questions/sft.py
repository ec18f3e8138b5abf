"""Mean cross-entropy, forward and backward: what does plain SFT cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "sft" at the main shapes."""
    return main_cases("sft", "sft", device, small, cpu_shapes=6)
