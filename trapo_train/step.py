"""One optimizer step: objective, optimizer and schedule by name; micro-batches in, new weights and metrics out."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, SchedulerType, get_scheduler

from trapo_kernels import KL, Objective, objectives
from trapo_train.model import policy_forward
from trapo_train.packing import MicroBatch
from trapo_train.parallel import World
from trapo_train.schedules import Schedule, build_schedule, is_schedule
from trapo_train.schema import UserError, check, did_you_mean, refused
from trapo_train.tally import Tally
from trapo_train.user_code import resolve

_UNFIT_OPTIMIZERS = ("LBFGS", "SparseAdam")  # need a closure, need sparse gradients
_UNSHARDED_OPTIMIZERS = ("Adafactor", "Rprop")  # place results of another sharding into a DTensor
_LEAST_EPS = torch.finfo(torch.float32).tiny  # what is smaller may round to 0 there
_UNFIT_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # need a validation metric every step


@dataclass(frozen=True)
class KLConfig:
    """A KL to the model before training, on rollout tokens."""

    beta: float
    """Its weight, at least 0."""
    estimator: Literal["k1", "k2", "k3", "k3_corrected"] = "k3"
    """How a token's KL is estimated, see trapo_kernels.KL: k2 and k3_corrected have its gradient, k3 that of the KL the other way
    round; that of k1 is zero in expectation, whatever the reference."""
    clamp: float | None = None
    """Nats within which a token's log ratio is held, above 0; null for no limit."""

    def __post_init__(self) -> None:
        check(
            self,
            ("beta", 0 <= self.beta < math.inf, "a finite number of at least 0"),
            ("clamp", self.clamp is None or self.clamp > 0, "null or above 0"),
        )
        with refused("the kernels refuse it", ValueError):  # what is no such number in float32
            self.term()

    def term(self) -> KL:
        """As the objective takes it."""
        return KL(self.beta, self.estimator, math.inf if self.clamp is None else self.clamp)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which policy loss to minimise."""

    name: str = "trapo"
    """A preset of trapo_kernels.objectives, such as trapo, sft, dr_grpo, luffy or chord_mu, or a path to your own function that
    returns a trapo_kernels.Objective: my_objectives:mine."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the preset or function, such as alpha in [1e-37, 1] of trapo; a number may be a schedule over the rollout steps,
    such as {schedule: cosine, start: 0.9, end: 0.05, steps: 200}."""
    chooser: str | None = None
    """Path to your own function, my_choosers:choose, that says before every step which terms it trains; null for all."""
    kl: KLConfig | None = None
    """A KL to the model before training, {beta: 0.01}, for an objective of rollouts that has none; null for none."""

    def __post_init__(self) -> None:
        if self.chooser == "":
            raise UserError("chooser must be a path like my_choosers:choose, or null, got an empty text.")
        if ":" in self.name:  # a function of the user's own is needed where one trains, not to read the configuration
            _schedules(self)
        else:
            extreme_objectives(self)


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become new weights."""

    name: str = "AdamW"
    """Class of torch.optim."""
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
        # Building both on one tiny matrix finds every argument that they refuse, before a model is loaded.
        optimizer = build_optimizer(nn.Linear(1, 1, bias=False), self)
        build_scheduler(optimizer, self, steps=max(2, self.warmup_steps + 1))

    def warmup(self, steps: int) -> int:
        """Optimizer steps of warmup in a run of `steps`."""
        return self.warmup_steps or math.floor(self.warmup_ratio * steps + 1e-9)  # 0.29 · 100 is 28.999…


def _are_betas(betas: Sequence[float]) -> bool:
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that is not finite, or weights that are to be saved are not."""


def build_objective(config: ObjectiveConfig, step: int = 0) -> Objective:
    """The configured preset with the options that hold at rollout step `step` ≥ 0.

    Raises: UserError for an unknown preset, an unknown option, or an option out of range.
    """
    return _built(config, scheduled_options(config, step))


def scheduled_options(config: ObjectiveConfig, step: int) -> dict[str, float]:
    """The options that are schedules, with their values at rollout step `step` ≥ 0."""
    return {name: schedule(step) for name, schedule in _schedules(config).items()}


def extreme_objectives(config: ObjectiveConfig) -> list[Objective]:
    """The preset with all schedules at their smallest, and at their largest value: between them lies every step's objective.

    Raises: UserError for an unknown preset or option, or an option that is out of range at any step.
    """
    bounds = {name: schedule.bounds for name, schedule in _schedules(config).items()}
    return [_built(config, {name: bound[i] for name, bound in bounds.items()}) for i in (0, 1)]


def _built(config: ObjectiveConfig, scheduled: dict[str, float]) -> Objective:
    preset, options = _preset(config), config.options | scheduled
    if config.name in objectives.PRESETS and scheduled.get("beta") == 0 and _schedules(config)["beta"].bounds[1] > 0:
        options = {name: option for name, option in options.items() if name not in ("kl", "kl_clamp")}  # those of its other steps
    with refused(f"objective: {config.name} refuses its options", TypeError, ValueError):
        objective = preset(**options)
    if not isinstance(objective, Objective):
        raise UserError(f"objective.name {config.name!r} must return a trapo_kernels.Objective, got {type(objective).__name__}.")
    if config.kl is None:
        return objective
    if objective.has_kl:
        raise UserError(
            f"objective.kl must be null where the objective has one, got {config.kl} with {config.name} {config.options}."
        )
    if not objective.rollout_terms:
        raise UserError(f"objective.kl is of rollout tokens, and {config.name} trains on expert tokens alone. Leave it out.")
    return with_kl(objective, config.kl.term())


def with_kl(objective: Objective, kl: KL) -> Objective:
    """With the KL beside the first rollout term, which there must be."""
    if objective.rollout is not None:
        return replace(objective, kl=kl)
    return replace(objective, plus=with_kl(objective.plus, kl))


def _schedules(config: ObjectiveConfig) -> dict[str, Schedule]:
    return {name: build_schedule(value) for name, value in config.options.items() if is_schedule(value)}


def _preset(config: ObjectiveConfig) -> Callable[..., Objective]:
    preset = objectives.PRESETS.get(config.name)
    if preset is None and ":" in config.name:
        preset = resolve("objective.name", config.name, "my_objectives:mine")
    if not callable(preset):
        near = did_you_mean(config.name, objectives.PRESETS)
        raise UserError(
            f"objective.name must be one of {', '.join(objectives.PRESETS)} or a path to a function, my_objectives:mine, got "
            f"{config.name!r}.{near}"
        )
    parameters = inspect.signature(preset).parameters
    allowed = list(parameters)
    for option in config.options:
        if option not in allowed and not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            near = did_you_mean(option, allowed)
            raise UserError(f"objective: options of {config.name} are {', '.join(allowed)}, got {option!r}.{near}")
    return preset


def cap_of_ratios(config: ObjectiveConfig) -> str | None:
    """The preset's option that caps ratios where the advantage is negative; None where it has none."""
    return next((name for name in ("dual", "delta") if name in inspect.signature(_preset(config)).parameters), None)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configured optimizer over all trainable parameters of `model`, in a fused implementation where it has one.

    Raises: UserError for an unknown optimizer or an argument that it does not take.
    """
    cls = getattr(torch.optim, config.name, None)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)) or cls is Optimizer or config.name in _UNFIT_OPTIMIZERS:
        known = [name for name in vars(torch.optim) if name not in (*_UNFIT_OPTIMIZERS, "Optimizer")]
        known = [name for name in known if isinstance(getattr(torch.optim, name), type)]
        raise UserError(f"name must be an optimizer of torch.optim ({', '.join(sorted(known))}), got {config.name!r}.")
    accepted = inspect.signature(cls).parameters
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if sharded and config.name in _UNSHARDED_OPTIMIZERS:
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


def optimizer_step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    temperature: float,
    max_grad_norm: float,
    world: World | None = None,
) -> dict[str, Any]:
    """Accumulate the gradients of all micro-batches, clip them, and update the weights once.

    A step whose gradient norm is not finite leaves weights and optimizer state alone and reports
    "skipped_step" = 1; one without a loss token leaves them alone as well; the schedule goes on. The metrics reach the host in one
    transfer at the end.

    Args:
        temperature: > 0, the sampling temperature of the rollouts.
        max_grad_norm: L2 norm that gradients are scaled down to; 0 never clips.
        world: the ranks that run this step together, each on its own micro-batches, equally many; None for a single process.
            FSDP averages gradients over the ranks, so that each rank's loss is multiplied by their number.

    Returns: loss, grad_norm (before clipping), learning_rate, loss_tokens, micro_batches, loss_passes (2 where the objective
        needs the logprobs of whole sequences first, else 1), skipped_step; and for each role that has tokens, entropy/<role>
        in nats and the kernel's metrics (see `linear_policy_loss`), TrSFT's under trsft/. They are means over the tokens that
        carry a gradient: without an entropy bonus rollouts of advantage 0 are left out.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    ranks = 1 if world is None else world.size
    tally = Tally()
    passes = 1
    # All are uploaded, a few MiB each, before the first pass: no copy stands between two of them.
    for number, micro_batch in enumerate([micro_batch.to(device) for micro_batch in micro_batches]):
        if isinstance(model, FSDPModule):  # replicas (HSDP) meet once, with the whole sum
            model.set_requires_all_reduce(number == len(micro_batches) - 1)
        out = policy_forward(model, micro_batch, objective, temperature)
        (out.loss if ranks == 1 else out.loss * ranks).backward()
        tally.add(out, micro_batch, objective)
        passes = max(passes, out.passes)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    if ranks > 1:
        # With a vocabulary-parallel head every rank has seen the tokens of all ranks already.
        tally = tally.on_cpu() if world.vocab_parallel_head else Tally.merged(world.gather(tally.on_cpu()))
    metrics = tally.result({"grad_norm": grad_norm.cpu() if ranks > 1 else grad_norm})
    finite = math.isfinite(metrics["grad_norm"])  # a loss may overflow alone, as a KL k3_corrected far from its reference does
    learning_rate = optimizer.param_groups[0]["lr"]
    if finite and metrics["loss_tokens"]:  # without a token the momentum alone would move the weights
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _advance(scheduler)
    return metrics | {
        "learning_rate": learning_rate,
        "micro_batches": len(micro_batches),
        "loss_passes": passes,
        "skipped_step": int(not finite),
    }


def _advance(scheduler: LRScheduler) -> None:
    """The next learning rate; without torch's warning where the first update is left out, whose rate is used up all the same."""
    if scheduler.last_epoch:  # torch looks at the first step alone, and leaving catch_warnings rearms every warning shown once
        scheduler.step()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
        scheduler.step()
