"""Conversations: which turns of them are learned, their prompts, and an answer as the chat template writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from trapo_train.rows import BESIDE_CONTENT, END_THINK, THINK, Message, cell, checked_messages, rendered_chat, shown
from trapo_train.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trapo_train.data import DataConfig


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
    where: str,
    tools: list[Any] | None = None,
) -> tuple[str, bool]:
    """Return what the chat template writes of an `answer` behind the rendered `prompt`, thoughts and tool calls included, without
    the token that ends the turn; and True. Where it does not go on from there, as one whose generation prompt opens thoughts does
    not for an answer without, or leaves out some of the content, as one that drops thoughts: the content alone and False.

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
    text = _turn(whole.removeprefix(prompt), tokenizer) if whole.startswith(prompt) else None
    # The template may move thoughts, which the content has before </think>.
    parts = [part.strip().removeprefix(THINK).strip() for part in content.split(END_THINK)]
    if text is not None and text.strip() and all(part in text for part in parts):
        return text, True
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


def _turn(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A rendered turn without the token that ends it, be that one EOS or, as a response ends with EOS here, another special token;
    None where more than special tokens stands behind EOS."""
    turn, end, rest = text.rpartition(tokenizer.eos_token)
    if end and not rest.strip():
        return turn
    special = "|".join(re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special)
    if not end:
        return re.sub(f"({special})$", "", rest.rstrip()) if special else rest.rstrip()
    return turn if re.fullmatch(rf"(\s|{special})*", rest) else None
