"""logprob and entropy, forward only: what does scoring rollouts cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import main_cases

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """The job "score" at the main shapes."""
    return main_cases("scoring", "score", device, small)
