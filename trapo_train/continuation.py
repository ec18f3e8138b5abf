"""What a run and its continuation must have in common, and what may change in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trapo_train.checkpoint import compare_fingerprints
from trapo_train.config import RunConfig, to_yaml
from trapo_train.step import build_objective

# Sections that change nothing of what is trained.
_FREE_SECTIONS = ("output_dir", "checkpoint", "evaluation", "eval_data", "parallel", "tracking")
# What a run that diverged, ran out of memory or lost its server must be able to change; its continuation says so.
_CHANGEABLE = (
    "optimizer.learning_rate",
    "optimizer.max_grad_norm",
    "optimizer.max_skipped_steps",
    "packing.max_tokens",
    "model.gradient_checkpointing",
    "rollout.max_batch_tokens",
    "rollout.vllm",
    "rollout.vllm_server",
)

MEANING = 1
"""Raised where the same settings come to train otherwise; a checkpoint without one is of 0, from before it was counted."""


def split_settings(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings that a continuation must share, those that it may change, by their dotted names)."""
    fixed = yaml.safe_load(to_yaml(config))
    for name in _FREE_SECTIONS:
        del fixed[name]
    if config.optimizer.schedule.startswith("constant"):
        del fixed["steps"]  # other schedules depend on it
    changeable = {}
    for name in _CHANGEABLE:
        section, key = name.split(".")
        changeable[name] = fixed[section].pop(key)
    return fixed, changeable


def what_changed(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """A sentence on the settings that a continuation has changed, or None."""
    differences = compare_fingerprints(saved, current)
    return f"{'; '.join(differences)}: from here on not bitwise the run that it continues" if differences else None


def what_means_otherwise(saved: int, config: RunConfig) -> str | None:
    """A sentence on what this version makes of the settings of a run that version `saved` of their `MEANING` began, or None."""
    found = list(_since_1(config)) if saved < 1 else []
    return f"begun by an earlier version: {'; '.join(found)}" if found else None


def _since_1(config: RunConfig) -> Iterator[str]:
    plan, layers = config.plan, build_objective(config.objective).layers
    if isinstance(config.reward, list) and config.rollout.correct_by is not None and plan.has_thresholds:
        judge = f"rollout.correct_by={config.rollout.correct_by}"
        yield f"plan {plan.name} decided by the weighted sum of the rewards and decides by {judge} now"
    untrained = (plan.guides and not any(layer.expert for layer in layers)) or (
        plan.largest_request > 0 and not any(layer.rollout for layer in layers)
    )
    of_sequences = config.packing.aggregation in ("constant", "sequence_mean", "sequence_sum", "prompt_mean")
    if of_sequences and (untrained or config.objective.chooser is not None):
        yield (
            f"packing.aggregation={config.packing.aggregation} counted sequences and prompts without a trained token and leaves "
            "them out of its denominators now"
        )
    if config.updates.correction is not None and any(layer.kl is not None for layer in layers):
        yield f"updates.correction={config.updates.correction.name} scaled the KL term and leaves it alone now"


def set_learning_rate(optimizer: Optimizer, scheduler: LambdaLR, peak: float) -> None:
    """Give a loaded optimizer and its schedule another peak learning rate; where they are in the schedule stays."""
    for group, share in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = peak
        group["lr"] = peak * share(scheduler.last_epoch)
    scheduler.base_lrs = [peak] * len(optimizer.param_groups)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
