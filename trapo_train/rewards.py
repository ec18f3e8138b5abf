"""Reward functions in TRL's signature, and the checks that every reward passes before it is used."""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import sys
import threading
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from trapo_train.records import Problem
from trapo_train.tasks import pointer_chasing_reward

logger = logging.getLogger(__name__)

MATH_TIME_LIMIT_S = 5


class RewardFn(Protocol):
    """A reward in TRL's signature: one number per row, or None where it has no opinion.

    `prompts` and `completions` are texts, one per row; a completion is the whole response, expert prefix included and
    special tokens left out. `columns` holds `solution` and every further column of the dataset, each as a list with one
    value per row. Declare the ones you read and take the rest with `**columns`.
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float | None]: ...


class RewardError(RuntimeError):
    """A reward function raised, or returned something that is not one finite number (or None) per row."""


def score(reward: RewardFn, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """Return the reward of each response text; `problems[i]` is the problem that `texts[i]` answers.

    None means that the reward has no opinion on a row: it counts as 0.0, and a warning says how many there were.

    Raises:
        RewardError: as `judge`.
    """
    opinions = judge(reward, problems, texts)
    missing = sum(opinion is None for opinion in opinions)
    if missing:
        logger.warning("%s has no opinion (None) on %d of %d rows: 0.0", _name(reward), missing, len(opinions))
    return [0.0 if opinion is None else opinion for opinion in opinions]


def judge(reward: RewardFn, problems: Sequence[Problem], texts: Sequence[str]) -> list[float | None]:
    """Call the reward and check what it returns: one finite number per row, None for no opinion.

    Raises:
        RewardError: naming the reward and the row, if it raises, returns another number of rows, or returns NaN,
            an infinity or anything that is not a number.
    """
    if len(problems) != len(texts):
        raise ValueError(f"judge: texts must hold one text per problem = {len(problems)}, got {len(texts)}.")
    if not texts:
        return []
    try:
        values = reward(**_arguments(problems, texts))
    except Exception as error:
        raise RewardError(_describe_exception(reward, problems, texts, error)) from error
    name = _name(reward)
    if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise RewardError(f"Reward {name} must return a list with one number per row, got {type(values).__name__}.")
    if len(values) != len(texts):
        raise RewardError(f"Reward {name} must return one number per row = {len(texts)}, got {len(values)}.")
    return [_check_value(value, name, problem) for value, problem in zip(values, problems, strict=True)]


def load_reward(name: str) -> RewardFn:
    """Return a reward by name ("exact_match", "math_verify", "pointer_chasing") or by path ("package.module:function").

    A module is looked for as `import` does, and in the working directory.
    """
    if name in REWARDS:
        if name == "math_verify":
            _import_math_verify()  # a missing extra shows now, not after the first rollout
        return REWARDS[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        near = difflib.get_close_matches(name, REWARDS, n=1)
        raise ValueError(
            f"reward must be one of {sorted(REWARDS)} or a path like my_rewards:my_reward, got {name!r}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {name!r}: importing the module {module_name!r} failed: {error}.") from error
    reward = getattr(module, attribute, None)
    if not callable(reward):
        raise ValueError(f"reward {name!r}: the module {module_name!r} has no function {attribute!r}.")
    return reward


def exact_match(
    prompts: Sequence[str], completions: Sequence[str], solution: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """Reward 1.0 where the completion is the solution, white space around both ignored; None without a solution."""
    return [
        None if truth is None else float(completion.strip() == truth.strip())
        for completion, truth in zip(completions, solution, strict=True)
    ]


def math_verify(
    prompts: Sequence[str], completions: Sequence[str], solution: Sequence[str | None], **columns: Any
) -> list[float | None]:
    r"""Reward 1.0 where the completion's answer equals the solution mathematically, graded by math-verify.

    The answer is what stands in \boxed{} or after words such as "the final answer is"; a bare number is none, so that a
    response cut off in mid-reasoning earns nothing. None where there is no solution or math-verify cannot parse it.

    Each parse and each comparison may take 5 s, then it counts as no answer. Outside the main thread there is no limit,
    because math-verify measures time with a signal.
    """
    return [_verify_math(completion, truth) for completion, truth in zip(completions, solution, strict=True)]


REWARDS: dict[str, RewardFn] = {
    "exact_match": exact_match,
    "math_verify": math_verify,
    "pointer_chasing": pointer_chasing_reward,
}


def _import_math_verify() -> Any:
    try:
        return importlib.import_module("math_verify")
    except ImportError as error:
        raise ImportError("reward 'math_verify' needs math-verify: pip install 'trapo[math]'.") from error


def _verify_math(completion: str, truth: str | None) -> float | None:
    if truth is None:
        return None
    library = _import_math_verify()
    seconds = MATH_TIME_LIMIT_S if threading.current_thread() is threading.main_thread() else None
    gold = library.parse(f"\\boxed{{{truth}}}", parsing_timeout=seconds)
    if not gold:
        return None
    anchored = [
        library.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),
        library.ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    answer = library.parse(completion, extraction_config=anchored, parsing_timeout=seconds)
    return float(library.verify(gold, answer, timeout_seconds=seconds))


def _arguments(problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, list[Any]]:
    names = problems[0].columns.keys()
    return {
        **{name: [problem.columns[name] for problem in problems] for name in names},
        "prompts": [problem.prompt for problem in problems],
        "completions": list(texts),
        "solution": [problem.solution for problem in problems],
    }


def _describe_exception(reward: RewardFn, problems: Sequence[Problem], texts: Sequence[str], error: Exception) -> str:
    """Say which row made the reward raise, found by calling it row by row."""
    for problem, text in zip(problems, texts, strict=True):
        try:
            reward(**_arguments([problem], [text]))
        except Exception as single:
            return f"Reward {_name(reward)} raised on row {problem.index}: {single!r}. Its completion: {text[:200]!r}"
    return f"Reward {_name(reward)} raised on {len(texts)} rows, though on none of them alone: {error!r}."


def _check_value(value: Any, name: str, problem: Problem) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real):
        raise RewardError(
            f"Reward {name} must return numbers or None, got {value!r} ({type(value).__name__}) on row {problem.index}."
        )
    if not math.isfinite(value):
        raise RewardError(
            f"Reward {name} must return finite numbers, got {float(value)} on row {problem.index}. "
            "Return None where it has no opinion."
        )
    return float(value)


def _name(reward: RewardFn) -> str:
    return repr(getattr(reward, "__name__", type(reward).__name__))
