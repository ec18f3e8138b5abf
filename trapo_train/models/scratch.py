"""A model that starts from random weights: its shape, and what transformers calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen3Config

from trapo_train.schema import UserError, check

ARCHITECTURES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@dataclass(frozen=True)
class ScratchConfig:
    """The shape of a model that starts from random weights; its vocabulary is the tokenizer's."""

    architecture: Literal["llama", "qwen2", "qwen3"] = "llama"
    """Hugging Face architecture: llama, qwen2 or qwen3."""
    hidden_size: int = 128
    """Width of the residual stream, a multiple of num_heads with an even quotient (rotary embeddings turn pairs)."""
    num_layers: int = 3
    """Decoder layers, at least 1."""
    num_heads: int = 4
    """Query heads, at least 1."""
    num_kv_heads: int = 4
    """Key and value heads, a divisor of num_heads; fewer than num_heads is grouped-query attention."""
    intermediate_size: int = 384
    """Width of the MLP, at least 1."""
    max_position: int = 512
    """Longest sequence in tokens, prompt and response together, at least 2."""
    tie_word_embeddings: bool = False
    """Whether the output head shares the input embedding's weight."""
    initializer_range: float = 0.02
    """Standard deviation of the random weights, above 0; narrow models learn sooner with about 1/√hidden_size."""

    def __post_init__(self) -> None:
        counts = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
        check(
            self,
            *((name, getattr(self, name) >= 1, "at least 1") for name in counts),
            ("max_position", self.max_position >= 2, "at least 2"),
            ("initializer_range", 0 < self.initializer_range <= 1, "above 0 and at most 1"),
        )
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(f"hidden_size must be a multiple of 2 · num_heads = {2 * self.num_heads}, got {self.hidden_size}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}.")


def scratch_config(scratch: ScratchConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The transformers configuration of a model from scratch for this tokenizer."""
    return ARCHITECTURES[scratch.architecture](
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.num_layers,
        num_attention_heads=scratch.num_heads,
        num_key_value_heads=scratch.num_kv_heads,
        head_dim=scratch.hidden_size // scratch.num_heads,
        intermediate_size=scratch.intermediate_size,
        max_position_embeddings=scratch.max_position,
        tie_word_embeddings=scratch.tie_word_embeddings,
        initializer_range=scratch.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
