"""Build nested frozen dataclasses from plain mappings, strictly: unknown keys, wrong types and bad ranges are errors."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")
KeyPath = tuple[str, ...]
_CALLED_HERE = {  # what is spelt quite differently: the plan of the TRAPO paper, and settings that TRL's and others' users look for
    "trapo": "paper",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "batch_size": "prompts_per_step",
    "train_batch_size": "prompts_per_step",
    "per_device_train_batch_size": "packing.max_tokens",
    "num_generations": "plan.num_samples",
    "n": "plan.num_samples",
    "max_completion_length": "rollout.max_response_tokens",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_tokens": "rollout.max_response_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "reward_funcs": "reward",
    "model_name_or_path": "model.name_or_path",
    "dataset_name": "data.path",
}


class UserError(ValueError):
    """What the user can correct: the command line shows the message alone. A plain ValueError is a bug, and shows its traceback."""


class MissingPackage(UserError, ImportError):
    """A package of an extra that is not installed; the message names the extra."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key, what is wrong with it, and where it was set."""


@contextmanager
def refused(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Inside, a library is given what the user configured: where it raises one of `kinds`, that is a UserError, `what` and why."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what}: {error}") from error


def build(cls: type[T], values: Any, origin: Callable[[KeyPath], str], path: KeyPath = ()) -> T:
    """Build dataclass `cls` from a mapping, nested dataclasses included.

    `origin(path)` says where the value at a key path was set, for the error messages. Whole numbers are accepted for
    floats, null for optional fields only. A section that is left out is built from its own defaults.

    Raises:
        ConfigError: for an unknown or missing key, a wrong type, or a value that the dataclass's own check refuses.
    """
    if not isinstance(values, dict):
        raise _wrong_type(values, f"a section with the keys {_listed(cls)}", origin, path, cls)
    known = {item.name: item for item in fields(cls) if item.init}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            raise ConfigError(_unknown_key(str(key), {name: hints[name] for name in known}, origin, path))
    arguments: dict[str, Any] = {}
    missing = []
    for name, item in known.items():
        if name in values:
            arguments[name] = _convert(values[name], hints[name], origin, (*path, name))
        elif is_dataclass(hints[name]):
            arguments[name] = build(hints[name], {}, origin, (*path, name))
        elif item.default is MISSING and item.default_factory is MISSING:
            missing.append(".".join((*path, name)))
    if missing:
        raise ConfigError(f"{origin(path)}: {', '.join(missing)} must be set.")
    try:
        return cls(**arguments)
    except UserError as error:
        section = ".".join(path)
        named = not section or str(error).startswith(section)
        raise ConfigError(f"{origin(path)}: {'' if named else section + ': '}{error}") from error


def check(config: Any, *rules: tuple[str, bool, str]) -> None:
    """Raise UserError unless each field of dataclass `config` whose type lists its values has one of them, and every rule holds:
    (the field, whether it holds, what its value must be)."""
    hints = typing.get_type_hints(type(config))
    listed = [(name, _is_listed(getattr(config, name), expected), _type_name(expected)) for name, expected in hints.items()]
    for name, holds, rule in (*listed, *rules):
        if not holds:
            raise UserError(f"{name} must be {rule}, got {getattr(config, name)!r}.")


def expand_home(config: Any, *names: str) -> None:
    """Put the home directory in place of a ~ at the start of these fields of dataclass `config`, paths or null.

    Raises: UserError for a ~ that no home directory takes the place of, or a $VARIABLE: a directory would have that name.
    """
    for name in names:
        path = getattr(config, name)
        if path is None:
            continue
        expanded = os.path.expanduser(path)
        if expanded.startswith("~") or re.search(r"\$[{\w]", path):
            raise UserError(
                f"{name} must be a path without a $VARIABLE, and with no ~ but that of a home directory, got {path!r}. "
                "Write it out; on the command line the shell does so in double quotes."
            )
        object.__setattr__(config, name, expanded)


def changed(section: Any) -> list[str]:
    """The names of a section's settings that are not at their defaults."""
    default = type(section)()
    return [item.name for item in fields(section) if getattr(section, item.name) != getattr(default, item.name)]


def _is_listed(value: Any, expected: Any) -> bool:
    """Whether `value` is among those that a type with a Literal lists; true for any other type, which is not looked at."""
    kind, arguments = typing.get_origin(expected), typing.get_args(expected)
    if kind is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if kind is list:
        return all(_is_listed(entry, arguments[0]) for entry in value)
    if kind in (Union, types.UnionType) and any(typing.get_origin(member) is Literal for member in arguments):
        return any(_is_listed(value, m) if typing.get_origin(m) is Literal else isinstance(value, m) for m in arguments)
    return True


def _convert(value: Any, expected: Any, origin: Callable[[KeyPath], str], path: KeyPath) -> Any:
    kind = typing.get_origin(expected) or expected
    arguments = typing.get_args(expected)
    if kind is Any:
        return value
    if kind in (Union, types.UnionType):
        return _convert_union(value, expected, origin, path)
    if kind is Literal:
        return _convert_choice(value, arguments, origin, path)
    if is_dataclass(kind):
        return build(kind, value, origin, path)
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        items = _item_types(arguments, len(value))
        if items is None:
            raise _wrong_type(value, _type_name(expected), origin, path)
        pairs = enumerate(zip(value, items, strict=True))
        return kind(_convert(entry, item, origin, (*path, str(i))) for i, (entry, item) in pairs)
    if kind is dict and isinstance(value, dict):
        item = arguments[1] if arguments else Any
        present = {
            key: entry for key, entry in value.items() if entry is not None or not is_dataclass(item)
        }  # null: no such section
        return {str(key): _convert(entry, item, origin, (*path, str(key))) for key, entry in present.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    raise _wrong_type(value, _type_name(expected), origin, path)


def _item_types(arguments: tuple[Any, ...], length: int) -> list[Any] | None:
    """Return the type of each entry of a list or tuple type; None if it fixes another length."""
    if not arguments:
        return [Any] * length
    if len(arguments) == 1 or arguments[1] is Ellipsis:
        return [arguments[0]] * length
    return list(arguments) if len(arguments) == length else None


def _convert_union(value: Any, expected: Any, origin: Callable[[KeyPath], str], path: KeyPath) -> Any:
    members = typing.get_args(expected)
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1 and value is not None:
        return _convert(value, members[0], origin, path)
    for member in members:
        if _is_meant(value, member):
            return _convert(value, member, origin, path)  # with the error of the entry that is wrong
        try:
            return _convert(value, member, origin, path)
        except ConfigError:
            continue
    raise _wrong_type(value, _type_name(expected), origin, path, next(filter(is_dataclass, members), None))


def _is_meant(value: Any, member: Any) -> bool:
    """Whether of a union's types `value` can only be this one: a list, or a section, or a mapping of names to sections."""
    if isinstance(value, list):
        return typing.get_origin(member) is list
    if isinstance(value, dict):
        of_sections = typing.get_origin(member) is dict and is_dataclass(typing.get_args(member)[1])
        entries = [entry for entry in value.values() if entry is not None]
        nested = bool(entries) and all(isinstance(entry, dict) for entry in entries)
        return of_sections if nested else is_dataclass(member)
    return False


def _convert_choice(value: Any, choices: tuple[Any, ...], origin: Callable[[KeyPath], str], path: KeyPath) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    raise ConfigError(
        f"{origin(path)}: {'.'.join(path)} must be one of {', '.join(map(str, choices))}, got {value!r}."
        f"{did_you_mean(str(value), [str(choice) for choice in choices])}"
    )


def _wrong_type(
    value: Any, expected: str, origin: Callable[[KeyPath], str], path: KeyPath, section: type | None = None
) -> ConfigError:
    """`section`: the dataclass that was expected; a text in its place is probably its name or path."""
    key = ".".join(path) or "the configuration"
    got = "null" if value is None else f"{value!r} ({_type_name(type(value))})"
    known = {item.name for item in fields(section)} if section is not None and isinstance(value, str) else set()
    named = [name for name in ("path", "name_or_path", "name") if name in known]
    in_list = bool(path) and path[-1].isdigit()  # whose entries are no settings of their own
    meant = f" Did you mean {f'{{{named[0]}: {value}}}' if in_list else f'{key}.{named[0]}={value}'}?" if named else ""
    if "text" in expected.split(" or ") and value is not None and not in_list:
        meant = f" {quotes_for(key)}"
    return ConfigError(f"{origin(path)}: {key} must be {expected}, got {got}.{meant}")


def quotes_for(key: str) -> str:
    """The remedy for a text that YAML reads as something else."""
    return f"Put quotes around a text with characters or words that mean something in YAML: '{key}=\"…\"' on the command line."


def _unknown_key(key: str, known: dict[str, Any], origin: Callable[[KeyPath], str], path: KeyPath) -> str:
    """`known`: the types of the keys of this section."""
    full, prefix = ".".join((*path, key)), "".join(f"{part}." for part in path)
    renamed = _CALLED_HERE.get(key, "")
    renamed = renamed if not path or renamed.startswith(prefix) else ""
    elsewhere = [*(prefix + inner for inner in _inside(key, known)), *([renamed] if "." in renamed else [])]
    near = f" Did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else did_you_mean(key, known, prefix)
    section = f"section {'.'.join(path)!r}" if path else "the configuration"
    return f"{origin((*path, key))}: unknown key {full!r}.{near} The keys of {section} are: {', '.join(known)}."


def _inside(key: str, known: dict[str, Any]) -> Iterator[str]:
    """The keys of this name, or with these initials, in the sections among `known`."""
    for name, expected in known.items():
        for section in filter(is_dataclass, (expected, *typing.get_args(expected))):
            yield from (f"{name}.{item.name}" for item in fields(section) if item.init and key in (item.name, _initials(item.name)))


def did_you_mean(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """ " Did you mean …?" of the choice that is closest in spelling, or whose words start with these letters, lr for
    learning_rate, or that has another name here; "" where none is near."""
    choices = list(choices)
    renamed = [choice for choice in choices if choice == _CALLED_HERE.get(word)]
    abbreviated = [choice for choice in choices if word == _initials(choice)]
    near = renamed or abbreviated or difflib.get_close_matches(word, choices, n=1)
    return f" Did you mean {prefix + near[0]!r}?" if near else ""


def _initials(name: str) -> str:
    """lr of learning_rate; "" of a single word."""
    return "".join(part[:1] for part in name.split("_")) if "_" in name else ""


def _listed(cls: type) -> str:
    return ", ".join(item.name for item in fields(cls) if item.init)


def _type_name(expected: Any) -> str:
    kind = typing.get_origin(expected) or expected
    arguments = [argument for argument in typing.get_args(expected) if argument is not Ellipsis]
    if kind in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if kind in (list, tuple):
        kinds = [_type_name(argument) for argument in arguments]
        if len(kinds) > 1:
            return f"a list of {len(kinds)}: {', '.join(kinds)}"
        return f"a list of {kinds[0]}" if kinds else "a list"
    if kind is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if is_dataclass(kind):
        return f"a section with the keys {_listed(kind)}"
    names = {bool: "true or false", int: "int", float: "float", str: "text", dict: "a mapping", type(None): "null"}
    return names.get(kind, str(expected))
