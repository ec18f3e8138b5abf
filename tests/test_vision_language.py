"""`head_options` and `fuse_loss` of models of images and text, whose configuration of the text says more than some of them do."""

from unittest import mock

import pytest
import torch
import transformers
from torch import nn

from trapo_kernels import fuse_loss, head_options, heads, linear_logprob, objectives, token_logprob

_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
_TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
_CAP = _LAYERS | {"final_logit_softcapping": 0.5}
_PER_LAYER = {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
_GEMMA3N = _PER_LAYER | {"laurel_rank": 4, "activation_sparsity_pattern": None, "altup_num_inputs": 2}
_MUSE = {"output_multiplier": 4.0, "final_logit_softcapping": 2.0}
_EXPERTS = {"moe_intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 16}
_ROUTED = {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 8}
_INKLING = _ROUTED | _SLIDING | {"d_rel": 4, "rel_extent": 8}
_INKLING2 = _INKLING | {"unpadded_vocab_size": 50, "final_logit_softcapping": 0.5}
_HEADS = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2}
_INDEX = {"index_topk": 4, "index_head_dim": 4, "index_n_heads": 2}
_MISTRAL = _ROUTED | _HEADS | _INDEX | {"kv_lora_rank": 8, "q_lora_rank": 8, "final_logit_softcapping": 0.5}
_IMAGES, _SOUND = ({name: {"text_hidden_size": 16}} for name in ("vision_config", "audio_config"))
_LAYERED_SOUND = {"audio_config": {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_hidden_size": 16}}
# (model, its text, the configuration of the text, that of the towers where they are not left out)
APPLIED = [
    ("Gemma3n", "Gemma3nText", _CAP | _GEMMA3N, {}),
    ("Gemma4", "Gemma4Text", _CAP | _PER_LAYER | {"global_head_dim": 8}, {}),
    ("Gemma4Unified", "Gemma4UnifiedText", _CAP | {"global_head_dim": 8}, {}),
    ("PaliGemma", "Gemma2", _CAP, {}),
    ("HyperCLOVAXVisionV2", "HyperCLOVAX", {"logits_scaling": 4.0}, {}),
    ("MuseGlimmer", "MuseGlimmerText", _MUSE, {}),
    ("MuseSpark", "MuseSparkText", _MUSE | _EXPERTS, _LAYERED_SOUND),
    ("Inkling", "InklingText", _INKLING, _IMAGES | _SOUND),
    ("Inkling2", "Inkling2Text", _INKLING2, _IMAGES),
    ("MistralLarge4", "MistralLarge4Text", _MISTRAL, {}),
]
IGNORED = [
    ("AyaVision", "Cohere2", _LAYERS | {"logit_scale": 4.0}, {}),
    ("LlavaNext", "Granite", {"logits_scaling": 0.5}, {}),
    ("Llava", "Gemma2", _CAP, {}),
    ("PaliGemma", "Granite", {"logits_scaling": 0.5, "use_bidirectional_attention": False}, {}),  # which would apply a cap
]


class _NoTower(nn.Identity):
    """In place of a vision tower, which may need timm or scipy, or be large."""

    @classmethod
    def _from_config(cls, config):
        return cls()


def _model(name, text, settings, towers):
    if not hasattr(transformers, f"{name}Config") or not hasattr(transformers, f"{text}Config"):
        # Supported versions before 5.20 lack some; that those which apply what they say are all here is a test of its own.
        pytest.skip(f"transformers {transformers.__version__} has no {name} of {text}")
    given = _SHAPE | _TOKENS | {"head_dim": 8} | settings
    text_config = getattr(transformers, f"{text}Config")(**given, attn_implementation="eager")
    config = getattr(transformers, f"{name}Config")(text_config=text_config, **towers)
    make = transformers.AutoModel.from_config

    def language_model_alone(config):
        return make(config) if config is text_config else _NoTower()

    made = getattr(transformers, f"{name}ForConditionalGeneration")
    tower = mock.patch(f"{made.__module__}.{name}VisionModel", _NoTower, create=True)
    with mock.patch.object(transformers.AutoModel, "from_config", language_model_alone), tower:
        model = made(config).eval()
    nn.init.normal_(model.lm_head.weight, std=0.2)  # logits that a cap and a scale change
    return model


@torch.no_grad()
def _logprobs(model, options):
    """By the options, and by the model's own logits."""
    input_ids, target = torch.randint(3, 40, (1, 7)), torch.randint(3, 50, (7,))
    hidden = model.model(input_ids, use_cache=False).last_hidden_state[0]
    own = token_logprob(model(input_ids, use_cache=False).logits[0], target).logprob
    return linear_logprob(hidden, model.lm_head.weight, target, **options).logprob, own


@pytest.mark.parametrize("case", APPLIED, ids=lambda case: case[0])
def test_options_of_a_model_that_does_what_its_text_says_give_its_logits(case):
    model = _model(*case)
    types = (model.config.model_type, model.config.text_config.model_type)
    if not heads._is_applied(types):
        _check_refused(model)
        return
    options = head_options(model)
    assert (options["softcap"], options["temperature"]) != (None, 1.0)
    torch.testing.assert_close(*_logprobs(model, options))
    input_ids = torch.randint(3, 40, (2, 7))
    own = model(input_ids, labels=input_ids).loss
    fuse_loss(model, objectives.sft())
    torch.testing.assert_close(model(input_ids, labels=input_ids).loss, own)


def test_each_of_these_models_is_tried():
    known = [case for case in APPLIED if all(hasattr(transformers, f"{name}Config") for name in case[:2])]
    types = {tuple(getattr(transformers, f"{name}Config").model_type for name in case[:2]) for case in known}
    assert {pair for pair in heads._APPLIED if heads._is_applied(pair)} <= types <= {*heads._APPLIED}


def _check_refused(model):
    """And rightly: its logits are those of its head."""
    types = f"{model.config.text_config.model_type} in {model.config.model_type}"
    with pytest.raises(ValueError, match=rf"^head_options: .* got softcap = .* and temperature = [\d.]+ of {types}, which may"):
        head_options(model)
    torch.testing.assert_close(*_logprobs(model, {}))


@pytest.mark.parametrize("case", IGNORED, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_model_that_may_ignore_what_its_text_says_is_refused(case):
    _check_refused(_model(*case))


def test_a_text_that_says_nothing_of_logits_is_taken_in_any_model():
    model = _model("Llava", "Gemma2", _LAYERS | {"final_logit_softcapping": None}, {})
    torch.testing.assert_close(*_logprobs(model, head_options(model)))
