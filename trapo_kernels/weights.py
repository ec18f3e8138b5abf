"""The packer's arithmetic: the counts of an optimizer step, and the `weight` per token that every normaliser is folded into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from trapo_kernels import batch_checks, checks
from trapo_kernels.objective import Objective
from trapo_kernels.roles import Role
from trapo_kernels.sequence import Sequences, starts


@dataclass(frozen=True)
class LossTotals:
    """Denominators of one optimizer step, summed over all micro-batches and ranks; sequences and prompts only where they were
    counted. A count that you have already is as good: `LossTotals(expert_tokens=num_items_in_batch)`.

    Each is a whole number ≥ 0, or a tensor of one; what a tensor on a GPU holds is not looked at.

    Raises: ValueError for anything else, None among it.
    """

    expert_tokens: int | Tensor = 0
    rollout_tokens: int | Tensor = 0
    sequences: int | Tensor = 0
    prompts: int | Tensor = 0

    def __post_init__(self):
        batch_checks.loss_totals(self)

    def __add__(self, other: LossTotals) -> LossTotals:
        if not isinstance(other, LossTotals):
            return NotImplemented
        return LossTotals(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def tokens(self) -> int | Tensor:
        """Loss tokens of either role."""
        return self.expert_tokens + self.rollout_tokens

    def __radd__(self, other: int) -> LossTotals:
        return self if other == 0 else NotImplemented  # the start of Python's sum


def loss_totals(role: Tensor, sequence_id: Tensor | None = None, prompt_id: Tensor | None = None) -> LossTotals:
    """Count the loss tokens per role, and the sequences and prompts where their ids are given.

    Equivalent to, without ids:

        totals = LossTotals(int((role == Role.EXPERT).sum()), int((role == Role.ROLLOUT).sum()))

    Args:
        role: [N] uint8 `Role`, host tensor.
        sequence_id, prompt_id: [N] int64, host tensors, or None to count none. Every distinct id counts, also one whose tokens are
            all ignored: an empty sequence still belongs to the mean. A negative id of ignored tokens is padding, which is in no
            sequence and of no prompt.

    Returns: `LossTotals`; those of an optimizer step are `sum(parts, LossTotals())` over all its micro-batches and ranks.
    Raises: TypeError or ValueError for a tensor of another shape or dtype, and for a role that is none.
    Memory: O(N). Determinism: whole numbers, the same in any order. Source: the denominators of `aggregate`.
    """
    checks.roles("loss_totals", role)
    for name, label in (("sequence_id", sequence_id), ("prompt_id", prompt_id)):
        if label is not None:
            checks.label("loss_totals", name, label, role)
    counted = _counted(role, sequence_id, prompt_id)
    return LossTotals(*(int(count) for count in vars(counted).values()))


def _counted(role: Tensor, sequence_id: Tensor | None, prompt_id: Tensor | None) -> LossTotals:
    """What `loss_totals` counts, as 0-d tensors on the device of `role`, for which the host does not wait."""
    real = role != Role.IGNORED
    return LossTotals(
        expert_tokens=(role == Role.EXPERT).sum(),
        rollout_tokens=(role == Role.ROLLOUT).sum(),
        **{
            name: 0 if label is None else _distinct(label, real | (label >= 0))
            for name, label in (("sequences", sequence_id), ("prompts", prompt_id))
        },
    )


def _distinct(label: Tensor, counted: Tensor) -> Tensor:
    """0-d: how many labels [N] the tokens `counted` [N] bool have; `unique` would make the host wait for a GPU."""
    absent = torch.iinfo(torch.int64).min
    ordered = torch.where(counted, label, absent).sort().values
    return (starts(ordered) & (ordered != absent)).sum()


Aggregation = Literal["constant", "length", "token_mean", "role_mean", "sequence_mean", "sequence_sum", "prompt_mean"]
AGGREGATIONS = get_args(Aggregation)
# The counts of `LossTotals` that a mode divides by.
_DIVISORS: dict[Aggregation, tuple[str, ...]] = {
    "constant": ("sequences",),
    "length": (),
    "token_mean": ("tokens",),
    "role_mean": ("expert_tokens", "rollout_tokens"),
    "sequence_mean": ("sequences",),
    "sequence_sum": ("sequences",),
    "prompt_mean": ("prompts",),
}


def aggregate(
    role: Tensor,
    sequence_id: Tensor | None = None,
    *,
    mode: Aggregation,
    max_tokens: int | None = None,
    totals: LossTotals | None = None,
    share: Tensor | None = None,
    prompt_id: Tensor | None = None,
) -> Tensor:
    """Fold the normaliser of the loss into a weight per token, so that no later sum ever divides by a count.

    Equivalent to, for mode "token_mean":

        weight = (role != Role.IGNORED).float() / (role != Role.IGNORED).sum()

    Args:
        role: [N] uint8 `Role`. On a GPU nothing waits for it, and `totals` are not compared with what this call counts.
        sequence_id: [N] int64, which sequence a token belongs to, negative for padding; a sequence is never split over calls.
            Needed by the modes that divide by sequences.
        mode: "constant": 1 / (sequences · max_tokens), the unbiased form of Dr.GRPO; "length": 1 / max_tokens, as TRAPO's release
            does; "token_mean": 1 / loss tokens, DAPO; "role_mean": 1 / loss tokens of the same role, CHORD; "sequence_mean": the
            mean over sequences of each sequence's token mean, GRPO; "sequence_sum": the mean over sequences of each sequence's
            token sum; "prompt_mean": the mean over prompts of the token mean over all sequences of a prompt.
        max_tokens: L of "constant" and "length", tokens, > 0.
        totals: denominators over all micro-batches and ranks of the optimizer step; None counts this call alone. DDP and FSDP
            average gradients over ranks: multiply the weight, or the loss before its backward, by their number. A normaliser n
            that is no such count, such as an average over ranks or steps, needs no aggregate: weight = mask / n, [N] fp32.
        share: [N] fp32 factor; it multiplies the weight and is not counted. 1/k on k copies of an expert prefix shrinks a mean: per
            mean, over the whole step and before splitting, pass torch.where(mine, share / share[mine].mean(), share), `mine` being
            that mean's tokens.
        prompt_id: [N] int64, which prompt a token belongs to, for "prompt_mean"; a prompt is never split over calls.

    Returns: weight [N] fp32, zero on ignored tokens.
    Raises: ValueError for an unknown mode, a tensor of another shape, or what the mode needs and is missing.
    Memory: O(N). Determinism: bitwise repeatable; every denominator is a whole number until the division.
    Source: arXiv 2503.20783 ("constant"), 2503.14476 ("token_mean"), 2508.11408 ("role_mean"), 2402.03300 ("sequence_mean");
        TRAPO's release ("length"); of the other two, their descriptions.
    """
    checks.one_of("aggregate", "mode", mode, AGGREGATIONS)
    checks.aggregation(role, {"sequences": sequence_id, "prompts": prompt_id}, mode, _DIVISORS[mode], max_tokens, share)
    longest = checks.whole_number(max_tokens)
    looks = checks.may_look(role)
    here = (loss_totals if looks else _counted)(role, sequence_id, prompt_id)
    totals = here if totals is None else totals
    checks.totals(totals, here, _DIVISORS[mode] if looks else ())
    counted, exact = role != Role.IGNORED, partial(_exact, device=role.device)
    if mode == "token_mean":
        denominator = exact(totals.tokens)
    elif mode == "role_mean":
        denominator = torch.where(role == Role.EXPERT, exact(totals.expert_tokens), exact(totals.rollout_tokens))
    elif mode == "sequence_mean":
        denominator = Sequences(sequence_id, counted).count() * exact(totals.sequences)
    elif mode == "prompt_mean":
        denominator = Sequences(prompt_id, counted).count() * exact(totals.prompts)
    else:
        denominator = exact(1 if mode == "length" else totals.sequences) * (1 if mode == "sequence_sum" else longest)
    weight = torch.where(counted, 1.0 / denominator.clamp(min=1.0), 0.0).float()
    return weight if share is None else torch.where(counted, weight * share, 0.0).float()


def _exact(count: int | Tensor, device: torch.device) -> Tensor:
    """0-d fp64; a number takes no copy to a GPU."""
    if isinstance(count, Tensor):
        return count.to(device, torch.float64)
    return torch.full((), count, dtype=torch.float64, device=device)


def silenced_weight(role: Tensor, weight: Tensor, advantage: Tensor | None, objective: Objective) -> Tensor:
    """`weight` with 0 for the tokens whose gradient under `objective` is exactly 0 because their advantage is 0; rows of weight 0
    are skipped and left out of the metrics.

    Equivalent to, for `objectives.grpo()`:

        weight = torch.where((role == Role.ROLLOUT) & (advantage == 0), 0.0, weight)

    Args:
        role: [N] uint8 `Role`. weight: [N] as `aggregate` returns it, whose denominators still count these tokens.
        advantage: [N] fp32; None where the objective reads none, as in SFT, and no weight changes.
        objective: what will train the batch; a KL term keeps all rollout tokens, a term with signal "one" all tokens of its role.

    Returns: weight [N]. With an entropy bonus pass the old weight as `entropy_weight` to the `TokenBatch`, or these tokens lose
        their bonus; those that keep one are not skipped.
    Raises: TypeError or ValueError for a tensor of another shape or dtype.
    Memory: O(N). Determinism: elementwise. Source: d(a·V)/dlogp = a·G.
    """
    where, floats = "silenced_weight", (torch.float32, torch.float64)
    checks.is_a(where, "objective", objective, Objective, "objectives.grpo()")
    checks.roles(where, role)
    checks.vector(where, "weight", weight, len(role), role.device, floats)
    if advantage is not None or "advantage" in objective.reads():
        checks.vector(where, "advantage", advantage, len(role), role.device, floats)
    silent = torch.zeros_like(role, dtype=torch.bool)
    for code in (Role.EXPERT, Role.ROLLOUT):
        if objective.lives_by_advantage(code):
            silent |= (role == code) & (advantage == 0)
    return torch.where(silent, 0.0, weight)
