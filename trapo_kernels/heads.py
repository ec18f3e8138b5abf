"""What a model of Hugging Face does to its logits, as options of the head functions; transformers is not imported."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor, nn


class ModelOptions(TypedDict):
    """What of a head's options a model decides."""

    bias: Tensor | None
    softcap: float | None
    temperature: float


def head_options(model: nn.Module) -> ModelOptions:
    """The options `bias`, `softcap` and `temperature` that give the head functions the logits of a causal LM of transformers.

    Equivalent to, for most models:

        config = model.config.get_text_config()
        bias = model.get_output_embeddings().bias
        softcap = getattr(config, "final_logit_softcapping", None)
        temperature = getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)

    Falcon-H1, Muse and Inkling scale before the cap, HyperCLOVA X multiplies by what Granite divides by. No model is run: of one
    that does more to its logits, or has a layer between its last hidden state and its head, as BERT, nothing is noticed. To be sure
    compare `linear_logprob(hidden, lm_head_weight, target, **options)` with `token_logprob(model(input_ids).logits, target)` once.

    Args:
        model: what `from_pretrained` of a causal LM returns, not wrapped (DDP's `.module`).

    Returns: a dict for `**`. Multiply `temperature` by that of the sampler where it is not 1.
    Raises: TypeError where the output head is no torch.nn.Linear, such as a LoRA'd one, whose `weight` is that of its base alone;
        ValueError where the model leaves rows of its head out.
    Memory: none; the bias is the model's own. Determinism: reads numbers. Source: the `forward` of each model in transformers 5.23.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"head_options: the model must have an output head that is a torch.nn.Linear, got {type(head).__name__} in "
            f"{type(model).__name__}. Unwrap the model; keep lm_head out of an adapter's target_modules, or pass lora=LoraHead(…) "
            "and the other options yourself."
        )
    config = model.config.get_text_config()
    used = getattr(config, "unpadded_vocab_size", None) or head.out_features
    if used < head.out_features:
        raise ValueError(
            f"head_options: the model must use all rows of its head, got unpadded_vocab_size = {used} of {head.out_features}. "
            f"Pass weight[:{used}] and the options yourself."
        )

    def factor(name: str) -> float:
        return getattr(config, name, None) or 1.0

    scaling = factor("logits_scaling")
    before = factor("lm_head_multiplier") * factor("output_multiplier") / factor("logits_mup_width_multiplier")
    after = factor("logit_scale") * (scaling if config.model_type == "hyperclovax" else 1.0 / scaling)
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")]
    cap = next((cap for cap in caps if cap is not None), None)
    return {"bias": head.bias, "softcap": None if cap is None else cap / before, "temperature": 1.0 / (before * after)}
