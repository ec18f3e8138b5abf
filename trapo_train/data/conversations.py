"""Conversations: which turns of them are learned, their prompts, and an answer as the chat template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from trapo_train.data.rows import BESIDE_CONTENT, Message, cell, checked_messages, rendered_chat, shown
from trapo_train.models.tokenizer import special_tokens
from trapo_train.records import END_THINK, THINK
from trapo_train.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trapo_train.data.dataset import DataConfig


class Endings(NamedTuple):
    """The tokens that end a response with their ids, the first of which ends a trace that has none, and all special tokens."""

    ends: dict[str, int]
    special: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> Endings:
        """Those of the tokenizer; a response ends with any of `end_ids`."""
        ends = dict(zip(tokenizer.convert_ids_to_tokens(list(end_ids)), end_ids, strict=True))
        return cls(ends, tuple(sorted({*ends, *special_tokens(tokenizer).values()}, key=len, reverse=True)))

    def split(self, text: str) -> tuple[str, str]:
        """A text and the token of `ends` behind it, "" where it ends with none."""
        end = next((end for end in self.ends if text.endswith(end)), "")
        return text.removesuffix(end), end


class Example(NamedTuple):
    """What a problem is made of: a row, or the first `messages` of the conversation in it."""

    row: int
    messages: int | None = None
    ends_row: bool = True  # whether the row's solution is about it

    def __str__(self) -> str:
        return f"row {self.row}" if self.messages is None else f"row {self.row} up to message {self.messages}"


class _WholeRows(Sequence[Example]):
    """Every row once, made when it is asked for: a list of a million takes 100 MiB."""

    def __init__(self, count: int) -> None:
        self._rows = range(count)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return Example(self._rows[index])


def examples(rows: Sequence[dict[str, Any]], config: DataConfig, where: str) -> Sequence[Example]:
    """Return what the rows are read as, in their order: each once, or, with `learned_turns: all`, a conversation once for every
    turn of the assistant that answers a message, one that is neither a system message nor the assistant's own, and once as a whole
    where another role has the last word or no turn answers."""
    if config.learned_turns == "last":
        return _WholeRows(len(rows))
    found: list[Example] = []
    for number, row in enumerate(rows):
        at = f"{where}, row {number}"
        messages = _conversation(cell(row, config.prompt_column, at), at)
        roles = [message["role"] for message in messages]
        answers = (end for end in range(2, len(roles) + 1) if roles[end - 1] == "assistant")
        ends = [end for end in answers if roles[end - 2] not in ("assistant", "system")]
        if roles[-1] != "assistant" or not ends:
            ends.append(len(roles))
        found += [Example(number, end, end == len(roles)) for end in ends]
    return found


def split_conversation(value: Any, end: int | None, where: str) -> tuple[list[Message], Message | None]:
    """Return the prompt of the first `end` messages of a conversation, all before the last of them, and that one, which is the
    expert trace; None where another role than assistant speaks last, and all of them are the prompt."""
    messages = _conversation(value, where)[:end]
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1 or messages[-2]["role"] == "assistant":
        got = "an assistant message alone" if len(messages) == 1 else "two assistant messages at its end"
        raise UserError(
            f"{where}: a conversation must have a message before the last, which is answered, got {got}. Remove the row"
            f"{'' if len(messages) == 1 else ', or the last message from it'}."
        )
    return messages[:-1], messages[-1]


def answer_text(
    messages: list[Message],
    answer: Message,
    prompt: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    endings: Endings,
    where: str,
    tools: list[Any] | None = None,
) -> tuple[str, bool]:
    """Return what the chat template writes of an `answer` behind the rendered `prompt`, thoughts and tool calls included, and the
    token that ends the turn if it ends a response here; and True. Where it does not go on from there, as one whose generation
    prompt opens thoughts does not for an answer without, or leaves out some of the content, as one that drops thoughts: the content
    alone and False.

    Raises: UserError for a field of BESIDE_CONTENT that the template does not write, and where content alone would not do.
    """
    content = answer.get("content", "")
    further = [field for field in BESIDE_CONTENT if answer.get(field)]
    if not content and not further:  # nobody answered
        return "", True

    def rendered(answer: Message) -> str:
        return rendered_chat([*messages, answer], config, tokenizer, where, tools, add_generation_prompt=False)

    whole = rendered(answer)
    for field in further:
        others = {"content": "", **{name: value for name, value in answer.items() if name != field}}
        without = None
        with suppress(UserError):  # a template that misses the field reads it
            without = rendered(others)
        if without == whole:
            raise UserError(
                f"{where}: the chat template must write the field {field} of the last message, it does not. Set model.tokenizer to "
                "one whose template does, or remove the field from the row."
            )
    turn = _turn(whole.removeprefix(prompt), endings) if whole.startswith(prompt) else None
    # The template may move thoughts, which the content has before </think>.
    parts = [part.strip().removeprefix(THINK).strip() for part in content.split(END_THINK)]
    if turn is not None and turn[0].strip() and all(part in turn[0] for part in parts):
        return "".join(turn), True
    if not content.strip() or answer.get("tool_calls"):
        raise UserError(
            f"{where}: the chat template must write all of the last message after the rendered prompt, which {shown(answer)} is "
            "not, and its content alone cannot take its place. Remove the row, or set model.tokenizer to one with another template."
        )
    return content, False


def _conversation(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: a conversation must be a non-empty list of messages with role and content, got {shown(value)}.")
    return checked_messages(value, f"{where}: a conversation")


def _turn(text: str, endings: Endings) -> tuple[str, str] | None:
    """A rendered turn and the first token that ends a response behind it, "" where another special token ends the turn; None where
    more than special tokens stands behind one that ends a response."""
    turn, rest = None, text.rstrip()
    while rest.endswith(endings.special):
        token = next(token for token in endings.special if rest.endswith(token))
        rest = rest.removesuffix(token)
        if token in endings.ends:
            turn = rest, token
        rest = rest.rstrip()
    if turn is None and not any(end in text for end in endings.ends):
        other = next((token for token in endings.special if text.rstrip().endswith(token)), "")
        return text.rstrip().removesuffix(other), ""
    return turn
