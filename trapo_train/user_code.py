"""Functions and classes of the user's own, named by their path in a configuration."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path
from typing import Any

from trapo_train.schema import UserError


def resolve(setting: str, path: str, example: str) -> Any:
    """What is at "package.module:name"; a module is looked for as `import` does, and in the working directory.

    Raises: UserError naming the setting, where there is none.
    """
    if path.count(":") != 1:
        raise UserError(f"{setting} must be a path like {example}, got {path!r}.")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{setting} {path!r} must name a function or class that can be imported: {error}.") from error
