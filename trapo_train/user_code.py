"""Functions and classes of the user's own, named by their path in a configuration."""

from __future__ import annotations

import importlib
import operator
import sys
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
        raise UserError(f"{setting} {path!r}: importing the module {module_name!r} failed: {error}.") from error
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        raise UserError(f"{setting} {path!r}: the module {module_name!r} has no function or class {name!r}.") from error
