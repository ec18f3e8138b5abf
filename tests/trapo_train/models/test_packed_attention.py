"""Packed rows through every attention that can run them: hidden states and gradients are those of one sequence at a time."""

from __future__ import annotations

import copy
import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Exaone4Config,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    modeling_flash_attention_utils,
)
from transformers.utils import is_flash_attn_2_available

from tests.trapo_train.models.small_models import CONFIGS, SHAPE, assert_close, build
from trapo_train.models import varlen
from trapo_train.models.attention import (
    FA2_IMPLEMENTATION,
    PACKED_IMPLEMENTATION,
    VARLEN_IMPLEMENTATION,
    segment_arguments,
)
from trapo_train.models.model import enable_gradient_checkpointing

OLDER_VARLEN = varlen.varlen_obstacle(Qwen2Config(**SHAPE | {"head_dim": 16})) or ""


def hidden_and_gradient(model, rows):
    """Last hidden states of `rows` (each a list of sequences packed into one row), and all gradients of the body."""
    model.zero_grad()
    outputs = []
    for sequences in rows:
        positions = torch.cat([torch.arange(len(s)) for s in sequences])[None]
        packed = segment_arguments(model, [len(s) for s in sequences], torch.device("cpu"))
        out = model.model(input_ids=torch.cat(sequences)[None], position_ids=positions, use_cache=False, **packed)
        outputs.append(out.last_hidden_state[0])
    hidden = torch.cat(outputs)
    weight = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).reshape(hidden.shape)
    (hidden.sin() * weight).sum().backward()
    return hidden.detach(), torch.cat([p.grad.flatten() for p in model.model.parameters()])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_packed_row_equals_one_sequence_at_a_time(name, checkpointing):
    sequences = make_sequences()
    model = build(name)
    alone_hidden, alone_gradient = hidden_and_gradient(model, [[s] for s in sequences])
    if checkpointing:
        enable_gradient_checkpointing(model)
        model.train()
    hidden, gradient = hidden_and_gradient(model, [sequences])
    assert_close(hidden, alone_hidden, 1e-13)
    assert_close(gradient, alone_gradient, 1e-12)


def make_sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 13, (n,), generator=generator) for n in (9, 5, 5, 5, 2, 1, 1)]


def varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """flash_attn_varlen_func of the package flash-attn, in plain PyTorch: the same arguments, [T, heads, head_dim] in and out."""
    assert causal and dropout_p == softcap == 0.0 and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max() and cu_seqlens_q[-1] == len(q)
    outputs = []
    for start, end in cu_seqlens_q.unfold(0, 2, 1).tolist():
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if window_size[0] < 0 else seen.triu(-window_size[0])
        part = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        outputs.append(F.scaled_dot_product_attention(*part, attn_mask=seen, scale=softmax_scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the package, which transformers then finds."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = package.flash_attn_with_kvcache = None
    package.flash_attn_varlen_func = varlen_attention
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input = padding.unpad_input = None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    for found_before in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn"):
        monkeypatch.setattr(modeling_flash_attention_utils, found_before, None, raising=False)
    return package


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_flash_attention_is_told_the_boundaries_and_windows(name, checkpointing, flash_attn, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("positions were compared, for which the host waits")

    expected = hidden_and_gradient(build(name), [[s] for s in make_sequences()])
    model = build(name, FA2_IMPLEMENTATION)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", refuse)
    if checkpointing:
        enable_gradient_checkpointing(model)
        model.train()
    for actual, wanted in zip(hidden_and_gradient(model, [make_sequences()]), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_own_flash_attention_is_told_the_boundaries(name, flash_attn):
    expected = hidden_and_gradient(build(name), [[s] for s in make_sequences()])
    model = build(name)
    model.config._attn_implementation_internal = "flash_attention_2"  # set by name, it would ask for the package's version
    for actual, wanted in zip(hidden_and_gradient(model, [make_sequences()]), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


def torchs_varlen_attention(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
    seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn, which has no CPU kernel, in plain PyTorch: the arguments of torch 2.13."""
    assert return_aux is seqused_k is block_table is num_splits is None and window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1]) and query.dtype == key.dtype == value.dtype
    return varlen_attention(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=True, window_size=window_size
    )


def test_the_stand_in_takes_what_torchs_function_takes():
    assert inspect.signature(torchs_varlen_attention).parameters.keys() >= inspect.signature(varlen.varlen_attn).parameters.keys()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_varlen_is_told_the_boundaries_and_windows(name, checkpointing, monkeypatch):
    expected = hidden_and_gradient(build(name), [[s] for s in make_sequences()])
    monkeypatch.setattr(varlen, "varlen_attn", torchs_varlen_attention)
    model = build(name, VARLEN_IMPLEMENTATION)
    if checkpointing:
        enable_gradient_checkpointing(model)
        model.train()
    for actual, wanted in zip(hidden_and_gradient(model, [make_sequences()]), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


WINDOW = SHAPE | {"sliding_window": 3, "initializer_range": 0.5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1}
WINDOWS = {
    "left to the mask": Qwen2MoeConfig(**WINDOW, **EXPERTS, use_sliding_window=True),
    "held by full layers, too": Exaone4Config(**WINDOW),
}


@pytest.mark.parametrize("implementation", [PACKED_IMPLEMENTATION, VARLEN_IMPLEMENTATION, FA2_IMPLEMENTATION])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_holds_in_the_layers_that_have_it_however_they_say_so(name, implementation, flash_attn, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", torchs_varlen_attention)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(WINDOWS[name]), attn_implementation="eager").requires_grad_(False)
    lengths = [len(s) for s in make_sequences()]
    row = {"input_ids": torch.cat(make_sequences())[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    expected = torch.cat([model.model(input_ids=s[None], use_cache=False).last_hidden_state[0] for s in make_sequences()])
    model.set_attn_implementation(implementation)
    packed = segment_arguments(model, lengths, torch.device("cpu"))
    assert_close(model.model(**row, use_cache=False, **packed).last_hidden_state[0], expected, 1e-5)


def test_a_window_in_the_configuration_alone_is_refused_for_longer_sequences():
    """As PhiMoE has it."""
    config = PhimoeConfig(**SHAPE, num_local_experts=2, sliding_window=3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_IMPLEMENTATION)
    for lengths in ([3, 2], [4, 1]):
        packed = segment_arguments(model, lengths, torch.device("cpu"))
        if lengths == [3, 2]:
            model.model(input_ids=torch.arange(5)[None], use_cache=False, **packed)
            continue
        with pytest.raises(ValueError, match="PhimoeAttention must hand on its sliding window, .* one of 3 tokens. Keep prompts"):
            model.model(input_ids=torch.arange(5)[None], use_cache=False, **packed)


@pytest.mark.parametrize("implementation", [VARLEN_IMPLEMENTATION, FA2_IMPLEMENTATION])
def test_kernels_compute_in_autocasts_type_whatever_the_norms_leave(implementation, flash_attn, monkeypatch):
    seen = []

    def attend(*tensors, **options):
        seen.append({tensor.dtype for tensor in tensors[:3]})
        return tensors[0]

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", attend)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"], attn_implementation=implementation)
    packed = segment_arguments(model, [5, 4], torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        model.model(input_ids=torch.arange(9)[None], use_cache=False, **packed)
    assert seen == [{torch.bfloat16}] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [
        pytest.param(
            VARLEN_IMPLEMENTATION,
            torch.bfloat16,
            5e-2,
            marks=pytest.mark.skipif(bool(OLDER_VARLEN), reason=f"torch's varlen_attn: {OLDER_VARLEN}"),
        ),
        pytest.param(
            FA2_IMPLEMENTATION,
            torch.bfloat16,
            5e-2,
            marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed (extra [flash-attn])"),
        ),
    ],
)
def test_other_kernels_train_as_sdpa_packed_does(implementation, dtype, tolerance, window):
    shape = SHAPE | {"head_dim": 16}
    config = Qwen2Config(**shape, use_sliding_window=window is not None, sliding_window=window, max_window_layers=1)
    lengths, gradients = (300, 300, 130, 7), []
    token_ids = torch.randint(0, 13, (1, sum(lengths)), device="cuda")
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    for each in (PACKED_IMPLEMENTATION, implementation):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=each, dtype=dtype).cuda()
        packed = segment_arguments(model, lengths, torch.device("cuda"))
        model.model(input_ids=token_ids, position_ids=positions, use_cache=False, **packed).last_hidden_state.sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.model.parameters()]))
    assert_close(gradients[1], gradients[0], tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_sequence_equals_eager_attention(name):
    token_ids = torch.randint(0, 13, (1, 9), generator=torch.Generator().manual_seed(2))
    model, eager = build(name), build(name, "eager")
    packed = segment_arguments(model, [9], torch.device("cpu"))
    hidden = model.model(input_ids=token_ids, use_cache=False, **packed).last_hidden_state
    # Eager attention takes its softmax in fp32.
    assert_close(hidden, eager.model(input_ids=token_ids, use_cache=False).last_hidden_state, 1e-6)
