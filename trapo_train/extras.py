"""The packages of the extras: whether those that the trainer and a configuration need are installed.

It imports none of them: `trapo_train.__main__` asks here first.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trapo_train.schema import MissingPackage

if TYPE_CHECKING:
    from trapo_train.config import RunConfig


def is_installed(package: str) -> bool:
    """Whether `import package` finds a package, and not just a folder of that name, such as the ./wandb of an earlier run."""
    if sys.modules.get(package) is not None:
        return True
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def missing_packages(config: RunConfig) -> list[str]:
    """What the configuration needs and this environment lacks: a sentence each, with the command that installs it."""
    needed = [(f"tracking.to: {name}", name, name) for name in config.tracking.to]
    if config.model.lora is not None:
        needed.append(("model.lora", "peft", "peft"))
    if config.model.liger is True:
        needed.append(("model.liger", "liger_kernel", "liger"))
    if config.rollout.engine == "vllm":
        needed.append(("rollout.engine=vllm", "vllm", "vllm"))
    rewards = [term.name for term in config.reward] if isinstance(config.reward, list) else [config.reward]
    if "math_verify" in rewards:
        needed.append(("reward math_verify", "math_verify", "math"))
    return [
        f"{setting} needs the package {package.replace('_', '-')}: pip install 'trapo[{extra}]'."
        for setting, package, extra in needed
        if not is_installed(package)
    ]


def check_packages(config: RunConfig) -> None:
    """Raise MissingPackage for the packages that are missing, before anything is read or written."""
    missing = missing_packages(config)
    if missing:
        raise MissingPackage(" ".join(missing))
