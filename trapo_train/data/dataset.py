"""Problems: rows of a dataset, checked, tokenised and brought into a resumable order."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from trapo_train.data.problems import Entry, ProblemSet, RowReader, Trace, fingerprint
from trapo_train.data.rejected import Place, rejected_experts, tell_failed_gradings
from trapo_train.data.report import DataReport
from trapo_train.data.rows import RENDERING
from trapo_train.data.sources import bad_line
from trapo_train.parallel.world import World
from trapo_train.records import Problem
from trapo_train.reports.status import Tell, silent
from trapo_train.rewards.functions import RewardFn, WeightedSum, take_metrics
from trapo_train.rewards.reward_checks import names
from trapo_train.schema import UserError, check, expand_home
from trapo_train.tasks import PointerChasingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRESETS = {
    "luffy": {"prompt_column": "prompt", "solution_column": "reward_model.ground_truth", "expert_column": "target"},
    "messages": {"prompt_column": "messages", "expert_column": "messages"},
}


class _NotGiven(str):
    """The default name of a column, told from the same name set explicitly, which overrides a preset."""

    __slots__ = ()


@dataclass(frozen=True)
class DataConfig:
    """Where problems come from and how a row becomes one. In YAML, for example:

    data: {path: train.jsonl}                                   # text in the columns prompt and solution, and expert if it has one
    data: {path: "runs/*.parquet", expert_column: null}         # no expert traces: every rollout starts from the prompt
    data: {path: Elliott/Openr1-Math-46k-8192, preset: luffy, response_start: "<think>\\n"}
    data: {path: chats.jsonl, preset: messages}                 # conversations, whose last turn is the expert trace
    data: {path: org/set, split: "train[:1000]", prompt_column: question, solution_column: answer, expert_column: traces,
           system_prompt: "Put the answer in \\\\boxed{}.", on_long_prompt: drop, on_rejected_expert: drop}

    Rows stay on disk; each is read and tokenised when it is used. Loading reads all rows once, to check and count them. Images,
    audio and the like reach a reward as they are stored, {bytes, path}: nothing decodes them.
    """

    task: Literal["pointer_chasing"] | None = None
    """A task generated offline. Give either this or path."""
    path: str | None = None
    """A Hugging Face dataset name, a folder, or a .parquet, .jsonl, .json or .csv file (patterns such as data/*.parquet
    too). Each cell of a .csv file is text, null where it is empty."""
    name: str | None = None
    """The configuration of the Hugging Face dataset, if it has several."""
    revision: str | None = None
    """Branch, tag or commit of the dataset on the hub; null for the newest."""
    split: str = "train"
    """Split to read, slices such as train[:1000] too; a task has "train" and "test" (held out)."""
    preset: Literal["luffy", "messages"] | None = None
    """Columns of a known layout: luffy for LUFFY's and TRAPO's OpenR1 data (prompt, target, reward_model.ground_truth) and the
    evaluation sets beside it; messages for conversations, a list of {role, content} under messages, where solution may be missing.
    A column you set explicitly overrides the preset."""
    prompt_column: str = _NotGiven("prompt")
    """Column with the prompt: text or chat messages. A dot reaches into a struct: reward_model.ground_truth. The same as
    expert_column for conversations: the last assistant turn, as the chat template writes it, is the expert trace, what comes before
    it the prompt. Messages reach the template with all their fields, such as tool_calls, and so does a column tools."""
    learned_turns: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation are expert traces: the last, with the others as context, or all that answer a message
    (none behind a system message or another assistant turn), each as a problem of its own whose prompt is what comes before it, as
    the chat template writes that for a model that is to answer. The row's solution is that of its last message: problems of earlier
    turns have none. Each problem computes its prompt again, so long chats of many turns cost more than their tokens."""
    solution_column: str | None = _NotGiven("solution")
    """Column with the true answer that the reward compares with; null if the dataset has none."""
    expert_column: str | None = _NotGiven("expert")
    """Column with expert responses: text, an assistant message, or a list of these; null takes none. Under its default name, or a
    preset's, it may be missing: then there are none either."""
    as_chat: bool = False
    """Render a text prompt as a user message with the tokenizer's chat template; chat prompts always are."""
    system_prompt: str | None = None
    """System message put before every prompt that has none; implies as_chat."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as {enable_thinking: false} of Qwen3 or {reasoning_effort: low} of gpt-oss."""
    response_start: str = ""
    """Text that every response starts with, put at the end of each prompt, such as "<think>\\n"; an expert trace that brings it
    again loses it."""
    think_tags: Literal["keep", "strip", "add", "require"] = "keep"
    """<think> and </think> in expert traces: keep as they are, strip the tags (not the thoughts), add <think> at the start where
    neither trace nor prompt opens it, or require both (the prompt may open) and stop at a trace without."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens, at least 1."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """What happens to a prompt over max_prompt_tokens: stop with an error, or drop the row and count it."""
    on_rejected_expert: Literal["keep", "drop"] = "keep"
    """What happens to an expert trace that the reward gives 0 or less: keep trusts all traces and never asks; drop asks about every
    trace before the run, ranks sharing them, which takes long where rewards do, and counts what it drops. A run that resumes drops
    the same ones and does not ask again."""
    on_duplicate: Literal["keep", "drop"] = "keep"
    """What happens to a row that equals an earlier one in prompt, solution, expert traces and the columns that the reward has as
    arguments by name: keep makes it a problem of its own, visited as often in an epoch; drop leaves it out and counts it. Other
    columns, such as an id, count only in rows without solution, traces and such columns. Evaluation makes rows of equal prompt and
    solution one problem in any case."""
    num_problems: int | None = None
    """Read at most this many rows, at least 1; null for all. A task generates so many, 1000 if null."""
    seed: int = 0
    """Seed of a generated task's problems, at least 0 and below 2^63; unused for a dataset."""
    task_options: PointerChasingConfig = field(default_factory=PointerChasingConfig)
    """What a generated task's problems look like."""

    def __post_init__(self) -> None:
        check(
            self,
            ("max_prompt_tokens", self.max_prompt_tokens >= 1, "at least 1"),
            ("num_problems", self.num_problems is None or self.num_problems >= 1, "null or at least 1"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63"),
        )
        expand_home(self, "path")
        if (self.task is None) == (self.path is None):
            raise UserError(f"Give either task or path, got task = {self.task!r} and path = {self.path!r}.")
        if self.task is not None and self.name is not None:
            raise UserError(f"name belongs to a dataset, got {self.name!r} with task = {self.task}. Leave it out.")
        if self.task is None and self.task_options != PointerChasingConfig():
            raise UserError(f"task_options belong to a task, got path = {self.path!r}. Remove them.")
        if self.task is not None and self.revision is not None:
            raise UserError(f"revision must be null but for a dataset on the hub, got {self.revision!r} with a task. Remove it.")
        self._name_columns()
        if self.learned_turns == "all" and self.prompt_column != self.expert_column:
            raise UserError(
                f"learned_turns: all needs conversations, prompts and expert traces in one column, got prompt_column = "
                f"{self.prompt_column} and expert_column = {self.expert_column}. Set preset: messages, or leave it out."
            )
        taken = sorted(RENDERING & set(self.chat_template_kwargs))
        if taken:
            raise UserError(f"chat_template_kwargs must be variables of the template, got {', '.join(taken)}. Leave that out.")

    def is_default(self, name: str) -> bool:
        """Whether the field of this name, that of a column, has its default or what the preset makes of it."""
        default = DataConfig.__dataclass_fields__[name].default
        return getattr(self, name) == PRESETS.get(self.preset, {}).get(name, default)

    def _name_columns(self) -> None:
        """Columns that were not given are the preset's, or called by their default names."""
        for name in ("prompt_column", "solution_column", "expert_column"):
            given = getattr(self, name)
            if isinstance(given, _NotGiven):
                object.__setattr__(self, name, PRESETS.get(self.preset, {}).get(name, str(given)))


def load_problems(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardFn | WeightedSum | None,
    correct_by: str | None = None,
    end_ids: Sequence[int] | None = None,
    *,
    world: World | None = None,
    rejected: Collection[Place] | None = None,
    section: str = "data",
    progress: Tell = silent,
) -> ProblemSet:
    """Read, check and tokenise the configured problems; with `on_rejected_expert: drop`, `reward` says which
    expert traces stay (None: all), of several rewards the one named `correct_by` (None: their weighted sum).

    Every expert trace ends with one of `end_ids` (None: the tokenizer's end-of-sequence token), the first of them where it
    has none. Columns besides prompt, solution and expert go to
    `Problem.columns` and on to the reward; one that is called like an argument of the reward is left out with a warning.

    Args:
        world: the ranks that load these problems together, each asking the reward about its share; None for a single process.
        rejected: the traces that an earlier start rejected, in place of asking again.
        section: what errors call this part of the configuration.
        progress: told how many rows are read.

    Raises, on every rank, what is raised on one:
        UserError: for a missing column, an empty dataset, a prompt that is empty or over the budget, a chat prompt
            without chat template, a tokenizer without end-of-sequence token, a column of the wrong type, or ranks that read
            different problems.
        RewardError: if the reward fails on an expert trace.
    """
    world = world or World.alone()
    asks = config.on_rejected_expert == "drop" and reward is not None
    verifier = reward if asks and rejected is None else None
    found: _Found | None = None

    def read() -> _Told:
        nonlocal found
        try:
            found = _read(RowReader(config, tokenizer, end_ids, section), reward, verifier, correct_by, world, progress)
        except UnicodeDecodeError as error:  # of a row, where it is read
            raise UserError(f"{section}: {bad_line(config.path or '') or error}. Save the file as UTF-8.") from error
        return found.told

    parts = world.attempt(read, Exception)  # such as too little memory of one rank, too
    where = found.reader.where
    _check_same(parts, where)
    if verifier is not None:
        rejected = set().union(*(part.rejected for part in parts))
        if world.first:
            tell_failed_gradings([part.gradings for part in parts], where)
    entries = [entry.without(rejected) for entry in found.entries] if asks else found.entries
    report = DataReport(
        problems=len(entries),
        without_expert=sum(not entry.traces for entry in entries),
        dropped_experts=sum(len(entry.traces) for entry in found.entries) - sum(len(entry.traces) for entry in entries),
        unread_columns=found.reader.unread_columns,
        **found.counts,
    )
    return ProblemSet(found.reader, entries, report, found.told.fingerprint, frozenset(rejected or ()))


class _Told(NamedTuple):
    """What ranks tell each other of the problems that they have read."""

    problems: int
    fingerprint: str
    rejected: set[Place]  # of this rank's share of the traces
    gradings: dict[str, float]


class _Found(NamedTuple):
    """What a rank has read."""

    reader: RowReader
    entries: list[Entry]
    counts: Counter[str]  # fields of the report
    told: _Told


def _read(
    reader: RowReader,
    reward: RewardFn | WeightedSum | None,
    verifier: RewardFn | WeightedSum | None,
    correct_by: str | None,
    world: World,
    progress: Tell,
) -> _Found:
    """Read all rows; their traces are asked about where there is a `verifier`. The fingerprint is of the data alone, whatever is
    rejected: a verdict may be another next time."""
    config, named = reader.config, _named(reward, reader.columns)
    digest, seen, rows, counts = hashlib.sha256(), set(), 0, Counter(experts=0, dropped_prompts=0)
    entries: list[Entry] = []
    rejected: set[Place] = set()
    for chunk in reader.chunks():
        rows += len(chunk)
        kept = [row for row in chunk if row.problem is not None]
        repeated = [_is_repeated(row.problem, named, seen) for row in kept]
        counts["dropped_prompts"] += len(chunk) - len(kept)
        counts["dropped_duplicates" if config.on_duplicate == "drop" else "duplicates"] += sum(repeated)
        if config.on_duplicate == "drop":
            kept = [row for row, again in zip(kept, repeated, strict=True) if not again]
        problems = [row.problem for row in kept]
        if verifier is not None:
            rejected |= rejected_experts(problems, reader.tokenizer, verifier, correct_by, world)
        for row in kept:
            counts.update(row.counts)
        for problem in problems:
            counts["experts"] += len(problem.experts)
            digest.update(fingerprint(problem))
            traces = tuple(Trace(i, len(expert.token_ids)) for i, expert in enumerate(problem.experts))
            entries.append(Entry(problem.index, len(problem.prompt_ids), hash(problem.prompt_ids), traces))
        progress(f"{reader.section}: read {rows:,} rows")
    if not entries:
        raise UserError(
            f"{reader.where} has no problem to offer: it has {rows} rows, and no prompt in them is within "
            f"{reader.section}.max_prompt_tokens = {config.max_prompt_tokens}."
        )
    gradings = {} if verifier is None else take_metrics(verifier)  # here, so that the first step does not report them as its own
    return _Found(reader, entries, counts, _Told(len(entries), digest.hexdigest(), rejected, gradings))


def _check_same(parts: Sequence[_Told], where: str) -> None:
    """Raise UserError unless all ranks have read the same."""
    others = {rank: part.problems for rank, part in enumerate(parts) if part.fingerprint != parts[0].fingerprint}
    if others:
        raise UserError(
            f"{where}: all ranks must read the same problems in the same order, got others on ranks {list(others)}, "
            f"{list(others.values())} of them, than on rank 0, which has {parts[0].problems}. Give every machine the same files, "
            "or keep them on a disk that all share."
        )


class ProblemOrder:
    """The order in which training visits the problems: reshuffled every epoch, a pure function of the seed.

    Every epoch visits each problem once. One call of `next` never repeats a problem, nor one to `avoid`, across the border of two
    epochs either, unless it asks for more than there are.
    """

    def __init__(self, num_problems: int, seed: int) -> None:
        if num_problems < 1:
            raise ValueError(f"ProblemOrder: num_problems must be at least 1, got {num_problems}.")
        self.num_problems = num_problems
        self.seed = seed
        self.epoch = 0  # epochs begun
        self._remaining = torch.zeros(0, dtype=torch.int64)  # of the epoch, in order; a view that nobody writes to: states share it

    @property
    def passes(self) -> float:
        """Passes over all problems so far."""
        return self.epoch - len(self._remaining) / self.num_problems

    def next(self, count: int, avoid: Collection[int] = ()) -> list[int]:
        """Return the next `count` problem positions, each in [0, num_problems); an epoch that begins has those to `avoid` last."""
        if count < 1:
            raise ValueError(f"ProblemOrder.next: count must be at least 1, got {count}.")
        taken: list[int] = []
        while len(taken) < count:
            if len(self._remaining) == 0:
                self._begin_epoch(avoid={*taken, *avoid})
            missing = count - len(taken)
            taken += self._remaining[:missing].tolist()
            self._remaining = self._remaining[missing:]
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the position: plain values, and what is left of the epoch as a tensor, which is not copied."""
        return {
            "num_problems": self.num_problems,
            "seed": self.seed,
            "epoch": self.epoch,
            "remaining": self._remaining,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; the number of problems and the seed must be the same."""
        for name in ("num_problems", "seed"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"ProblemOrder: cannot resume with {name} = {getattr(self, name)}, the saved run had {state[name]}. "
                    "Resume with the data of the saved run, or start a new one."
                )
        self.epoch = state["epoch"]
        self._remaining = torch.as_tensor(state["remaining"], dtype=torch.int64)  # older checkpoints have a list

    def _begin_epoch(self, avoid: set[int]) -> None:
        order = random.Random(f"{self.seed}/{self.epoch}").sample(range(self.num_problems), self.num_problems)
        # Problems that this step has taken from the old epoch come last in the new one (a stable sort by False < True).
        self._remaining = torch.tensor(sorted(order, key=avoid.__contains__))
        self.epoch += 1


def _named(reward: RewardFn | WeightedSum | None, columns: Sequence[str]) -> list[str]:
    """The columns that the reward has as arguments by name."""
    rewards = [term for _, term, _ in reward.terms] if isinstance(reward, WeightedSum) else [reward] if reward is not None else []
    return [column for column in columns if any(names(one, column) for one in rewards)]


def _is_repeated(problem: Problem, named: Sequence[str], seen: set[int]) -> bool:
    """Whether a row equal to this one was `seen` (see `DataConfig.on_duplicate`), of whose columns the reward has those `named` as
    arguments; it is from now on. Hashes have 64 bits: of a million different rows two are taken for equal with a chance of 3e-8."""
    has_answer = problem.solution is not None or problem.experts or named
    columns = {name: problem.columns[name] for name in (named if has_answer else problem.columns)}
    key = hash((problem.prompt_ids, problem.solution, tuple(expert.token_ids for expert in problem.experts), repr(columns)))
    if key in seen:
        return True
    seen.add(key)
    return False
