"""What `head_options` reads from a model; whole models are in tests/test_pages.py and, of images and text, in
tests/test_vision_language.py."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.trapo_kernels import cases
from trapo_kernels import LoraHead, head_options, linear_logprob, token_logprob

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
    with pytest.raises(TypeError, match=r"^head_options: .* got no output head in Sequential\. Unwrap the model \(DDP's \.module"):
        head_options(nn.Sequential(nn.Linear(D, V)))
    with pytest.raises(
        TypeError, match=r"got torch\.nn\.modules\.sparse\.Embedding in SimpleNamespace\. .* pass the options yourself"
    ):
        head_options(_model(nn.Embedding(V, D)))


def test_a_head_that_learns_more_than_weight_and_bias_is_refused():
    class Scaled(nn.Linear):
        """Dory's: a factor for every token, 1 at first, so that no comparison of logits before training shows it."""

        def __init__(self):
            super().__init__(D, V)
            self.logit_scale = nn.Parameter(torch.ones(V))

        def forward(self, hidden):
            return super().forward(hidden) * self.logit_scale

    with pytest.raises(TypeError, match=r"must learn a weight and a bias alone, got logit_scale in .*Scaled of SimpleNamespace\."):
        head_options(_model(Scaled()))
    assert head_options(_model(nn.utils.parametrizations.weight_norm(nn.Linear(D, V))))["temperature"] == 1.0


def _with_peft(**settings):
    """A model whose head PEFT has wrapped, its adapters no longer zero."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, V)).to(cases.DEVICE)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    for name, parameter in wrapped.named_parameters():
        parameter.data += 0.1 * torch.rand_like(parameter) if "original" not in name else 0.0
    return wrapped, wrapped.base_model.model[1]


@pytest.mark.parametrize("settings", [{"target_modules": ["1"]}, {"target_modules": ["0"], "modules_to_save": ["1"]}], ids=str)
@pytest.mark.parametrize("state", ["on", "off", "merged"])
def test_a_head_that_peft_has_wrapped_gives_its_own_logits_and_gradients(settings, state):
    wrapped, head = _with_peft(**settings)
    hidden, target = torch.randn(9, D, device=cases.DEVICE), torch.arange(9, device=cases.DEVICE)
    if state == "merged":
        wrapped.merge_adapter()
    with wrapped.disable_adapter() if state == "off" else nullcontext():
        found = linear_logprob(hidden, head.weight, target, **head_options(_model(head))).logprob
        expected = token_logprob(head(hidden), target).logprob
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        torch.testing.assert_close(found, expected)
        if state == "on":
            for ours, theirs in zip(*(torch.autograd.grad(x.sum(), trained) for x in (found, expected)), strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "actual"),
    [
        ({"use_dora": True}, "DoRA or another variant"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_dropout": 0.5}, r"lora_dropout = 0\.5 in training mode"),
    ],
    ids=str,
)
def test_an_adapter_that_is_no_plain_lora_is_refused(settings, actual):
    wrapped, head = _with_peft(target_modules=["1"], **settings)
    with pytest.raises(ValueError, match=rf"^LoraHead\.from_peft: layer must add one plain LoRA to its base, got {actual}\. "):
        head_options(_model(head))
    if "lora_dropout" in settings:
        assert head_options(_model(head.eval()))["lora"].scaling == head.scaling["default"]
        wrapped.add_adapter("other", wrapped.peft_config["default"])
        wrapped.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match=r"got the active adapters \['default', 'other'\]\. Activate one"):
            head_options(_model(head))


def test_what_is_no_lora_layer_is_refused():
    with pytest.raises(TypeError, match=r"must be a LoRA layer of PEFT, got torch\.nn\.modules\.linear\.Linear\. Pass model"):
        LoraHead.from_peft(nn.Linear(D, V))


def test_a_head_with_rows_that_the_model_leaves_out_is_refused():
    assert head_options(_model(unpadded_vocab_size=V))["temperature"] == 1.0
    with pytest.raises(ValueError, match=r"got unpadded_vocab_size = 37 of 40\. Pass weight\[:37\]"):
        head_options(_model(unpadded_vocab_size=37))
