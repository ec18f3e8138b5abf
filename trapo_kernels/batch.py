"""TokenBatch, the per-token inputs of a policy loss, and the packer's arithmetic that folds every normaliser into `weight`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trapo_kernels import batch_checks, checks
from trapo_kernels.objective import Objective
from trapo_kernels.roles import IGNORE_INDEX, Role

_NO_TOKEN = -2  # in no vocabulary; -1 is a token of another rank's shard


class _Rows(NamedTuple):
    """Indices of rows, None where they are not known; see `TokenBatch`."""

    active: Tensor | None
    silent: Tensor | None


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Per-token inputs of a policy loss; every tensor is [N] and lies on the device of the hidden states.

    Args:
        target: int64, the token whose logprob is wanted, in [0, V).
        role: uint8, one of `Role`.
        advantage: fp32, the signal of rollout tokens; expert tokens use 1 unless the objective says otherwise. None where no term
            of the objective reads it, as in SFT.
        weight: fp32, every normaliser, mask, mixing coefficient and static correction; the loss is Σ weight · token loss. A token
            of weight 0 still belongs to its sequence in what an objective pools over it, such as GSPO's ratio or a quantile of
            entropies; one that should not has the role IGNORED.
        old_logprob: fp32 nats under the policy that sampled, the ratio's denominator. None: the batch is strictly on-policy,
            so the ratio is 1 in value and carries the gradient of logprob.
        ref_logprob: fp32 nats under the frozen reference of the KL term; needed only when the objective has one.
        entropy_weight: fp32, weight of the entropy bonus; None means `weight`.
        rollout_logprob: fp32 nats as the sampler reported them; needed only by terms anchored at "rollout".
        scored_rows: int64 [K], rows that cannot contribute but whose logprob and entropy are wanted: they take part in the forward
            GEMM alone and count in no metric. None: none; such rows then read 0, unless an objective pools over their sequence.
        sequence_id: int64, any label per sequence, for objectives that pool over sequences; a sequence is never split over batches.
        kl_weight: fp32, weight of the KL term on rollout tokens, read nowhere else; None means `weight`.

    `active_rows`, int64 [M], are the rows that can contribute, ascending, and `silent_rows` [K] those with a role that cannot, for
    which an objective that pools over sequences takes the forward GEMM alone. They are found when the tensors are on the CPU (no
    sync), and move to a GPU with the batch. None: not known, as after `dataclasses.replace` or an in-place write on a GPU, which
    may have changed a weight; every row then goes through the GEMMs with the inactive ones zeroed. See `with_active_rows`.
    Compiled code takes them as they were when last read: after an in-place write read them once, or build the batch anew.

    Raises: ValueError or TypeError with rule, actual value and remedy.
    """

    target: Tensor
    role: Tensor
    advantage: Tensor | None
    weight: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    entropy_weight: Tensor | None = None
    rollout_logprob: Tensor | None = None
    sequence_id: Tensor | None = None
    scored_rows: Tensor | None = None
    kl_weight: Tensor | None = None

    def __post_init__(self):
        batch_checks.token_batch(self)
        if self.scored_rows is not None:
            batch_checks.scored_rows(self)
        self._note(self._found())

    @property
    def active_rows(self) -> Tensor | None:
        """[M] int64: the rows that can contribute, ascending, or None where they are not known (see the class)."""
        return self._rows().active

    @property
    def silent_rows(self) -> Tensor | None:
        """[K] int64: the rows with a role that cannot contribute and are not in `scored_rows`, ascending; None if not known."""
        return self._rows().silent

    def _rows(self) -> _Rows:
        rows, versions = self._noted
        if torch.compiler.is_compiling() or (versions is not None and versions == self._versions()):
            return rows
        self._note(self._found())
        return self._noted[0]

    def _found(self) -> _Rows:
        if not checks.may_look(self.role):
            return _Rows(None, None)
        active = self.active
        silent = (self.role != Role.IGNORED) & ~active
        if self.scored_rows is not None:
            silent = silent.index_fill(0, self.scored_rows, False)
        return _Rows(active.nonzero().squeeze(1), silent.nonzero().squeeze(1))

    def _note(self, rows: _Rows) -> None:
        # no field: FSDP and `dataclasses.replace` make a batch of its fields anew
        object.__setattr__(self, "_noted", (rows, self._versions()))

    def _versions(self) -> list[int] | None:
        """How often each tensor that decides about active rows was written to in place; None where nobody counts."""
        deciding = [x for x in (self.role, self.weight, self.entropy_weight, self.kl_weight) if x is not None]
        if torch.compiler.is_compiling() or any(x.is_inference() for x in deciding):
            return None
        return [x._version for x in deciding]

    def __getstate__(self) -> dict:  # copies begin to count anew
        return vars(self) | {"_noted": (self._rows(), None)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._note(state["_noted"][0])

    @property
    def active(self) -> Tensor:
        """[N] bool: the rows that can contribute to the loss, its KL term or the entropy bonus."""
        weighted = self.weight != 0
        if self.entropy_weight is not None:
            weighted = weighted | (self.entropy_weight != 0)
        if self.kl_weight is not None:
            weighted = weighted | ((self.kl_weight != 0) & (self.role == Role.ROLLOUT))
        return weighted & (self.role != Role.IGNORED)

    @property
    def weight_of_entropy(self) -> Tensor:
        """[N]: the weight of the entropy bonus."""
        return self.weight if self.entropy_weight is None else self.entropy_weight

    @property
    def weight_of_kl(self) -> Tensor:
        """[N]: the weight of the KL term, read on rollout tokens alone."""
        return self.weight if self.kl_weight is None else self.kl_weight

    @property
    def on_policy(self) -> bool:
        """Whether the current policy itself sampled: there is no old_logprob, and ratios to "old" are 1."""
        return self.old_logprob is None

    def target_to_score(self, pools: bool) -> Tensor:
        """[N] int64: the target of every row whose logprob is computed, -100 elsewhere; `pools`: whether the objective pools over
        sequences, to which silent rows belong.

        Such a row whose own target is -100 has one outside every vocabulary, and so a logprob of NaN; on a CPU it is refused.
        """
        wanted = self.role != Role.IGNORED if pools else self.active
        if self.scored_rows is not None:
            wanted = wanted.index_fill(0, self.scored_rows, True)
        return torch.where(wanted, torch.where(self.target == IGNORE_INDEX, _NO_TOKEN, self.target), IGNORE_INDEX)

    def __len__(self) -> int:
        return self.target.shape[0]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`; what a CPU knew of active and silent rows moves along, so that no sync follows on a GPU."""
        later = torch.device(device).type != "cpu"  # on a CPU the copy is read at once
        return self._each(lambda tensor: tensor.to(device, non_blocking=later))

    def pin_memory(self) -> TokenBatch:
        """The same batch in pinned host memory, from which `to` a GPU need not wait for it; a DataLoader calls this."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, place: Callable[[Tensor], Tensor]) -> TokenBatch:
        """The same batch, every tensor of which `place` has put elsewhere."""
        streams = {stream.name: getattr(self, stream.name) for stream in fields(self)}
        there = TokenBatch(**{name: None if tensor is None else place(tensor) for name, tensor in streams.items()})
        pairs = zip(self._rows(), there._rows(), strict=True)  # what was known, and what the CPU has found anew
        there._note(_Rows(*(found if known is None else place(known) for known, found in pairs)))
        return there

    def with_active_rows(self, rows: Tensor | None, silent_rows: Tensor | None = None) -> TokenBatch:
        """The same batch, told that `rows`, int64 [M] ascending, are exactly those that can contribute, and `silent_rows` [K] those
        that are so called; None tells nothing.

        For what a GPU would have to wait for, where neither role nor weights have changed:
        `replace(batch, ref_logprob=…).with_active_rows(batch.active_rows, batch.silent_rows)`. Checked on the CPU; on a GPU an
        active row that is missing is left out of loss and gradients, a silent one reads a logprob of 0.
        """
        batch_checks.row_hints(self, rows, silent_rows)
        told = replace(self)
        pairs = zip((rows, silent_rows), told._rows(), strict=True)
        told._note(_Rows(*(found if given is None else given for given, found in pairs)))
        return told


@dataclass(frozen=True)
class LossTotals:
    """Denominators of one optimizer step, summed over all micro-batches and ranks; sequences and prompts only where they were
    counted. A count that you have already is as good: `LossTotals(expert_tokens=num_items_in_batch)`."""

    expert_tokens: int = 0
    rollout_tokens: int = 0
    sequences: int = 0
    prompts: int = 0

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(
            self.expert_tokens + other.expert_tokens,
            self.rollout_tokens + other.rollout_tokens,
            self.sequences + other.sequences,
            self.prompts + other.prompts,
        )

    @property
    def tokens(self) -> int:
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

    Returns: `LossTotals`; add those of all micro-batches and ranks of an optimizer step.
    Raises: TypeError or ValueError for a tensor of another shape or dtype, and for a role that is none.
    Memory: O(N). Determinism: whole numbers, the same in any order. Source: the denominators of `aggregate`.
    """
    checks.roles("loss_totals", role)
    for name, label in (("sequence_id", sequence_id), ("prompt_id", prompt_id)):
        if label is not None:
            checks.label("loss_totals", name, label, role)
    real = role != Role.IGNORED
    return LossTotals(
        expert_tokens=int((role == Role.EXPERT).sum()),
        rollout_tokens=int((role == Role.ROLLOUT).sum()),
        **{
            name: 0 if label is None else int(label[real | (label >= 0)].unique().numel())
            for name, label in (("sequences", sequence_id), ("prompts", prompt_id))
        },
    )


# The counts of `LossTotals` that a mode divides by.
_DIVISORS = {
    "constant": ("sequences",),
    "length": (),
    "token_mean": ("tokens",),
    "role_mean": ("expert_tokens", "rollout_tokens"),
    "sequence_mean": ("sequences",),
    "sequence_sum": ("sequences",),
    "prompt_mean": ("prompts",),
}
AGGREGATIONS = tuple(_DIVISORS)


def aggregate(
    role: Tensor,
    sequence_id: Tensor | None = None,
    *,
    mode: str,
    max_tokens: int | None = None,
    totals: LossTotals | None = None,
    share: Tensor | None = None,
    prompt_id: Tensor | None = None,
) -> Tensor:
    """Fold the normaliser of the loss into a weight per token, so that no later sum ever divides by a count.

    Equivalent to, for mode "token_mean":

        weight = (role != Role.IGNORED).float() / (role != Role.IGNORED).sum()

    Args:
        role: [N] uint8 `Role`, host tensor.
        sequence_id: [N] int64, which sequence a token belongs to, negative for padding; a sequence is never split over calls.
            Needed by the modes that divide by sequences.
        mode: "constant": 1 / (sequences · max_tokens), the unbiased form of Dr.GRPO; "length": 1 / max_tokens, as TRAPO's release
            does; "token_mean": 1 / loss tokens, DAPO; "role_mean": 1 / loss tokens of the same role, CHORD; "sequence_mean": the
            mean over sequences of each sequence's token mean, GRPO; "sequence_sum": the mean over sequences of each sequence's
            token sum; "prompt_mean": the mean over prompts of the token mean over all sequences of a prompt.
        max_tokens: L of "constant" and "length", tokens, > 0.
        totals: denominators over all micro-batches and ranks of the optimizer step; None counts this call alone. DDP and FSDP
            average gradients over ranks: multiply the weight, or the loss before its backward, by their number.
        share: [N] fp32 factor, such as 1/k for k copies of one expert prefix; it multiplies the weight and is not counted.
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
    counted_here = loss_totals(role, sequence_id, prompt_id)
    totals = counted_here if totals is None else totals
    checks.totals(totals, counted_here, _DIVISORS[mode])
    counted = role != Role.IGNORED
    if mode == "token_mean":
        denominator = float(totals.tokens)
    elif mode == "role_mean":
        expert = (role == Role.EXPERT).double()
        denominator = expert * totals.expert_tokens + (1.0 - expert) * totals.rollout_tokens
    elif mode == "sequence_mean":
        denominator = _tokens_per_group(sequence_id, counted) * float(totals.sequences)
    elif mode == "prompt_mean":
        denominator = _tokens_per_group(prompt_id, counted) * float(totals.prompts)
    else:
        sequences = 1 if mode == "length" else totals.sequences
        denominator = float(sequences * (1 if mode == "sequence_sum" else longest))
    denominator = torch.as_tensor(denominator, dtype=torch.float64, device=role.device).expand(role.shape)
    weight = torch.where(counted, 1.0 / denominator.clamp(min=1.0), 0.0).float()
    return weight if share is None else torch.where(counted, weight * share, 0.0).float()


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


def _tokens_per_group(group_id: Tensor, counted: Tensor) -> Tensor:
    """[N] fp64: counted tokens in the group of each token."""
    _, compact_id = group_id.unique(return_inverse=True)
    tokens = torch.bincount(compact_id[counted], minlength=int(compact_id.max()) + 1 if len(compact_id) else 0)
    return tokens[compact_id].double()
