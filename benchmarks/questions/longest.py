"""The longest micro-batch that fits: up to how many tokens does TRAPO's loss run before memory ends?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import MODELS

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """N doubled from 4096 tokens until the contender is out of memory; on a GPU only, because a CPU swaps instead of refusing."""
    if device == "cpu":
        return []
    return [Case("longest", "trapo", 4096, *MODELS["Qwen2.5-Math-7B"], "bfloat16", measure="longest")]
