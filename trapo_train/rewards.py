"""Reward functions in TRL's signature, and the checks that every reward passes before it is used."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from trapo_train.math_grader import load_library
from trapo_train.records import Problem
from trapo_train.tasks import pointer_chasing_reward
from trapo_train.workers import WorkerPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardTerm:
    """One of several rewards."""

    name: str
    """exact_match, math_verify, pointer_chasing, or a path to your own function: my_rewards:my_reward."""
    weight: float = 1.0
    """Its weight in the sum, a finite number."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty.")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be a finite number, got {self.weight}.")


class RewardFn(Protocol):
    """A reward in TRL's signature, a function or an async one: one number per row, or None where it has no opinion.

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
        values = _called(reward, _arguments(problems, texts))
    except Exception as error:
        raise RewardError(_describe_exception(reward, problems, texts, error)) from error
    name = _name(reward)
    if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise RewardError(f"Reward {name} must return a list with one number per row, got {type(values).__name__}.")
    if len(values) != len(texts):
        raise RewardError(f"Reward {name} must return one number per row = {len(texts)}, got {len(values)}.")
    return [_check_value(value, name, problem) for value, problem in zip(values, problems, strict=True)]


def load_reward(name: str | Sequence[RewardTerm]) -> RewardFn:
    """Return a reward by name ("exact_match", "math_verify", "pointer_chasing") or by path ("package.module:function"), or the
    weighted sum of several.

    A module is looked for as `import` does, and in the working directory.
    """
    if not isinstance(name, str):
        return WeightedSum([(load_reward(term.name), term.weight) for term in name])
    if name in REWARDS:
        if name == "math_verify":
            load_library()  # a missing extra shows now, not after the first rollout
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


class MathVerify:
    """Reward 1.0 where the completion's answer equals the solution mathematically, graded by math-verify (see `math_grader`).

    None where there is no solution or math-verify cannot parse it. Grading runs in worker programs: a response that takes longer
    than `TIME_LIMIT_S` or crashes the grader earns 0.0 and is counted, and training goes on.
    """

    TIME_LIMIT_S = 20.0  # for a whole grading; math-verify's own limits usually end it earlier

    def __init__(self) -> None:
        self.__name__ = "math_verify"
        self._pool: WorkerPool | None = None
        self._counts: Counter[str] = Counter()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], solution: Sequence[str | None], **columns: Any
    ) -> list[float | None]:
        if self._pool is None:
            workers = max(1, min(8, (os.cpu_count() or 2) // 2))
            self._pool = WorkerPool("trapo_train.math_grader", num_workers=workers, time_limit_s=self.TIME_LIMIT_S)
        asked = [i for i, truth in enumerate(solution) if truth is not None]
        answers = self._pool.map([(completions[i], solution[i]) for i in asked])
        values: list[float | None] = [None] * len(completions)
        for i, answer in zip(asked, answers, strict=True):
            values[i] = answer.value if answer.outcome == "ok" else 0.0
            self._counts[answer.outcome] += 1
        return values

    def take_metrics(self) -> dict[str, float]:
        """Gradings that took too long and that crashed since this was last asked."""
        counts, self._counts = self._counts, Counter()
        return {"reward/grading_timeouts": float(counts["timeout"]), "reward/grading_crashes": float(counts["crash"])}


class WeightedSum:
    """Several rewards as one: Σ weight · reward over those that have an opinion on a row; None where none has."""

    def __init__(self, terms: Sequence[tuple[RewardFn, float]]) -> None:
        self.terms = list(terms)
        self.__name__ = " + ".join(f"{weight:g}·{_name(reward)}" for reward, weight in self.terms)
        self._values: dict[str, list[float]] = {}

    def __call__(self, **arguments: Any) -> list[float | None]:
        totals: list[float | None] = [None] * len(arguments["completions"])
        for reward, weight in self.terms:
            for i, value in enumerate(_called(reward, arguments)):
                if value is not None:
                    totals[i] = (totals[i] or 0.0) + weight * value
                    self._values.setdefault(_name(reward).strip("'"), []).append(float(value))
        return totals

    def take_metrics(self) -> dict[str, float]:
        """The mean of each reward since this was last asked, and the metrics of the rewards themselves."""
        metrics = {f"reward/{name}": fmean(values) for name, values in self._values.items()}
        self._values = {}
        for reward, _ in self.terms:
            metrics |= take_metrics(reward)
        return metrics


def take_metrics(reward: RewardFn) -> dict[str, float]:
    """What a reward counted besides its values since this was last asked; nothing for a plain function."""
    return reward.take_metrics() if hasattr(reward, "take_metrics") else {}


REWARDS: dict[str, RewardFn] = {
    "exact_match": exact_match,
    "math_verify": MathVerify(),
    "pointer_chasing": pointer_chasing_reward,
}


def _called(reward: RewardFn, arguments: dict[str, Any]) -> Sequence[float | None]:
    """What the reward returns; one that is async is run to its end."""
    values = reward(**arguments)
    return asyncio.run(_awaited(values)) if inspect.isawaitable(values) else values


async def _awaited(values: Any) -> Any:
    return await values


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
            _called(reward, _arguments([problem], [text]))
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
