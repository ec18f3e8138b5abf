"""Small models of several architectures, exact enough to compare in fp64."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from trapo_train.models.attention import PACKED_IMPLEMENTATION
from trapo_train.models.model import install_policy_head

SHAPE = dict(
    vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    intermediate_size=24, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE),
    "sliding window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "final softcap": Gemma2Config(**SHAPE, attn_logit_softcapping=None, final_logit_softcapping=1.5, sliding_window=4),
}


def exact(model: nn.Module) -> nn.Module:
    """Norms and rotary angles in fp64 as well: transformers computes them in fp32 whatever the model's dtype."""

    def norm(self, hidden):
        scale = 1.0 + self.weight if "Gemma" in type(self).__name__ else self.weight
        epsilon = self.eps if "Gemma" in type(self).__name__ else self.variance_epsilon
        return scale * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)

    def rotary(self, hidden, position_ids):
        angle = (position_ids[..., None] * self.inv_freq.double()).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = norm.__get__(module)
        elif "Rotary" in type(module).__name__:
            module.forward = rotary.__get__(module)
    return model


def build(name: str, implementation: str = PACKED_IMPLEMENTATION) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=implementation, dtype=torch.float64)
    install_policy_head(model, compute_dtype=torch.float64)
    return exact(model)


def assert_close(actual, expected, relative):
    assert (actual - expected).abs().max() <= relative * expected.abs().max()
