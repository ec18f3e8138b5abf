"""TokenBatch, the per-token inputs of a policy loss; `weights` has the arithmetic that folds every normaliser into one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from trapo_kernels import batch_checks, checks
from trapo_kernels.roles import IGNORE_INDEX, Role
from trapo_kernels.weights import AGGREGATIONS, Aggregation, LossTotals, aggregate

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
            GEMM alone, as silent rows do, and count in no metric; beside a KL times the ratio of a sequence every row takes all of
            the GEMMs. None: none; such rows then read 0, unless an objective pools over their sequence.
        sequence_id: int64, any label per sequence, for objectives that pool over sequences; a sequence is never split over batches.
        kl_weight: fp32, weight of the KL term on rollout tokens, read nowhere else; None means `weight`.

    `active_rows`, int64 [M], are the rows that can contribute, ascending, and `silent_rows` [K] those with a role that cannot, for
    which an objective that pools over sequences takes the forward GEMM alone, unless it has a KL times the ratio of a sequence
    ("k3_corrected" beside MeanRatio), whose gradient reaches them. They are found when the tensors are on the CPU (no sync), and
    move to a GPU with the batch. None: not known, as after `dataclasses.replace` or an in-place write on a GPU, which
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
    # What `rows` took this from: sequence_id [M] and which tokens have a role [M], on the CPU, and its index.
    _cut_from: ClassVar[tuple[Tensor, Tensor, slice | Tensor] | None] = None

    def __post_init__(self):
        batch_checks.token_batch(self)
        if self.scored_rows is not None:
            batch_checks.scored_rows(self)
        self._note(self._found())

    @classmethod
    def from_padded(
        cls,
        target: Tensor,
        mask: Tensor,
        *,
        aggregation: Aggregation,
        role: int | Tensor = Role.ROLLOUT,
        advantage: Tensor | None = None,
        old_logprob: Tensor | None = None,
        ref_logprob: Tensor | None = None,
        rollout_logprob: Tensor | None = None,
        max_tokens: int | None = None,
        totals: LossTotals | None = None,
        share: Tensor | None = None,
        correction: Tensor | None = None,
        prompt_id: Tensor | None = None,
    ) -> TokenBatch:
        """A batch of N = B·T tokens from padded tensors [B, T], a sequence per row; sequence b has tokens b·T to (b + 1)·T - 1.

        Equivalent to, for rollouts whose tensors are all [B, T]:

            role = torch.where(mask != 0, Role.ROLLOUT, Role.IGNORED).to(torch.uint8).flatten()
            sequence_id = torch.arange(len(target)).repeat_interleave(target.shape[1])
            weight = aggregate(role, sequence_id, mode=aggregation)
            streams = {"old_logprob": old_logprob.flatten(), "sequence_id": sequence_id}
            batch = TokenBatch(target.flatten(), role, advantage.flatten(), weight, **streams)

        Args:
            target: [B, T] int64, the token that follows each hidden state: of a model's `hidden` [B, T + 1, D] and `input_ids`
                [B, T + 1] pass `input_ids[:, 1:]`, and `hidden[:, :-1].flatten(0, 1)` to the loss. Where they begin with the
                prompts, T completion tokens at the end go with `hidden[:, -T - 1 : -1].flatten(0, 1)`.
            mask: [B, T] bool, or 0 and 1 of any dtype: the loss tokens. All else is IGNORED, and may hold anything in any tensor.
                A row without one still counts as a sequence.
            aggregation, max_tokens, totals: mode, max_tokens and totals of `aggregate`; a method's own is in `PUBLISHED`.
            role: Role.ROLLOUT or Role.EXPERT of all loss tokens, or [B, T] uint8.
            advantage: [B] fp32, or [B, T].
            old_logprob, ref_logprob, rollout_logprob: [B, T] fp32 nats, as in the class.
            share: [B] or [B, T] fp32 factor of the weight, and so of KL term and entropy bonus as well; it is not counted.
            correction: [B] or [B, T] fp32 factor of the policy loss alone, such as one of `corrections` as `.view(mask.shape)`: it
                is in `weight`, not in `kl_weight` and `entropy_weight`, for whose sake a token of factor 0 is not skipped: replace
                both by None where the objective reads neither.
            prompt_id: [B] int64, which prompt a sequence answers, for "prompt_mean".

        Returns: the batch, on the device of target, without a host sync. Built on the CPU and then moved, it lets the GPU skip
            padding.
        Raises: ValueError or TypeError with rule, actual value and remedy.
        """
        where = "TokenBatch.from_padded"
        checks.one_of(where, "aggregation", aggregation, AGGREGATIONS)
        of_tokens = {"old_logprob": old_logprob, "ref_logprob": ref_logprob, "rollout_logprob": rollout_logprob}
        of_either = {"advantage": advantage, "share": share, "correction": correction}
        batch_checks.padded(where, target, mask, role, of_tokens, of_either, {"prompt_id": prompt_id})
        flat = partial(_flat, shape=target.shape)
        role = flat(torch.where(mask != 0, role, Role.IGNORED).to(torch.uint8))
        sequence_id = flat(torch.arange(len(target), device=target.device))
        counted = {"max_tokens": max_tokens, "totals": totals, "share": flat(share), "prompt_id": flat(prompt_id)}
        weight = aggregate(role, sequence_id, mode=aggregation, **counted)
        weights = {"weight": weight} if correction is None else _corrected(where, role, weight, flat(correction))
        streams = {name: flat(x) for name, x in of_tokens.items()}
        return cls(flat(target), role, flat(advantage), **weights, sequence_id=sequence_id, **streams)

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
        if torch.compiler.is_compiling():
            return rows
        found = self._found()
        if checks.may_look(self.role):  # looked at every time: numpy's writes and those to `.data` count no version
            known = all(a is not None and torch.equal(a, b) for a, b in zip(rows, found, strict=True))  # perhaps in pinned memory
        else:
            known = versions is not None and versions == self._versions()
        if not known:
            self._note(found)
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

    def __getstate__(self) -> dict:  # copies begin to count anew, and take no whole batch along
        return vars(self) | {"_noted": (self._rows(), None), "_cut_from": None}

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

    def cut_sequence(self) -> int | None:
        """The label of a sequence of which `rows` on a CPU has left a token with a role behind; None where none is known, as in
        compiled code, which looks at no values."""
        if self._cut_from is None or torch.compiler.is_compiling():
            return None
        sequence_id, real, index = self._cut_from
        left = real.clone()
        left[index] = False
        here = sequence_id[index][real[index]]
        cut = here[torch.isin(here, sequence_id[left])]
        return int(cut[0]) if len(cut) else None

    def __len__(self) -> int:
        return self.target.shape[0]

    def rows(self, index: slice | Tensor) -> TokenBatch:
        """The tokens of some rows as a batch, such as a micro-batch; `index` is a slice, or int64 [M] on the device of the batch.

        Weights stay as they are, normalised over the whole optimizer step, so that losses, and gradients, of parts that cover the
        batch add up to its own. An objective that pools over sequences needs whole ones: it refuses a part that cuts one, where
        the batch was split on the CPU and the part not copied since (pickle, deepcopy, `replace`); compiled code, which looks at no
        values, does not. Split before `to`: what a batch on a GPU knows of active and silent rows does not reach its parts, and one
        with `scored_rows` is refused.
        """
        batch_checks.row_index(self, index)
        streams = {stream.name: getattr(self, stream.name) for stream in fields(self)}
        streams = {name: x if x is None else x[index] for name, x in streams.items() if name != "scored_rows"}
        if self.scored_rows is not None:
            scored = torch.zeros_like(self.role, dtype=torch.bool).index_fill(0, self.scored_rows, True)
            streams["scored_rows"] = scored[index].nonzero().squeeze(1)
        part = TokenBatch(**streams)
        if self.sequence_id is not None and checks.may_look(self.role):
            whole = (self.sequence_id, self.role != Role.IGNORED, slice(None)) if self._cut_from is None else self._cut_from
            sequence_id, real, rows = whole  # a part of a part is one of the whole
            places = torch.arange(len(real), device=real.device)[rows][index]
            object.__setattr__(part, "_cut_from", (sequence_id, real, places))
        return part

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TokenBatch:
        """The same batch on `device`; what a CPU knew of active and silent rows moves along, so that no sync follows on a GPU.

        `non_blocking`: the host may go on before a copy to a GPU is done; to a CPU it always waits, where the copy is read at once.
        """
        later = non_blocking and torch.device(device).type != "cpu"
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
        object.__setattr__(there, "_cut_from", self._cut_from)
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
        object.__setattr__(told, "_cut_from", self._cut_from)
        pairs = zip((rows, silent_rows), told._rows(), strict=True)
        told._note(_Rows(*(found if given is None else given for given, found in pairs)))
        return told


def _flat(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    """[B·T] of [B] or [B, T] = `shape`."""
    return None if x is None else (x if x.ndim == 2 else x[:, None]).expand(shape).reshape(-1)


def _corrected(where: str, role: Tensor, weight: Tensor, factor: Tensor) -> dict[str, Tensor]:
    """A batch's weights where `factor` [N] is of the policy loss alone."""
    checks.vector(where, "correction", factor, len(role), role.device, (torch.float32, torch.float64))
    corrected = torch.where(role != Role.IGNORED, weight * factor, 0.0).float()
    return {"weight": corrected, "kl_weight": weight, "entropy_weight": weight}
