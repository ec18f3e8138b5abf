"""Tasks that are generated offline, each with an exact verifier, expert traces and a tokenizer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trapo_train.tasks.pointer_chasing import (
    PointerChasingConfig,
    build_tokenizer,
    generate_rows,
    pointer_chasing_reward,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PointerChasingConfig", "build_tokenizer", "generate_rows", "pointer_chasing_reward", "tokenizer_of"]


def tokenizer_of(task: str | None) -> PreTrainedTokenizerFast | None:
    """That of the generated task of this name; None for None."""
    return None if task is None else build_tokenizer()
