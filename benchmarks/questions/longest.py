"""The longest micro-batch that fits: up to how many tokens does TRAPO's loss run before memory ends?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_UNCOMPILED, MODELS, SMALL

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """N doubled until the contender is out of memory: the GPU's own, or 512 MiB above the inputs on a CPU (`cell`)."""
    if small:
        return [Case("longest", "trapo", 16, *SMALL[1:], "float32", measure="longest", contenders=("ours (torch)",))]
    if device == "cpu":
        return [Case("longest", "trapo", 256, 256, 32768, "float32", measure="longest", contenders=CPU_UNCOMPILED)]
    return [Case("longest", "trapo", 4096, *MODELS["Qwen2.5-Math-7B"], "bfloat16", measure="longest")]
