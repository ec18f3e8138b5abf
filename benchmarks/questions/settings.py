"""A head that is not trained, and rows whose bits do not depend on their neighbours: what does the one save and the other cost?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import SMALL, TRAPO_MICRO_BATCH

ABOUT = __doc__
_OURS = ("floor, 3 GEMMs", "ours (triton)", "ours (native)")


def cases(device: str, small: bool) -> list[Case]:
    """TRAPO's loss at the first shape; the floor is that of a head that is trained."""
    shape = SMALL if small else TRAPO_MICRO_BATCH if device == "cuda" else (1024, 256, 32768)
    dtype = "bfloat16" if device == "cuda" and not small else "float32"
    return [
        Case("settings", "trapo", *shape, dtype, setting=setting, contenders=_OURS)
        for setting in ("frozen head", "batch_invariant")
    ]
