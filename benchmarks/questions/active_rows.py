"""Rows with a zero coefficient (prompts, prefixes without TrSFT, equal-reward groups): who still pays for them?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_UNCOMPILED, SMALL, TRAPO_MICRO_BATCH

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """TRAPO's loss with 1, 0.5 and 0.25 of the rows active; the floor is that of all rows."""
    shape = SMALL if small else TRAPO_MICRO_BATCH if device == "cuda" else (1024, 256, 32768)
    dtype = "bfloat16" if device == "cuda" and not small else "float32"
    fractions = (0.5,) if small else (1.0, 0.5, 0.25)
    names = CPU_UNCOMPILED if device == "cpu" and not small else ()
    return [Case("active_rows", "trapo", *shape, dtype, active=fraction, contenders=names) for fraction in fractions]
