"""The first call in a fresh process with empty caches: how long until the first number, and how much of it is compilation?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_CHOICE, SMALL

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """One modest shape; the second call in the same process shows what remains."""
    shape = SMALL if small else (4096, 1024, 151936) if device == "cuda" else (64, 256, 32768)
    dtype = "bfloat16" if device == "cuda" and not small else "float32"
    names = ("ours (torch)",) if small else CPU_CHOICE if device == "cpu" else ()
    return [Case("compile", "trapo", *shape, dtype, measure="first_call", contenders=names)]
