"""The cells of dataset rows as texts: prompts, solutions and expert traces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import date, time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from trapo_train.records import END_THINK, THINK, opens_thoughts
from trapo_train.schema import UserError, refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trapo_train.data.dataset import DataConfig

RENDERING = {"conversation", "messages", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"}
Message = dict[str, Any]  # role, content and whatever else the chat template reads
BESIDE_CONTENT = ("tool_calls", "reasoning_content", "thinking")  # what else an assistant says in a message


def cell(row: dict[str, Any], column: str, where: str) -> Any:
    """Return a row's value in a column; a dot in the column name reaches into a struct, if no column is called so."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, dict) or key not in value:
            present = f"has the fields {sorted(value)}" if isinstance(value, dict) else f"is {type(value).__name__}"
            raise UserError(f"{where}: column {column!r} has no field {key!r}: the value there {present}.")
        value = value[key]
    return value


def with_files(value: Any, where: str) -> Any:
    """A cell with the content of the files in it, images, audio and the like, as datasets names them by their absolute path where
    it reads a folder: what it says does not depend on where that lies."""
    if isinstance(value, list):
        return [with_files(item, where) for item in value]
    if not isinstance(value, dict):
        return value
    path = value.get("path")
    if value != {"bytes": None, "path": path} or not isinstance(path, str) or not Path(path).is_absolute():
        return {key: with_files(item, where) for key, item in value.items()}
    try:
        return {"bytes": Path(path).read_bytes(), "path": Path(path).name}
    except OSError as error:
        raise UserError(f"{where}: a file of the dataset must be readable, got {error}. Put it there or remove the row.") from error


def prompt_text(
    value: Any, config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str, tools: list[Any] | None = None
) -> str:
    """Return the text of a prompt: as it is, or rendered with the chat template, with `tools` and its generation prompt."""
    if isinstance(value, str):
        if not wants_chat(value, config):
            if config.chat_template_kwargs:
                raise UserError(
                    f"{where}: chat_template_kwargs need a prompt that is rendered with the chat template, got a text. Set "
                    "as_chat: true, or leave them out."
                )
            return value
        messages = [{"role": "user", "content": value}]
    else:
        messages = checked_messages(value, f"{where}: a prompt")
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: a chat prompt must end with what the model is to answer, got an assistant message at its end. Leave the "
            "answer out of the prompt; expert_column is the place for it, or the same column for conversations (preset: "
            "messages)."
        )
    return rendered_chat(messages, config, tokenizer, where, tools, add_generation_prompt=True)


def rendered_chat(
    messages: list[Message],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    tools: list[Any] | None,
    *,
    add_generation_prompt: bool,
) -> str:
    """Return what the tokenizer's chat template writes of `messages`, behind the configured system prompt where they have none."""
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: a chat prompt needs a tokenizer with a chat template, and this one has none. Use the tokenizer "
            "of an instruction-tuned model (model.tokenizer), or give the prompt as text without as_chat and system_prompt."
        )
    variables = config.chat_template_kwargs
    with refused(f"{where}: the tokenizer has several chat templates and none by default", ValueError):
        template = tokenizer.get_chat_template(tools=tools) if variables or tools is not None else ""
    if variables:
        _check_variables(variables, template, where)
    if tools is not None:
        if "tools" not in _variables(template, where):
            raise UserError(
                f"{where}: the tokenizer's chat template must read the tools of the column tools, it does not. Set model.tokenizer "
                "to one that does, or remove the column."
            )
        variables = variables | {"tools": tools}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables)
    except Exception as error:  # a template is the model's own code and may raise anything
        raise UserError(f"{where}: the chat template refused the prompt: {error}") from error


def tools_of(row: dict[str, Any], where: str) -> list[Any] | None:
    """Return what a row has in its column tools, descriptions of functions as a list or as JSON; None where it has none."""
    value = row.get("tools")
    if isinstance(value, str):
        with suppress(ValueError):  # refused below, as any other text
            value = json.loads(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(
            f"{where}: the column tools must hold a list of function descriptions for the chat template, got {shown(value)}. "
            "Rename the column if it is something else."
        )
    return _without_none(value)


def wants_chat(prompt: Any, config: DataConfig) -> bool:
    """Return whether a prompt is rendered with the chat template."""
    return config.as_chat or config.system_prompt is not None or not isinstance(prompt, str)


def solution_text(value: Any, where: str) -> str | None:
    """Return a solution as text, which may be the only item of a list; whole numbers, such as 27.0, are spelled, None stays.

    Raises: UserError for anything else, and for a float that is not below 2^53, as tables hold whole numbers beyond int64.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, float) and value.is_integer():
        if abs(value) >= 2**53:
            raise UserError(
                f"{where}: a solution that is a float must be below 2^53, as larger ones may be rounded, got {shown(value)}. "
                "Write the column's numbers as text."
            )
        whole = True
    if whole:
        return str(int(value))
    if value is None or isinstance(value, str):
        return value
    is_date = isinstance(value, date | time)
    remedy = "Convert the column" + (", of JSON to text in Parquet: in JSON such text is read as a date" if is_date else "")
    raise UserError(
        f"{where}: a solution must be text, a whole number, a list of one of these, or null, got {shown(value)}. {remedy}."
    )


def trace_texts(value: Any, where: str) -> list[str]:
    """Return the expert traces of a cell: text, an assistant message, or a list of these; empty ones are left out."""
    if value is None:
        return []
    if not isinstance(value, list):
        value = [value]
    return [text for text in (_trace_text(item, where) for item in value) if text]


def with_think_tags(trace: str, mode: str, prompt: str, where: str) -> str:
    """The expert trace with its <think> tags treated as `DataConfig.think_tags` says; the prompt may have opened them."""
    opened = trace.lstrip().startswith(THINK) or opens_thoughts(prompt)
    if mode == "strip":
        return re.sub(f"^{THINK}\\s*|{THINK}|{END_THINK}", "", trace.lstrip())
    if mode == "add" and not opened:
        return f"{THINK}\n{trace}"
    if mode == "require" and not (opened and END_THINK in trace):
        raise UserError(
            f"{where}: an expert trace must open with {THINK} and have {END_THINK} (think_tags: require), got {shown(trace)}. "
            "Remove the row, or set think_tags: keep or add."
        )
    return trace


def without_start(trace: str, prompt: str, response_start: str, rendered: bool) -> str:
    """The expert trace without what the prompt ends with already: response_start, <think>, or whatever tag a chat template opened,
    or the empty thoughts that it wrote, where the prompt was `rendered` with one."""
    tag = re.search(rf"({THINK}\s*{END_THINK}|<[A-Za-z_|]+>)\s*$" if rendered else f"{THINK}\\s*$", prompt)
    opening = response_start.strip() or (tag.group().strip() if tag else "")
    if not opening or not trace.lstrip().startswith(opening):
        return trace
    rest = trace.lstrip().removeprefix(opening)
    gap = prompt[len(prompt.rstrip()) :]
    # White space behind the tag that the prompt has is the prompt's; what it lacks stays for the model to write.
    return rest.removeprefix(gap) if rest.startswith(gap) else rest.lstrip()


def check_thoughts(trace: str, prompt: str, where: str) -> None:
    """Raise UserError for a trace with thoughts behind a prompt that has ended them: the model would learn to think twice."""
    if trace.lstrip().startswith(THINK) and re.search(rf"{THINK}\s*{END_THINK}\s*$", prompt):
        raise UserError(
            f"{where}: an expert trace must have no thoughts where the prompt ends with empty ones, got {shown(trace)} behind "
            f"{prompt.rstrip()[-24:]!r}. Have the chat template leave thoughts to the model, as with chat_template_kwargs="
            "{enable_thinking: true}, or set think_tags=strip."
        )


def checked_messages(value: Any, what: str) -> list[Message]:
    """The messages without null fields (a dataset gives every row the fields of all), text parts of a content joined."""
    good = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    messages = [_with_one_text(message) for message in _without_none(value)] if good else []
    good = bool(messages) and all(
        isinstance(message.get("role"), str) and isinstance(message.get("content", "" if message.get("tool_calls") else None), str)
        for message in messages
    )
    if not good:
        renamed = any({"from", "value"} <= message.keys() for message in messages)
        remedy = " Rename from and value to role and content, and human and gpt to user and assistant." if renamed else ""
        raise UserError(
            f"{what} must be text or a non-empty list of messages with text under 'role' and 'content' (which one with tool_calls "
            f"need not have), got {shown(value)}.{remedy}"
        )
    return messages


def _with_one_text(message: Message) -> Message:
    parts = message.get("content")
    if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
        return message
    if not parts and not message.get("tool_calls"):  # no text, not an empty one
        return message
    return message | {"content": "".join(part["text"] for part in parts)}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def shown(value: Any) -> str:
    """Return how an error shows a value: its beginning and its type."""
    return f"{repr(value)[:100]} ({type(value).__name__})"


def _check_variables(given: Iterable[str], template: str, where: str) -> None:
    read = _variables(template, where)
    unread = [name for name in given if name not in read]
    if unread:
        raise UserError(
            f"{where}: chat_template_kwargs must be variables that the tokenizer's chat template reads, which are "
            f"{', '.join(sorted(read)) or 'none'}, got {', '.join(unread)}. Leave that out, or set model.tokenizer to one that "
            "reads it."
        )


class _Generation(Extension):
    """The block that transformers adds to the templates' language, {% generation %} around what the assistant wrote."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a scope of its own: what is set in it is not set behind it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("unused"), [], [], body).set_lineno(line)


def _variables(template: str, where: str) -> frozenset[str]:
    try:
        return _read_variables(template)
    except TemplateSyntaxError as error:
        raise UserError(f"{where}: the chat template cannot be read: {error}. Set model.tokenizer to another.") from error


@lru_cache
def _read_variables(template: str) -> frozenset[str]:
    """The variables that a chat template reads and does not set first, without those that transformers gives to every template."""
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    found = meta.find_undeclared_variables(environment.parse(template))
    return frozenset(found - RENDERING - {"raise_exception", "strftime_now"})


def _trace_text(item: Any, where: str) -> str:
    if item is None or isinstance(item, str):
        return item or ""
    messages = checked_messages(item if isinstance(item, list) else [item], f"{where}: an expert trace")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise UserError(f"{where}: an expert trace must be one assistant message, got the roles {roles}.")
    further = sorted(messages[0].keys() & set(BESIDE_CONTENT))
    if further:
        raise UserError(
            f"{where}: an expert trace is the content of a message, got one with {', '.join(further)} as well. Append it to the "
            "messages of its prompt, in one column (preset: messages), where the chat template writes all of it."
        )
    return messages[0]["content"]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
