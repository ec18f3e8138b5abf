"""Optimizer and learning-rate schedule, by their names in torch.optim and transformers, or an optimizer of the user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler

from trapo_train.schema import UserError, check
from trapo_train.user_code import resolve

_UNFIT_OPTIMIZERS = ("LBFGS", "SparseAdam")  # need a closure, need sparse gradients
_UNSHARDED_OPTIMIZERS = ("Adafactor", "Rprop")  # place results of another sharding into a DTensor
_UNSHARDED_PACKAGES = ("bitsandbytes",)  # hands a DTensor to its kernels as if it were a plain one
_LEAST_EPS = torch.finfo(torch.float32).tiny  # what is smaller may round to 0 there
_UNFIT_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # need a validation metric every step


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become new weights."""

    name: str = "AdamW"
    """Class of torch.optim, or the path of another that derives from its Optimizer, such as bitsandbytes.optim:AdamW8bit."""
    learning_rate: float = 1e-6
    """Peak learning rate, above 0."""
    betas: tuple[float, float] | None = None
    """Decay of the first and second moment, each in [0, 1); null for the optimizer's own."""
    weight_decay: float = 0.0
    """Decay of matrices, at least 0; vectors (norms, biases) are never decayed."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, such as momentum of SGD; eps must be above 0 in float32."""
    schedule: str = "constant_with_warmup"
    """Learning-rate schedule of transformers.get_scheduler, such as constant_with_warmup, linear or cosine."""
    warmup_steps: int = 0
    """Optimizer steps from 0 to the peak learning rate, at least 0."""
    warmup_ratio: float = 0.0
    """The same as a share of all optimizer steps of the run, rounded down, in [0, 1); in place of warmup_steps."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, such as min_lr of cosine_with_min_lr."""
    max_grad_norm: float = 1.0
    """Gradients with a larger L2 norm are scaled down to it, at least 0; 0 never clips."""
    max_skipped_steps: int = 3
    """Rollout steps in a row that may be skipped, because no update of theirs had a finite gradient, before the run stops; at least
    0."""

    def __post_init__(self) -> None:
        check(
            self,
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0"),
            ("betas", self.betas is None or _are_betas(self.betas), "two numbers in [0, 1), or null"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"),
            ("max_grad_norm", self.max_grad_norm >= 0, "at least 0"),
            ("max_skipped_steps", self.max_skipped_steps >= 0, "at least 0"),
        )
        if self.warmup_steps and self.warmup_ratio:
            raise UserError(
                f"warmup_steps and warmup_ratio say the same, got {self.warmup_steps} and {self.warmup_ratio:g}. Set either to 0."
            )
        if self.schedule == "constant" and (self.warmup_steps or self.warmup_ratio):
            name = "warmup_steps" if self.warmup_steps else "warmup_ratio"
            raise UserError(f"{name} must be 0 with the schedule constant, got {getattr(self, name):g}. Use constant_with_warmup.")
        eps = self.options.get("eps")
        for number in eps if isinstance(eps, (list, tuple)) else [eps]:  # Adafactor has two
            if isinstance(number, (int, float)) and abs(number) < _LEAST_EPS:
                raise UserError(
                    f"options must have eps of at least {_LEAST_EPS:.3g}, got {eps!r}: a weight whose gradient is 0 would become "
                    "0 / 0. Raise it, or leave it out."
                )
        # Building both on one tiny matrix finds every argument that they refuse, before a model is loaded. The module of one's own
        # optimizer is asked for where it trains: who exports or plots needs none.
        matrix = nn.Linear(1, 1, bias=False)
        own = ":" in self.name
        optimizer = torch.optim.SGD(matrix.parameters(), self.learning_rate) if own else build_optimizer(matrix, self)
        build_scheduler(optimizer, self, steps=max(2, self.warmup_steps + 1))

    def warmup(self, steps: int) -> int:
        """Optimizer steps of warmup in a run of `steps`."""
        return self.warmup_steps or math.floor(self.warmup_ratio * steps + 1e-9)  # 0.29 · 100 is 28.999…


def _are_betas(betas: Sequence[float]) -> bool:
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configured optimizer over all trainable parameters of `model`, in a fused implementation where it has one.

    Raises: UserError for an unknown optimizer or an argument that it does not take.
    """
    cls = _optimizer_class(config.name)
    accepted = inspect.signature(cls).parameters
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if sharded and (config.name in _UNSHARDED_OPTIMIZERS or cls.__module__.split(".")[0] in _UNSHARDED_PACKAGES):
        raise UserError(f"{config.name} has no form for parameters sharded over ranks, got several ranks. Use AdamW.")
    if "fused" in accepted and (not sharded or config.name in ("Adam", "AdamW")):  # the others' fused forms take no shards
        arguments["fused"] = True
    if config.betas is not None:
        arguments["betas"] = config.betas
    for name, field_name in (("lr", "learning_rate"), ("weight_decay", "weight_decay"), ("betas", "betas")):
        if name in config.options:
            raise UserError(f"options must not set {name}, which is optimizer.{field_name}. Set that.")
    arguments |= config.options
    for name in [*arguments, *(["weight_decay"] if config.weight_decay else [])]:
        if name not in accepted:
            unset = {"betas": "Set optimizer.betas=null", "weight_decay": "Set optimizer.weight_decay=0"}.get(name, "Leave it out")
            raise UserError(f"{config.name} takes {', '.join(n for n in accepted if n != 'params')}, got {name!r}. {unset}.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim >= 2]}, {"params": [p for p in trainable if p.ndim < 2]}]
    if "weight_decay" in accepted:
        groups[0]["weight_decay"], groups[1]["weight_decay"] = config.weight_decay, 0.0
    if config.name == "Muon" and len(groups[1]["params"]):
        raise UserError(
            f"optimizer.name=Muon trains matrices alone, got a model with {len(groups[1]['params'])} vectors (norms, biases). Use "
            "AdamW, or model.lora, whose adapters are matrices."
        )
    try:
        return cls([group for group in groups if group["params"]], **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{config.name} refuses its arguments: {error}.") from error


def _optimizer_class(name: str) -> type[Optimizer]:
    if ":" in name:
        cls = resolve("optimizer.name", name, "bitsandbytes.optim:AdamW8bit")
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise UserError(f"optimizer.name {name!r} must be a class that derives from torch.optim.Optimizer, got {cls!r}.")
        return cls
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)) or cls is Optimizer or name in _UNFIT_OPTIMIZERS:
        known = [name for name in vars(torch.optim) if name not in (*_UNFIT_OPTIMIZERS, "Optimizer")]
        known = [name for name in known if isinstance(getattr(torch.optim, name), type)]
        raise UserError(
            f"name must be an optimizer of torch.optim ({', '.join(sorted(known))}), or a path such as "
            f"bitsandbytes.optim:AdamW8bit, got {name!r}."
        )
    return cls


def build_scheduler(optimizer: Optimizer, config: OptimizerConfig, *, steps: int) -> LRScheduler:
    """The configured learning-rate schedule over `steps` optimizer steps.

    Raises: UserError for an unknown schedule, an argument that it does not take, a polynomial one of nothing but warmup, or a rate
        below 0 or not finite, looked for at every step of 8191, and of more at thousands spread over them.
    """
    known = [schedule.value for schedule in SchedulerType if schedule.value not in _UNFIT_SCHEDULES]
    if config.schedule not in known:
        raise UserError(f"schedule must be one of {', '.join(known)}, got {config.schedule!r}.")
    if config.schedule.startswith("constant") and config.schedule_options:  # which get_scheduler would drop without a word
        raise UserError(f"schedule {config.schedule} has no schedule_options, got {config.schedule_options}. Leave them out.")
    if config.schedule == "polynomial" and config.warmup_steps >= steps:  # which divides by the steps after the warmup
        raise UserError(
            "optimizer.warmup_steps must be below the optimizer steps with optimizer.schedule=polynomial, got "
            f"{config.warmup_steps} and {steps}. Lower it, or raise steps."
        )
    try:
        scheduler = get_scheduler(config.schedule, optimizer, config.warmup(steps), steps, config.schedule_options or None)
        tried = _steps_to_try(config.warmup(steps), steps)
        factors = (factor(step) for step in tried for factor in getattr(scheduler, "lr_lambdas", []))
        bad = next((factor for factor in factors if not 0 <= factor < math.inf), None)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"schedule {config.schedule} refuses its arguments: {error}. See schedule_options.") from error
    if bad is not None:
        raise UserError(
            f"schedule {config.schedule} must give learning rates of at least 0, got {bad:g} times the peak. See schedule_options."
        )
    return scheduler


def _steps_to_try(warmup: int, steps: int) -> Iterator[int]:
    """Of the steps 0 … `steps` some thousand, however many there are: those around the end of the warmup, the last, and every
    n-th."""
    yield from (step for step in (warmup - 1, warmup, warmup + 1, steps - 1, steps) if 0 <= step <= steps)
    yield from range(0, steps + 1, max(1, steps // 4096))
