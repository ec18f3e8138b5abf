"""The objective by name: a preset of the kernels or your own function, at the values that its schedules have at a step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trapo_kernels import KL, Objective, objectives
from trapo_train.schedules import Schedule, build_schedule, is_schedule
from trapo_train.schema import UserError, check, did_you_mean, refused
from trapo_train.user_code import resolve


@dataclass(frozen=True)
class KLConfig:
    """A KL to the model before training, on rollout tokens."""

    beta: float
    """Its weight, at least 0. With 0 it is only watched, as `rollout/kl_ref`, at the cost of the frozen copy."""
    estimator: Literal["k1", "k2", "k3", "k3_corrected"] = "k3"
    """How a token's KL is estimated, see trapo_kernels.KL: k2 and k3_corrected have its gradient, k3 that of the KL the other way
    round; that of k1 is zero in expectation, whatever the reference."""
    clamp: float | None = None
    """Nats within which a token's log ratio is held, above 0; null for no limit."""
    cap: float | None = None
    """Nats, the most that the estimate k3 of a token can be, above 0; null for no limit. verl's low_var_kl is k3 with clamp 20 and
    cap 10."""

    def __post_init__(self) -> None:
        check(
            self,
            ("beta", 0 <= self.beta < math.inf, "a finite number of at least 0"),
            ("clamp", self.clamp is None or self.clamp > 0, "null or above 0"),
            ("cap", self.cap is None or self.cap > 0, "null or above 0"),
        )
        with refused("the kernels refuse it", ValueError):  # what is no such number in float32
            self.term()

    def term(self) -> KL:
        """As the objective takes it."""
        clamp, cap = (math.inf if bound is None else bound for bound in (self.clamp, self.cap))
        return KL(self.beta, self.estimator, clamp, cap)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which policy loss to minimise."""

    name: str = "trapo"
    """A preset of trapo_kernels.objectives, such as trapo, sft, dr_grpo, luffy or chord_mu, or a path to your own function that
    returns a trapo_kernels.Objective: my_objectives:mine."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the preset or function, such as alpha in [1e-30, 1] of trapo; a number may be a schedule over the rollout steps,
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
    preset = _preset(config)
    with refused(f"objective: {config.name} refuses its options", TypeError, ValueError):
        objective = preset(**config.options | scheduled)
    if not isinstance(objective, Objective):
        raise UserError(f"objective.name {config.name!r} must return a trapo_kernels.Objective, got {type(objective).__name__}.")
    if config.kl is not None and objective.has_kl:
        raise UserError(
            f"objective.kl must be null where the objective has one, got {config.kl} with {config.name} {config.options}."
        )
    if (config.kl is not None or objective.has_kl) and objective.why_a_kl_is_idle:
        raise UserError(f"objective {config.name}: {objective.why_a_kl_is_idle}. Leave the KL out.")
    if config.kl is None:
        return objective
    with refused(f"objective.kl does not go with {config.name}", ValueError):
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
