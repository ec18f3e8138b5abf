"""The packages of the extras: whether those that the trainer and a configuration need are installed.

It imports none of them: `trapo_train.__main__` asks here first.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trapo_train.schema import MissingPackage

if TYPE_CHECKING:
    from trapo_train.config import RunConfig

OLDEST_PEFT = "0.20"  # as in pyproject.toml: the first that loads adapters beside fused experts


def is_installed(package: str) -> bool:
    """Whether `import package` finds a package, and not just a folder of that name, such as the ./wandb of an earlier run."""
    module = sys.modules.get(package)
    if module is not None and getattr(module, "__spec__", None) is None:  # made by hand
        return True
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def lacks(setting: str, package: str, extra: str) -> str:
    """The sentence for a package that is missing."""
    return f"{setting} needs the package {package.replace('_', '-')}: pip install 'trapo[{extra}]'."


def why_no_peft() -> str | None:
    """What keeps model.lora from running, with the command that mends it; None where nothing does."""
    if not is_installed("peft"):
        return lacks("model.lora", "peft", "peft")
    from packaging.version import Version

    found = version("peft")
    if Version(found) < Version(OLDEST_PEFT):
        return f"model.lora needs PEFT {OLDEST_PEFT} or newer, got {found}: pip install -U 'trapo[peft]'."
    return None


def missing_packages(config: RunConfig) -> list[str]:
    """What the configuration needs and this environment lacks: a sentence each, with the command that installs it."""
    needed = [(f"tracking.to: {name}", name, name) for name in config.tracking.to]
    if config.model.liger is True:
        needed.append(("model.liger", "liger_kernel", "liger"))
    if config.rollout.engine == "vllm":
        needed.append(("rollout.engine=vllm", "vllm", "vllm"))
    rewards = [term.name for term in config.reward] if isinstance(config.reward, list) else [config.reward]
    if "math_verify" in rewards:
        needed.append(("reward math_verify", "math_verify", "math"))
    missing = [lacks(*one) for one in needed if not is_installed(one[1])]
    peft = why_no_peft() if config.model.lora is not None else None
    return missing if peft is None else [*missing, peft]


def check_packages(config: RunConfig) -> None:
    """Raise MissingPackage for the packages that are missing, before anything is read or written."""
    missing = missing_packages(config)
    if missing:
        raise MissingPackage(" ".join(missing))
