"""Routers of a mixture of experts choose under autocast what they choose in a model of 16 bits."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trapo_train.models.autocast import cast_routers, stays_in_float32
from trapo_train.models.model import body_autocast, install_policy_head

SHAPE = {
    "vocab_size": 20, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "n_shared_experts": 1, "initializer_range": 0.5,
}  # fmt: skip
NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def build(name, keep=None, **options):
    """A model of one layer with a mixture of experts, and its router; `keep`: what it is to keep in float32, unless None."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **dict.fromkeys(NAMES, 16), pad_token_id=0, **options)
    model = AutoModelForCausalLM.from_config(config)
    if keep is not None:
        model._keep_in_fp32_modules_strict = keep
    install_policy_head(model, compute_dtype=torch.bfloat16)
    (router,) = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    return model, router


@pytest.mark.parametrize(
    ("name", "keep", "options"),
    [
        ("glm4_moe", [], {"first_k_dense_replace": 0, "head_dim": 8}),  # raises both to float32
        ("glm4_moe", ["gate.weight"], {"first_k_dense_replace": 0, "head_dim": 8}),  # its own since transformers 5.24
        ("dots1", [], {"first_k_dense_replace": 0}),
        ("qwen3_moe", [], {"head_dim": 8}),  # does not
        ("mixtral", [], {}),
    ],
)
def test_under_autocast_a_router_is_that_of_a_model_in_16_bits(name, keep, options):
    model, router = build(name, keep, **options)
    hidden = torch.randn(200, 64)
    rounded = copy.deepcopy(router).bfloat16()
    if keep:
        rounded.weight.data = router.weight.data
    expected = rounded(hidden.bfloat16())
    with body_autocast(model):
        found = router(hidden)
    assert all(map(torch.equal, found, expected))
    found[0].float().square().sum().backward()
    assert router.weight.grad.dtype == torch.float32 and router.weight.grad.any()
    assert all(map(torch.equal, router(hidden), type(router).forward(router, hidden)))  # left alone without autocast


def test_the_hooks_of_a_router_fire_once():
    """By one of them transformers collects router_logits."""
    model, router = build("qwen3_moe", head_dim=8, output_router_logits=True)
    seen = []
    router.register_forward_hook(lambda *_: seen.append(1))
    with body_autocast(model):
        logits = model.model(torch.arange(6)[None]).router_logits
    assert (len(logits), len(seen)) == (1, 1)


class Gate(torch.nn.Module):
    def forward(self, hidden):
        return hidden.sigmoid()


class Experts(Gate):
    """What stands beside a router."""


class TopKGating(Gate):
    """JetMoE's, beside layers that are not called experts."""


def test_a_gate_is_a_router_beside_experts_and_may_have_no_weight():
    blocks = {"attention": {"gate": Gate()}, "mixture": {"gate": Gate(), "experts": Experts()}, "jetmoe": {"gate": TopKGating()}}
    model = torch.nn.ModuleDict({name: torch.nn.ModuleDict(block) for name, block in blocks.items()})
    model._keep_in_fp32_modules_strict = None
    cast_routers(model)
    with torch.autocast("cpu", torch.bfloat16):
        types = {name: block["gate"](torch.randn(3)).dtype for name, block in model.items()}
        experts = model["mixture"]["experts"](torch.randn(3)).dtype
    assert types == {"attention": torch.float32, "mixture": torch.bfloat16, "jetmoe": torch.bfloat16}
    assert experts == torch.float32


def test_what_a_model_keeps_in_float32_is_what_loading_it_in_bfloat16_does(tmp_path):
    """LongCat's list is for float16: its routers are in bfloat16 in a sampler, and so here."""
    sizes = {"ffn_hidden_size": 16, "expert_ffn_hidden_size": 8, "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = AutoConfig.for_model("longcat_flash", **SHAPE | sizes | heads | {"num_hidden_layers": 2}, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model._keep_in_fp32_modules and not any(stays_in_float32(model, name) for name, _ in model.named_parameters())
    assert {parameter.dtype for name, parameter in model.named_parameters() if "classifier" in name} == {torch.bfloat16}
    model._keep_in_fp32_modules_strict = ["norm"]
    kept = {name for name, _ in model.named_parameters() if stays_in_float32(model, name)}
    assert kept == {name for name, _ in model.named_parameters() if "norm" in name} != set()


def test_what_transformers_keeps_in_float32_is_not_rounded():
    """Of Ernie 4.5 the bias that balances experts."""
    model, router = build("ernie4_5_moe", moe_k=2, moe_layer_start_index=0)
    bias = router.moe_statics.e_score_correction_bias
    torch.nn.init.normal_(bias)
    seen = []
    router.moe_statics.register_forward_hook(lambda module, inputs, output: seen.append(module.e_score_correction_bias.clone()))
    with body_autocast(model):
        router(torch.randn(5, 64))
    assert torch.equal(seen[0], bias)
