"""What `head_options` reads from a model; whole models are in tests/test_pages.py and, of images and text, in
tests/test_vision_language.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.trapo_kernels import cases
from trapo_kernels import head_options, linear_logprob, token_logprob

D, V = 6, 40


def _model(head=None, **settings):
    config = SimpleNamespace(model_type="some", **settings)
    config.get_text_config = lambda: config
    head = nn.Linear(D, V, device=cases.DEVICE) if head is None else head
    return SimpleNamespace(get_output_embeddings=lambda: head, config=config)


@pytest.mark.parametrize(
    ("settings", "logits"),
    [
        ({}, lambda x: x),
        ({"final_logit_softcapping": None, "logit_scale": None}, lambda x: x),
        ({"logits_soft_cap": 0.5}, lambda x: 0.5 * torch.tanh(x / 0.5)),  # RecurrentGemma
        ({"output_logit_soft_cap": 0.5}, lambda x: 0.5 * torch.tanh(x / 0.5)),  # xLSTM
        ({"output_multiplier": 4.0, "final_logit_softcapping": 2.0}, lambda x: 2.0 * torch.tanh(4.0 * x / 2.0)),  # Muse
        ({"logits_mup_width_multiplier": 3.0, "final_logit_softcapping": 0.5}, lambda x: 0.5 * torch.tanh(x / 3.0 / 0.5)),
        ({"final_logit_softcapping": 0.5, "logits_scaling": 0.25}, lambda x: 2.0 * torch.tanh(x / 0.5)),
    ],
    ids=lambda case: ", ".join(case) if isinstance(case, dict) else "",
)
def test_options_give_the_logits(settings, logits):
    model, hidden = _model(**settings), torch.randn(9, D, device=cases.DEVICE)
    head, target = model.get_output_embeddings(), torch.arange(9, device=cases.DEVICE)
    found = linear_logprob(hidden, head.weight, target, **head_options(model)).logprob
    torch.testing.assert_close(found, token_logprob(logits(head(hidden)), target).logprob)


def test_a_wrapped_model_and_a_head_that_is_no_linear_layer_are_refused():
    with pytest.raises(TypeError, match=r"^head_options: .* got NoneType in Sequential\. Unwrap the model"):
        head_options(nn.Sequential(nn.Linear(D, V)))
    with pytest.raises(TypeError, match=r"got Embedding in SimpleNamespace\. .* pass lora=LoraHead\(…\)"):
        head_options(_model(nn.Embedding(V, D)))


def test_a_head_with_an_adapter_is_refused():
    """Its `weight` is that of its base: the loss would be another without a word."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(D, V)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"got Linear in SimpleNamespace\. .*keep lm_head out of an adapter's target_modules"):
        head_options(_model(wrapped.base_model.model[0]))


def test_a_head_with_rows_that_the_model_leaves_out_is_refused():
    assert head_options(_model(unpadded_vocab_size=V))["temperature"] == 1.0
    with pytest.raises(ValueError, match=r"got unpadded_vocab_size = 37 of 40\. Pass weight\[:37\]"):
        head_options(_model(unpadded_vocab_size=37))
