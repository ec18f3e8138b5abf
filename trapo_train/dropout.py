"""Dropout of a model's own layers, which training on ratios cannot have."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def switch_off_dropout(model: nn.Module) -> bool:
    """Set every dropout of the model to 0, that of LoRA's adapters left alone; returns whether there was any.

    Sampler, old policy and update are separate passes: with other masks each, ratios and the sampler's mismatch are noise.
    """
    found = False
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, _DropoutNd) and module.p > 0:
            module.p, found = 0.0, True
        for attribute, value in vars(module).items():  # such as attention_dropout, which transformers hands to attention functions
            if "dropout" in attribute and isinstance(value, float) and value > 0:
                setattr(module, attribute, 0.0)
                found = True
    return found
