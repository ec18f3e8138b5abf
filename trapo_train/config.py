"""The configuration of a run: one frozen dataclass whose sections belong to the modules that use them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import yaml

from trapo_train.checkpoints.checkpoint import CheckpointConfig
from trapo_train.config_file import read_config
from trapo_train.data.dataset import DataConfig
from trapo_train.evaluation.eval_sets import UNNAMED, EvalConfig
from trapo_train.models.model import ModelConfig
from trapo_train.parallel.world import ParallelConfig
from trapo_train.reports.trackers import TrackingConfig
from trapo_train.rewards.functions import RewardTerm
from trapo_train.rollouts.plans import PlanConfig
from trapo_train.rollouts.rollout import RolloutConfig
from trapo_train.schema import UserError, build, check, expand_home
from trapo_train.step.advantages import AdvantageConfig
from trapo_train.step.objective import ObjectiveConfig
from trapo_train.step.optimizer import OptimizerConfig
from trapo_train.step.packing import PackingConfig
from trapo_train.step.updates import UpdateConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a training run."""

    output_dir: str
    """Folder for metrics, plots, checkpoints and the resolved configuration."""
    prompts_per_step: int
    """Problems sampled for each rollout step, at least 1; plan.refill may sample more."""
    data: DataConfig
    """Training problems."""
    steps: int | None = None
    """Rollout steps, at least 1; optimizer steps as well unless updates says otherwise. Null where epochs is given."""
    epochs: float | None = None
    """Passes over the training problems in place of steps, above 0: epochs · problems / prompts_per_step of these, rounded up. Null
    where steps is given. The configuration that a run leaves in its output_dir has the steps."""
    eval_data: DataConfig | dict[str, DataConfig] | None = None
    """Held-out problems: one set, or several by name, {aime: {path: aime.parquet}, math: {path: math.parquet}}; null for no
    evaluation, or in place of a set to leave it out."""
    reward: str | list[RewardTerm] | None = None
    """exact_match, math_verify, pointer_chasing, or a path to your own function: my_rewards:my_reward. Or several, with weights:
    [{name: math_verify, weight: 1.0}, {name: my_rewards:brevity, weight: 0.1}]. Null where no response is sampled: SFT. See
    `trapo_train.rewards.functions.RewardFn` for what one gets."""
    seed: int = 0
    """Seed of everything random in the run, at least 0; data sections have their own for generated problems."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model and tokenizer."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """What is sampled for each problem."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How it is sampled."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """How rewards become advantages."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its learning rate."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    """How samples become micro-batches."""
    updates: UpdateConfig = field(default_factory=UpdateConfig)
    """How many optimizer steps each rollout step is used for."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """When and how the held-out problems are sampled."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are saved and how many are kept."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go besides metrics.jsonl."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How a run under torchrun spreads over its ranks."""

    def __post_init__(self) -> None:
        check(
            self,
            ("steps", self.steps is None or self.steps >= 1, "at least 1"),
            ("epochs", self.epochs is None or 0 < self.epochs < math.inf, "a finite number above 0"),
            ("prompts_per_step", self.prompts_per_step >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("seed", self.seed < 2**63, "below 2^63"),
            ("output_dir", self.output_dir != "", "a text that is not empty"),
            ("output_dir", "\0" not in self.output_dir, "a name that a directory can have, without NUL"),
            ("reward", self.reward not in ("", []), "a name, a list of at least one reward, or null"),
        )
        expand_home(self, "output_dir")
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else f"both, {self.steps} and {self.epochs:g}. Set steps=null or epochs=null"
            raise UserError(f"steps must be set, or epochs in its place, got {given}.")
        if self.updates.mini_batches > self.prompts_per_step:
            raise UserError(
                f"updates.mini_batches must be at most prompts_per_step, {self.prompts_per_step}, got {self.updates.mini_batches}: "
                "all samples of a problem are in one mini-batch, and others would be empty. Lower it."
            )
        buffer_size = self.plan.setting("buffer_size")
        if buffer_size is not None and self.updates.mini_batches > buffer_size:
            raise UserError(
                f"updates.mini_batches must be at most plan.buffer_size, {buffer_size}, the problems of a step on traces, got "
                f"{self.updates.mini_batches}. Lower it."
            )
        if self.plan.refill and self.advantage.normalise == "batch":
            raise UserError(
                f"plan.refill must be 0 with advantage.normalise=batch, got {self.plan.refill}: whether a problem teaches would "
                "depend on the others of the step. Use another normalise."
            )
        rewards = [self.reward] if isinstance(self.reward, str) else [term.name for term in self.reward or ()]
        if self.rollout.correct_by is not None and self.rollout.correct_by not in rewards:
            raise UserError(f"rollout.correct_by must be null or one of the rewards, {rewards}, got {self.rollout.correct_by!r}.")
        dropout = 0.0 if self.model.lora is None else self.model.lora.dropout
        if dropout > 0 and (self.updates.per_step > 1 or self.updates.correction is not None):
            raise UserError(
                "model.lora.dropout must be 0 with several updates per rollout step or updates.correction, got "
                f"{dropout:g}: ratios would compare different random masks. Set model.lora.dropout=0."
            )
        if self.checkpoint.keep_best:
            self._check_keep_best()
        names = [name for name in self.held_out if name != UNNAMED]
        if any(not re.fullmatch(r"[\w.-]+", name) for name in names):
            raise UserError(f"eval_data must name its sets with letters, digits, '_', '.' and '-', got {names}.")
        self.evaluation.check_names(names)

    @property
    def held_out(self) -> dict[str, DataConfig]:
        """The sets of held-out problems by name, an only one as UNNAMED; empty without eval_data."""
        if isinstance(self.eval_data, dict):
            return self.eval_data
        return {} if self.eval_data is None else {UNNAMED: self.eval_data}

    def for_problems(self, num_problems: int) -> RunConfig:
        """With the steps that epochs come to for this many training problems."""
        if self.epochs is None:
            return self
        steps = self.epochs * num_problems / self.prompts_per_step
        return replace(self, steps=max(1, math.ceil(round(steps, 9))), epochs=None)  # 1.1 · 10 is 11.000000000000002

    def _check_keep_best(self) -> None:
        saved, evaluated = self.checkpoint.every, self.evaluation.every
        if self.eval_data is None or not (saved and evaluated) or evaluated % saved:
            given = "no eval_data" if self.eval_data is None else "eval_data"
            raise UserError(
                "checkpoint.keep_best needs eval_data, checkpoint.every and evaluation.every above 0, and the latter a multiple of "
                f"the former, so that every evaluated step is saved, got {given}, {saved} and {evaluated}. Set them so, or "
                "checkpoint.keep_best=false."
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a file or recipe with overrides; see `config_file.read_config`.

    Raises:
        ConfigError: naming the key, the rule, the value and where it was set, for anything that is not a valid
            configuration.
    """
    return build(RunConfig, *read_config(path, overrides))


def to_yaml(config: RunConfig) -> str:
    """Return the configuration as YAML with every key spelled out; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
