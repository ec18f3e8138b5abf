"""One file per question: `ABOUT`, one sentence, and `cases(device, small)`, the cells it needs, the most telling first."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# In the order that a short budget should answer them.
NAMES = (
    "trapo",
    "sft",
    "scoring",
    "grpo",
    "accuracy",
    "narrow",
    "active_rows",
    "chunk",
    "sweep",
    "compile",
    "step",
    "longest",
)


def load(name: str) -> ModuleType:
    """The module of one question."""
    return import_module(f"benchmarks.questions.{name}")
