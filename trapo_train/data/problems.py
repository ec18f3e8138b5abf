"""The loaded problems: a few numbers about every row in memory, the rows themselves read and tokenised when they are used."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from trapo_train.data.conversations import Endings, answer_text, examples, split_conversation
from trapo_train.data.rows import (
    cell,
    check_thoughts,
    prompt_text,
    solution_text,
    tools_of,
    trace_texts,
    wants_chat,
    with_files,
    with_think_tags,
    without_start,
)
from trapo_train.data.sources import load_rows
from trapo_train.models.tokenizer import check_end, continuations, line_break_behind
from trapo_train.records import ExpertTrace, Problem
from trapo_train.rewards.functions import ABOUT_RESPONSES
from trapo_train.schema import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trapo_train.data.dataset import DataConfig, DataReport

logger = logging.getLogger(__name__)

RESERVED_COLUMNS = ("prompts", "completions", "solution", *ABOUT_RESPONSES)  # what the reward function is called with
CHUNK_ROWS = 256  # rows that are tokenised together: a fast tokenizer spreads them over all cores
CACHED_PROBLEMS = 256  # tokenised problems kept: a step's own, read again by its later micro-groups


class Trace(NamedTuple):
    """An expert trace in use: its place among the traces of its row, and its length."""

    number: int
    num_tokens: int


class Entry(NamedTuple):
    """What is kept in memory of a problem."""

    index: int  # Problem.index
    prompt_tokens: int
    prompt_key: int  # a hash of the prompt's ids
    traces: tuple[Trace, ...]

    def without(self, places: Collection[tuple[int, int]]) -> Entry:
        """The same without the traces at `places`, given by problem index and trace number."""
        return self._replace(traces=tuple(trace for trace in self.traces if (self.index, trace.number) not in places))


class Row(NamedTuple):
    """What a row is read as; `problem` is None for too long a prompt."""

    problem: Problem | None
    traces: list[str]
    counts: dict[str, int]  # what it adds to those of a DataReport


class _Texts(NamedTuple):
    """What a row is as texts, before anything is tokenised."""

    at: str  # the row, as errors name it
    value: Any  # the prompt as it stands in its column
    expert: Any  # and the expert traces, None where it has none
    prompt: str
    rendered: bool  # with the chat template, which writes its own special tokens
    is_bare: bool  # whether the answer of a conversation is its content alone


class ProblemSet(Sequence[Problem]):
    """The loaded problems and what loading found. A problem is read and tokenised when it is asked for."""

    def __init__(
        self,
        reader: RowReader,
        entries: Sequence[Entry],
        report: DataReport,
        fingerprint: str,
        rejected: frozenset[tuple[int, int]] = frozenset(),
    ) -> None:
        self.report = report
        self.fingerprint = fingerprint
        """A hash of all token ids, solutions and columns: equal for equal data, so that resuming can tell when it changed."""
        self.rejected = rejected
        """Problem index and trace number of the expert traces that the reward rejected; the fingerprint knows nothing of them."""
        self._reader = reader
        self._entries = entries
        self._problem = lru_cache(maxsize=CACHED_PROBLEMS)(reader.problem)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._problem(entry) for entry in self._entries[index]]
        return self._problem(self._entries[index])

    @property
    def section(self) -> str:
        """The section of the configuration that they come from, such as eval_data.aime."""
        return self._reader.section

    @property
    def has_solutions(self) -> bool:
        """Whether there is a column of solutions, which rewards get as `solution`."""
        return self._reader.has_solutions

    @property
    def passed_as(self) -> dict[str, str]:
        """Columns that rewards get under another name, and that name."""
        config = self._reader.config
        columns = {"prompts": config.prompt_column, "solution": config.solution_column}
        return {column: name for name, column in columns.items() if column is not None}

    @property
    def longest_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return max((entry.prompt_tokens for entry in self._entries), default=0)

    @property
    def prompt_keys(self) -> list[int]:
        """A number for each problem, equal for equal prompts; two others of a million are equal with a chance of 3e-8."""
        return [entry.prompt_key for entry in self._entries]

    @property
    def traces(self) -> list[int]:
        """How many expert traces each problem has."""
        return [len(entry.traces) for entry in self._entries]

    def longest_with_expert(self, max_tokens: int) -> tuple[int, int]:
        """Tokens of prompt and expert trace where these are longest together, of the traces of at most `max_tokens` tokens."""
        pairs = [(entry.prompt_tokens, trace.num_tokens) for entry in self._entries for trace in entry.traces]
        return max((pair for pair in pairs if pair[1] <= max_tokens), key=sum, default=(0, 0))

    def without_long_experts(self, max_tokens: int) -> tuple[ProblemSet, int]:
        """The same problems without the expert traces of more than `max_tokens` tokens, and how many these were.

        Such a trace is no model for a response: the policy may not write one as long, and cut short it has no answer.
        """
        short = [
            entry._replace(traces=tuple(trace for trace in entry.traces if trace.num_tokens <= max_tokens))
            for entry in self._entries
        ]
        dropped = sum(len(old.traces) - len(new.traces) for old, new in zip(self._entries, short, strict=True))
        return self._with(short), dropped

    def at(self, places: Iterable[int]) -> ProblemSet:
        """The problems at these places."""
        return self._with([self._entries[place] for place in places])

    def with_experts(self) -> ProblemSet:
        """The problems that have an expert trace."""
        return self._with([entry for entry in self._entries if entry.traces])

    def _with(self, entries: Sequence[Entry]) -> ProblemSet:
        return ProblemSet(self._reader, entries, self.report, self.fingerprint, self.rejected)


class RowReader:
    """Turns rows of the configured dataset into problems.

    Raises: UserError as `data.load_problems` says, naming the section of the configuration, the dataset, its split and the row.
    """

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int] | None = None, section: str = "data"
    ) -> None:
        self.section = section
        self.where = f"{section}: {config.path or config.task}, split {config.split}"
        check_end(tokenizer)
        self.config = config
        self.tokenizer = tokenizer
        self._endings = Endings.of(tokenizer, end_ids or [tokenizer.eos_token_id])
        self._line_break = line_break_behind(tokenizer)
        columns, self._rows = load_rows(config, section)
        self._told = False  # of prompts that begin twice
        self._are_conversations = config.prompt_column == config.expert_column
        self._has_experts = _has(columns, config.expert_column)
        self.has_solutions = config.solution_column is not None and (
            config.preset != "messages" or _has(columns, config.solution_column)
        )
        further = _further_columns(config, columns, self.where, section)
        self.unread_columns = tuple(column for column in further if column in RESERVED_COLUMNS)
        self.columns = [column for column in further if column not in RESERVED_COLUMNS]
        self._examples = examples(self._rows, config, self.where)

    def chunks(self) -> Iterator[list[Row]]:
        """All examples in order, some at a time, their problems with expert traces."""
        by_row = groupby(enumerate(self._examples), key=lambda numbered: numbered[1].row)
        rows = ((index, row) for row, (_, of_row) in zip(self._rows, by_row, strict=True) for index, _ in of_row)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            read = self._read(chunk)
            named = [(row.problem.index, text) for row in read if row.problem is not None for text in row.traces]
            experts = self._experts(named)  # all of the chunk's, in order
            yield [
                row._replace(problem=row.problem and replace(row.problem, experts=tuple(islice(experts, len(row.traces)))))
                for row in read
            ]

    def problem(self, entry: Entry) -> Problem:
        """The problem of an entry, with the traces that are in use."""
        (read,) = self._read([(entry.index, self._rows[self._examples[entry.index].row])])
        named = [(entry.index, read.traces[trace.number]) for trace in entry.traces]
        return replace(read.problem, experts=tuple(self._experts(named)))

    def _read(self, chunk: Sequence[tuple[int, dict[str, Any]]]) -> list[Row]:
        """What examples, given by index and row, are read as: their prompts are tokenised together, their traces not yet."""
        texts = [self._texts(index, row) for index, row in chunk]
        encoded, end = _encode_prompts(texts, self.tokenizer), _added_end(self.tokenizer)
        return [self._row(*example, *parts, end) for example, *parts in zip(chunk, texts, encoded, strict=True)]

    def _row(self, index: int, row: dict[str, Any], texts: _Texts, token_ids: list[int], end: tuple[int, ...]) -> Row:
        config, tokenizer = self.config, self.tokenizer
        at, value, expert, prompt, rendered, is_bare = texts
        prompt_ids, twice = (token_ids, False) if rendered else _without_ends(prompt, token_ids, tokenizer, end)
        if twice and not self._told:
            self._told = True
            logger.warning("%s: the prompt begins with %s, which the tokenizer adds: one is left out", at, tokenizer.bos_token)
        if not prompt_ids:
            raise UserError(f"{at}: the prompt is empty. Remove the row.")
        if len(prompt_ids) > config.max_prompt_tokens:
            if config.on_long_prompt == "drop":
                return Row(None, [], {})
            raise UserError(
                f"{at}: the prompt has {len(prompt_ids)} tokens, max_prompt_tokens is {config.max_prompt_tokens}. Raise "
                f"{self.section}.max_prompt_tokens, or drop such rows with {self.section}.on_long_prompt=drop."
            )
        solution = None
        if self.has_solutions and self._examples[index].ends_row:
            solution = solution_text(cell(row, config.solution_column, at), at)
        traces: list[str] = []
        for text in trace_texts(expert, at):
            text = with_think_tags(text, config.think_tags, prompt, at)
            text = without_start(text, prompt, config.response_start, rendered)
            check_thoughts(text, prompt, at)
            traces.append(text)
        columns = {column: with_files(row[column], at) for column in self.columns}
        problem = Problem(index, prompt, tuple(prompt_ids), solution, columns=columns)
        counts = {"bare_answers": is_bare, "plain_prompts": bool(tokenizer.chat_template) and not rendered}
        counts["without_solution"] = self.has_solutions and self._examples[index].ends_row and solution is None
        if traces and self._are_conversations and config.learned_turns == "last":
            counts["context_turns"] = sum(message["role"] == "assistant" for message in value)
        if config.system_prompt is not None:
            counts["own_system"] = isinstance(value, list) and value[0]["role"] == "system"
        return Row(problem, traces, counts)

    def _texts(self, index: int, row: dict[str, Any]) -> _Texts:
        config, tokenizer, example = self.config, self.tokenizer, self._examples[index]
        at = f"{self.where}, {example}"
        value, answer, is_written = cell(row, config.prompt_column, at), None, True
        if self._are_conversations:
            value, answer = split_conversation(value, example.messages, at)
        rendered = wants_chat(value, config)
        tools = tools_of(row, at) if rendered else None
        prompt = prompt_text(value, config, tokenizer, at, tools)
        expert = cell(row, config.expert_column, at) if self._has_experts and not self._are_conversations else None
        if answer is not None:
            expert, is_written = answer_text(value, answer, prompt, config, tokenizer, self._endings, at, tools)
        return _Texts(at, value, expert, prompt + config.response_start, rendered, not is_written)

    def _experts(self, named: Sequence[tuple[int, str]]) -> Iterator[ExpertTrace]:
        """Tokenise traces, each given with the index of its example; one without a token that ends a response gets the first."""
        if not named:
            return
        texts, ends = zip(*(self._endings.split(text) for _, text in named), strict=True)
        end_ids = self._endings.ends
        first, last = (self._examples[index] for index in (named[0][0], named[-1][0]))
        with _encoding(f"{self.where}, from {first} to {last}: an expert trace"):
            encoded = continuations(texts, tokenizer=self.tokenizer, line_break=self._line_break)
        for (index, _), text, end, token_ids in zip(named, texts, ends, encoded, strict=True):
            inside = next((token for token, token_id in end_ids.items() if token_id in token_ids), None)
            if inside is not None:
                raise UserError(
                    f"{self.where}, {self._examples[index]}: an expert trace has {inside!r} before its end, which ends a response. "
                    "Remove it from the text."
                )
            end = end or next(iter(end_ids))
            yield ExpertTrace(text + end, (*token_ids, end_ids[end]))


def fingerprint(problem: Problem) -> bytes:
    """What two equal problems have in common and no others, the columns that a reward reads included."""
    traces, columns = [expert.token_ids for expert in problem.experts], sorted(problem.columns.items())
    return repr((problem.index, problem.prompt_ids, problem.solution, traces, columns)).encode()


def identity(problem: Problem) -> tuple[Any, ...]:
    """What rows that are one held-out problem have in common, whatever their expert traces: prompt and solution, or the columns,
    which hold the answer where there is no solution."""
    return problem.prompt_ids, problem.solution if problem.solution is not None else repr(problem.columns)


def _further_columns(config: DataConfig, columns: list[str], where: str, section: str) -> list[str]:
    """Check that the configured columns exist; return the others, which go to the reward."""
    named = {name: getattr(config, name) for name in ("prompt_column", "solution_column", "expert_column")}
    for name, column in named.items():
        optional = name == "expert_column" and config.is_default(name)  # a dataset without it simply has no expert traces
        optional = optional or (name, column, config.preset) == ("solution_column", "solution", "messages")
        if column is not None and not optional and not _has(columns, column):
            layout, near = _layout_hint(config, columns), did_you_mean(column, columns)
            hint = (layout or near) if config.is_default(name) else (near or layout)  # a name that somebody typed may be misspelt
            preset = f"remove preset: {config.preset} and " if config.preset is not None else ""
            remedy = f"{preset}set {section}.{name} to one of them" + ("." if name == "prompt_column" else ", or to null.")
            raise UserError(f"{where} has no column {column!r} ({name}); it has {columns}.{hint} {remedy[0].upper()}{remedy[1:]}")
    return [column for column in columns if column not in named.values()]


def _layout_hint(config: DataConfig, columns: list[str]) -> str:
    """What makes problems of the columns of layouts that are common on the hub."""
    if "messages" in columns and config.preset != "messages":
        return " For conversations set preset: messages."
    if "conversations" in columns:
        return " For conversations set prompt_column and expert_column to conversations, and solution_column: null."
    pairs = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"))
    for prompt, answer in pairs:
        if prompt in columns and answer in columns:
            preset = "no preset, " if config.preset is not None else ""
            return f" For SFT on them set {preset}prompt_column: {prompt}, expert_column: {answer} and solution_column: null."
    return ""


def _has(columns: list[str], column: str | None) -> bool:
    return column is not None and (column in columns or column.split(".")[0] in columns)


@contextmanager
def _encoding(what: str) -> Iterator[None]:
    """Names `what` a tokenizer cannot encode."""
    try:
        yield
    except Exception as error:  # tokenizers raises that very class, for a text beyond a vocabulary without an unknown token
        raise UserError(f"{what} must be text that the tokenizer knows: {error}. Set model.tokenizer to one that does.") from error


def _encode_prompts(texts: Sequence[_Texts], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of every prompt, with the tokenizer's special tokens where it is not `rendered`."""
    found: list[list[int]] = []
    for rendered, alike in groupby(texts, key=lambda text: text.rendered):
        group = list(alike)
        try:
            found += tokenizer([text.prompt for text in group], add_special_tokens=not rendered)["input_ids"]
        except Exception:  # as in _encoding; by itself each shows which it is
            for text in group:
                with _encoding(f"{text.at}: the prompt"):
                    tokenizer(text.prompt, add_special_tokens=not rendered)
            raise
    return found


def _added_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts behind every text: nothing, or its own end of sequence, whatever `model.eos_token` says."""
    one, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    places = [i for i in range(len(one) - len(plain) + 1) if one[i : i + len(plain)] == plain]
    return tuple(one[places[0] + len(plain) :]) if plain and places else ()


def _without_ends(
    prompt: str, token_ids: list[int], tokenizer: PreTrainedTokenizerBase, end: tuple[int, ...]
) -> tuple[list[int], bool]:
    """The token ids of a text prompt less what the tokenizer added that does not belong there, and whether that is a second
    beginning-of-sequence token."""
    # Some tokenizers end every text; a prompt must stay open.
    if end and tuple(token_ids[-len(end) :]) == end:
        token_ids = token_ids[: -len(end)]
    elif token_ids and token_ids[-1] == tokenizer.eos_token_id:
        token_ids = token_ids[:-1]
    # A text that was rendered before has one already; transformers adds another.
    twice = tokenizer.bos_token_id is not None and token_ids[:2] == [tokenizer.bos_token_id] * 2
    twice = twice and len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) < len(token_ids)  # or both are the text's own
    return token_ids[1:] if twice else token_ids, twice
