"""A LoRA'd head, without ever forming the sum of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trapo_kernels import checks


@dataclass(frozen=True, eq=False)
class LoraHead:
    """The low-rank part of a head: logits = hidden · (weight + scaling · b · a)ᵀ, as two thin GEMMs beside that of the weight.

    Args:
        a: [R, D], the dtype of hidden, or float32 beside 16-bit hidden states; PEFT's `lora_A.weight`.
        b: [V, R], as a; PEFT's `lora_B.weight`. Over a process group each rank passes the rows of its own shard, and the whole
            `a`, whose gradient arrives summed over the ranks: do not all-reduce it again.
        scaling: lora_alpha / R, or lora_alpha / √R for rank-stabilised LoRA.

    Of a PEFT layer `head` with adapter `name` pass `head.base_layer.weight` as the head's weight, and here
    `head.lora_A[name].weight`, `head.lora_B[name].weight` and `head.scaling[name]`; its `weight` is the base's alone. This is plain
    LoRA: what DoRA (`use_dora`), `lora_bias` and `lora_dropout` add is not in these tensors and would be left out without a word.

    Memory: [C, R] beside what a chunk of C rows needs; backward adds both gradients in fp32. Source: arXiv 2106.09685.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    def __post_init__(self):
        checks.lora_factors(self.a, self.b, self.scaling)

    def scaled_a(self, dtype: torch.dtype) -> Tensor:
        """scaling · a [R, D] in `dtype`, differentiable."""
        return self.a.to(dtype) * self.scaling

    def autocast(self, dtype: torch.dtype) -> LoraHead:
        """The same with 16-bit factors in the autocast dtype; float32 ones are left to the op, as a head's weight is."""
        a, b = (x if x.dtype == torch.float32 else x.to(dtype) for x in (self.a, self.b))
        return LoraHead(a, b, self.scaling)
