"""What a run and its continuation must have in common, and what may change in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trapo_train.checkpoints.checkpoint import compare_fingerprints
from trapo_train.config import RunConfig, to_yaml
from trapo_train.data.dataset import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def split_settings(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings that a continuation must share, those that it may change, by their dotted names)."""
    fixed = yaml.safe_load(to_yaml(config))
    for name in _FREE_SECTIONS:
        del fixed[name]
    if config.optimizer.schedule.startswith("constant") and not config.optimizer.warmup_ratio:
        del fixed["steps"]  # other schedules, and a share of the steps, depend on it
    changeable = {}
    for name in _CHANGEABLE:
        section, key = name.split(".")
        changeable[name] = fixed[section].pop(key)
    return fixed, changeable


def what_changed(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """A sentence on the settings that a continuation has changed, or None."""
    differences = compare_fingerprints(saved, current)
    return f"{'; '.join(differences)}: from here on not bitwise the run that it continues" if differences else None


def about_dates(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Why the prompts may be others on another day, and what to do: empty where the chat template asks for no date."""
    template = str(tokenizer.chat_template or "")
    if "strftime_now" not in template or "date_string" in config.chat_template_kwargs:
        return ""
    remedy = (
        "set data.chat_template_kwargs={date_string: <a day>}" if "date_string" in template else "set model.tokenizer to another"
    )
    return (
        "If the data is the same, its prompts have another date: the chat template writes that of the day (strftime_now), so that "
        f"this run can be resumed on the day alone on which it started. For a new run, {remedy}."
    )


def set_learning_rate(optimizer: Optimizer, scheduler: LambdaLR, peak: float) -> None:
    """Give a loaded optimizer and its schedule another peak learning rate; where they are in the schedule stays."""
    for group, share in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = peak
        group["lr"] = peak * share(scheduler.last_epoch)
    scheduler.base_lrs = [peak] * len(optimizer.param_groups)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
