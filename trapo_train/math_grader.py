r"""Grading of mathematical answers by math-verify; as a program, a worker for `trapo_train.workers`.

The answer is what stands in \boxed{} or after words such as "the final answer is"; a bare number is none, so that a response cut
off in mid-reasoning earns nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from trapo_train.schema import MissingPackage

TIME_LIMIT_S = 5  # of each parse and each comparison


def load_library() -> Any:
    """The package math_verify, or a MissingPackage that names its extra."""
    try:
        import math_verify
    except ImportError as error:
        raise MissingPackage("reward 'math_verify' needs math-verify: pip install 'trapo[math]'.") from error
    return math_verify


def grade(completion: str, solution: str) -> float | None:
    """1.0 where the completion's answer equals the solution, else 0.0; None where math-verify cannot parse the solution.

    Must run in the main thread: math-verify measures time with a signal.
    """
    library = load_library()
    gold = library.parse(f"\\boxed{{{solution}}}", parsing_timeout=TIME_LIMIT_S)
    if not gold:
        return None
    anchored = [
        library.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),
        library.ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    answer = library.parse(completion, extraction_config=anchored, parsing_timeout=TIME_LIMIT_S)
    return float(library.verify(gold, answer, timeout_seconds=TIME_LIMIT_S))


if __name__ == "__main__":
    from trapo_train.workers import serve

    load_library()
    sys.exit(serve(grade))
