"""The records that flow through one training step: Problem → Request → Sample.

They hold plain Python values only, so that plans, rewards, advantages and packing can be tested without a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

THINK, END_THINK = "<think>", "</think>"  # around the thoughts of a response


def opens_thoughts(prompt: str) -> bool:
    """Whether a response to the prompt begins inside thoughts."""
    return prompt.rstrip().endswith(THINK)


@dataclass(frozen=True)
class ExpertTrace:
    """One expert solution of a problem: the response only, without the prompt, with the token that ends it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One row of the dataset, or a conversation in it up to one of the assistant's turns, tokenised.

    `index` is its position among all of these and identifies the problem's advantage group. `columns` holds every further
    column of the dataset; the reward function receives them by name.
    """

    index: int
    prompt: str
    prompt_ids: tuple[int, ...]
    solution: str | None = None
    experts: tuple[ExpertTrace, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a plan asks for next: `num_samples` completions after the first `prefix_ratio` of expert trace `expert_index`.

    `prefix_ratio` is in [0, 1]: 0 samples without a prefix, 1 takes the full expert trace and generates nothing. `snap`: whether
    the cut moves forward to a paragraph break within `rollout.snap_window`, as TRAPO's does, or stands exactly at the ratio.
    """

    num_samples: int
    prefix_ratio: float = 0.0
    expert_index: int = 0
    snap: bool = True


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one list of input token ids; `logprobs` are nats under the sampling distribution's temperature."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str  # "stop" (a token that ends a response generated, included in token_ids) or "length"


@dataclass
class Sample:
    """One response to a problem: an expert prefix (may be empty) followed by the model's completion (may be empty).

    `micro_group` counts from 1. `prefix_weight` is the share of the TrSFT loss that this copy of the prefix carries: 1/k for
    each of k samples of one problem that share a prefix. `finish_reason` is the engine's, or "expert" for a full expert trace.
    `rewards` are the parts of a weighted sum by name, unweighted, None for no opinion; empty for a single reward.
    A completion that is `masked` is in no loss and no denominator; its reward counts as any other. `verdict`: what plans decide by,
    the value of the reward that rollout.correct_by names, unweighted, else `reward`. `correct`: whether it reaches
    rollout.correct_at.
    """

    problem: Problem
    micro_group: int
    prefix_ratio: float
    prefix_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    completion_logprobs: tuple[float, ...]
    finish_reason: str
    prefix_weight: float = 1.0
    masked: bool = False
    reward: float = 0.0
    verdict: float = 0.0
    correct: bool = False
    advantage: float = 0.0
    answer_in_prefix: bool = False
    rewards: dict[str, float | None] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        """True when the response starts with expert tokens."""
        return len(self.prefix_ids) > 0
