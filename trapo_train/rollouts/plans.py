"""Plans: what to sample for one problem, decided from the rewards that came back so far.

A plan is a generator per problem that yields a `Request` and receives the rewards of its samples:

    rewards = yield Request(num_samples=4)
    return Outcome(dropped=frozenset({1}))          # what becomes of the samples; Outcome() keeps all

TRAPO's plans are ladders, and a ladder is data: rungs that are climbed in order, each a micro-group of samples with an
expert prefix of its own. Each rung decides afresh, from the mean reward of all earlier samples, whether to use it.

The rewards that a plan is sent are verdicts: of several rewards the one that rollout.correct_by names, unweighted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal

from trapo_train.records import Problem, Request
from trapo_train.schedules import build_schedule
from trapo_train.schema import UserError, check


@dataclass(frozen=True)
class Outcome:
    """What a plan makes of a problem's samples once it is done."""

    dropped: frozenset[int] = frozenset()
    """Micro-groups, from 1, that are not trained on: they enter no advantage and no denominator."""
    deferred: bool = False
    """Whether a later step is to train on the problem's expert trace."""


PlanSteps = Generator[Request, list[float], Outcome | None]  # None, of a generator without return, keeps all
Plan = Callable[[Problem], PlanSteps]


@dataclass(frozen=True)
class Rung:
    """One micro-group of a ladder."""

    samples: int
    """Samples to draw, at least 1."""
    prefix_ratio: float = 0.0
    """Share of the expert trace to start from, in [0, 1]; 0 never guides, 1 is the whole trace, nothing generated."""
    threshold: float | None = None
    """Guide if the mean reward (rollout.correct_by) of earlier samples is below this; null guides always. Must be null on the first
    rung, which has no earlier samples."""
    expert_index: int = 0
    """Expert trace to take, from 0; a problem with fewer traces takes its last one."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples of a rung must be at least 1, got {self.samples}. Leave the rung out instead.")
        if not 0.0 <= self.prefix_ratio <= 1.0:
            raise UserError(f"prefix_ratio of a rung must be in [0, 1], got {self.prefix_ratio}.")
        if self.threshold is not None and self.threshold != self.threshold:
            raise UserError("threshold of a rung must be a number or null, got NaN.")
        if self.expert_index < 0:
            raise UserError(f"expert_index of a rung must be at least 0, got {self.expert_index}.")


ONE_TRACE = (Rung(1, 1.0),)
# The authors' code compares sums: "sum < 4 of 6" and "sum < 7 of 7" are the means 4/6 and 7/7.
LADDERS: dict[str, tuple[Rung, ...]] = {
    "paper": (Rung(4), Rung(2, 0.2, 0.5), Rung(1, 0.5, 0.7), Rung(1, 1.0, 0.9, expert_index=1)),
    "release": (Rung(4), Rung(2, 0.25, 0.5), Rung(1, 0.5, 4 / 6), Rung(1, 1.0, 7 / 7, expert_index=1)),
    "sft": ONE_TRACE,  # for each trace of the problem
}
DEFAULT_NUM_SAMPLES = 8
# Which plans read which of the optional settings, and what they use where it is null.
_READERS: dict[str, dict[str, Any]] = {
    "num_samples": dict.fromkeys(("grpo", "luffy", "prefix_rft", "uft", "hpt", "relift"), DEFAULT_NUM_SAMPLES),
    "guidance": {"prefix_rft": None, "uft": None},
    "longest_prefix": {"prefix_rft": 0.95},
    "chunks": {"uft": 5},
    "unsolved_at": {"hpt": 0.0, "relift": 0.0},
    "buffer_size": {"relift": 128},
}


@dataclass(frozen=True)
class PlanConfig:
    """Which plan draws the samples of each problem; a setting that is null takes the plan's default.

    paper and release: TRAPO's ladder as published and as in its code. grpo: unguided. sft: every expert
    trace. luffy: unguided and one expert trace, SRFT's plan with one sample more. prefix_rft: unguided and one sample after a
    prefix of random length. uft: all after one random hint. hpt: unguided, replaced by the expert trace where they fail. relift:
    unguided, failures are kept in a buffer and their traces trained on in steps of their own. ladder: your own rungs.
    """

    name: Literal["paper", "release", "grpo", "sft", "luffy", "prefix_rft", "uft", "hpt", "relift", "ladder"] = "paper"
    """Which of these plans."""
    num_samples: int | None = None
    """Samples per problem, at least 1, at least 2 where one of them is guided (luffy, prefix_rft); null for 8. Elsewhere fixed."""
    refill: int = 0
    """Up to this many extra sampling rounds per step, at least 0, each replacing problems that teach nothing: all advantages are 0,
    or would be if rollout.correct_by alone were the reward, and no expert token is trained. Problems that still teach nothing are
    left out of the loss and its denominators (DAPO's dynamic sampling, with a limit). 0: one round, keep everything. A round
    samples as many problems as are missing, waits for its longest response and hands the weights to the engine again."""
    rungs: tuple[Rung, ...] = ()
    """The micro-groups of the plan "ladder", first to last; empty for every other plan."""
    guidance: float | dict[str, Any] | None = None
    """prefix_rft: the shortest prefix drawn; uft: the expected hint; a share of the trace in [0, 1], fixed or a schedule."""
    longest_prefix: float | None = None
    """prefix_rft: the longest prefix drawn, as a share of the trace in [0, 1]; null for 0.95."""
    chunks: int | None = None
    """uft: equal parts of the trace of which a hint has the first few, at least 1; null for 5."""
    unsolved_at: float | None = None
    """hpt, relift: a problem whose mean reward (rollout.correct_by) is at most this is unsolved; null for 0."""
    buffer_size: int | None = None
    """relift: unsolved problems that are waited for before a step trains on their expert traces, at least 1; null for 128."""

    def __post_init__(self) -> None:
        check(self)
        for setting, readers in _READERS.items():
            value = getattr(self, setting)
            if value is not None and self.name not in readers:
                if setting == "num_samples":
                    ladder = "" if self.name == "ladder" else ' of the plan "ladder"'
                    raise UserError(
                        f"num_samples is fixed by the plan {self.name!r}, got {value}. "
                        f"Leave it out, or give the micro-groups as rungs{ladder}."
                    )
                raise UserError(
                    f"{setting} belongs to {', '.join(readers)}, got {value} with the plan {self.name!r}. Leave it out."
                )
        self._check_ranges()
        if (self.name == "ladder") != bool(self.rungs):
            remedy = "Give its micro-groups, plan.rungs=[{samples: 4}, …]." if self.name == "ladder" else "Set plan.name=ladder."
            raise UserError(
                f'rungs belong to the plan "ladder" and it needs at least one, got {len(self.rungs)} with the plan {self.name!r}. '
                f"{remedy}"
            )
        if self.rungs and self.rungs[0].threshold is not None:
            raise UserError(f"The first rung has no earlier samples, so its threshold must be null, got {self.rungs[0].threshold}.")

    def _check_ranges(self) -> None:
        smallest = 2 if self.name in ("luffy", "prefix_rft") else 1
        for name, low in (("num_samples", smallest), ("refill", 0), ("chunks", 1), ("buffer_size", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} of {self.name!r} must be at least {low}, got {value}.")
        if self.unsolved_at is not None and self.unsolved_at != self.unsolved_at:
            raise UserError("unsolved_at must be a number, got NaN.")
        if self.name not in _READERS["guidance"]:
            return
        if self.guidance is None:
            raise UserError(
                f"guidance must be set for the plan {self.name!r}: a share of the trace in [0, 1], or a schedule such as "
                "{schedule: cosine, start: 0.95, end: 0.05, steps: 500}."
            )
        low, high = build_schedule(self.guidance).bounds
        top = self.setting("longest_prefix") if self.name == "prefix_rft" else 1.0
        if not 0.0 <= low <= high <= top <= 1.0:
            raise UserError(
                f"guidance of {self.name!r} must stay in [0, {top:g}] and longest_prefix in [0, 1], got guidance from {low:g} to "
                f"{high:g}."
            )

    def setting(self, name: str) -> Any:
        """The value of an optional setting, or the plan's default where it is null; None where the plan has no such setting."""
        value = getattr(self, name)
        return _READERS[name].get(self.name) if value is None else value

    @property
    def largest_request(self) -> int:
        """The most samples of a problem that the plan generates at once; 0 where it never generates."""
        rungs = plan_rungs(self)
        return self.setting("num_samples") if rungs is None else max((r.samples for r in rungs if r.prefix_ratio < 1), default=0)

    @property
    def has_thresholds(self) -> bool:
        """Whether the plan compares rewards with a number: rungs with a threshold, or unsolved_at."""
        return self.name in _READERS["unsolved_at"] or any(rung.threshold is not None for rung in plan_rungs(self) or ())

    @property
    def guides(self) -> bool:
        """Whether the plan may use expert traces."""
        rungs = plan_rungs(self)
        return rungs is None or any(rung.prefix_ratio > 0 for rung in rungs)

    def traces_used(self, num_traces: int) -> set[int]:
        """Which of the `num_traces` expert traces of a problem, at least 1, the plan may ever use, counted from 0."""
        if self.name == "sft":
            return set(range(num_traces))
        rungs = plan_rungs(self)
        if rungs is None:
            return {0}
        return {min(rung.expert_index, num_traces - 1) for rung in rungs if rung.prefix_ratio > 0}


def plan_rungs(config: PlanConfig) -> tuple[Rung, ...] | None:
    """The rungs of a plan that is a ladder, of sft those for one trace; None for one that draws at random or drops samples, which
    no fixed ladder does."""
    num_samples = config.setting("num_samples")
    if config.name == "grpo":
        return (Rung(num_samples),)
    if config.name == "luffy":
        return (Rung(num_samples - 1), Rung(1, 1.0))
    return config.rungs or LADDERS.get(config.name)


def build_plan(config: PlanConfig, *, step: int = 0, seed: int = 0) -> Plan:
    """Build the configured plan for rollout step `step` ≥ 0: a function that returns a fresh generator for a problem.

    A plan is a pure function of (problem, step, seed) and of the rewards it is sent, so that a resumed run draws the same.
    A problem without an expert trace is never guided, whatever the plan: its samples are drawn without a prefix.
    """
    if config.name == "prefix_rft":
        return partial(_prefix_rft, config, step, seed)
    if config.name == "uft":
        return partial(_uft, config, step, seed)
    if config.name == "hpt":
        return partial(_hpt, config)
    if config.name == "relift":
        return partial(_relift, config)
    if config.name == "sft":
        return _sft
    return partial(_climb, plan_rungs(config))


def _climb(rungs: tuple[Rung, ...], problem: Problem) -> PlanSteps:
    """A ladder. A rung is guided if its ratio is above 0 and the mean of all rewards so far is below its threshold."""
    earlier: list[float] = []
    for rung in rungs:
        rewards = yield _request(rung, problem, earlier)
        if len(rewards) != rung.samples:
            raise ValueError(f"The plan asked for {rung.samples} samples, got {len(rewards)} rewards. Send one each.")
        earlier.extend(rewards)
    return Outcome()


def _sft(problem: Problem) -> PlanSteps:
    """Every expert trace of the problem, whole, in a request of its own."""
    if not problem.experts:
        yield Request(1)
    for number in range(len(problem.experts)):
        yield Request(1, 1.0, number)
    return Outcome()


def _prefix_rft(config: PlanConfig, step: int, seed: int, problem: Problem) -> PlanSteps:
    """n - 1 unguided samples and one after a prefix of share ~ U(low, high); `low` falls on a cosine from 0.95 to 0.05.

    Source: arXiv 2507.01679.
    """
    num_samples = config.setting("num_samples")
    yield Request(num_samples - 1)
    low, high = build_schedule(config.guidance)(step), config.setting("longest_prefix")
    ratio = _generator(problem, step, seed).uniform(low, high)
    yield Request(1, ratio, snap=False) if problem.experts else Request(1)
    return Outcome()


def _uft(config: PlanConfig, step: int, seed: int, problem: Problem) -> PlanSteps:
    """All samples after one hint: the first k of `chunks` equal parts of the trace, k ~ Binomial(chunks, guidance).

    The paper's guidance is {schedule: cosine, start: 0.95, end: 0.05, steps: 300, after: 0} in a run of 500 steps. A hint of
    all chunks is the whole trace, of which one copy is enough.

    Source: arXiv 2505.16984, appendix B.
    """
    num_samples, chunks = config.setting("num_samples"), config.setting("chunks")
    share = build_schedule(config.guidance)(step)
    generator = _generator(problem, step, seed)
    shown = sum(generator.random() < share for _ in range(chunks)) if problem.experts else 0
    yield Request(1 if shown == chunks else num_samples, shown / chunks, snap=False)
    return Outcome()


def _hpt(config: PlanConfig, problem: Problem) -> PlanSteps:
    """Unguided samples; where their mean reward is at most `unsolved_at`, the expert trace takes their place.

    Source: arXiv 2509.04419.
    """
    rewards = yield Request(config.setting("num_samples"))
    if fmean(rewards) > config.setting("unsolved_at") or not problem.experts:
        return Outcome()
    yield Request(1, 1.0)
    return Outcome(dropped=frozenset({1}))


def _relift(config: PlanConfig, problem: Problem) -> PlanSteps:
    """Unguided samples; a problem whose mean reward is at most `unsolved_at` is deferred to a step on expert traces.

    Source: arXiv 2506.07527.
    """
    rewards = yield Request(config.setting("num_samples"))
    return Outcome(deferred=bool(problem.experts) and fmean(rewards) <= config.setting("unsolved_at"))


class DeferredProblems:
    """Positions of the problems that plans deferred, oldest first, each once; a step on their expert traces takes them out."""

    def __init__(self, size: int | None) -> None:
        self.size = size  # None for a plan that defers nothing
        self._waiting: dict[int, None] = {}  # a set that keeps the order

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, positions: Iterable[int]) -> None:
        """Let the problems at `positions` wait; those that wait already keep their place."""
        self._waiting |= dict.fromkeys(positions)

    def take(self) -> list[int]:
        """The positions of the next step on expert traces, `size` of them; empty while fewer are waiting."""
        if self.size is None or len(self._waiting) < self.size:
            return []
        waiting = list(self._waiting)
        self._waiting = dict.fromkeys(waiting[self.size :])
        return waiting[: self.size]

    def state_dict(self) -> dict[str, Any]:
        """What waits, as plain values."""
        return {"waiting": list(self._waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._waiting = dict.fromkeys(state["waiting"])


def _generator(problem: Problem, step: int, seed: int) -> random.Random:
    return random.Random(f"{seed}/{step}/{problem.index}")  # a text is hashed the same way in every process


def _request(rung: Rung, problem: Problem, earlier: list[float]) -> Request:
    needed = rung.threshold is None or fmean(earlier) < rung.threshold
    if not problem.experts or rung.prefix_ratio == 0.0 or not needed:
        return Request(rung.samples)
    return Request(rung.samples, rung.prefix_ratio, min(rung.expert_index, len(problem.experts) - 1))
