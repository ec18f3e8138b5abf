"""The packages of the optional extras: whether those that a configuration needs are installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from trapo_train.config import RunConfig
from trapo_train.schema import MissingPackage


def missing_packages(config: RunConfig) -> list[str]:
    """What the configuration needs and this environment lacks: a sentence each, with the command that installs it."""
    needed = [(f"tracking.to: {name}", name, name) for name in config.tracking.to]
    if config.model.lora is not None:
        needed.append(("model.lora", "peft", "peft"))
    if config.model.liger is True:
        needed.append(("model.liger", "liger_kernel", "liger"))
    if config.rollout.engine == "vllm":
        needed.append(("rollout.engine=vllm", "vllm", "vllm"))
    return [
        f"{setting} needs the package {package.replace('_', '-')}: pip install 'trapo[{extra}]'."
        for setting, package, extra in needed
        if sys.modules.get(package) is None and find_spec(package) is None
    ]


def check_packages(config: RunConfig) -> None:
    """Raise MissingPackage for the packages that are missing, before anything is read or written."""
    missing = missing_packages(config)
    if missing:
        raise MissingPackage(" ".join(missing))
