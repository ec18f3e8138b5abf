"""Plans: what to sample for one problem, decided from the rewards that came back so far.

A plan is a generator per problem that yields a `Request` and receives the rewards of its samples:

    rewards = yield Request(num_samples=4)

Every plan here is a ladder, and a ladder is data: rungs that are climbed in order, each a micro-group of samples
with an expert prefix of its own. Each rung decides afresh, from the mean reward of all earlier samples, whether to use
it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from trapo_train.records import Problem, Request

Plan = Callable[[Problem], Generator[Request, list[float], None]]


@dataclass(frozen=True)
class Rung:
    """One micro-group of a ladder."""

    samples: int
    """Samples to draw, at least 1."""
    prefix_ratio: float = 0.0
    """Share of the expert trace to start from, in [0, 1]; 0 never guides, 1 is the whole trace, nothing generated."""
    threshold: float | None = None
    """Guide if the mean reward of all earlier samples is below this; null guides always. Null on the first rung."""
    expert_index: int = 0
    """Expert trace to take, from 0; a problem with fewer traces takes its last one."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples of a rung must be at least 1, got {self.samples}. Leave the rung out instead.")
        if not 0.0 <= self.prefix_ratio <= 1.0:
            raise ValueError(f"prefix_ratio of a rung must be in [0, 1], got {self.prefix_ratio}.")
        if self.threshold is not None and self.threshold != self.threshold:
            raise ValueError("threshold of a rung must be a number or null, got NaN.")
        if self.expert_index < 0:
            raise ValueError(f"expert_index of a rung must be ≥ 0, got {self.expert_index}.")


# The authors' code compares sums: "sum < 4 of 6" and "sum < 7 of 7" are the means 4/6 and 7/7.
LADDERS: dict[str, tuple[Rung, ...]] = {
    "paper": (Rung(4), Rung(2, 0.2, 0.5), Rung(1, 0.5, 0.7), Rung(1, 1.0, 0.9, expert_index=1)),
    "release": (Rung(4), Rung(2, 0.25, 0.5), Rung(1, 0.5, 4 / 6), Rung(1, 1.0, 7 / 7, expert_index=1)),
    "sft": (Rung(1, 1.0),),
}
PLANS = ("paper", "release", "grpo", "sft", "luffy", "ladder")
DEFAULT_NUM_SAMPLES = 8


@dataclass(frozen=True)
class PlanConfig:
    """Which plan draws the samples of each problem."""

    name: Literal["paper", "release", "grpo", "sft", "luffy", "ladder"] = "paper"
    """paper, release: TRAPO's ladder; grpo: unguided; sft: expert trace; luffy: both; ladder: your own rungs."""
    num_samples: int | None = None
    """Samples per problem of grpo (≥ 1) and luffy (≥ 2, one is the expert trace), null for 8; fixed elsewhere."""
    rungs: tuple[Rung, ...] = ()
    """The micro-groups of the plan "ladder", first to last; empty for every other plan."""

    def __post_init__(self) -> None:
        if self.name not in PLANS:
            raise ValueError(f"name of a plan must be one of {list(PLANS)}, got {self.name!r}.")
        smallest = {"grpo": 1, "luffy": 2}.get(self.name)
        if self.num_samples is not None and smallest is None:
            raise ValueError(
                f"num_samples is fixed by the plan {self.name!r}, got {self.num_samples}. "
                'Leave it out, or give the micro-groups as rungs of the plan "ladder".'
            )
        if self.num_samples is not None and self.num_samples < smallest:
            raise ValueError(f"num_samples of {self.name!r} must be at least {smallest}, got {self.num_samples}.")
        if (self.name == "ladder") != bool(self.rungs):
            raise ValueError(
                f'rungs belong to the plan "ladder" and it needs at least one, got {len(self.rungs)} with the plan {self.name!r}.'
            )
        if self.rungs and self.rungs[0].threshold is not None:
            raise ValueError(
                f"The first rung has no earlier samples, so its threshold must be null, got {self.rungs[0].threshold}."
            )


def plan_rungs(config: PlanConfig) -> tuple[Rung, ...]:
    """Return the rungs of the configured plan; their samples add up to the samples per problem."""
    num_samples = config.num_samples or DEFAULT_NUM_SAMPLES
    if config.name == "grpo":
        return (Rung(num_samples),)
    if config.name == "luffy":
        return (Rung(num_samples - 1), Rung(1, 1.0))
    return config.rungs or LADDERS[config.name]


def build_plan(config: PlanConfig) -> Plan:
    """Build the configured plan: a function that returns a fresh generator for a problem.

    A rung is guided if the problem has an expert trace, its prefix ratio is above 0, and the mean of all rewards
    received so far is below its threshold (or it has none). Otherwise its samples are drawn without a prefix; so a
    problem without an expert is never guided, whatever the plan.
    """
    rungs = plan_rungs(config)

    def plan(problem: Problem) -> Generator[Request, list[float], None]:
        earlier: list[float] = []
        for rung in rungs:
            rewards = yield _request(rung, problem, earlier)
            if len(rewards) != rung.samples:
                raise ValueError(f"The plan asked for {rung.samples} samples, got {len(rewards)} rewards. Send one each.")
            earlier.extend(rewards)

    return plan


def _request(rung: Rung, problem: Problem, earlier: list[float]) -> Request:
    needed = rung.threshold is None or fmean(earlier) < rung.threshold
    if not problem.experts or rung.prefix_ratio == 0.0 or not needed:
        return Request(rung.samples)
    return Request(rung.samples, rung.prefix_ratio, min(rung.expert_index, len(problem.experts) - 1))
