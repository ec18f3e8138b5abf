"""N from 1k to 64k (128k for scoring) and the heads of well-known models: where is the single pass ahead, and where is it not?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import CPU_CHOICE, MODELS, SMALL

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """A sweep over N at one head, then every model's head at N = 8192, then ragged sizes. On a CPU the question `trapo`
    has the other lengths of the same head (512 and 2048), and the plots take them from there."""
    if small:
        return [Case("sweep", "trapo", n, *SMALL[1:], "float32", with_memory=True, contenders=CPU_CHOICE) for n in (16, 32)]
    if device == "cpu":
        return [Case("sweep", "trapo", n, 896, 32768, "float32", with_memory=True, contenders=CPU_CHOICE) for n in (64, 256)]
    head = MODELS["Qwen2.5-Math-7B"]
    lengths = [Case("sweep", "trapo", 2**k, *head, "bfloat16", with_memory=True) for k in (12, 10, 13, 14, 16, 11)]
    models = [Case("sweep", "trapo", 8192, *other, "bfloat16", with_memory=True) for other in MODELS.values() if other != head]
    scoring = [Case("sweep", "score", 2**k, *head, "bfloat16", with_memory=True) for k in (12, 14, 16, 17)]
    ragged = [Case("sweep", "trapo", 8191, 3584, 151643, "bfloat16")]  # an odd V: no aligned rows
    return [*lengths, *models, *scoring, *ragged]
