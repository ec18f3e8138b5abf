"""Every setting with its type, default and meaning, as the dataclasses of the configuration say it."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NamedTuple

from trapo_train.config import RunConfig
from trapo_train.schema import UserError, did_you_mean


class Setting(NamedTuple):
    """One key of a configuration."""

    key: str
    """Its path, `rollout.temperature`; `reward[].name` in each entry of a list, which overrides replace as a whole."""
    type: str
    """As it is annotated."""
    default: str
    """As YAML writes it; "" where it must be set, or where it is a section."""
    about: str
    """What it does."""


def settings(section: str = "") -> list[Setting]:
    """Those of a section by its path, such as `rollout.vllm`, sections within it included; of the whole configuration for "".

    Raises: UserError for what is no section.
    """
    cls: Any = RunConfig
    prefix = ""
    for part in filter(None, section.split(".")):
        inner = {name: kind for name, kind in _sections(cls)}
        if part not in inner:
            known = ", ".join(inner) or "none"
            raise UserError(f"settings: {section} must name a section, got {part!r}; there are {known}.{did_you_mean(part, inner)}")
        prefix += f"{part}[]." if _is_of_a_list(typing.get_type_hints(cls)[part]) else f"{part}."
        cls = inner[part]
    return list(_settings(cls, prefix))


def _settings(cls: type, prefix: str) -> Iterator[Setting]:
    about, inner = _docstrings(cls), dict(_sections(cls))
    for item in fields(cls):
        if not item.init:
            continue
        where = f"{prefix}{item.name}"
        default = "" if item.name in inner else _default(item)
        yield Setting(where, _type(item), default, about.get(item.name, ""))


def _sections(cls: type) -> Iterator[tuple[str, type]]:
    """The fields that are dataclasses of their own, or may be, or may hold some."""
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        kind = next(_dataclasses(hints[item.name]), None)
        if kind is not None:
            yield item.name, kind


def _dataclasses(kind: Any) -> Iterator[type]:
    if is_dataclass(kind):
        yield kind
    for inner in typing.get_args(kind):
        yield from _dataclasses(inner)


def _is_of_a_list(kind: Any) -> bool:
    """Whether the dataclass in this type is that of a list's entries."""
    return not is_dataclass(kind) and any(
        typing.get_origin(inner) is list and any(_dataclasses(inner)) for inner in (kind, *typing.get_args(kind))
    )


def _docstrings(cls: type) -> dict[str, str]:
    """The text below each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            for field, text in zip(body.body, body.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _type(item: Field) -> str:
    return item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))


def _default(item: Field) -> str:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    if value is MISSING:
        return ""
    plain = isinstance(value, str) and value.isprintable() and value != ""
    return value if plain else json.dumps(value) if value is None or isinstance(value, (bool, str)) else str(value)
