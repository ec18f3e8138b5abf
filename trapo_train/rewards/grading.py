"""Rewards that are computed in worker programs, so that a response that hangs or crashes them costs only its own reward."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from trapo_train.metrics import Mean
from trapo_train.records import opens_thoughts
from trapo_train.rewards.reward_checks import takes
from trapo_train.rewards.reward_values import RewardError
from trapo_train.rewards.workers import Answer, WorkerPool
from trapo_train.schema import UserError

FAILED_SHARE = "reward/failed_share/"  # and the name of the reward


class Grader:
    """A worker pool that starts when it is first asked, and counts what goes wrong in it. Threads may ask at once."""

    may_overlap = True

    def __init__(self, module: str, arguments: Sequence[str], time_limit_s: float, memory_limit_mib: int) -> None:
        self._module, self._arguments = module, arguments
        self._limits = {"time_limit_s": time_limit_s, "memory_limit_mib": memory_limit_mib}
        self._pool: WorkerPool | None = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def ask(self, requests: Sequence[Sequence[Any]]) -> list[Answer]:
        """Answers in the order of the requests."""
        if not requests:
            return []
        with self._lock:
            if self._pool is None:
                self._pool = WorkerPool(self._module, self._arguments, num_workers=_num_workers(), **self._limits)
        answers = self._pool.map(requests)
        with self._lock:
            self._counts.update(answer.outcome for answer in answers)
        return answers

    def take_metrics(self) -> dict[str, float]:
        """Counts since this was last asked, and their share of the gradings; an exception of the grader counts as a crash."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        timeouts, crashes, gradings = counts["timeout"], counts["crash"] + counts["error"], counts.total()
        share = {f"{FAILED_SHARE}{self.__name__}": Mean((timeouts + crashes) / gradings, gradings)} if gradings else {}
        return {"reward/timeouts": float(timeouts), "reward/crashes": float(crashes), **share}


class WorkerReward(Grader):
    """Calls the function at `path` ("package.module:function") row by row in worker programs; `reward` is that very function, here
    asked for its parameters alone. It gets the columns that it takes, dates and decimals in them as text.

    A row that takes longer than `time_limit_s`, crashes the worker or outgrows `memory_limit_mib` earns 0.0 and is counted.

    Raises: RuntimeError for an exception of the function, RewardError where it returns no list of one value; UserError for a
    column whose values cannot be sent.
    """

    def __init__(self, path: str, reward: Callable[..., Any], *, time_limit_s: float, memory_limit_mib: int) -> None:
        super().__init__("trapo_train.rewards.reward_worker", [path], time_limit_s, memory_limit_mib)
        self.__name__, self.__wrapped__ = path, reward

    def __call__(self, **columns: Any) -> list[float | None]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        requests = [({name: [value] for name, value in self.sent(row).items()},) for row in rows]
        answers = self.ask(requests)
        for answer in answers:
            if answer.outcome == "error":
                raise RuntimeError(answer.value)
            if isinstance(answer.value, str):
                raise RewardError(answer.value)
        return [answer.value[0] if answer.outcome == "ok" else 0.0 for answer in answers]

    def sent(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a worker is sent of a row's columns."""
        found = {}
        is_known = takes(self, "completions")  # unlike the arguments of one that is not written in Python, which gets all
        for name in row:
            if is_known and not takes(self, name):
                continue
            try:
                found[name] = json.loads(json.dumps(row[name], default=_as_text))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"reward {self.__name__!r} with in_worker must take columns of text, numbers, lists and mappings, the column "
                    f"{name!r} cannot be sent: {error}. Have it name the columns that it reads in place of **columns, or set "
                    "in_worker: false."
                ) from error
        return found


class MathVerify(Grader):
    """Reward 1.0 where the completion's answer equals the solution mathematically, graded by math-verify (see `math_grader`).

    None where there is no solution or math-verify cannot parse it, or not within its own limits. Grading runs in worker programs: a
    response that takes longer than `time_limit_s`, or than math-verify's own limits, which usually end it earlier, or crashes the
    grader earns 0.0 and is counted, and training goes on.
    """

    def __init__(self, *, time_limit_s: float = 20.0, memory_limit_mib: int = 8192) -> None:
        super().__init__("trapo_train.rewards.math_grader", (), time_limit_s, memory_limit_mib)
        self.__name__ = "math_verify"

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        solution: Sequence[str | None],
        thoughts_open: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        asked = [i for i, truth in enumerate(solution) if truth is not None]
        opened = [opens_thoughts(prompt) for prompt in prompts] if thoughts_open is None else thoughts_open
        answers = self.ask([(completions[i], solution[i], opened[i]) for i in asked])
        values: list[float | None] = [None] * len(completions)
        for i, answer in zip(asked, answers, strict=True):
            values[i] = answer.value if answer.outcome == "ok" else 0.0
        return values


def _as_text(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta):
        return str(value)
    raise TypeError(f"got {type(value).__name__}")


def num_processors(own_cgroup: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors that this process may use: those that it is bound to, or what a cgroup (version 2) that it is in, of a container
    or a job, grants of their time where that is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS binds to none
    found = re.search(r"^0::/(.*)$", own_cgroup.read_text(), re.MULTILINE) if own_cgroup.is_file() else None
    if found is None:
        return bound
    group = cgroups / found[1]
    files = [folder / "cpu.max" for folder in (group, *group.parents)]  # a limit is for all groups beneath
    quotas = [file.read_text().split() for file in files if file.is_file()]
    return min([bound, *(int(quota) / int(period) for quota, period in quotas if quota != "max")])


def _num_workers() -> int:
    """At most 8, and half of the processors that this process may use, as if the ranks that torchrun started here shared them."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, int(num_processors() // (2 * ranks))))


def about_failed_gradings(reward: str, share: float) -> str:
    """A sentence on a reward of which this share of the gradings failed in a step."""
    remedy = "Raise its time_limit_s or memory_limit_mib, or try it with in_worker: false"
    if reward == "math_verify":
        remedy = "Look at the responses in samples/ (tracking.samples_every=1), or raise its time_limit_s or memory_limit_mib"
    return f"{share:.0%} of the gradings of {reward} timed out or crashed, and each counts as 0. {remedy}"
