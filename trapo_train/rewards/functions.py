"""Reward functions in TRL's signature, and the checks that every reward passes before it is used."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from numbers import Real
from statistics import fmean
from typing import Any, Protocol

from trapo_train.metrics import Mean, merge_metrics
from trapo_train.records import Problem
from trapo_train.rewards.builtin import REWARDS, Overlong
from trapo_train.rewards.grading import MathVerify, WorkerReward
from trapo_train.rewards.math_grader import load_library
from trapo_train.rewards.reward_checks import check_is_no_class, takes
from trapo_train.rewards.reward_values import RewardError, number, one_per_completion
from trapo_train.rewards.surroundings import current_gpu, no_autocast, use_gpu
from trapo_train.schema import UserError, check, did_you_mean
from trapo_train.user_code import in_words, note_place, resolve

ABOUT_RESPONSES = ("completion_tokens", "finish_reasons", "thoughts_open")  # what a reward is told besides the columns of the data
SEARCH_S = 5.0  # most seconds that the row is looked for which a reward raised on: each row asked may be a call of a service


@dataclass(frozen=True)
class RewardTerm:
    """One of several rewards."""

    name: str
    """exact_match, math_verify, pointer_chasing, overlong, or a path to your own function: my_rewards:my_reward."""
    weight: float = 1.0
    """Its weight in the sum, a finite number."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of overlong, DAPO's punishment of long responses: {max_tokens: 8192, buffer: 2048}; empty for the others."""
    in_worker: bool = False
    """Call your own function row by row in worker programs: what hangs or crashes there earns 0 and training goes on.
    There dates and decimals of the data are text."""
    time_limit_s: float = 20.0
    """Seconds that a row may take in a worker, above 0. math-verify ends a parse or a comparison after 5 s by itself."""
    memory_limit_mib: int = 8192
    """Address space of a worker in MiB, at least 64. CUDA reserves far more: ask a server for what needs a GPU."""

    def __post_init__(self) -> None:
        check(
            self,
            ("name", self.name != "", "a text that is not empty"),
            ("weight", math.isfinite(self.weight), "a finite number"),
            ("time_limit_s", 0 < self.time_limit_s < math.inf, "a finite number above 0"),
            ("memory_limit_mib", self.memory_limit_mib >= 64, "at least 64"),
        )
        if self.in_worker and ":" not in self.name:
            raise UserError(
                f"in_worker is for your own function, got name {self.name!r}. Leave it out: math_verify grades in workers "
                "always, and the others cannot hang."
            )
        limits = {name: getattr(self, name) for name in ("time_limit_s", "memory_limit_mib")}
        limits = {name: limit for name, limit in limits.items() if limit != getattr(RewardTerm, name)}
        if limits and not self.in_worker and self.name != "math_verify":
            own = "Set in_worker: true, or limit the time in the function itself" if ":" in self.name else "Leave them out"
            raise UserError(
                f"time_limit_s and memory_limit_mib are limits of a worker, got {limits} of {self.name!r}, which is called in the "
                f"process that trains. {own}."
            )
        if self.name != "overlong" and self.options:
            raise UserError(f"options belong to the reward overlong, got {self.options} of {self.name!r}. Leave them out.")
        if self.name == "overlong":
            self.overlong()

    def overlong(self) -> Overlong:
        """The reward of that name with the term's options."""
        try:
            return Overlong(**self.options)
        except TypeError as error:
            raise UserError(f"options of overlong are max_tokens and buffer, got {self.options}.") from error


class RewardFn(Protocol):
    """A reward as TRL calls one for text data, a function or an async one: one number per row, or None where it has no opinion.

    `prompts` and `completions` are texts, one per row, those of a chat too; a completion is the whole response, expert prefix
    included, and special tokens left out. `columns` holds `solution` and every further column of the dataset, each as a list with
    one value per row, and no `completion_ids`. Declare the ones you read and take the rest with `**columns`.

    Three columns are about the responses, for rewards that declare them or take `**columns`: `completion_tokens` (list[int]), the
    tokens of the whole response, expert prefix and end-of-sequence token included, whatever `rollout.verify` shows of its text;
    `finish_reasons` (list[str]), "stop", "length" (cut off by the budget) or "expert" (a whole expert trace); and `thoughts_open`
    (list[bool]), whether a text begins behind a <think> that the prompt, or a prefix that is not shown, leaves open. Columns of the
    data that have one of these names are left out, as those called prompts or completions are, with a warning.

    An object may have `take_metrics()` besides, which returns what it counted since it was last asked, numbers by their names in
    metrics.jsonl: they add up over calls, rewards and ranks; a mean is a `metrics.Mean`. What the run itself reports under the same
    name stays.

    Rows are independent of each other: how many come in one call is not fixed. A plain function is called from the thread that
    trains, an async one also several times at once (see `may_overlap`).

    One that draws at random does so from the global generators of python, numpy or torch: each rank's start from the run's seed and
    are resumed with it. They are no help where calls overlap, whose order is not fixed, nor in workers, which seed their own.
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float | None]: ...


Columns = Mapping[str, Sequence[Any]]


def judge(
    reward: RewardFn | WeightedSum | None, problems: Sequence[Problem], texts: Sequence[str], about: Columns | None = None
) -> list[float | None]:
    """Call the reward and check what it returns: one finite number per row, None for no opinion. No reward has none on any row.

    Args:
        about: the columns of ABOUT_RESPONSES; None leaves them out.

    Raises:
        RewardError: naming the reward and the row, if it raises, returns another number of rows, or returns NaN,
            an infinity or anything that is not a number.
    """
    if len(problems) != len(texts):
        raise ValueError(f"judge: texts must hold one text per problem = {len(problems)}, got {len(texts)}.")
    if not texts or reward is None:
        return [None] * len(texts)
    if isinstance(reward, WeightedSum):
        return reward.judge(problems, texts, about)
    try:
        values = called(reward, _arguments(problems, texts, about))
    except RewardError:  # of a worker, which has checked what it got
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and must not end the run without a word
        raise RewardError(_describe_exception(reward, problems, texts, about, error)) from error
    name = _name(reward)
    given = zip(one_per_completion(values, name, len(texts)), problems, strict=True)
    return [number(value, name, f" on row {problem.index}") for value, problem in given]


def load_reward(name: str | Sequence[RewardTerm] | None) -> RewardFn | WeightedSum | None:
    """Return a reward by name ("exact_match", "math_verify", "pointer_chasing") or by path ("package.module:function"), or the
    weighted sum of several; None for None.

    A module is looked for as `import` does, and in the working directory.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        return _load_sum(name)
    if name == "overlong":
        raise UserError("reward overlong needs options: [{name: overlong, options: {max_tokens: 8192, buffer: 2048}}, …].")
    if name in REWARDS:
        if name == "math_verify":
            load_library()  # a missing extra shows now, not after the first rollout
        return REWARDS[name]
    if ":" not in name:
        raise UserError(
            f"reward must be one of {sorted(REWARDS)} or a path like my_rewards:my_reward, got {name!r}."
            f"{did_you_mean(name, REWARDS)}"
        )
    reward = resolve("reward", name, "my_rewards:my_reward")
    if not callable(reward):
        raise UserError(f"reward {name!r} must name a function, got {type(reward).__name__}.")
    check_is_no_class(name, reward)
    return reward


class Total(float):
    """A weighted sum that knows its parts by name, unweighted; None for no opinion."""

    parts: dict[str, float | None]

    def __new__(cls, value: float, parts: dict[str, float | None]) -> Total:
        total = super().__new__(cls, value)
        total.parts = parts
        return total


def opinion_of(value: float | None, name: str | None) -> float | None:
    """What the reward called `name` gave to a row whose reward is `value`; `value` itself for None or a single reward."""
    return value.parts.get(name) if name is not None and isinstance(value, Total) else value


class WeightedSum:
    """Several rewards as one: Σ weight · reward over those that have an opinion on a row; None where none has.

    Not a reward function itself: `judge` takes it in place of one.
    """

    def __init__(self, terms: Sequence[tuple[str, RewardFn, float]]) -> None:
        self.terms = list(terms)  # name, reward, weight
        self.__name__ = " + ".join(f"{weight:g}·{name}" for name, _, weight in self.terms)
        self._values: dict[str, list[float]] = {}

    def judge(self, problems: Sequence[Problem], texts: Sequence[str], about: Columns | None = None) -> list[float | None]:
        """As `judge`, each reward checked on its own; what it returns besides None are `Total`s."""
        totals: list[float | None] = [None] * len(texts)
        parts: list[dict[str, float | None]] = [{} for _ in texts]
        for name, reward, weight in self.terms:
            for i, opinion in enumerate(judge(reward, problems, texts, about)):
                parts[i][name] = opinion
                if opinion is not None:
                    totals[i] = (totals[i] or 0.0) + weight * opinion
                    self._values.setdefault(name, []).append(opinion)
        return [total if total is None else Total(total, found) for total, found in zip(totals, parts, strict=True)]

    def take_metrics(self) -> dict[str, float]:
        """The mean of each reward since this was last asked, and what the rewards themselves report, merged."""
        means = {f"reward/{name}": Mean(fmean(values), len(values)) for name, values in self._values.items()}
        self._values = {}
        return merge_metrics([means, *(take_metrics(reward) for _, reward, _ in self.terms)])


def take_metrics(reward: RewardFn | WeightedSum) -> dict[str, float]:
    """What a reward counted besides its values since this was last asked; nothing for a plain function.

    Raises: RewardError where its `take_metrics` raises or returns anything but numbers by their names.
    """
    if not hasattr(reward, "take_metrics"):
        return {}
    try:
        found = reward.take_metrics()
    except RewardError:  # of one of several
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise RewardError(f"Reward {_name(reward)} raised in take_metrics: {error!r}.") from error
    numbers = isinstance(found, Mapping) and all(
        isinstance(name, str) and (isinstance(value, Real) or getattr(value, "ndim", None) == 0) for name, value in found.items()
    )
    if not numbers:
        raise RewardError(f"take_metrics of reward {_name(reward)} must return numbers by their names, got {repr(found)[:200]}.")
    return merge_metrics([found])


def without_rewards(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that say something where there is no reward."""
    of_rewards = ("reward/", "accuracy/", "time/reward_s")
    return {name: value for name, value in metrics.items() if not name.startswith(of_rewards)}


def may_overlap(reward: RewardFn | WeightedSum) -> bool:
    """Whether the reward may run in threads, several calls at once, while samples are generated: an async function, one that works
    in worker programs, one with an attribute `may_overlap` that is true, or a sum of such.

    A plain function may not: one that limits its own time by signals, as math-verify does, works in the main thread only.
    """
    if isinstance(reward, WeightedSum):
        return all(may_overlap(term) for _, term, _ in reward.terms)
    asynchronous = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)
    return asynchronous or getattr(reward, "may_overlap", False)


def called(reward: RewardFn, arguments: dict[str, Any]) -> Sequence[float | None]:
    """What the reward returns; one that is async is run to its end. It gets the columns that it takes. What it raises has a note of
    the line in the reward's module."""
    taken = {name: values for name, values in arguments.items() if takes(reward, name)}
    try:
        with no_autocast():
            values = reward(**taken)
        if not inspect.isawaitable(values):
            return values
        return asyncio.run_coroutine_threadsafe(_awaited(values), _event_loop(current_gpu())).result()
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and nothing is kept from the caller
        note_place(error, reward)
        raise


def _load_sum(terms: Sequence[RewardTerm]) -> WeightedSum:
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(f"reward must list at least one reward, each once, got {names}. Add up the weights of the same one.")
    loaded = []
    for term in terms:
        # Loaded here, a wrong path shows now, for a worker too.
        reward = term.overlong() if term.name == "overlong" else load_reward(term.name)
        limits = {"time_limit_s": term.time_limit_s, "memory_limit_mib": term.memory_limit_mib}
        if term.in_worker:
            reward = WorkerReward(term.name, reward, **limits)
        elif term.name == "math_verify":
            reward = MathVerify(**limits)
        loaded.append((term.name, reward, term.weight))
    return WeightedSum(loaded)


@cache
def _event_loop(gpu: int | None) -> asyncio.AbstractEventLoop:
    """The loop of all async rewards, so that what they share, such as a session or a semaphore, works between their calls. It runs
    in a thread of its own: the caller's may run one already, as in a notebook."""
    loop = asyncio.new_event_loop()
    loop.call_soon(use_gpu, gpu)
    threading.Thread(target=loop.run_forever, name="async-rewards", daemon=True).start()
    return loop


async def _awaited(values: Any) -> Any:
    return await values


def _arguments(problems: Sequence[Problem], texts: Sequence[str], about: Columns | None) -> dict[str, list[Any]]:
    names = problems[0].columns.keys()
    return {
        **{name: [problem.columns[name] for problem in problems] for name in names},
        "prompts": [problem.prompt for problem in problems],
        "completions": list(texts),
        "solution": [problem.solution for problem in problems],
        **{name: list(values) for name, values in (about or {}).items()},
    }


def _describe_exception(
    reward: RewardFn, problems: Sequence[Problem], texts: Sequence[str], about: Columns | None, error: Exception
) -> str:
    """Say which row made the reward raise, found by calling it row by row for `SEARCH_S` at most; a service that is slow or down
    (TimeoutError, ConnectionError or another OSError) is no row's fault and is not asked again."""
    what, until = f"Reward {_name(reward)} raised on", time.monotonic() + SEARCH_S
    for i, (problem, text) in enumerate(zip(problems, texts, strict=True)):
        if isinstance(error, OSError) or time.monotonic() > until:
            return f"{what} a call with {len(texts)} rows: {in_words(error)}."
        try:
            called(reward, _arguments([problem], [text], {name: [values[i]] for name, values in (about or {}).items()}))
        except (Exception, SystemExit) as single:
            more = ". --traceback shows how it got there" if hasattr(single, "__notes__") else ""  # not in a worker
            return f"{what} row {problem.index}: {in_words(single)}. Its completion: {text[:200]!r}{more}"
    return f"{what} {len(texts)} rows, though on none of them alone: {in_words(error)}."


def _name(reward: RewardFn) -> str:
    name = getattr(reward, "__name__", type(reward).__name__)
    own = inspect.isfunction(reward) and not reward.__module__.startswith("trapo_train.") and "<locals>" not in reward.__qualname__
    return repr(f"{reward.__module__}:{name}" if own else name)
