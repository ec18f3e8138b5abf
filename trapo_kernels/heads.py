"""What a model of Hugging Face has for a head, as arguments of the head functions; transformers is not imported."""

from __future__ import annotations

from importlib.metadata import version
from typing import TypedDict

from torch import Tensor, nn

from trapo_kernels.fsdp import unsharded
from trapo_kernels.lora import LoraHead

# (model type, text model type) whose own forward applies the cap or scale in its text model's configuration, with the version
# of transformers that began to; many others ignore theirs. tests/test_vision_language.py has each of these.
_APPLIED = {
    ("gemma3n", "gemma3n_text"): (5, 17),
    ("gemma4", "gemma4_text"): (5, 17),
    ("gemma4_unified", "gemma4_unified_text"): (5, 17),
    ("hyperclovax_vision_v2", "hyperclovax"): (5, 18),
    ("inkling2", "inkling2_text"): (5, 24),
    ("inkling_mm_model", "inkling_text"): (5, 17),
    ("mistral_large4", "mistral_large4_text"): (5, 24),
    ("muse_glimmer", "muse_glimmer_text"): (5, 17),
    ("muse_spark", "muse_spark_text"): (5, 20),
    ("paligemma", "gemma2"): (5, 23),
}


class ModelOptions(TypedDict):
    """What of a head's options a model decides."""

    bias: Tensor | None
    softcap: float | None
    temperature: float
    lora: LoraHead | None


def head_options(model: nn.Module) -> ModelOptions:
    """The options that give the head functions the logits of a causal LM of transformers, beside the `weight` of its head.

    Equivalent to, for most models:

        config = model.config.get_text_config()
        bias, lora = model.get_output_embeddings().bias, None
        softcap = getattr(config, "final_logit_softcapping", None)
        temperature = getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)

    With PEFT's LoRA on the head `lora` is `LoraHead.from_peft` of it, while the adapter is on and not merged; a head among
    modules_to_save is a head like any other.
    Falcon-H1, Muse and Inkling scale before the cap, HyperCLOVA X multiplies by what Granite divides by. A model of images and text
    that is not known to do what the configuration of its text says is refused: many, such as LLaVA, do not. No model is run: of one
    that does more to its logits, or has a layer between its last hidden state and its head, as BERT, nothing is noticed. To be sure
    compare `linear_logprob(hidden, lm_head_weight, target, **options)` with `token_logprob(model(input_ids).logits, target)` once.

    Args:
        model: what `from_pretrained` of a causal LM returns, not wrapped: DDP's `.module`, PEFT's `.get_base_model()`.

    Returns: a dict for `**`. Multiply `temperature` by that of the sampler where it is not 1. Bias and LoRA are what `unsharded`
        gives: where FSDP2 wraps them in a unit that nobody calls, every rank must call this, in each forward anew.
    Raises: TypeError where the output head is no torch.nn.Linear, nor that with PEFT's LoRA, or learns more than weight and bias;
        ValueError where it has an adapter that is no plain LoRA, where the model leaves rows of its head out, or where a cap or a
        scale is in the configuration of its text and it is not known to apply that itself.
    Memory: none, but what is gathered. Determinism: reads, or gathers. Source: the `forward` of each model in transformers 5.24.
    """
    head, lora = _head(model)
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
    if config is not model.config and (softcap, temperature) != (None, 1.0) and not _is_applied(types):
        raise ValueError(
            "head_options: a cap or a scale in the configuration of a model's text must be one that the model itself applies, got "
            f"softcap = {softcap} and temperature = {temperature:g} of {types[1]} in {types[0]}, which may ignore them. Pass the "
            f"options yourself: these, or none where the forward of {type(model).__name__} returns lm_head(hidden)."
        )
    return {"bias": unsharded(head.bias), "softcap": softcap, "temperature": temperature, "lora": lora}


def _is_applied(types: tuple[str, str]) -> bool:
    """Whether the installed transformers is known to apply what the text of such a model says of its logits."""
    return types in _APPLIED and tuple(int(part) for part in version("transformers").split(".")[:2]) >= _APPLIED[types]


def _head(model: nn.Module) -> tuple[nn.Linear, LoraHead | None]:
    """The output head, which must be linear, and the LoRA on it."""
    head, lora = _without_adapter(getattr(model, "get_output_embeddings", lambda: None)())
    found = "no output head" if head is None else f"{type(head).__module__}.{type(head).__qualname__}"
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"head_options: the model must have an output head that is a torch.nn.Linear, got {found} in {type(model).__name__}. "
            "Unwrap the model (DDP's .module, PEFT's .get_base_model()), or pass the options yourself."
        )
    # Dory's has a factor for every token, which training moves away from 1; a parametrized weight is a weight.
    more = [name for name, _ in head.named_parameters() if name.partition(".")[0] not in ("weight", "bias", "parametrizations")]
    if more:
        raise TypeError(
            f"head_options: the output head must learn a weight and a bias alone, got {', '.join(more)} in {found} of "
            f"{type(model).__name__}. Call the head function with a weight that has them folded in, and options of your own."
        )
    return head, lora


def _without_adapter(head: nn.Module | None) -> tuple[nn.Module | None, LoraHead | None]:
    """The layer of an output head that PEFT has wrapped, and the LoRA that it adds to that."""
    if hasattr(head, "modules_to_save"):
        active = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.modules_to_save]
        return head.modules_to_save[active[0]] if active else head.original_module, None
    if hasattr(head, "lora_A"):
        return head.base_layer, None if head.disable_adapters or head.merged else LoraHead.from_peft(head)
    return head, None
