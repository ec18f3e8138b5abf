"""TokenBatch, the per-token inputs of a policy loss, and the packer's arithmetic that folds every normaliser into `weight`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trapo_kernels import checks

IGNORE_INDEX = -100


class Role:
    """What a token is to the loss; plain integers, because torch.compile cannot compare a tensor with an enum member."""

    IGNORED = 0  # in no loss; its hidden state is never read
    ROLLOUT = 1  # sampled by the policy: the ratio loss
    EXPERT = 2  # written by an expert: the imitation loss


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Per-token inputs of a policy loss; every tensor is [N] and lies on the device of the hidden states.

    Args:
        target: int64, the token whose logprob is wanted, in [0, V).
        role: uint8, one of `Role`.
        advantage: fp32, the signal of rollout tokens; expert tokens use 1 unless the objective says otherwise.
        weight: fp32, every normaliser, mask, mixing coefficient and static correction; the loss is Σ weight · token loss.
        old_logprob: fp32 nats under the policy that sampled, the ratio's denominator. None: the batch is strictly on-policy,
            so the ratio is 1 in value and carries the gradient of logprob.
        ref_logprob: fp32 nats under the frozen reference of the KL term; needed only when the objective has one.
        rollout_logprob: fp32 nats as the sampler reported them; needed only by terms anchored at "rollout".
        entropy_weight: fp32, weight of the entropy bonus; None means `weight`.
        active_rows: int64 [M], the rows that can contribute, in order. Found here when the tensors are on the CPU (no sync). On a
            GPU pass what the packer knows; without it every row goes through the GEMMs with the inactive ones zeroed.
        sequence_id: int64, any label per sequence, for objectives that pool over sequences; a sequence is never split over batches.

    Raises: ValueError or TypeError with rule, actual value and remedy.
    """

    target: Tensor
    role: Tensor
    advantage: Tensor
    weight: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    rollout_logprob: Tensor | None = None
    entropy_weight: Tensor | None = None
    active_rows: Tensor | None = None
    sequence_id: Tensor | None = None

    def __post_init__(self):
        checks.token_batch(self)
        if self.active_rows is None and self.role.device.type == "cpu" and not torch.compiler.is_compiling():
            object.__setattr__(self, "active_rows", self.active.nonzero().squeeze(1))

    @property
    def active(self) -> Tensor:
        """[N] bool: the rows that can contribute to the loss or to the entropy bonus."""
        weighted = self.weight != 0
        if self.entropy_weight is not None:
            weighted = weighted | (self.entropy_weight != 0)
        return weighted & (self.role != Role.IGNORED)

    def __len__(self) -> int:
        return self.target.shape[0]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`, with `active_rows` found before the move, so that no sync follows."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenBatch(**{name: None if t is None else t.to(device, non_blocking=True) for name, t in moved.items()})


@dataclass(frozen=True)
class LossTotals:
    """Denominators of one optimizer step, summed over all micro-batches and ranks."""

    expert_tokens: int
    rollout_tokens: int
    sequences: int

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(
            self.expert_tokens + other.expert_tokens,
            self.rollout_tokens + other.rollout_tokens,
            self.sequences + other.sequences,
        )


def loss_totals(role: Tensor, sequence_id: Tensor) -> LossTotals:
    """Count the loss tokens per role and the sequences of `role` [N] and `sequence_id` [N] int64 (host tensors).

    Every distinct id counts as a sequence, also one whose tokens are all ignored: an empty sequence still belongs to the mean.
    """
    return LossTotals(
        expert_tokens=int((role == Role.EXPERT).sum()),
        rollout_tokens=int((role == Role.ROLLOUT).sum()),
        sequences=int(sequence_id.unique().numel()),
    )


AGGREGATIONS = ("constant", "token_mean", "role_mean", "sequence_mean", "sequence_sum")


def aggregate(
    role: Tensor,
    sequence_id: Tensor,
    *,
    mode: str,
    max_tokens: int | None = None,
    totals: LossTotals | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Fold the normaliser of the loss into a weight per token, so that no later sum ever divides by a count.

    Equivalent to, for mode "token_mean":

        weight = (role != Role.IGNORED).float() / (role != Role.IGNORED).sum()

    Args:
        role: [N] uint8 `Role`, host tensor.
        sequence_id: [N] int64, which sequence a token belongs to; a sequence is never split over calls.
        mode: "constant": 1 / (sequences · max_tokens), the unbiased form of Dr.GRPO; "token_mean": 1 / loss tokens, DAPO;
            "role_mean": 1 / loss tokens of the same role, CHORD; "sequence_mean": the mean over sequences of each sequence's
            token mean, GRPO; "sequence_sum": the mean over sequences of each sequence's token sum.
        max_tokens: L of "constant", tokens, > 0.
        totals: denominators over all micro-batches and ranks of the optimizer step; None counts this call alone.
        share: [N] fp32 factor, such as 1/k for k copies of one expert prefix; it multiplies the weight and is not counted.

    Returns: weight [N] fp32, zero on ignored tokens.
    Raises: ValueError for an unknown mode or a missing `max_tokens`.
    """
    checks.one_of("aggregate", "mode", mode, AGGREGATIONS)
    if mode == "constant" and (max_tokens is None or max_tokens <= 0):
        raise ValueError(
            f'aggregate: mode "constant" needs max_tokens > 0, got {max_tokens}. Pass the longest response in tokens.'
        )
    totals = totals or loss_totals(role, sequence_id)
    counted = role != Role.IGNORED
    if mode == "constant":
        denominator = torch.full(role.shape, float(totals.sequences * (max_tokens or 1)))
    elif mode == "token_mean":
        denominator = torch.full(role.shape, float(totals.expert_tokens + totals.rollout_tokens))
    elif mode == "role_mean":
        denominator = torch.where(role == Role.EXPERT, float(totals.expert_tokens), float(totals.rollout_tokens))
    elif mode == "sequence_sum":
        denominator = torch.full(role.shape, float(totals.sequences))
    else:
        _, compact_id = sequence_id.unique(return_inverse=True)
        tokens = torch.bincount(compact_id[counted], minlength=int(compact_id.max()) + 1 if len(compact_id) else 0)
        denominator = tokens[compact_id] * float(totals.sequences)
    weight = torch.where(counted, 1.0 / denominator.clamp(min=1.0), 0.0).float()
    return weight if share is None else weight * share
