"""Which expert traces the reward rejects: each rank asks about its share, and what was found holds for the runs that continue."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trapo_train.files import replace_text
from trapo_train.models.tokenizer import decode
from trapo_train.parallel.world import World
from trapo_train.records import Problem, opens_thoughts
from trapo_train.rewards.functions import RewardFn, WeightedSum, judge, opinion_of
from trapo_train.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REJECTED_FILE = "rejected_experts.json"
Place = tuple[int, int]  # problem index, trace number


def rejected_experts(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardFn | WeightedSum,
    correct_by: str | None,
    world: World,
) -> set[Place]:
    """Of this rank's share of the traces those with a reward of 0 or less; no opinion rejects nothing."""
    pairs = world.share([(problem, number) for problem in problems for number in range(len(problem.experts))])
    traces = [problem.experts[number] for problem, number in pairs]
    texts = [decode(tokenizer, trace.token_ids, special=False) for trace in traces]  # as a step shows it to the reward
    lengths = [len(trace.token_ids) for trace in traces]
    opened = [opens_thoughts(problem.prompt) for problem, _ in pairs]
    about = {"completion_tokens": lengths, "finish_reasons": ["expert"] * len(pairs), "thoughts_open": opened}
    opinions = [opinion_of(value, correct_by) for value in judge(reward, [problem for problem, _ in pairs], texts, about)]
    judged = zip(pairs, opinions, strict=True)
    return {(problem.index, number) for (problem, number), opinion in judged if opinion is not None and opinion <= 0}


def tell_failed_gradings(counts: Sequence[Mapping[str, float]], where: str) -> None:
    """Warn of gradings that failed while the traces of `where` were judged, from what the reward of each rank counted."""
    timeouts, crashes = (sum(int(each.get(f"reward/{name}", 0)) for each in counts) for name in ("timeouts", "crashes"))
    if timeouts or crashes:
        logger.warning(
            "%s: verifying the expert traces, %d gradings ran out of time and %d crashed: reward 0", where, timeouts, crashes
        )


def write_rejected(output_dir: Path, rejected: Collection[Place]) -> None:
    """Keep which traces a run does not use: another start might judge otherwise, by a time limit or a model."""
    replace_text(output_dir / REJECTED_FILE, json.dumps(sorted(rejected)) + "\n")


def read_rejected(output_dir: Path) -> set[Place]:
    """What `write_rejected` kept.

    Raises: UserError for a file that is not there or not readable.
    """
    file = output_dir / REJECTED_FILE
    try:
        return {(index, number) for index, number in json.loads(file.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"a run with data.on_rejected_expert=drop resumes with the expert traces that it began with, which {file} says, got "
            f"{type(error).__name__}: {error}. Put the file back, or start a new run in another output_dir."
        ) from error
