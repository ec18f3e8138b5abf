"""A configuration as it is written: recipes, YAML as people mean it, overrides. Whether its keys and values exist, `config` knows.

Nothing heavy is imported here: what is wrong with a file is told at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml

from trapo_train.schema import ConfigError, KeyPath, quotes_for

CONFIG_FILE, MODEL_DIR, ADAPTER_DIR = "config.yaml", "model", "adapter"  # of a run, in its output_dir

Given = tuple[dict[Any, Any], Callable[[KeyPath], str]]  # values, and where each key was set


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Given:
    """The values of a YAML file, or of a recipe of the package by its name, with overrides such as "plan.name=grpo" applied.

    An override's value is YAML too: 3, 1e-6, true, null, [1, 2]; a text without quotes is taken as it stands, with # and all behind
    it, unless YAML reads it as something else, as "a: b" or "[a]". It replaces the value at its key; missing sections on the way
    are created. One of steps and epochs, overridden alone, takes the place of the other.

    Raises:
        ConfigError: naming the file or the override, for what is not there, no YAML, or no mapping of keys to values.
    """
    file, text = _read(str(path))
    values = _parse_yaml(text, file)
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a configuration must be a mapping of keys to values, got {type(values).__name__}.")
    applied: list[tuple[KeyPath, str]] = []
    for override in overrides:
        applied.append((_apply_override(values, override), override))
    overridden = [name for name in ("steps", "epochs") if any(key == (name,) for key, _ in applied)]
    if len(overridden) == 1 and values[overridden[0]] is not None:
        values.pop("epochs" if overridden == ["steps"] else "steps", None)

    def origin(key: KeyPath) -> str:
        for target, override in reversed(applied):
            if key[: len(target)] == target:
                return f"override {override!r}"
        beneath = [repr(override) for target, override in applied if target[: len(key)] == key]
        return f"{file} with override {', '.join(beneath)}" if beneath else file

    return values, origin


def read_finished_run(directory: str | Path, overrides: Sequence[str] = ()) -> Given:
    """As `read_config`, of a run's own configuration, with the model that it trained, wherever its directory is now.

    Raises:
        FileNotFoundError: for a directory without a configuration, or without a model where no override names one.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{directory}: the directory of a finished run holds {CONFIG_FILE}, this one does not.")
    model = directory / MODEL_DIR
    if not (model.exists() or any(override.startswith("model.name_or_path=") for override in overrides)):
        raise FileNotFoundError(
            f"{directory}: the directory of a finished run holds {MODEL_DIR}, this one does not. Export a checkpoint first, "
            f"`trapo-train export {directory}`, and add model.name_or_path={model}_step_N."
        )
    trained = ["model.scratch=null", "model.revision=null", f"model.name_or_path={json.dumps(str(model))}"]
    return read_config(directory / CONFIG_FILE, [*trained, f"output_dir={json.dumps(str(directory))}", *overrides])


def recipes() -> dict[str, str]:
    """The packaged configurations by name, as they are written; the first line is a comment on what it is."""
    files = sorted((resources.files("trapo_train") / "recipes").iterdir(), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in files if entry.name.endswith(".yaml")}


def read_recipe(name: str) -> str:
    """The text of a packaged configuration. Raises ConfigError for one that is not there."""
    found = recipes()
    if name not in found:
        raise ConfigError(f"There is no recipe {name!r}. The recipes are: {', '.join(found)}.")
    return found[name]


_NUMBERS = {  # of YAML 1.1 without 010, there an 8, and 1:30, there 90, and with 1e-6
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F][\da-fA-F_]*|0b[01][01_]*)$",
    "tag:yaml.org,2002:float": r"([-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d[\d_]*([eE][-+]?\d+)?)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
_NO_TEXT = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}  # no setting is a date


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but numbers are those that people write, a date is text, and a key given twice is an error."""

    yaml_implicit_resolvers: ClassVar = {
        first: [resolver for resolver in resolvers if resolver[0] not in _NO_TEXT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(sorted(twice))} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def _read(path: str) -> tuple[str, str]:
    """Return the name and the text of a configuration file or packaged recipe."""
    if Path(path).is_file():
        try:
            return path, Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: a configuration must be text in UTF-8: {error}. Save it in that encoding.") from error
    found = recipes()
    if path in found:
        return f"recipe {path}", found[path]
    own = Path(path) / CONFIG_FILE
    if own.is_file():
        raise ConfigError(f"{path} is the directory of a run. Continue it with {own} checkpoint.resume=true.")
    raise ConfigError(f"There is no file {path!r} and no recipe of that name. The recipes are: {', '.join(found)}.")


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    """Set one value in place and return its key path."""
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"override {override!r}: must have the form section.key=value.")
    section = values
    for depth, name in enumerate(path[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(path[:depth])} is no section, its value is {section!r}.")
    section[path[-1]] = _override_value(key, text, f"override {override!r}")
    return path


def _override_value(key: str, text: str, where: str) -> Any:
    """What an override's text says as YAML, or the text itself, of which YAML would drop a comment and white space at its ends."""
    try:
        value, first = _parse_yaml(text, where), text.lstrip()[:1]
    except ConfigError as error:
        is_part = any(text.count(left) > text.count(right) for left, right in ("{}", "[]"))
        remedy = f"A shell splits words at spaces: quote the whole override, '{key}={text} …'." if is_part else quotes_for(key)
        raise ConfigError(f"{error}\n{remedy}") from error
    if value is None and first != "#" and text.strip().lower() not in ("", "~", "null"):  # an anchor, or a document's start
        raise ConfigError(f"{where}: {key} would be null. {quotes_for(key)}")
    is_quoted = first in tuple("'\"|>!")
    if is_quoted or not (isinstance(value, str) or first == "#"):
        return value
    if "\\n" in text:
        raise ConfigError(
            f"{where}: {key} must have quotes around a text with \\n in it, without them a backslash and an n, got {text}. "
            f"For a line break write '{key}=\"…\\n\"', where \\\\ is a backslash; for the two characters \"{key}='…\\n'\"."
        )
    return text
