"""The rewards that a configuration names without a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trapo_train.rewards.grading import MathVerify
from trapo_train.schema import UserError
from trapo_train.tasks import pointer_chasing_reward


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft overlong punishment: 0 up to max_tokens - buffer tokens, falling to -1 at max_tokens, -1 beyond.

    Source: arXiv 2503.14476, equation 13.
    """

    max_tokens: int
    """Tokens at which the punishment is whole, usually rollout.max_response_tokens."""
    buffer: int
    """Tokens over which it grows, in [1, max_tokens]."""

    may_overlap = True

    def __post_init__(self) -> None:
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (self.max_tokens, self.buffer))
        if not whole or not 1 <= self.buffer <= self.max_tokens:
            raise UserError(
                f"overlong needs whole numbers 1 <= buffer <= max_tokens, got buffer = {self.buffer!r}, max_tokens = "
                f"{self.max_tokens!r}. For example {{max_tokens: 8192, buffer: 2048}}."
            )

    def __call__(self, completion_tokens: Sequence[int], **columns: Any) -> list[float]:
        free = self.max_tokens - self.buffer
        return [min(max(free - tokens, -self.buffer), 0) / self.buffer for tokens in completion_tokens]


def exact_match(
    prompts: Sequence[str], completions: Sequence[str], solution: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """Reward 1.0 where the completion is the solution, white space around both ignored; None without a solution."""
    return [
        None if truth is None else float(completion.strip() == truth.strip())
        for completion, truth in zip(completions, solution, strict=True)
    ]


REWARDS: dict[str, Callable[..., Sequence[float | None]]] = {
    "exact_match": exact_match,
    "math_verify": MathVerify(),
    "pointer_chasing": pointer_chasing_reward,
}
