"""Functions and classes of the user's own, named by their path in a configuration."""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
import traceback
from pathlib import Path
from typing import Any

from trapo_train.schema import UserError


def resolve(setting: str, path: str, example: str) -> Any:
    """What is at "package.module:name"; a module is looked for as `import` does, and in the working directory.

    Raises: UserError naming the setting, where there is none; whatever else the module itself raises.
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name) or ":" in name or module_name.startswith("."):
        raise UserError(f"{setting} must be a path like {example}, got {path!r}.")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        where = f" Modules are looked for where Python looks, and in {working_directory}."
        where = " Leave out the ending .py." if module_name.endswith(".py") else where if error.name == module_name else ""
        raise UserError(f"{setting} {path!r}: importing the module {module_name!r} failed: {error}.{where}") from error
    except SyntaxError as error:
        at = f"{Path(error.filename or module_name).name}:{error.lineno}"
        raise UserError(f"{setting} {path!r}: importing the module {module_name!r} failed at {at}: {error.msg}.") from error
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        raise UserError(f"{setting} {path!r}: the module {module_name!r} has no function or class {name!r}.") from error


def note_place(error: Exception, code: Any) -> None:
    """Add to `error` where in the module of the user's function or object `code` it was raised, "at my_rewards.py:9"."""
    file = getattr(sys.modules.get(getattr(inspect.unwrap(code), "__module__", "")), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    note = f"at {Path(file or '').name}:{lines[-1]}" if lines else ""
    if note and note not in getattr(error, "__notes__", ()):  # one that is raised again has it
        error.add_note(note)


def in_words(error: Exception) -> str:
    """The error with its notes, in a line."""
    return " ".join(" ".join([repr(error), *getattr(error, "__notes__", ())]).split())
