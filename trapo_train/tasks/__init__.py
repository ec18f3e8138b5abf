"""Tasks that are generated offline, each with an exact verifier, expert traces and a tokenizer of its own."""

from trapo_train.tasks.pointer_chasing import (
    PointerChasingConfig,
    build_tokenizer,
    generate_rows,
    pointer_chasing_reward,
)

__all__ = ["PointerChasingConfig", "build_tokenizer", "generate_rows", "pointer_chasing_reward"]
