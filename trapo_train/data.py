"""Problems: rows of a dataset, checked, tokenised and brought into a resumable order."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from trapo_train.records import ExpertTrace, Problem
from trapo_train.rewards import RewardFn, judge
from trapo_train.rows import cell, load_rows, prompt_text, solution_text, trace_texts, wants_chat, without_start
from trapo_train.tasks import PointerChasingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TASKS = ("pointer_chasing",)
RESERVED_COLUMNS = ("prompts", "completions", "solution")  # what the reward function is called with
VERIFY_BATCH = 64
PRESETS = {"luffy": {"prompt_column": "prompt", "solution_column": "reward_model.ground_truth", "expert_column": "target"}}


@dataclass(frozen=True)
class DataConfig:
    """Where problems come from and how a row becomes one."""

    task: str | None = None
    """A task generated offline: "pointer_chasing". Give either this or path."""
    path: str | None = None
    """A Hugging Face dataset name, a folder, or a .parquet, .jsonl or .json file (patterns such as data/*.parquet too)."""
    name: str | None = None
    """The configuration of the Hugging Face dataset, if it has several."""
    split: str = "train"
    """Split to read, slices such as train[:1000] too; a task has "train" and "test" (held out)."""
    preset: Literal["luffy"] | None = None
    """Columns of a known layout: luffy for LUFFY's and TRAPO's OpenR1 data (prompt, target, reward_model.ground_truth)."""
    prompt_column: str = "prompt"
    """Column with the prompt: text or chat messages. A dot reaches into a struct: reward_model.ground_truth."""
    solution_column: str | None = "solution"
    """Column with the true answer that the reward compares with; null if the dataset has none."""
    expert_column: str | None = "expert"
    """Column with expert responses: text, an assistant message, or a list of these; null if the dataset has none."""
    as_chat: bool = False
    """Render a text prompt as a user message with the tokenizer's chat template; chat prompts always are."""
    system_prompt: str | None = None
    """System message put before every prompt that has none; implies as_chat."""
    response_start: str = ""
    """Text that every response starts with, put at the end of each prompt, such as "<think>\\n"; an expert trace that brings it
    again loses it."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens, at least 1."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """What happens to a prompt over max_prompt_tokens: stop with an error, or drop the row and count it."""
    on_rejected_expert: Literal["keep", "drop"] = "keep"
    """What happens to an expert trace that the reward gives 0 or less: keep it or drop it; both are counted."""
    num_problems: int | None = None
    """Read at most this many rows, at least 1; null for all. A task generates so many, 1000 if null."""
    seed: int = 0
    """Seed of a generated task's problems; unused for a dataset."""
    task_options: PointerChasingConfig = field(default_factory=PointerChasingConfig)
    """What a generated task's problems look like."""

    def __post_init__(self) -> None:
        if (self.task is None) == (self.path is None):
            raise ValueError(f"Give either task or path, got task = {self.task!r} and path = {self.path!r}.")
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"task must be one of {list(TASKS)}, got {self.task!r}.")
        if self.task is None and self.task_options != PointerChasingConfig():
            raise ValueError(f"task_options belong to a task, got path = {self.path!r}. Remove them.")
        if self.preset is not None:
            self._apply_preset()
        if self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1, got {self.max_prompt_tokens}.")
        if self.num_problems is not None and self.num_problems < 1:
            raise ValueError(f"num_problems must be at least 1 or null, got {self.num_problems}.")
        for name, choices in (("on_long_prompt", ("error", "drop")), ("on_rejected_expert", ("keep", "drop"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}.")

    def _apply_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {list(PRESETS)} or null, got {self.preset!r}.")
        for name, column in PRESETS[self.preset].items():
            given, default = getattr(self, name), DataConfig.__dataclass_fields__[name].default
            if given not in (default, column):
                raise ValueError(f"preset {self.preset} sets {name} to {column!r}, got {given!r} too. Leave out one of them.")
            object.__setattr__(self, name, column)


@dataclass(frozen=True)
class DataReport:
    """What loading found, in counts."""

    problems: int
    """Problems in the set."""
    without_expert: int
    """Problems among them that have no expert trace: they are never guided."""
    experts: int
    """Expert traces read, all problems together."""
    rejected_experts: int
    """Expert traces that the reward gave 0 or less; 0 if there was no reward to ask."""
    dropped_experts: int
    """Rejected traces that were dropped (`on_rejected_expert: drop`)."""
    dropped_prompts: int
    """Rows dropped because the prompt was too long (`on_long_prompt: drop`)."""

    def __str__(self) -> str:
        return (
            f"{self.problems} problems ({self.without_expert} without expert; {self.dropped_prompts} more dropped for a "
            f"long prompt), {self.experts} expert traces ({self.rejected_experts} rejected by the reward, "
            f"{self.dropped_experts} of them dropped)"
        )


@dataclass(frozen=True)
class ProblemSet(Sequence[Problem]):
    """The loaded problems and what loading found."""

    problems: tuple[Problem, ...]
    report: DataReport

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: Any) -> Any:
        return self.problems[index]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    @property
    def fingerprint(self) -> str:
        """A hash of all token ids and solutions: equal for equal data, so that resuming can tell when it changed."""
        digest = hashlib.sha256()
        for problem in self.problems:
            traces = [expert.token_ids for expert in problem.experts]
            digest.update(repr((problem.index, problem.prompt_ids, problem.solution, traces)).encode())
        return digest.hexdigest()


def load_problems(config: DataConfig, tokenizer: PreTrainedTokenizerBase, reward: RewardFn | None) -> ProblemSet:
    """Read, check and tokenise the configured problems; `reward` verifies the expert traces (None: nobody does).

    Every expert trace gets the end-of-sequence token once. Columns besides prompt, solution and expert go to
    `Problem.columns` and on to the reward; one that is called like an argument of the reward is left out with a warning.

    Raises:
        ValueError: for a missing column, an empty dataset, a prompt that is empty or over the budget, a chat prompt
            without chat template, or a tokenizer without end-of-sequence token.
        TypeError: for a column of the wrong type.
        RewardError: if the reward fails on an expert trace.
    """
    where = f"{config.path or config.task}, split {config.split}"
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-sequence token, so no response could end. Set tokenizer.eos_token.")
    columns, rows = load_rows(config)
    further = _further_columns(config, columns, where)
    read = [_read_row(config, tokenizer, further, index, row, where) for index, row in enumerate(rows)]
    problems = [problem for problem in read if problem is not None]
    if not problems:
        raise ValueError(
            f"{where} has no problem to offer: it has {len(read)} rows, and no prompt in them is within "
            f"max_prompt_tokens = {config.max_prompt_tokens}."
        )
    experts = sum(len(problem.experts) for problem in problems)
    rejected = set() if reward is None else _rejected_experts(problems, tokenizer, reward)
    drop = config.on_rejected_expert == "drop"
    if drop:
        problems = [_without(problem, rejected) for problem in problems]
    report = DataReport(
        problems=len(problems),
        without_expert=sum(not problem.experts for problem in problems),
        experts=experts,
        rejected_experts=len(rejected),
        dropped_experts=len(rejected) if drop else 0,
        dropped_prompts=len(read) - len(problems),
    )
    logger.info("%s: %s", where, report)
    return ProblemSet(tuple(problems), report)


class ProblemOrder:
    """The order in which training visits the problems: reshuffled every epoch, a pure function of the seed.

    Every epoch visits each problem once. One call of `next` never repeats a problem, across the border of two epochs
    either, unless it asks for more than there are.
    """

    def __init__(self, num_problems: int, seed: int) -> None:
        if num_problems < 1:
            raise ValueError(f"ProblemOrder: num_problems must be at least 1, got {num_problems}.")
        self.num_problems = num_problems
        self.seed = seed
        self.epoch = 0  # epochs begun
        self._remaining: list[int] = []

    def next(self, count: int) -> list[int]:
        """Return the next `count` problem positions, each in [0, num_problems)."""
        if count < 1:
            raise ValueError(f"ProblemOrder.next: count must be at least 1, got {count}.")
        taken: list[int] = []
        while len(taken) < count:
            if not self._remaining:
                self._begin_epoch(avoid=set(taken))
            missing = count - len(taken)
            taken += self._remaining[:missing]
            self._remaining = self._remaining[missing:]
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values that JSON can hold."""
        return {
            "num_problems": self.num_problems,
            "seed": self.seed,
            "epoch": self.epoch,
            "remaining": list(self._remaining),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; the number of problems and the seed must be the same."""
        for name in ("num_problems", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"ProblemOrder: cannot resume with {name} = {getattr(self, name)}, the saved run had {state[name]}. "
                    "Resume with the data of the saved run, or start a new one."
                )
        self.epoch = state["epoch"]
        self._remaining = list(state["remaining"])

    def _begin_epoch(self, avoid: set[int]) -> None:
        order = random.Random(f"{self.seed}/{self.epoch}").sample(range(self.num_problems), self.num_problems)
        # Problems that this call has taken from the old epoch come last in the new one (a stable sort by False < True).
        self._remaining = sorted(order, key=avoid.__contains__)
        self.epoch += 1


def _further_columns(config: DataConfig, columns: list[str], where: str) -> list[str]:
    """Check that the configured columns exist; return the others, which go to the reward."""
    named = {name: getattr(config, name) for name in ("prompt_column", "solution_column", "expert_column")}
    for name, column in named.items():
        if column is not None and column not in columns and column.split(".")[0] not in columns:
            remedy = f"Set {name} to one of them" + ("." if name == "prompt_column" else ", or to null.")
            raise ValueError(f"{where} has no column {column!r} ({name}); it has {columns}. {remedy}")
    further = [column for column in columns if column not in named.values()]
    for column in set(further) & set(RESERVED_COLUMNS):
        logger.warning("%s: column %r is left out, the reward has an argument of that name", where, column)
    return [column for column in further if column not in RESERVED_COLUMNS]


def _read_row(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    further: list[str],
    index: int,
    row: dict[str, Any],
    where: str,
) -> Problem | None:
    """Return the row as a problem, or None if its prompt is too long and such rows are dropped."""
    at = f"{where}, row {index}"
    value = cell(row, config.prompt_column, at)
    prompt = prompt_text(value, config, tokenizer, at) + config.response_start
    prompt_ids = _prompt_ids(prompt, tokenizer, add_special_tokens=not wants_chat(value, config))
    if not prompt_ids:
        raise ValueError(f"{at}: the prompt is empty. Remove the row.")
    if len(prompt_ids) > config.max_prompt_tokens:
        if config.on_long_prompt == "drop":
            return None
        raise ValueError(
            f"{at}: the prompt has {len(prompt_ids)} tokens, max_prompt_tokens is {config.max_prompt_tokens}. "
            "Raise max_prompt_tokens, or drop such rows with on_long_prompt: drop."
        )
    solution = None
    if config.solution_column is not None:
        solution = solution_text(cell(row, config.solution_column, at), at)
    traces: list[str] = []
    if config.expert_column is not None:
        traces = [without_start(text, prompt) for text in trace_texts(cell(row, config.expert_column, at), at)]
    experts = tuple(_expert(text, tokenizer, at) for text in traces)
    return Problem(index, prompt, prompt_ids, solution, experts, {column: row[column] for column in further})


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> tuple[int, ...]:
    token_ids = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
    # Some tokenizers end every text; a prompt must stay open. A chat template writes its own special tokens.
    if token_ids and add_special_tokens and token_ids[-1] == tokenizer.eos_token_id:
        token_ids = token_ids[:-1]
    return tuple(token_ids)


def _expert(text: str, tokenizer: PreTrainedTokenizerBase, at: str) -> ExpertTrace:
    text = text.removesuffix(tokenizer.eos_token)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id in token_ids:
        raise ValueError(
            f"{at}: an expert trace has the end-of-sequence token {tokenizer.eos_token!r} before its end. Remove it from the text."
        )
    return ExpertTrace(text + tokenizer.eos_token, (*token_ids, tokenizer.eos_token_id))


def _rejected_experts(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, reward: RewardFn) -> set[tuple[int, int]]:
    """Return (problem index, trace number) of every trace with a reward of 0 or less; no opinion rejects nothing."""
    pairs = [(problem, number) for problem in problems for number in range(len(problem.experts))]
    rejected = set()
    for start in range(0, len(pairs), VERIFY_BATCH):
        batch = pairs[start : start + VERIFY_BATCH]
        texts = [problem.experts[number].text.removesuffix(tokenizer.eos_token) for problem, number in batch]
        opinions = judge(reward, [problem for problem, _ in batch], texts)
        for (problem, number), opinion in zip(batch, opinions, strict=True):
            if opinion is not None and opinion <= 0:
                rejected.add((problem.index, number))
    return rejected


def _without(problem: Problem, rejected: set[tuple[int, int]]) -> Problem:
    kept = tuple(expert for i, expert in enumerate(problem.experts) if (problem.index, i) not in rejected)
    return replace(problem, experts=kept)
