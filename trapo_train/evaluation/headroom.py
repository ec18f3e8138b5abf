"""Headroom: does an expert prefix help this model on these problems? Measured before training, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from trapo_train.engines.engine import Engine
from trapo_train.evaluation.eval_sets import group_problems
from trapo_train.evaluation.evaluate import engine_calls, in_turn, standard_error
from trapo_train.parallel.world import World, interleave
from trapo_train.records import Problem, Request
from trapo_train.reports.display import say
from trapo_train.reports.status import silent
from trapo_train.rewards.functions import RewardFn
from trapo_train.rewards.judging import judge_samples
from trapo_train.rollouts.rollout import RolloutConfig, complete, draft
from trapo_train.schema import UserError, check

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from trapo_train.trainer import Trainer

ALL = "all"
FRACTIONS = (0.0, 0.25, 0.5, 0.75)  # of the expert trace, to start from
MIN_GAIN = 0.10  # smallest rise of the pass rate that counts as headroom
UNGUIDED = (0.05, 0.60)  # below it samples without a prefix teach nothing, above it there is little left to learn
RESPONSES_PER_CALL = 256  # of the engine
SEED = 0  # of the samples, so that models are compared on equal draws


@dataclass(frozen=True)
class HeadroomConfig:
    """What to measure."""

    samples_per_prompt: int = 4
    """Responses sampled for each problem and fraction, at least 1."""
    num_problems: int | None = 128
    """The first so many problems that have an accepted expert trace, at least 2; null takes all."""
    group_by: str | None = None
    """Dataset column whose values get a pass rate each, such as depth; null for none."""

    def __post_init__(self) -> None:
        check(
            self,
            ("samples_per_prompt", self.samples_per_prompt >= 1, "at least 1"),
            ("num_problems", self.num_problems is None or self.num_problems >= 2, "null or at least 2"),
        )


@dataclass(frozen=True)
class HeadroomRow:
    """The pass rate of one group of problems after one fraction of the expert trace."""

    fraction: float
    group: str
    """A value of the grouping column, such as depth_3, or "all" for every problem."""
    pass_rate: float
    n: int
    """Problems in the group."""
    standard_error: float
    """Of pass_rate, over problems; NaN for one problem."""
    answer_in_prefix: float
    """Share of the problems whose prefix already states the solution."""


@dataclass(frozen=True)
class HeadroomReport:
    """Pass rates by fraction and group, and the gain: the best guided pass rate minus the unguided one."""

    rows: tuple[HeadroomRow, ...]
    gain: float
    gain_standard_error: float
    """Over problems, paired: the same problems with and without the prefix."""
    num_rejected: int
    """Problems left out because the verifier accepts none of their expert traces."""
    section: str = "data"
    """The section of the configuration that the problems come from: data, or an evaluation set such as eval_data.math."""

    def overall(self) -> list[HeadroomRow]:
        """Return the rows of all problems together, one per fraction."""
        return [row for row in self.rows if row.group == ALL]

    def verdict(self) -> tuple[bool, str]:
        """Return whether there is headroom for guided training, and a sentence with rule, actual value and remedy."""
        (low, high), unguided, best = UNGUIDED, self.overall()[0], self._best()
        found = (
            f"got {unguided.pass_rate:.1%} without and {best.pass_rate:.1%} after {best.fraction:.0%} of the expert trace "
            f"({100 * self.gain:+.1f} ± {100 * self.gain_standard_error:.1f} points, {unguided.n} problems)"
        )
        window = f"{low:.0%} to {high:.0%}"
        if unguided.pass_rate < low:
            remedy = "Take easier problems or a stronger model, or train it longer before."
            return False, f"No headroom: the unguided pass rate must be {window}, {found}. {remedy}"
        if unguided.pass_rate > high:
            return False, f"No headroom: the unguided pass rate must be {window}, {found}. Take harder problems."
        if self.gain < MIN_GAIN:
            remedy = "The model cannot continue from these traces: first train it on some, or take traces closer to it."
            rule = f"an expert prefix must raise the pass rate by at least {100 * MIN_GAIN:.0f} points"
            return False, f"No headroom: {rule}, {found}. {remedy}"
        if self.gain < 2 * self.gain_standard_error:
            return False, f"Headroom is not shown: the gain must be twice its error, {found}. Take more problems or samples."
        return True, f"Headroom: an expert prefix raises the pass rate, {found}."

    def _best(self) -> HeadroomRow:
        return max(self.overall()[1:], key=lambda row: row.pass_rate)


def measure_headroom(
    engine: Engine,
    problems: Sequence[Problem],
    reward: RewardFn,
    tokenizer: PreTrainedTokenizerBase,
    config: HeadroomConfig,
    rollout: RolloutConfig,
    world: World | None = None,
    progress: Callable[[float], None] = silent,
) -> HeadroomReport:
    """Sample every problem after each fraction of its expert trace, and return the pass rates.

    Only problems with an expert trace that the verifier accepts are measured, each with its first such trace: a wrong
    trace would say nothing about the model. The engine's own random state is left alone, and what a response draws depends on its
    problem's place alone: ranks that share the engine calls find what a single process would (see `evaluate`).

    Args:
        problems: with expert traces of at most rollout.max_response_tokens tokens.
        rollout: its temperature, max_response_tokens, top_p, top_k, verify, correct_at, correct_by and how traces are cut.
        world: the ranks that call this together; None for a single process.
        progress: told before each engine call what share of this rank's calls is done.

    Raises, on every rank:
        UserError: fewer than two problems with an accepted expert trace; a missing column `group_by`.
        what sampling or a reward raises on any rank.
    """
    world = world or World.alone()
    # The first rank's answer: a verifier may answer another rank otherwise.
    answers = world.attempt(lambda: _accepted(problems, reward, tokenizer, config, rollout) if world.first else ({}, 0), Exception)
    accepted, num_rejected = answers[0]
    read = [problems[i] for i in accepted]  # each from its dataset, once
    chosen = [replace(problem, experts=(problem.experts[trace],)) for problem, trace in zip(read, accepted.values(), strict=True)]
    if len(chosen) < 2:
        raise UserError(
            f"headroom: needs at least 2 problems with an expert trace of at most {rollout.max_response_tokens} tokens that "
            f"the verifier accepts, got {len(chosen)} of {len(problems)}. Check the expert column and the reward."
        )
    groups = {**group_problems(chosen, config.group_by), ALL: list(range(len(chosen)))}
    responses = len(FRACTIONS) * config.samples_per_prompt  # of each problem
    mine = world.share(list(engine_calls([responses] * len(chosen), RESPONSES_PER_CALL, world.size)))

    def sampled(positions: Sequence[int]) -> list[_Found]:
        asked = [chosen[i] for i in positions]
        return _sample(engine, asked, reward, tokenizer, config, rollout, first_key=positions[0] * responses)

    parts = world.attempt(lambda: in_turn(mine, sampled, progress), Exception)
    found = [problem for call in interleave(parts) for problem in call]
    rows, overall_rates = [], []
    for place, fraction in enumerate(FRACTIONS):
        rates = [problem.pass_rates[place] for problem in found]
        stated = [problem.answer_in_prefix[place] for problem in found]
        for name, positions in groups.items():
            rows.append(_row(fraction, name, [rates[i] for i in positions], [stated[i] for i in positions]))
        overall_rates.append(rates)
    best = max(overall_rates[1:], key=fmean)
    gains = [guided - unguided for guided, unguided in zip(best, overall_rates[0], strict=True)]
    return HeadroomReport(tuple(rows), fmean(gains), standard_error(gains), num_rejected)


class _Found(NamedTuple):
    """Of one problem, a value for each fraction."""

    pass_rates: list[float]
    answer_in_prefix: list[bool]


def _sample(
    engine: Engine,
    problems: Sequence[Problem],
    reward: RewardFn,
    tokenizer: PreTrainedTokenizerBase,
    config: HeadroomConfig,
    rollout: RolloutConfig,
    first_key: int,
) -> list[_Found]:
    """One engine call for these problems, of which the first response draws as that of `first_key`."""
    drafts = [
        [draft(problem, Request(config.samples_per_prompt, fraction), 1, tokenizer, rollout) for fraction in FRACTIONS]
        for problem in problems
    ]
    samples = [sample for per_fraction in drafts for group in per_fraction for sample in group]
    complete(samples, engine, rollout, temperature=rollout.temperature, seed=SEED, first_key=first_key)
    judge_samples(samples, reward, tokenizer, rollout)
    return [
        _Found(
            [fmean(sample.correct for sample in group) for group in per_fraction],
            [group[0].answer_in_prefix for group in per_fraction],
        )
        for per_fraction in drafts
    ]


def _accepted(
    problems: Sequence[Problem],
    reward: RewardFn,
    tokenizer: PreTrainedTokenizerBase,
    config: HeadroomConfig,
    rollout: RolloutConfig,
) -> tuple[dict[int, int], int]:
    """Return the first problems with an accepted trace, by position, each with the place of that trace, and how many had none."""
    limit = config.num_problems or len(problems)
    chosen: dict[int, int] = {}
    num_rejected = 0
    while len(chosen) < limit and len(chosen) + num_rejected < len(problems):
        start = len(chosen) + num_rejected
        # A block of what is still missing: grading may be slow, and a data set long.
        block = problems[start : start + limit - len(chosen)]
        traces = [
            [draft(problem, Request(1, 1.0, i), 1, tokenizer, rollout)[0] for i in range(len(problem.experts))] for problem in block
        ]
        judge_samples([trace for per_problem in traces for trace in per_problem], reward, tokenizer, rollout)
        for position, per_problem in enumerate(traces, start):
            accepted = next((place for place, trace in enumerate(per_problem) if trace.correct), None)
            if accepted is not None:
                chosen[position] = accepted
            else:
                num_rejected += 1
    return chosen, num_rejected


def _row(fraction: float, group: str, rates: list[float], stated: list[bool]) -> HeadroomRow:
    return HeadroomRow(fraction, group, fmean(rates), len(rates), standard_error(rates), fmean(stated))


def measure(trainer: Trainer, config: HeadroomConfig) -> HeadroomReport:
    """The headroom of the trainer's model on the first held-out set with expert traces, or on its training problems."""
    held_out = (entry.problems for entry in trainer.eval_sets.values() if len(entry.problems.with_experts()))
    problems, _ = next(held_out, trainer.problems).without_long_experts(trainer.config.rollout.max_response_tokens)
    with trainer.ready_to_generate():

        def progress(share: float) -> None:
            trainer.progress(f"sampling after expert prefixes: {share:.0%}")

        settings = (config, trainer.config.rollout, trainer.world, progress)
        found = measure_headroom(trainer.engine, problems, trainer.reward, trainer.tokenizer, *settings)
    return replace(found, section=problems.section)


def show_headroom(report: HeadroomReport, directory: Path, console: Console) -> bool:
    """Print pass rates and verdict, write headroom.json and headroom.png to `directory`; returns the verdict."""
    from trapo_train.reports.plots import plot_headroom
    from trapo_train.reports.tables import headroom_table

    console.print(headroom_table(report))
    holds, sentence = report.verdict()
    say(console, sentence, "green" if holds else "bold red")
    path = plot_headroom(report, directory / "headroom.png")
    rows = [{key: None if value != value else value for key, value in asdict(row).items()} for row in report.rows]
    summary = {"verdict": holds, "sentence": sentence, "gain": report.gain, "section": report.section, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    say(console, f"wrote {path} and {path.with_suffix('.json').name}", "dim")
    return holds
