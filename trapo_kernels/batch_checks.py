"""The input rules of a `TokenBatch`, by itself and beside hidden states and an objective, and of the counts in its weights."""

from __future__ import annotations

import numbers
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trapo_kernels import checks
from trapo_kernels.roles import IGNORE_INDEX, Role

if TYPE_CHECKING:
    from trapo_kernels.batch import TokenBatch
    from trapo_kernels.objective import Objective
    from trapo_kernels.weights import LossTotals

_MOST_LOGPROB = 1e-3  # what a sampler's rounding may leave above 0
_NO_ADVANTAGE = "Check the rewards: a standard deviation of one sample or of equal ones is a usual cause."


def token_batch(batch: TokenBatch) -> None:
    """Shapes, dtypes, devices and roles of a TokenBatch."""
    where = "TokenBatch"
    if not isinstance(batch.target, Tensor) or batch.target.ndim != 1:
        shape = list(batch.target.shape) if isinstance(batch.target, Tensor) else type(batch.target).__name__
        remedy = "Flatten it with target.reshape(-1), or call TokenBatch.from_padded for [batch, sequence] tensors."
        raise ValueError(f"{where}: target must be a tensor of shape [N], got {shape}. {remedy}")
    length, device = batch.target.shape[0], batch.target.device
    floats = (torch.float32, torch.float64)
    checks.vector(where, "target", batch.target, length, device, (torch.int64,))
    checks.vector(where, "role", batch.role, length, device, (torch.uint8,))
    checks.role_values(where, batch.role)
    for name in ("advantage", "weight", "old_logprob", "ref_logprob", "rollout_logprob", "entropy_weight", "kl_weight"):
        value = getattr(batch, name)
        if value is not None or name == "weight":
            checks.vector(where, name, value, length, device, floats)
            if value.requires_grad:
                raise ValueError(f"{where}: {name} is a constant of the loss, got a tensor that requires grad. Detach it.")
    if batch.sequence_id is not None:
        checks.vector(where, "sequence_id", batch.sequence_id, length, device, (torch.int64,))
    if checks.may_look(batch.role):
        remedy = "Only rows with role IGNORED may hold anything."
        real = batch.role != Role.IGNORED
        checks.finite_tensor(where, "weight", torch.where(real, batch.weight, 0.0), remedy)
        if batch.entropy_weight is not None:
            checks.finite_tensor(where, "entropy_weight", torch.where(real, batch.entropy_weight, 0.0), remedy)
        if batch.kl_weight is not None:
            read = torch.where(batch.role == Role.ROLLOUT, batch.kl_weight, 0.0)
            checks.finite_tensor(where, "kl_weight", read, "Only rows with another role than ROLLOUT may hold anything.")


def padded(
    where: str,
    target: object,
    mask: object,
    role: object,
    of_tokens: dict[str, object],
    of_either: dict[str, object],
    of_sequences: dict[str, object],
) -> None:
    """Tensors of B padded sequences: [B, T] `of_tokens`, [B] `of_sequences`, either; all but target and mask may be None. Dtypes of
    what goes into the batch as it is are left to `token_batch` and `aggregate`."""
    if not isinstance(target, Tensor) or target.ndim != 2:
        raise ValueError(
            f"{where}: target must be a tensor of shape [B, T], got {checks.described(target)}. Pass the token after each hidden "
            "state, such as input_ids[:, 1:]; for tokens in one row call TokenBatch(...)."
        )
    if isinstance(role, Tensor):
        of_tokens = of_tokens | {"role": role}
        if role.dtype != torch.uint8:
            raise TypeError(f"{where}: role must be torch.uint8, got {role.dtype}. Convert it with role.to(torch.uint8).")
    else:
        checks.one_of(where, "role", role, (Role.ROLLOUT, Role.EXPERT))
    tokens, sequences = tuple(target.shape), tuple(target.shape[:1])
    for streams, shapes in (({"mask": mask} | of_tokens, [tokens]), (of_either, [sequences, tokens]), (of_sequences, [sequences])):
        for name, value in streams.items():
            if value is None and name != "mask":
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) not in shapes or value.device != target.device:
                remedy = "Cut it to the tokens that are scored, and move it with .to(target.device)."
                shape, device = (tuple(value.shape), value.device) if isinstance(value, Tensor) else (None, target.device)
                moved = "" if device == target.device else ".to(target.device)"
                if value is None:
                    remedy = "Pass the loss mask, 1 where a token counts."
                elif not isinstance(value, Tensor):
                    remedy = f"Make it a tensor, torch.as_tensor({name}, device=target.device)."
                if sequences in shapes and shape == (*sequences, 1):
                    remedy = f"Drop its last axis with {name}.squeeze(1){moved}."
                if tokens in shapes and shape == (target.numel(),):
                    remedy = f"Restore its axes with {name}.reshape(target.shape){moved}."
                rule = " or ".join(f"{'[B, T]' if len(shape) == 2 else '[B]'} = {list(shape)}" for shape in shapes)
                raise ValueError(
                    f"{where}: {name} must be a tensor of shape {rule} on {target.device}, as target is, got "
                    f"{checks.described(value)}. {remedy}"
                )
    if checks.may_look(mask) and bool((odd := (mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{where}: mask must hold 0 and 1, got {mask[odd][0].item()}. Pass mask != 0; a factor of the weight is share=."
        )


def row_index(batch: TokenBatch, index: object) -> None:
    """A slice, or int64 [M] on the device of the batch, which must be the CPU where it has scored rows."""
    where, device = "TokenBatch.rows", batch.target.device
    if not isinstance(index, slice) and not (
        isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64 and index.device == device
    ):
        raise TypeError(
            f"{where}: index must be a slice or int64 of shape [M] on {device}, got {checks.described(index)}. Pass "
            "slice(i, i + 1) for one row, mask.nonzero().squeeze(1) for those of a mask."
        )
    if isinstance(index, slice) and index.step is not None and index.step < 1:
        raise ValueError(
            f"{where}: a slice must have a step of at least 1, got {index.step}. Pass the rows as indices, such as "
            "torch.arange(len(batch)).flip(0)."
        )
    if batch.scored_rows is not None and device.type != "cpu":
        raise ValueError(
            f"{where}: a batch with scored_rows must be on the CPU, where those of a part are found without a wait, got {device}. "
            "Split it before batch.to(...)."
        )


def loss_totals(totals: LossTotals) -> None:
    """Every count is a whole number ≥ 0 of any kind, or a tensor of one, which is looked at on a CPU only."""
    for name in ("expert_tokens", "rollout_tokens", "sequences", "prompts"):  # as Dynamo of torch 2.11 can read them
        value = getattr(totals, name)
        one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
        if one and not checks.may_look(value):
            continue
        number = value.item() if one else value
        whole = isinstance(number, int) or (isinstance(number, numbers.Real) and float(number).is_integer())
        if not (whole and number >= 0):  # torch.compile would compile anew for every int that is made a float
            raise ValueError(
                f"LossTotals: {name} must be a whole number ≥ 0, got {value!r}. Pass the count over all micro-batches and ranks, "
                f"or totals=None to aggregate where there is none. {checks.NO_COUNT}"
            )


def row_hints(batch: TokenBatch, active: Tensor | None, silent: Tensor | None) -> None:
    """int64 [M] and [K], exactly the rows that are so called, None for neither; which ones is looked at on the CPU only."""
    where, device = "TokenBatch.with_active_rows", batch.target.device
    rule = "those whose role is not IGNORED and whose weight, entropy weight or KL weight is not 0"
    silent_rule = "those with another role than IGNORED, no weight and no place in scored_rows"
    for name, rows, what in (("rows", active, rule), ("silent_rows", silent, silent_rule)):
        if rows is None:
            continue
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype != torch.int64 or rows.device != device:
            raise ValueError(
                f"{where}: {name} must be int64 of shape [M] on {device}, got {checks.described(rows)}. Pass batch.active_rows and "
                "batch.silent_rows of a batch with the same role and weights, or None."
            )
        found = batch.active_rows if name == "rows" else batch.silent_rows
        if checks.may_look(batch.role) and not torch.equal(rows, found):
            raise ValueError(
                f"{where}: {name} must be {what}, {found[:8].tolist()}{'…' if len(found) > 8 else ''} ({len(found)} rows), got "
                f"{rows[:8].tolist()}{'…' if len(rows) > 8 else ''} ({len(rows)} rows). Leave them out to have them found."
            )


def scored_rows(batch: TokenBatch) -> None:
    """scored_rows: int64 [K], none of them active, each with a target."""
    rows = batch.scored_rows
    where = "TokenBatch: scored_rows"
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype != torch.int64 or rows.device != batch.target.device:
        raise ValueError(
            f"{where} must be int64 of shape [K] on {batch.target.device}, got {checks.described(rows)}. Pass indices of rows."
        )
    if not checks.may_look(rows) or len(rows) == 0:
        return
    if int(rows.min()) < 0 or int(rows.max()) >= len(batch):
        raise ValueError(
            f"{where} must lie in [0, N) = [0, {len(batch)}), got {int(rows.min())} to {int(rows.max())}. "
            "Count rows from the start of this batch."
        )
    wrong = rows[batch.active[rows] | (batch.target[rows] < 0)]
    if len(wrong):
        raise ValueError(
            f"{where} must have a target and no part in the loss (weight, entropy weight and KL weight 0), got row "
            f"{int(wrong[0])}. Leave out active rows, which are scored anyway."
        )


def batch_fits(where: str, batch: TokenBatch, num_rows: int, vocab_size: int | None, device: torch.device) -> None:
    """The batch must describe the rows at hand; targets of ignored rows are not looked at."""
    if len(batch) != num_rows:
        raise ValueError(
            f"{where}: the batch must have one token per row, N = {num_rows}, got {len(batch)}. "
            "Pass the hidden states of exactly the positions that the batch scores."
        )
    if batch.target.device != device:
        raise ValueError(
            f"{where}: the batch must be on {device}, got {batch.target.device}. Move it with batch.to({str(device)!r})."
        )
    if checks.may_look(batch.role):
        real = batch.role != Role.IGNORED
        checks.target(where, torch.where(real, batch.target, batch.target_to_score(pools=False)), num_rows, vocab_size, device)
        missing = real & (batch.target == IGNORE_INDEX)
        if missing.any():
            raise ValueError(
                f"{where}: a token with a role must have a target in the vocabulary, got -100 at row {int(missing.nonzero()[0])}. "
                "Set role to Role.IGNORED there, before weights are computed, so that it does not count in their normaliser."
            )


def streams_fit(where: str, batch: TokenBatch, objective: Objective) -> None:
    """Every stream that the objective reads must be there; only old_logprob may be absent (strictly on-policy). On the CPU each
    must be finite where it is read, and logprobs none above 0."""
    for name in sorted(objective.reads(batch.on_policy) - {"old_logprob"}):
        if getattr(batch, name) is None:
            reason = {"sequence_id": "reduction", "advantage": "signal"}.get(name, "KL term, anchor or reduction")
            raise ValueError(
                f"{where}: objective {objective.name!r} reads batch.{name}, got None. Pass TokenBatch(..., {name}=...), or use an "
                f"objective without the {reason} that needs it."
            )
    if "sequence_id" in objective.reads(batch.on_policy) and (cut := batch.cut_sequence()) is not None:
        raise ValueError(
            f"{where}: objective {objective.name!r} pools over sequences, which must be whole in a batch, got some tokens of "
            f"sequence {cut}, of which TokenBatch.rows has left others behind. Split a batch between its sequences."
        )
    if not checks.may_look(batch.role):  # on a GPU not even the masks are made
        return
    active = batch.active
    weighted, in_kl = active & (batch.weight != 0), active & (batch.weight_of_kl != 0)
    contributing = batch.role[weighted | in_kl]
    _warn_of_an_idle_loss(where, contributing, objective)
    _warn_of_an_idle_kl(where, contributing, objective)
    for layer in objective.layers:
        for code, term in ((Role.ROLLOUT, layer.rollout), (Role.EXPERT, layer.expert)):
            names = set() if term is None else term.reads(batch.on_policy) - {"sequence_id"}
            of_kl = layer.kl.reads if layer.kl is not None and code == Role.ROLLOUT else frozenset()
            of_role = batch.role == code
            pooled = term is not None and term.reduces(batch.on_policy)  # over silent tokens, too
            of_term = of_role if pooled else of_role & weighted
            for name in sorted((names | of_kl) - ({"old_logprob"} if batch.on_policy else set())):
                remedy = "Give a token without one the role IGNORED."
                if name == "advantage":
                    remedy = f"{_NO_ADVANTAGE} {remedy}" if pooled else _NO_ADVANTAGE
                read = (of_term & (name in names)) | (of_role & in_kl & (name in of_kl))
                values = torch.where(read, getattr(batch, name), 0.0)
                checks.finite_tensor(where, f"batch.{name}", values, remedy)
                if name.endswith("logprob"):
                    _check_logprobs(where, name, values)


def _check_logprobs(where: str, name: str, values: Tensor) -> None:
    """At most 0, up to rounding: what is above is a negative log-likelihood, or a density."""
    above = values > _MOST_LOGPROB
    if above.any():
        row = int(above.nonzero()[0])
        raise ValueError(
            f"{where}: batch.{name} must hold logprobs, at most 0, got {values[row].item():.4g} at row {row}. Pass log p of each "
            "token, not -log p."
        )


def _warn_of_an_idle_loss(where: str, role: Tensor, objective: Objective) -> None:
    """Say that nothing will train, as with ROLLOUT on every token of an SFT; a part of a batch may be so rightly."""
    named = {
        "ROLLOUT": (Role.ROLLOUT, [layer.rollout or layer.kl for layer in objective.layers]),
        "EXPERT": (Role.EXPERT, objective.expert_terms),
    }
    trained = {name: code for name, (code, parts) in named.items() if any(parts)}
    idle = len(role) > 0 and not any(bool((role == code).any()) for code in trained.values())
    if idle and not objective.has_entropy_bonus:
        warnings.warn(
            f"{where}: objective {objective.name!r} trains tokens of role {' and '.join(trained)}, of which this batch has none: "
            "its loss and its gradients are 0. Set TokenBatch.role, or use another objective.",
            stacklevel=4,
        )


def _warn_of_an_idle_kl(where: str, role: Tensor, objective: Objective) -> None:
    """Say that a KL holds nothing, as on the expert tokens of an SFT; a part of a batch may be so rightly."""
    trained, reason = any(layer.kl and layer.kl.beta > 0 for layer in objective.layers), objective.why_a_kl_is_idle
    if trained and reason and bool((role == Role.EXPERT).any()) and not bool((role == Role.ROLLOUT).any()):
        warnings.warn(
            f"{where}: {reason}, which is all that this batch has: the loss is the same without the KL. Leave it out, or set "
            "Role.ROLLOUT on the tokens that the policy sampled.",
            stacklevel=4,
        )
