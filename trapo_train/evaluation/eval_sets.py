"""What is evaluated: the settings, and the named sets of held-out problems."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.data.problems import identity
from trapo_train.parallel.world import World
from trapo_train.records import Problem
from trapo_train.reports.status import Tell, silent
from trapo_train.rollouts.rollout import RolloutConfig
from trapo_train.schema import UserError, changed, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNNAMED = ""  # the only set, where eval_data is one data section


@dataclass(frozen=True)
class EvalConfig:
    """When and how to evaluate."""

    every: int = 0
    """Rollout steps between evaluations, at least 0; 0 evaluates only at the end."""
    samples_per_prompt: int | dict[str, int] = 1
    """Responses sampled for each problem, at least 1: one number, or one for each set by name; accuracy is their mean (avg@k).
    Equal rows are one problem, which gets so many for each of its rows."""
    pass_at: list[int] | None = None
    """k of every pass@k to report, each at least 1, on the sets with that many samples; null for 2, 4, 8 … as far as they reach."""
    temperature: float = 1.0
    """Sampling temperature, 0 or from 1e-6 to 1e6; 0 is greedy and takes one sample per problem."""
    top_p: float | None = None
    """As rollout.top_p, in (0, 1]; null for that of the rollouts."""
    top_k: int | None = None
    """As rollout.top_k, at least 0; null for that of the rollouts."""
    max_response_tokens: int | None = None
    """Longest response in tokens, at least 1; null for that of the rollouts."""
    num_problems: int | None = None
    """The first so many problems of each set, at least 1; null takes all."""
    group_by: str | None = None
    """Dataset column whose values get an accuracy each, such as depth, on the sets that have it; null for none."""
    responses_per_call: int = 256
    """Most responses that one engine call samples, at least 1, or those of one problem where these are more. Ranks share the calls,
    which are made smaller if some ranks would otherwise get none. Samples do not depend on the call size or the rank."""
    sample: bool = True
    """Whether responses are sampled and judged; false reports expert_nll alone, of sets with expert traces, and needs no reward.
    Nothing reads the settings of responses then, and the run notes those that are set."""
    save_samples: bool = False
    """Whether each evaluation writes its responses to output_dir/samples, as JSON lines with the whole texts."""
    seed: int = 0
    """Seed of the samples, at least 0 and below 2^63: the same at every evaluation, so that checkpoints are compared on equal
    draws."""

    def __post_init__(self) -> None:
        samples = self.samples_per_prompt
        counts = list(samples.values()) if isinstance(samples, dict) else [samples]
        check(
            self,
            ("every", self.every >= 0, "at least 0"),
            ("samples_per_prompt", all(count >= 1 for count in counts), "at least 1"),
            ("pass_at", self.pass_at is None or all(k >= 1 for k in self.pass_at), "null or numbers of at least 1"),
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "0 or from 1e-6 to 1e6"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "null or in (0, 1]"),
            ("top_k", self.top_k is None or self.top_k >= 0, "null or at least 0"),
            ("max_response_tokens", self.max_response_tokens is None or self.max_response_tokens >= 1, "null or at least 1"),
            ("num_problems", self.num_problems is None or self.num_problems >= 1, "null or at least 1"),
            ("responses_per_call", self.responses_per_call >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63"),
        )
        if self.temperature == 0 and any(count > 1 for count in counts):
            raise UserError(
                f"samples_per_prompt must be 1 at temperature 0, got {samples}: greedy samples are "
                "all the same. Set temperature above 0, or samples_per_prompt to 1."
            )
        if self.save_samples and not self.sample:
            raise UserError(
                "save_samples must not be set where sample is false, got True: there are no responses. Leave it out, or set "
                "sample=true."
            )

    @property
    def ignored(self) -> list[str]:
        """The settings of responses that are not at their defaults, where no responses are sampled; else none."""
        return [name for name in changed(self) if not self.sample and name not in ("sample", "every", "num_problems")]

    def sampling(self, rollout: RolloutConfig) -> RolloutConfig:
        """How an evaluation samples and judges responses, but for the temperature: as `rollout`, unless it is set here."""
        own = {name: getattr(self, name) for name in ("top_p", "top_k", "max_response_tokens")}
        own = {name: value for name, value in own.items() if value is not None}
        return replace(rollout, **own, on_truncated="keep")  # there is no loss to leave a completion out of

    def check_names(self, names: Sequence[str]) -> None:
        """Raise UserError unless `samples_per_prompt` is one number or names exactly these sets."""
        samples = self.samples_per_prompt
        if isinstance(samples, dict) and set(samples) != set(names):
            raise UserError(
                f"evaluation.samples_per_prompt must name the sets of eval_data, {', '.join(names) or 'which has no names'}, got "
                f"{', '.join(samples)}. Give one number for all, or one for each."
            )


@dataclass(frozen=True)
class EvalSet:
    """The problems of one set without repetitions, and how many responses each of them gets.

    A problem that the dataset holds several times (AIME is published with every row 32 times) is one problem with that many times
    the samples: its rows are no independent problems in a standard error, and pass@k may draw from all of their responses.
    """

    problems: Sequence[Problem]
    rows: tuple[int, ...]
    """Where in `problems` each problem stands first."""
    samples: tuple[int, ...]
    """Responses of each problem; 1 if greedy, however often it is repeated."""
    groups: dict[str, list[int]]
    """Positions in `rows` by value of the column group_by, named like depth_3; empty where the set has no such column."""
    members: tuple[int, ...] = ()
    """Every row of these problems, repetitions included: they may differ in their expert traces."""

    @classmethod
    def of(cls, problems: Sequence[Problem], config: EvalConfig, name: str = UNNAMED) -> EvalSet:
        """The set of this name, from its rows."""
        rows: dict[Any, int] = {}
        repeats: dict[Any, int] = {}
        values: list[Any] = []
        members: list[int] = []
        for row, problem in enumerate(problems):
            key = identity(problem)
            if key not in rows and len(rows) != config.num_problems:
                rows[key], repeats[key] = row, 0
                values.append(problem.columns.get(config.group_by))
            if key in rows:
                repeats[key] += 1
                members.append(row)
        grouped = bool(problems) and config.group_by in problems[0].columns
        each = config.samples_per_prompt
        each = each[name] if isinstance(each, dict) else each
        samples = [1 if config.temperature == 0 else each * count for count in repeats.values()]
        groups = _group(values, config.group_by) if grouped else {}
        return cls(problems, tuple(rows.values()), tuple(samples), groups, tuple(members))

    @property
    def most_samples(self) -> int:
        """Responses that every problem has at least: the largest k of pass@k."""
        return min(self.samples)


def section_of(name: str) -> str:
    """What a set is called in the configuration and in what is said of it: eval_data.aime."""
    return f"eval_data.{name}" if name else "eval_data"


def load_eval_sets(
    configured: Mapping[str, DataConfig],
    config: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int] | None = None,
    world: World | None = None,
    progress: Tell = silent,
) -> dict[str, EvalSet]:
    """The sets that are `configured` by name (see `RunConfig.held_out`), their expert traces ending with one of `end_ids`.

    Args:
        world: the ranks that load them together.
        progress: told how many rows are read.

    Raises: UserError for data that cannot be used (see `load_problems`), a k of pass@k beyond the samples of every set, a
        column group_by that no set has, or a set that has nothing to report.
    """
    sets: dict[str, EvalSet] = {}
    for name, entry in configured.items():
        problems = load_problems(entry, tokenizer, None, end_ids=end_ids, world=world, section=section_of(name), progress=progress)
        sets[name] = EvalSet.of(problems, config, name)
    if not sets:
        return sets
    for entry in sets.values():
        if not config.sample and not any(entry.problems[row].experts for row in entry.members):
            raise UserError(
                f"evaluation.sample=false reports the loss of expert traces alone, and {entry.problems.section} has none. Set its "
                "expert_column to the column that holds them, or evaluation.sample=true."
            )
    if not config.sample:
        return sets
    most = max(entry.most_samples for entry in sets.values())
    if max(config.pass_at or [1]) > most:
        raise UserError(
            f"evaluation.pass_at must be at most {most}, the samples of a problem, got {max(config.pass_at)}. "
            "Raise evaluation.samples_per_prompt."
        )
    if config.group_by is not None and not any(entry.groups for entry in sets.values()):
        columns = sorted({column for entry in sets.values() for column in entry.problems[0].columns})
        raise UserError(
            f"evaluation.group_by must name a column of the data set, got {config.group_by!r}; it has {columns}. "
            "Name one of these, or null."
        )
    return sets


def group_problems(problems: Sequence[Problem], group_by: str | None) -> dict[str, list[int]]:
    """Return the positions of the problems of each group, at least one, named like depth_3, in the order of the column's values.

    Raises: UserError for problems without the column.
    """
    if group_by is None:
        return {}
    first = problems[0]  # all rows of a set have the same columns
    if group_by not in first.columns:
        raise UserError(
            f"group_by must name a column of the data set, got {group_by!r}; problem {first.index} has {sorted(first.columns)}. "
            "Name one of these, or null."
        )
    return _group([problem.columns[group_by] for problem in problems], group_by)


def _group(values: Sequence[Any], group_by: str | None) -> dict[str, list[int]]:
    positions: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        positions.setdefault(value if isinstance(value, Hashable) else str(value), []).append(i)
    ordered = sorted(positions, key=lambda value: (0, value, "") if isinstance(value, int | float) else (1, 0, str(value)))
    return {f"{group_by}_{value}": positions[value] for value in ordered}
