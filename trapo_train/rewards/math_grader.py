r"""Grading of mathematical answers by math-verify; as a program, a worker for `trapo_train.rewards.workers`.

The answer is what stands in \boxed{}, after words such as "the final answer is" or, as in GSM8K, in a last line "#### 72"; a bare
number is none, so that a response cut off in mid-reasoning earns nothing. Of a response with thoughts what stands behind its first
</think> counts alone, nothing where <think> stands in it or at the end of its prompt and </think> does not; one with neither, as
models write it that have no such tags, is an answer from its beginning.
"""

from __future__ import annotations

import re
import sys
import threading
from itertools import product
from typing import Any

from trapo_train.extras import lacks
from trapo_train.records import END_THINK, THINK
from trapo_train.rewards.workers import OutOfTime
from trapo_train.schema import MissingPackage

TIME_LIMIT_S = 5  # of each parse and each comparison
BOLD_ANSWER = re.compile(  # Answer: **34**, **Answer:** **34** and **Answer: 34**; bounded, for a response may repeat itself
    r"(answer(?: is)?:?(?:\*\*)?[ \t]{0,4}\*\*|\*\*[^*\n]{0,60}answer(?: is:?|:)[ \t]{1,4})([^*\s](?:[^*\n]{0,298}[^*\s])?)\*\*",
    re.IGNORECASE,
)
NUMBER = re.compile(r"\d+(?:[.,/]\d+)*")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # no command of LaTeX
GSM8K_LINE = re.compile(r"^####[ \t]*(\S+)\s*\Z", re.MULTILINE)  # no heading of several words


def load_library() -> Any:
    """The package math_verify, or a MissingPackage that names its extra."""
    try:
        import math_verify
        import math_verify.errors
    except ImportError as error:
        raise MissingPackage(lacks("reward math_verify", "math_verify", "math")) from error
    return math_verify


def grade(completion: str, solution: str, opened: bool = False) -> float | None:
    """1.0 where the completion's answer behind its thoughts equals the solution, else 0.0; None where math-verify cannot parse the
    solution, or not within TIME_LIMIT_S.

    Args:
        opened: whether the completion begins in thoughts, as behind a prompt that ends with <think>.

    Raises: OutOfTime where parsing the completion or a comparison took more than TIME_LIMIT_S, unless another comparison says that
        they are equal; RuntimeError outside the main thread.
    """
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        raise RuntimeError(
            f"math_grader: grade must run in the main thread, as math-verify measures time with a signal, got {thread.name}. "
            "Use the reward math_verify, which grades in programs of its own."
        )
    library = load_library()
    try:
        gold = _parse(f"\\boxed{{{solution}}}", library)
    except OutOfTime:  # no fault of the completion
        gold = []
    if not gold:
        return None
    anchored = [
        library.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),
        library.ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    answer = _parse(anchored_answer(behind_thoughts(completion, opened)), library, extraction_config=anchored)
    late = False
    for pair in product(gold, answer):  # as verify does with lists, where an exception of one pair would hide the others
        try:
            if library.verify(*pair, timeout_seconds=TIME_LIMIT_S, raise_on_error=True):
                return 1.0
        except library.errors.TimeoutException:
            late = True
        except Exception:  # sympy's, of any class, for what cannot be compared: not equal
            continue
    if late:
        raise OutOfTime
    return 0.0


def behind_thoughts(completion: str, opened: bool) -> str:
    """The completion without its thoughts, which are all of it where they never end; it may stand in thoughts that are `opened`."""
    thoughts, end, rest = completion.partition(END_THINK)
    if end:
        return rest
    return "" if opened or THINK in thoughts else completion


def anchored_answer(completion: str) -> str:
    """The completion as math-verify finds the answer in it: a bold one behind "Answer:" as a formula, unless it is marked as one or
    is a number with a unit, as in a text its first number counts; and where nothing is boxed and the last line is "#### 72", as
    GSM8K ends its answers, the 72 in \\boxed{}."""
    text = BOLD_ANSWER.sub(_plain, completion)
    last = GSM8K_LINE.search(text)
    if last is None or "\\boxed" in text:
        return text
    return f"{text[: last.start()]}\\boxed{{{last[1].lstrip('*').rstrip('*.')}}}"


def _plain(found: re.Match[str]) -> str:
    anchor, answer = found[1].replace("**", ""), found[2]
    is_marked = "$" in answer or "\\boxed" in answer or answer.startswith(("\\(", "\\["))
    has_unit = len(NUMBER.findall(answer)) == 1 and WORD.search(answer)
    return anchor + (answer if is_marked or has_unit else f"${answer}$")


def _parse(text: str, library: Any, **options: Any) -> list[Any]:
    try:
        return library.parse(text, parsing_timeout=TIME_LIMIT_S, raise_on_error=True, **options)
    except library.errors.TimeoutException:
        raise OutOfTime from None
    except Exception:  # sympy's, of any class, for what is no formula
        return []


if __name__ == "__main__":
    from trapo_train.rewards.workers import serve

    load_library()
    sys.exit(serve(grade))
