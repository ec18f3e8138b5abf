"""Choosing a packed attention, and refusing what it cannot do; that it equals single sequences: test_packed_attention.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma2Config, GptOssConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.pretended_gpu import DEVICE, pretend
from tests.trapo_train.models.small_models import CONFIGS, SHAPE
from trapo_train.models import attention, varlen
from trapo_train.models.attention import (
    FA2_IMPLEMENTATION,
    PACKED_IMPLEMENTATION,
    VARLEN_IMPLEMENTATION,
    check_attention,
    check_packing,
    choose_attention,
    packed_attention_forward,
    plain_attention,
    segment_arguments,
)
from trapo_train.models.model import ModelConfig, prepare
from trapo_train.schema import UserError


def build(config, implementation=PACKED_IMPLEMENTATION):
    torch.manual_seed(0)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class._from_config(copy.deepcopy(config), attn_implementation=implementation).double()


def test_no_mask_is_built_for_a_packed_row(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a mask was built")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", refuse)
    monkeypatch.setitem(attention.AttentionMaskInterface._global_mapping, PACKED_IMPLEMENTATION, refuse)
    model = build(CONFIGS["qwen2"])
    packed = segment_arguments(model, [5, 3], torch.device("cpu"))
    model.model(input_ids=torch.arange(8)[None], use_cache=False, **packed)


@pytest.mark.parametrize("implementation", [PACKED_IMPLEMENTATION, VARLEN_IMPLEMENTATION, FA2_IMPLEMENTATION])
def test_generate_is_that_of_sdpa(implementation):
    token_ids = torch.tensor([[0, 0, 3, 5], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    arguments = dict(input_ids=token_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ours = build(CONFIGS["llama"], implementation).eval().generate(**arguments)
    theirs = build(CONFIGS["llama"], "sdpa").eval().generate(**arguments)
    assert torch.equal(ours, theirs)


def test_lost_segment_lengths_are_noticed():
    with pytest.raises(ValueError, match="did not pass segment_lengths"):
        model = build(CONFIGS["llama"])
        model.model(input_ids=torch.arange(4)[None], attention_mask=torch.empty(1, 1, 0, 0), use_cache=False)


CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def choose(name, device=CUDA, dtype=BF16, config=CONFIGS["llama"], **options):
    wide = copy.deepcopy(config)
    wide.head_dim = 64 if wide.head_dim == SHAPE["head_dim"] else wide.head_dim
    return choose_attention(name, device=device, compute_dtype=dtype, architecture=wide, **options)


def test_flash_attention_runs_or_is_refused():
    with pytest.raises(ValueError, match=r"flash_attention_2 cannot run: the package flash-attn is not installed"):
        choose("flash_attention_2")
    assert choose("auto", torch.device("cpu"), torch.float32) == PACKED_IMPLEMENTATION
    assert choose("auto", dtype=torch.float32) == PACKED_IMPLEMENTATION


def test_cudnn_which_keeps_a_plan_for_every_shape_is_taken_from_sdpa():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose("sdpa_packed", torch.device("cpu"), torch.float32)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        choose("sdpa_packed")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def flash_attn_installed(monkeypatch):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(attention, "lazy_import_flash_attention", lambda implementation: None)


def test_flash_attention_where_installed_still_needs_cuda_and_bfloat16(flash_attn_installed):
    told = []
    assert choose("auto", tell=told.append) == choose("flash_attention_2") == FA2_IMPLEMENTATION
    assert told == ["model.attention=auto: flash_attention_2"]
    for name in ("flash_attention_2", "varlen"):
        with pytest.raises(ValueError, match=f"{name} cannot run: it needs a CUDA device, got cpu"):
            choose(name, torch.device("cpu"))
        with pytest.raises(ValueError, match=f"{name} cannot run: it needs model.dtype=bfloat16, got float32"):
            choose(name, dtype=torch.float32)


@pytest.mark.parametrize("config", [Gemma2Config(**SHAPE), DeepseekV3Config()], ids=["softcap", "latent"])
def test_what_sdpa_cannot_generate_is_left_to_transformers_flash_attention(config, flash_attn_installed):
    assert choose("flash_attention_2", config=config) == choose("auto", config=config) == "flash_attention_2"


def test_flash_attention_of_another_torch_or_for_narrower_heads_is_refused(flash_attn_installed, monkeypatch):
    def fail(implementation):
        raise ImportError("undefined symbol")

    with pytest.raises(ValueError, match="flash_attention_2 cannot run: it needs heads of at most 256 numbers, the model has 512"):
        choose("flash_attention_2", config=LlamaConfig(**SHAPE | {"head_dim": 512}))
    monkeypatch.setattr(attention, "lazy_import_flash_attention", fail)
    with pytest.raises(ValueError, match=r"flash_attention_2 cannot run: .* flash-attn does not load \(undefined symbol\)"):
        choose("flash_attention_2")


def varlen_of_torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Arguments alone."""


@pytest.fixture
def varlen_in_torch(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_of_torch_2_13)


def test_without_flash_attn_torchs_own_varlen_kernel_is_chosen(varlen_in_torch):
    told = []
    assert choose("auto", tell=told.append) == choose("varlen") == VARLEN_IMPLEMENTATION
    (sentence,) = told
    assert sentence.startswith("model.attention=auto: varlen; flash_attention_2 cannot run: the package flash-attn is not")


def test_varlen_of_an_older_torch_is_refused(monkeypatch):
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        """As in torch 2.11."""

    monkeypatch.setattr(varlen, "varlen_attn", older)
    with pytest.raises(ValueError, match="varlen cannot run: varlen_attn of torch .* has no enable_gqa, that of torch 2.13 has"):
        choose("varlen")
    told = []
    assert choose("auto", tell=told.append) == PACKED_IMPLEMENTATION and "; varlen cannot run: varlen_attn of" in told[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**SHAPE | {"head_dim": 512}), "heads of a multiple of 8 up to 256 numbers, the model has 512"),
        (LlamaConfig(**SHAPE | {"head_dim": 12}), "heads of a multiple of 8 up to 256 numbers, the model has 12"),
        (Gemma2Config(**SHAPE), "cannot cap attention logits, the model caps them at 50.0"),
        (DeepseekV3Config(), "values as wide as keys"),
    ],
    ids=["wide", "ragged", "softcap", "latent"],
)
def test_a_model_that_varlen_cannot_run(config, message, varlen_in_torch):
    with pytest.raises(ValueError, match=f"model.attention=varlen cannot run: it .*{message}"):
        choose("varlen", config=config)
    assert choose("auto", config=config) == PACKED_IMPLEMENTATION


@pytest.mark.parametrize(
    ("dtype", "window", "grouped"),
    [(BF16, None, True), (torch.float32, None, False), (BF16, 4, False), (BF16, 8, True)],
    ids=["flash", "fp32", "window", "window as long as the sequence"],
)
def test_fewer_key_heads_reach_sdpa_on_a_gpu_only_where_flash_takes_them(dtype, window, grouped, monkeypatch):
    asked, sdpa = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        asked.append((options["enable_gqa"], k.shape[1]))
        return sdpa(q, k, v, **options)

    def attend(device):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, 8, 16).to(dtype).to(device) for heads in (4, 2, 2))
        return packed_attention_forward(torch.nn.Module(), q, k, v, None, segment_lengths=(8,), sliding_window=window)[0]

    here = attend("cpu")
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with pretend(monkeypatch):
        there = attend(DEVICE).cpu()
    assert asked == [(grouped, 2 if grouped else 4)]
    torch.testing.assert_close(there, here, rtol=2e-2, atol=2e-2)


def test_flash_attention_is_told_the_boundaries_and_the_longest_of_a_row_in_any_order():
    model = build(CONFIGS["llama"])
    model.config._attn_implementation_internal = "flash_attention_2"  # set by name, it would ask for the package's version
    told = segment_arguments(model, [3, 5, 2], torch.device("cpu"))
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 8, 10]
    assert told["max_length_q"] == told["max_length_k"] == 5


def test_unsupported_attention_is_refused():
    softcapped = build(Gemma2Config(**SHAPE))
    with pytest.raises(ValueError, match=r"caps them at 50\.0.*flash_attention_2"):
        check_attention(softcapped)
    chunked = build(CONFIGS["llama"])
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="LlamaForCausalLM has chunked_attention"):
        check_attention(chunked)
    old = build(CONFIGS["llama"])
    old._supports_attention_backend = False
    with pytest.raises(ValueError, match="does not"):
        check_attention(old)


@pytest.mark.parametrize("prepared", [True, False])
def test_attention_with_sinks_is_refused_before_anything_is_sampled_or_trained(prepared):
    """transformers' SDPA would leave them out without a word."""
    shape = SHAPE | {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**shape), attn_implementation=PACKED_IMPLEMENTATION)
    with pytest.raises(UserError, match="attention: GptOssAttention asks for s_aux, which SDPA cannot do"):
        if prepared:
            prepare(model, ModelConfig(name_or_path="none"), device="cpu")
        else:
            model(input_ids=torch.arange(4)[None])


def test_a_model_whose_packed_sequences_see_each_other_is_refused(monkeypatch):
    model = build(CONFIGS["llama"]).float()
    check_packing(model)
    monkeypatch.setattr("trapo_train.models.attention.segment_arguments", lambda *_: {"segment_lengths": (5,)})
    with pytest.raises(UserError, match=r"a packed row must give .* that of LlamaForCausalLM is off by .* Choose another model"):
        check_packing(model)
    assert model.config._attn_implementation == PACKED_IMPLEMENTATION


def test_plain_attention_gives_the_chosen_one_back_after_an_exception_too():
    model = build(CONFIGS["llama"])
    with pytest.raises(KeyError), plain_attention(model):
        assert model.config._attn_implementation == "eager"
        raise KeyError("inside")
    assert model.config._attn_implementation == PACKED_IMPLEMENTATION
