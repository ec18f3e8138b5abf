"""One file per question: `ABOUT`, one sentence, and `cases(device, small)`, the cells it needs, the most telling first."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# In the order that a short budget should answer them.
NAMES = (
    "trapo",
    "scoring",
    "active_rows",
    "settings",
    "sft",
    "grpo",
    "sweep",
    "chunk",
    "narrow",
    "accuracy",
    "compile",
    "step",
    "longest",
)


def load(name: str) -> ModuleType:
    """The module of one question."""
    return import_module(f"benchmarks.questions.{name}")
