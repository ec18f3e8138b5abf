"""The configuration of a run: one frozen dataclass whose sections belong to the modules that use them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml

from trapo_train.checkpoints.checkpoint import CheckpointConfig
from trapo_train.data.dataset import DataConfig
from trapo_train.evaluation.evaluate import EvalConfig
from trapo_train.models.model import ModelConfig
from trapo_train.parallel.world import ParallelConfig
from trapo_train.reports.trackers import TrackingConfig
from trapo_train.rewards.functions import RewardTerm
from trapo_train.rollouts.plans import PlanConfig
from trapo_train.rollouts.rollout import RolloutConfig
from trapo_train.schema import ConfigError, KeyPath, UserError, build, check, expand_home, quotes_for
from trapo_train.step.advantages import AdvantageConfig
from trapo_train.step.objective import ObjectiveConfig
from trapo_train.step.optimizer import OptimizerConfig
from trapo_train.step.packing import PackingConfig
from trapo_train.step.updates import UpdateConfig

CONFIG_FILE = "config.yaml"  # of a run, in its output_dir


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
    evaluation."""
    reward: str | list[RewardTerm] | None = None
    """exact_match, math_verify, pointer_chasing, or a path to your own function: my_rewards:my_reward. Or several, with weights:
    [{name: math_verify, weight: 1.0}, {name: my_rewards:brevity, weight: 0.1}]. Null where no response is sampled: SFT. See
    `rewards.RewardFn` for what one gets."""
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
        names = list(self.eval_data) if isinstance(self.eval_data, dict) else []
        if any(not re.fullmatch(r"[\w.-]+", name) for name in names):
            raise UserError(f"eval_data must name its sets with letters, digits, '_', '.' and '-', got {names}.")
        self.evaluation.check_names(names)

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
    """Load a YAML file, or a recipe of the package by its name, and apply overrides such as "plan.name=grpo".

    An override's value is YAML too: 3, 1e-6, true, null, [1, 2]; a text without quotes is taken as it stands, with # and all behind
    it, unless YAML reads it as something else, as "a: b" or "[a]". It replaces the value at its key; missing sections on the way
    are created. One of steps and epochs, overridden alone, takes the place of the other.

    Raises:
        ConfigError: naming the key, the rule, the value and where it was set, for anything that is not a valid
            configuration.
    """
    file, text = _read(str(path))
    values = _parse_yaml(text, file)
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a configuration must be a mapping of keys to values, got {type(values).__name__}.")
    applied: list[tuple[KeyPath, str]] = []
    for override in overrides:
        applied.append((_apply_override(values, override), override))
    overridden = [name for name in ("steps", "epochs") if any(key == (name,) for key, _ in applied)]
    if len(overridden) == 1 and values[overridden[0]] is not None:
        values.pop("epochs" if overridden == ["steps"] else "steps", None)

    def origin(key: KeyPath) -> str:
        for target, override in reversed(applied):
            if key[: len(target)] == target:
                return f"override {override!r}"
        beneath = [repr(override) for target, override in applied if target[: len(key)] == key]
        return f"{file} with override {', '.join(beneath)}" if beneath else file

    return build(RunConfig, values, origin)


def recipes() -> dict[str, str]:
    """The packaged configurations by name, each with its first comment line."""
    found = {}
    for entry in sorted((resources.files("trapo_train") / "recipes").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").split("\n", 1)[0]
            found[entry.name.removesuffix(".yaml")] = first.removeprefix("# ")
    return found


def to_yaml(config: RunConfig) -> str:
    """Return the configuration as YAML with every key spelled out; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


_NUMBERS = {  # of YAML 1.1 without 010, there an 8, and 1:30, there 90, and with 1e-6
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F][\da-fA-F_]*|0b[01][01_]*)$",
    "tag:yaml.org,2002:float": r"([-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d[\d_]*([eE][-+]?\d+)?)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
_NO_TEXT = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}  # no setting is a date


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but numbers are those that people write, a date is text, and a key given twice is an error."""

    yaml_implicit_resolvers: ClassVar = {
        first: [resolver for resolver in resolvers if resolver[0] not in _NO_TEXT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(sorted(twice))} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def _read(path: str) -> tuple[str, str]:
    """Return the name and the text of a configuration file or packaged recipe."""
    if Path(path).is_file():
        try:
            return path, Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: a configuration must be text in UTF-8: {error}. Save it in that encoding.") from error
    recipe = resources.files("trapo_train") / "recipes" / f"{path}.yaml"
    if "/" not in path and recipe.is_file():
        return f"recipe {path}", recipe.read_text(encoding="utf-8")
    own = Path(path) / CONFIG_FILE
    if own.is_file():
        raise ConfigError(f"{path} is the directory of a run. Continue it with {own} checkpoint.resume=true.")
    raise ConfigError(f"There is no file {path!r} and no recipe of that name. The recipes are: {', '.join(recipes())}.")


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    """Set one value in place and return its key path."""
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"override {override!r}: must have the form section.key=value.")
    section = values
    for depth, name in enumerate(path[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(path[:depth])} is no section, its value is {section!r}.")
    section[path[-1]] = _override_value(key, text, f"override {override!r}")
    return path


def _override_value(key: str, text: str, where: str) -> Any:
    """What an override's text says as YAML, or the text itself, of which YAML would drop a comment and white space at its ends."""
    try:
        value, first = _parse_yaml(text, where), text.lstrip()[:1]
    except ConfigError as error:
        is_part = any(text.count(left) > text.count(right) for left, right in ("{}", "[]"))
        remedy = f"A shell splits words at spaces: quote the whole override, '{key}={text} …'." if is_part else quotes_for(key)
        raise ConfigError(f"{error}\n{remedy}") from error
    if value is None and first != "#" and text.strip().lower() not in ("", "~", "null"):  # an anchor, or a document's start
        raise ConfigError(f"{where}: {key} would be null. {quotes_for(key)}")
    is_quoted = first in tuple("'\"|>!")
    if is_quoted or not (isinstance(value, str) or first == "#"):
        return value
    if "\\n" in text:
        raise ConfigError(
            f"{where}: {key} must have quotes around a text with \\n in it, without them a backslash and an n, got {text}. "
            f"For a line break write '{key}=\"…\\n\"', where \\\\ is a backslash; for the two characters \"{key}='…\\n'\"."
        )
    return text
