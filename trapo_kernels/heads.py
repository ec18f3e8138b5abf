"""What a model of Hugging Face does to its logits, as options of the head functions; transformers is not imported."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor, nn

# (model, its text): types with a configuration of the text of which the model's own forward does what it says of logits. Many more
# ignore theirs. tests/test_vision_language.py has each of these.
_APPLIED = {
    ("gemma3n", "gemma3n_text"),
    ("gemma4", "gemma4_text"),
    ("gemma4_unified", "gemma4_unified_text"),
    ("hyperclovax_vision_v2", "hyperclovax"),
    ("muse_glimmer", "muse_glimmer_text"),
    ("muse_spark", "muse_spark_text"),
    ("paligemma", "gemma2"),
}


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

    Falcon-H1, Muse and Inkling scale before the cap, HyperCLOVA X multiplies by what Granite divides by. A model of images and text
    that is not known to do what the configuration of its text says is refused: many, such as LLaVA, do not. No model is run: of one
    that does more to its logits, or has a layer between its last hidden state and its head, as BERT, nothing is noticed. To be sure
    compare `linear_logprob(hidden, lm_head_weight, target, **options)` with `token_logprob(model(input_ids).logits, target)` once.

    Args:
        model: what `from_pretrained` of a causal LM returns, not wrapped (DDP's `.module`).

    Returns: a dict for `**`. Multiply `temperature` by that of the sampler where it is not 1.
    Raises: TypeError where the output head is no torch.nn.Linear, such as a LoRA'd one, whose `weight` is that of its base alone;
        ValueError where the model leaves rows of its head out, or a cap or a scale is in the configuration of its text and it is
        not known to apply that itself.
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
    softcap, temperature = None if cap is None else cap / before, 1.0 / (before * after)
    types = (model.config.model_type, config.model_type)
    if config is not model.config and types not in _APPLIED and (softcap, temperature) != (None, 1.0):
        raise ValueError(
            "head_options: a cap or a scale in the configuration of a model's text must be one that the model itself applies, got "
            f"softcap = {softcap} and temperature = {temperature:g} of {types[1]} in {types[0]}, which may ignore them. Pass the "
            f"options yourself: these, or none where the forward of {type(model).__name__} returns lm_head(hidden)."
        )
    return {"bias": head.bias, "softcap": softcap, "temperature": temperature}
