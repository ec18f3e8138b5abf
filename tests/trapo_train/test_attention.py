"""Choosing a packed attention, and refusing what it cannot do; that it equals single sequences: test_packed_attention.py."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Gemma2Config, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.trapo_train.small_models import CONFIGS, SHAPE
from trapo_train import attention
from trapo_train.attention import (
    FLEX_IMPLEMENTATION,
    PACKED_IMPLEMENTATION,
    check_attention,
    choose_attention,
    segment_arguments,
)
from trapo_train.flex import BLOCK, packed_block_mask


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


def test_generate_is_that_of_sdpa():
    token_ids = torch.tensor([[0, 0, 3, 5], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    arguments = dict(input_ids=token_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ours = build(CONFIGS["llama"]).eval().generate(**arguments)
    theirs = build(CONFIGS["llama"], "sdpa").eval().generate(**arguments)
    assert torch.equal(ours, theirs)


def test_lost_segment_lengths_are_noticed():
    with pytest.raises(ValueError, match="did not pass segment_lengths"):
        model = build(CONFIGS["llama"])
        model.model(input_ids=torch.arange(4)[None], attention_mask=torch.empty(1, 1, 0, 0), use_cache=False)


def test_flash_attention_runs_or_is_refused():
    with pytest.raises(ValueError, match=r"flash_attention_2 cannot run: the package flash-attn is not installed"):
        choose_attention("flash_attention_2", device=torch.device("cuda"), compute_dtype=torch.bfloat16)
    assert choose_attention("auto", device=torch.device("cpu"), compute_dtype=torch.float32) == PACKED_IMPLEMENTATION


def test_flash_attention_where_installed_still_needs_cuda_and_bfloat16(monkeypatch):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    bf16, cuda = torch.bfloat16, torch.device("cuda")
    told = []
    assert choose_attention("auto", device=cuda, compute_dtype=bf16, tell=told.append) == "flash_attention_2"
    assert told == ["model.attention=auto: flash_attention_2"]
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        choose_attention("flash_attention_2", device=torch.device("cpu"), compute_dtype=bf16)
    with pytest.raises(ValueError, match=r"needs model\.dtype=bfloat16, got float32"):
        choose_attention("flash_attention_2", device=cuda, compute_dtype=torch.float32)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 300])
@pytest.mark.parametrize("lengths", [(1,), (128,), (700,), (300, 300, 40), (130, 1, 1, 126, 500), (64,) * 9])
def test_the_block_mask_of_a_row_is_that_of_its_token_mask(lengths, window):
    mask = packed_block_mask(lengths, window, torch.device("cpu"))
    position, start = (
        torch.arange(sum(lengths)),
        torch.tensor([s for s, n in zip(starts(lengths), lengths, strict=True) for _ in range(n)]),
    )
    query, key = position[:, None], position[None, :]
    visible = (key <= query) & (key >= start[:, None]) & (query - key < (window or 10**6))
    blocks = -(-len(position) // BLOCK)
    padded = torch.zeros(blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[: len(position), : len(position)] = visible
    cells = padded.view(blocks, BLOCK, blocks, BLOCK)
    assert torch.equal(mask.to_dense()[0, 0].bool(), cells.any(3).any(1))
    assert torch.equal(mask.mask_mod(None, None, query, key), visible)
    # A cell that skips the comparison has all of its pairs visible, but for queries beyond the end of the row.
    for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        for column in mask.full_kv_indices[0, 0, row, :count].tolist():
            assert cells[row, : len(position) - row * BLOCK, column].all()
    assert window is not None or lengths != (700,) or int(mask.full_kv_num_blocks.sum()) == 15


def starts(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths))]


def test_flex_is_refused_without_a_gpu_and_with_dropout():
    with pytest.raises(ValueError, match="model.attention=flex cannot run: it needs a CUDA device, got cpu"):
        choose_attention("flex", device=torch.device("cpu"), compute_dtype=torch.float32)
    assert choose_attention("flex", device=torch.device("cuda"), compute_dtype=torch.float32) == FLEX_IMPLEMENTATION
    model = build(CONFIGS["llama"], FLEX_IMPLEMENTATION)
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="flex has no dropout, LlamaAttention asks for 0.1"):
        LlamaForCausalLM(model.config).train().model(
            input_ids=torch.arange(8)[None], use_cache=False, **segment_arguments(model, [5, 3], torch.device("cpu"))
        )


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
