"""Static corrections: factors per token, known before the update, that the packer multiplies into `weight`.

    kl_weight = aggregate(role, sequence_id, mode=...)  # of a KL term, which they leave alone, as entropy_weight is
    weight = kl_weight * tis(role, old_logprob, rollout_logprob)

`TokenBatch.from_padded` takes those of flattened tensors as `correction=tis(...).view(mask.shape)`. The sampler and the trainer
compute different logprobs for the same policy; ρ = exp(old - rollout) of a rollout token corrects for it. Expert tokens always get
factor 1. Beside a ratio pooled over the sequence (GSPO, GMPO) take the level "sequence" or "geometric": factors that differ within
a sequence make the gradient that of GSPO-token. Everything is tensor arithmetic without a host sync, on the host or on a GPU.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from trapo_kernels import checks
from trapo_kernels.roles import Role
from trapo_kernels.sequence import Sequences, starts

__all__ = ["drop_overlong", "duplicate_share", "icepop", "mis", "sequence_mask", "tis"]

Level = Literal["token", "sequence", "geometric"]
LEVELS = get_args(Level)


def tis(
    role: Tensor,
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    *,
    cap: float = 2.0,
    level: Level = "token",
    sequence_id: Tensor | None = None,
) -> Tensor:
    """Truncated importance sampling: min(ρ, cap) on rollout tokens.

    Args:
        role: [N] uint8 `Role`. old_logprob, rollout_logprob: [N] fp32 or fp64 nats; read on rollout tokens only.
        cap: largest factor, > 0.
        level: "token"; "sequence", the product over the sequence; or "geometric", its length-mean. The last two need sequence_id
            [N] int64, and whole sequences.

    Returns: factors [N] in the dtype of old_logprob, in [0, cap]; 1 on tokens that are no rollout.
    Raises: TypeError or ValueError for a tensor of another shape or dtype, a cap or level outside its range, a missing
        sequence_id, and on the host for a logprob of a rollout token that is not finite.
    Memory: O(N). Determinism: bitwise repeatable, without a host sync on a GPU.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    checks.in_range("tis", "cap", cap, 0.0, math.inf, open_low=True)
    log_ratio = _log_ratio("tis", role, old_logprob, rollout_logprob, level, sequence_id)
    return torch.where(role == Role.ROLLOUT, log_ratio.clamp(max=math.log(cap)).exp(), 1.0)


def mis(
    role: Tensor,
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    *,
    low: float = 0.0,
    high: float = 2.0,
    level: Level = "sequence",
    sequence_id: Tensor | None = None,
) -> Tensor:
    """Masked importance sampling: ρ where low ≤ ρ ≤ high, else 0; arguments as in `tis`.

    Returns: factors [N] in the dtype of old_logprob, 0 or in [low, high]; 1 on tokens that are no rollout.
    Raises: as `tis`; ValueError for bounds without 0 ≤ low < high.
    Memory: O(N). Determinism: bitwise repeatable, without a host sync on a GPU.
    Source: Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference mismatch".
    """
    checks.in_range("mis", "low", low, 0.0, math.inf)
    checks.in_range("mis", "high", high, low, math.inf, open_low=True)
    ratio = _log_ratio("mis", role, old_logprob, rollout_logprob, level, sequence_id).exp()
    return torch.where((ratio >= low) & (ratio <= high) | (role != Role.ROLLOUT), ratio, 0.0)


def icepop(role: Tensor, old_logprob: Tensor, rollout_logprob: Tensor, *, low: float = 0.5, high: float = 5.0) -> Tensor:
    """IcePop: `mis` for each token by itself, ρ where low ≤ ρ ≤ high, else 0.

    Returns: factors [N], as `mis` with level "token".
    Raises: as `mis`.
    Memory: O(N). Determinism: bitwise repeatable, without a host sync on a GPU.
    Source: the IcePop note of the Ling team, 2025, with these bounds.
    """
    return mis(role, old_logprob, rollout_logprob, low=low, high=high, level="token")


def sequence_mask(
    role: Tensor,
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    sequence_id: Tensor,
    *,
    low: float = 0.0,
    high: float = math.inf,
    advantage: Tensor | None = None,
) -> Tensor:
    """1 on the rollout tokens of sequences whose geometric-mean ratio lies in [low, high], else 0.

    Args:
        role, old_logprob, rollout_logprob, sequence_id: as in `tis`, whole sequences.
        low, high: the bounds, 0 ≤ low < high.
        advantage: [N]; given, only tokens with a negative advantage are masked, as in DeepSeek-V3.2's off-policy sequence mask.

    Returns: 0 or 1, [N] in the dtype of old_logprob; 1 on tokens that are no rollout.
    Raises: as `mis`.
    Memory: O(N). Determinism: bitwise repeatable, without a host sync on a GPU.
    Source: arXiv 2512.02556 for the one-sided form.
    """
    checks.in_range("sequence_mask", "low", low, 0.0, math.inf)
    checks.in_range("sequence_mask", "high", high, low, math.inf, open_low=True)
    ratio = _log_ratio("sequence_mask", role, old_logprob, rollout_logprob, "geometric", sequence_id).exp()
    kept = (ratio >= low) & (ratio <= high) | (role != Role.ROLLOUT)
    if advantage is not None:
        checks.vector("sequence_mask", "advantage", advantage, len(role), role.device, (torch.float32, torch.float64))
        kept = kept | (advantage >= 0)
    return kept.to(old_logprob.dtype)


def duplicate_share(prefix_id: Tensor, sequence_id: Tensor) -> Tensor:
    """1/k for the tokens of each of k sequences that share one prefix; pass it to `aggregate(share=...)`.

    Args:
        prefix_id: [N] int64, equal for tokens of the same prefix in whatever sequence, negative on all other tokens (share 1).
        sequence_id: [N] int64. A prefix counts once per sequence, however many tokens it has there.

    Returns: the share [N] fp32, in (0, 1].
    Raises: TypeError or ValueError for a tensor of another shape or dtype.
    Memory: O(N). Determinism: bitwise repeatable, without a host sync on a GPU.
    Source: the definition; k copies of an expert prefix then weigh as much as one.
    """
    checks.is_a("duplicate_share", "prefix_id", prefix_id, Tensor, "the prefix of every token, -1 for none")
    for name, value in (("prefix_id", prefix_id), ("sequence_id", sequence_id)):
        checks.vector("duplicate_share", name, value, prefix_id.numel(), prefix_id.device, (torch.int64,))
    inside = prefix_id >= 0
    # The first token of a (prefix, sequence) pair stands for the pair: sort by sequence, then stably by prefix.
    order = sequence_id.argsort(stable=True)
    order = order[prefix_id[order].argsort(stable=True)]
    first = starts(prefix_id[order]) | starts(sequence_id[order])
    stands = torch.empty_like(inside).scatter_(0, order, first)
    copies = Sequences(prefix_id, inside).sum(stands.double())
    return torch.where(inside, 1.0 / copies.clamp(min=1), 1.0).float()


def drop_overlong(role: Tensor, sequence_id: Tensor, finished: Tensor) -> Tensor:
    """The roles with the rollout tokens of unfinished sequences IGNORED: DAPO's overlong filtering.

    Call it before `aggregate`, so that the dropped tokens are in no denominator; their sequence still counts as one.

    Args:
        role: [N] uint8 `Role`. sequence_id: [N] int64, whole sequences.
        finished: [N] bool, true on a token that ends its sequence, such as `target == eos`; a sequence without one was cut off.

    Returns: the roles [N] uint8.
    Raises: TypeError or ValueError for a tensor of another shape or dtype.
    Memory: O(N). Determinism: bitwise repeatable, without a host sync on a GPU.
    Source: arXiv 2503.14476, section 3.4.
    """
    checks.roles("drop_overlong", role)
    checks.label("drop_overlong", "sequence_id", sequence_id, role)
    checks.vector("drop_overlong", "finished", finished, len(role), role.device, (torch.bool,))
    ends = Sequences(sequence_id, finished).sum(torch.ones_like(role, dtype=torch.float64))
    return torch.where((role == Role.ROLLOUT) & (ends == 0), Role.IGNORED, role).to(torch.uint8)


def _log_ratio(
    where: str, role: Tensor, old_logprob: Tensor, rollout_logprob: Tensor, level: Level, sequence_id: Tensor | None
) -> Tensor:
    """log ρ [N] at the given level, 0 on tokens that are no rollout."""
    checks.one_of(where, "level", level, LEVELS)
    checks.roles(where, role)
    mine = role == Role.ROLLOUT
    for name, value in (("old_logprob", old_logprob), ("rollout_logprob", rollout_logprob)):
        checks.vector(where, name, value, len(role), role.device, (torch.float32, torch.float64))
        remedy = (
            "A sampler reports one for every token it chose; give a token without one the role IGNORED, or factor 1 with "
            "torch.where(rollout_logprob.isfinite(), rollout_logprob, old_logprob)."
        )
        checks.finite_tensor(where, name, torch.where(mine, value, 0.0), remedy)
    log_ratio = torch.where(mine, old_logprob - rollout_logprob, 0.0)
    if level == "token":
        return log_ratio.to(old_logprob.dtype)
    if sequence_id is None:
        raise ValueError(f'{where}: level "{level}" needs sequence_id [N] int64, got None. Pass the sequence of every token.')
    checks.label(where, "sequence_id", sequence_id, role)
    sequences = Sequences(sequence_id, mine)
    pooled = sequences.sum(log_ratio) if level == "sequence" else sequences.mean(log_ratio)
    return torch.where(mine, pooled, 0.0).to(old_logprob.dtype)
