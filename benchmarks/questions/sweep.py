"""N from 1k to 64k (128k for scoring) and the heads of well-known models: where is the single pass ahead, and where is it not?"""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.questions.shapes import MODELS, ON_MORE_SHAPES, SMALL

ABOUT = __doc__


def cases(device: str, small: bool) -> list[Case]:
    """A sweep over N at one head, then every model's head at N = 8192, then ragged sizes; a CPU sweeps N at a small head."""
    if small:
        return [Case("sweep", "trapo", n, *SMALL[1:], "float32") for n in (16, 32)]
    if device == "cpu":
        settings = {"dtype": "float32", "with_memory": True, "contenders": ON_MORE_SHAPES}
        return [Case("sweep", "trapo", n, 256, 32768, **settings) for n in (64, 256, 1024)]
    head = MODELS["Qwen2.5-Math-7B"]
    lengths = [Case("sweep", "trapo", 2**k, *head, "bfloat16", with_memory=True) for k in (12, 10, 13, 14, 16, 11)]
    models = [Case("sweep", "trapo", 8192, *other, "bfloat16", with_memory=True) for other in MODELS.values() if other != head]
    scoring = [Case("sweep", "score", 2**k, *head, "bfloat16", with_memory=True) for k in (12, 14, 16, 17)]
    ragged = [Case("sweep", "trapo", 8191, 3584, 151643, "bfloat16")]  # an odd V: no aligned rows
    return [*lengths, *models, *scoring, *ragged]
