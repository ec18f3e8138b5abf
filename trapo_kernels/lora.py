"""A LoRA'd head, without ever forming the sum of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trapo_kernels import checks
from trapo_kernels.fsdp import unsharded


@dataclass(frozen=True, eq=False)
class LoraHead:
    """The low-rank part of a head: logits = hidden · (weight + scaling · b · a)ᵀ, as two thin GEMMs beside that of the weight.

    Args:
        a: [R, D], the dtype of hidden, or float32 beside 16-bit hidden states; PEFT's `lora_A.weight`.
        b: [V, R], as a; PEFT's `lora_B.weight`. Over a process group each rank passes the rows of its own shard, and the whole
            `a`, whose gradient arrives summed over the ranks: do not all-reduce it again.
        scaling: lora_alpha / R, or lora_alpha / √R for rank-stabilised LoRA.

    `LoraHead.from_peft(head)` is that of a PEFT layer, whose `weight`, the base's alone, goes beside it as the head's weight;
    `head_options` reads it from a model. This is plain LoRA, without what DoRA (`use_dora`), `lora_bias` and `lora_dropout` add.

    Memory: [C, R] beside what a chunk of C rows needs; backward adds both gradients in fp32. Source: arXiv 2106.09685.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    def __post_init__(self):
        checks.lora_factors(self.a, self.b, self.scaling)

    @classmethod
    def from_peft(cls, layer: nn.Module) -> LoraHead:
        """That of a PEFT layer over a linear output head, by its one active adapter.

        Equivalent to, for an adapter "default":

            LoraHead(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])

        Args:
            layer: `model.get_output_embeddings()`, where the adapter's target_modules name the head.

        Returns: the factors themselves, which get their gradients, or what `unsharded` gathers of them, for one forward.
        Raises: TypeError for what is no LoRA layer of PEFT; ValueError for one that adds no plain LoRA to its base.
        Memory: none, but what is gathered. Determinism: reads attributes, or gathers. Source: PEFT's `LoraLayer`.
        """
        if not all(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling", "active_adapters")):
            raise TypeError(
                f"LoraHead.from_peft: layer must be a LoRA layer of PEFT, got {type(layer).__module__}.{type(layer).__qualname__}. "
                "Pass model.get_output_embeddings() of a model with an adapter on its head."
            )
        names = list(layer.active_adapters)
        name = names[0] if names else ""
        dropout = getattr(layer.lora_dropout[name], "p", 0.0) if name in layer.lora_dropout else 0.0
        for there, actual, remedy in (
            (len(names) != 1, f"the active adapters {names}", "Activate one with set_adapter"),
            (bool(layer.merged), "one that is merged into it", "Unmerge it, or leave lora out"),
            (layer.use_dora.get(name) or layer.lora_variant.get(name), "DoRA or another variant", "Train the head without it"),
            (layer.lora_bias.get(name), "lora_bias", "Train the head without it"),
            (dropout > 0 and layer.training, f"lora_dropout = {dropout:g} in training mode", "Set it to 0 for the head"),
        ):
            if there:
                raise ValueError(f"LoraHead.from_peft: layer must add one plain LoRA to its base, got {actual}. {remedy}.")
        a, b = unsharded(layer.lora_A[name].weight), unsharded(layer.lora_B[name].weight)
        return cls(a, b, float(layer.scaling[name]))

    def scaled_a(self, dtype: torch.dtype) -> Tensor:
        """scaling · a [R, D] in `dtype`, differentiable."""
        return self.a.to(dtype) * self.scaling

    def autocast(self, dtype: torch.dtype) -> LoraHead:
        """The same with 16-bit factors in the autocast dtype; float32 ones are left to the op, as a head's weight is."""
        a, b = (x if x.dtype == torch.float32 else x.to(dtype) for x in (self.a, self.b))
        return LoraHead(a, b, self.scaling)
