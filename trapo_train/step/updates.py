"""Several optimizer steps on the samples of one rollout step: mini-batches, epochs, old logprobs and static corrections."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from trapo_kernels import Objective, Role, TokenBatch, corrections
from trapo_train.metrics import Mean, merge_metrics
from trapo_train.micro_batch import MicroBatch
from trapo_train.models.lora import without_lora
from trapo_train.models.model import score_all
from trapo_train.models.placement import reshard
from trapo_train.records import Sample
from trapo_train.schema import UserError, check, refused

_STREAMS = ("role", "old_logprob", "rollout_logprob", "sequence_id", "advantage")  # what the trainer gives to a correction


@dataclass(frozen=True)
class CorrectionConfig:
    """A factor on the policy loss of rollout tokens for the difference between the sampler's logprobs and the trainer's; a KL term
    and the entropy bonus are left as they are."""

    name: Literal["tis", "mis", "icepop", "sequence_mask"] = "tis"
    """Function of trapo_kernels.corrections."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its arguments, such as {cap: 2.0} of tis or {low: 0.5, high: 2.0, level: sequence} of mis. sequence_mask with {low: 0.5,
    negative_only: true} masks tokens of negative advantage alone, as DeepSeek-V3.2 does; false, the default, masks either."""

    def __post_init__(self) -> None:
        check(self)
        parameters = inspect.signature(getattr(corrections, self.name)).parameters
        allowed = [name for name in parameters if name not in _STREAMS] + ["negative_only"] * ("advantage" in parameters)
        for option in self.options:
            if option not in allowed:
                raise UserError(f"options of {self.name} are {', '.join(allowed)}, got {option!r}.")
        if not isinstance(self.options.get("negative_only", False), bool):
            raise UserError(f"negative_only of {self.name} must be true or false, got {self.options['negative_only']!r}.")
        none, label = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        batch = TokenBatch(label, label.to(torch.uint8), none, none, rollout_logprob=none, sequence_id=label)
        with refused(f"{self.name} refuses its options", TypeError, ValueError):
            self.factor(batch, none)

    def factor(self, batch: TokenBatch, old_logprob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor of every token, [N], and whether a cap made it less than the ratio, [N] bool."""
        function = getattr(corrections, self.name)
        parameters = inspect.signature(function).parameters
        streams = {"role": batch.role, "old_logprob": old_logprob}
        streams |= {"rollout_logprob": batch.rollout_logprob, "sequence_id": batch.sequence_id}
        options = dict(self.options)
        streams |= {"advantage": batch.advantage} if options.pop("negative_only", False) else {}
        taken = {name: stream for name, stream in streams.items() if name in parameters} | options
        factor = function(**taken)
        whole = function(**taken | {"cap": math.inf}) if "cap" in parameters else factor
        return factor, factor < whole


@dataclass(frozen=True)
class UpdateConfig:
    """How many optimizer steps the samples of one rollout step are used for."""

    mini_batches: int = 1
    """Parts that the problems of a step are split into, at least 1; one optimizer step each, with its own normalisers."""
    epochs: int = 1
    """Passes over all mini-batches, at least 1."""
    correction: CorrectionConfig | None = None
    """Correction for the sampler's logprobs; null for none. What it does is reported as correction/mean, the factor's mean over the
    rollout tokens in the loss, and the shares of them that it masks and caps, correction/masked_share and /capped_share."""

    def __post_init__(self) -> None:
        check(self, *((name, getattr(self, name) >= 1, "at least 1") for name in ("mini_batches", "epochs")))

    @property
    def per_step(self) -> int:
        """Optimizer steps per rollout step."""
        return self.mini_batches * self.epochs


def split_groups(groups: Sequence[list[Sample]], parts: int) -> list[list[Sample]]:
    """The samples of each mini-batch; all samples of a problem stay together."""
    return [[sample for group in groups[part::parts] for sample in group] for part in range(parts)]


def with_old_policy(
    model: PreTrainedModel, micro_batches: Sequence[MicroBatch], objective: Objective, config: UpdateConfig, temperature: float
) -> list[MicroBatch]:
    """The micro-batches with what must be known of the policy before the first update.

    `old_logprob` where there are several updates (with one the policy is its own old one), for ratios and to measure the sampler;
    the correction's factor in the weights of the policy loss, not in those of its KL term and entropy bonus. Both come from the
    trainer's own forward pass, with the packing of the updates that follow; where nothing reads them there is none.
    """
    rollouts = bool(objective.rollout_terms)
    read = rollouts or "old_logprob" in objective.reads()
    if not (config.per_step > 1 and read) and not (config.correction is not None and rollouts):
        return list(micro_batches)
    model.train()
    scored = score_all(model, micro_batches, temperature)
    reshard(model)  # or the first update would see the weights of before
    return [_with_old(micro_batch, logprob, objective, config) for micro_batch, logprob in zip(micro_batches, scored, strict=True)]


def _with_old(micro_batch: MicroBatch, logprob: torch.Tensor, objective: Objective, config: UpdateConfig) -> MicroBatch:
    batch = micro_batch.batch
    # What is not finite comes out of the update's own pass as well, whose step all ranks then skip; here it must stop none of them.
    sampled_with = 0.0 if batch.rollout_logprob is None else batch.rollout_logprob.nan_to_num()
    old = torch.where(logprob.isfinite(), logprob, sampled_with)
    changes: dict[str, Any] = {"old_logprob": old} if config.per_step > 1 else {}
    if config.correction is None:
        return replace(micro_batch, batch=replace(batch, **changes))
    factor, capped = config.correction.factor(batch, old)
    changes["weight"] = batch.weight * factor
    if objective.has_kl:
        changes["kl_weight"] = batch.weight
    counted = (batch.role == Role.ROLLOUT) & (batch.weight != 0)  # before a mask takes some out
    found = {"log_ratio": logprob.float() - batch.rollout_logprob, "factor": factor, "capped": capped.float(), "counted": counted}
    return replace(micro_batch, batch=replace(batch, **changes), correction=found)


def with_reference(
    reference: PreTrainedModel | None, micro_batches: list[MicroBatch], objective: Objective, temperature: float
) -> list[MicroBatch]:
    """The micro-batches with logprobs of the model as it was before training, where the objective reads them; with LoRA
    `reference` is the model itself, whose adapters are left out."""
    if "ref_logprob" not in objective.reads():
        return micro_batches
    with without_lora(reference):
        scored = score_all(reference, micro_batches, temperature)
    reshard(reference)
    pairs = zip(micro_batches, scored, strict=True)
    return [replace(micro_batch, batch=replace(micro_batch.batch, ref_logprob=logprob)) for micro_batch, logprob in pairs]


def merge_updates(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of a step's updates as one: sums of counts, largest maxima, the last learning rate, means of the rest: of
    all tokens where they are means over tokens.

    Updates that were skipped, whose metrics may be NaN, only count, unless all were; so do those without a token, but for what they
    tell of a correction.
    """
    merged = updates[0] if len(updates) == 1 else _merged(updates)
    return {name: float(value) if isinstance(value, Mean) else value for name, value in merged.items()}


def _merged(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    finite = [update for update in updates if not update["skipped_step"]] or updates
    taken = [update for update in finite if update["loss_tokens"]] or finite
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for update in finite for name in update):
        values = [update[name] for update in (taken if name in ("loss", "grad_norm") else finite) if name in update]
        if name in ("loss_tokens", "micro_batches", "skipped_step"):
            merged[name] = sum(update[name] for update in updates)
        elif name.endswith("_max") or name == "loss_passes":
            merged[name] = max(values)
        elif name == "learning_rate":
            merged[name] = updates[-1][name]
        elif isinstance(values[0], list):
            merged[name] = [sum(bin_) for bin_ in zip(*values, strict=True)]
        elif all(isinstance(value, Mean) for value in values):
            merged |= merge_metrics({name: value} for value in values)
        else:
            merged[name] = sum(values) / len(values)
    return merged
