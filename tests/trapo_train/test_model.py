"""The model on packed rows: equal to one sequence at a time, for any split into micro-batches; loading and its refusals."""

from __future__ import annotations

import random
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    modeling_flash_attention_utils,
)
from transformers.utils import is_flash_attn_2_available

from trapo_kernels import objectives
from trapo_train.attention import FLEX_IMPLEMENTATION, PACKED_IMPLEMENTATION, segment_arguments
from trapo_train.model import (
    ModelConfig,
    PolicyHead,
    ScratchConfig,
    enable_gradient_checkpointing,
    install_policy_head,
    load_model_and_tokenizer,
    policy_forward,
    policy_head,
    score,
)
from trapo_train.packing import PackingConfig, pack
from trapo_train.records import Problem, Sample

SHAPE = dict(
    vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    intermediate_size=24, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE),
    "sliding window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "final softcap": Gemma2Config(**SHAPE, attn_logit_softcapping=None, final_logit_softcapping=1.5, sliding_window=4),
}


def exact(model: nn.Module) -> nn.Module:
    """Norms and rotary angles in fp64 as well: transformers computes them in fp32 whatever the model's dtype."""

    def norm(self, hidden):
        scale = 1.0 + self.weight if "Gemma" in type(self).__name__ else self.weight
        epsilon = self.eps if "Gemma" in type(self).__name__ else self.variance_epsilon
        return scale * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)

    def rotary(self, hidden, position_ids):
        angle = (position_ids[..., None] * self.inv_freq.double()).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = norm.__get__(module)
        elif "Rotary" in type(module).__name__:
            module.forward = rotary.__get__(module)
    return model


def build(name: str, implementation: str = PACKED_IMPLEMENTATION) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation, dtype=torch.float64)
    install_policy_head(model, compute_dtype=torch.float64)
    return exact(model)


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


def assert_close(actual, expected, relative):
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


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


@pytest.mark.parametrize("name", CONFIGS)
def test_flex_gives_the_hidden_states_of_one_sequence_at_a_time(name):
    expected, _ = hidden_and_gradient(build(name), [[s] for s in make_sequences()])
    model = build(name, FLEX_IMPLEMENTATION).requires_grad_(False)  # flex_attention has no backward on a CPU
    lengths = [len(s) for s in make_sequences()]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = segment_arguments(model, lengths, torch.device("cpu"))
    out = model.model(input_ids=torch.cat(make_sequences())[None], position_ids=positions, use_cache=False, **packed)
    assert_close(out.last_hidden_state[0], expected, 1e-12)


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


@pytest.mark.parametrize("name", CONFIGS)
def test_flash_attention_is_told_the_boundaries_by_transformers(name, monkeypatch):
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
    expected = hidden_and_gradient(build(name), [[s] for s in make_sequences()])
    model = build(name)
    model.config._attn_implementation_internal = "flash_attention_2"  # set by name, it would ask for the package's version
    for actual, wanted in zip(hidden_and_gradient(model, [make_sequences()]), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [
        (FLEX_IMPLEMENTATION, torch.float32, 1e-2),  # TF32 or fp32, whatever flex_attention's kernel takes
        ("flash_attention_2", torch.bfloat16, 5e-2),
    ],
)
def test_other_kernels_train_as_sdpa_packed_does(implementation, dtype, tolerance, window):
    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed (extra [flash-attn])")
    shape = SHAPE | {"head_dim": 16}  # flex_attention's smallest on a GPU
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


def make_samples() -> list[Sample]:
    generator = random.Random(0)
    samples = []
    for index, prefix, completion, advantage, weight in [
        (0, 0, 5, 0.75, 1.0),
        (0, 0, 2, -0.25, 1.0),
        (0, 4, 3, 0.5, 0.5),
        (0, 7, 0, 0.25, 1.0),
        (1, 0, 6, 0.0, 1.0),
        (1, 2, 6, 0.0, 0.0),
        (2, 0, 1, -1.0, 1.0),
        (2, 0, 9, 1.0, 1.0),
    ]:
        ids = [tuple(generator.randrange(13) for _ in range(n)) for n in (3 + index, prefix, completion)]
        samples.append(
            Sample(
                problem=Problem(index, "", ids[0]), micro_group=1, prefix_ratio=0.0, prefix_ids=ids[1],
                completion_ids=ids[2], completion_logprobs=(-1.0,) * completion, finish_reason="stop",
                prefix_weight=weight, advantage=advantage,
            )
        )  # fmt: skip
    return samples


def loss_and_gradient(model, samples, objective, config, **extra):
    model.zero_grad()
    total = 0.0
    for micro_batch in pack(samples, config, objective, max_response_tokens=16, **extra):
        out = policy_forward(model, micro_batch, objective, temperature=0.8)
        out.loss.backward()
        total += float(out.loss.detach())
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


OBJECTIVES = [objectives.trapo(entropy_coef=0.1), objectives.luffy(), objectives.sft(), objectives.dapo()]


@pytest.mark.parametrize("aggregation", ["constant", "token_mean", "role_mean", "sequence_mean"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_gradients_do_not_depend_on_the_split_or_the_order(aggregation, objective):
    model, samples = build("llama"), make_samples()
    loss, whole = loss_and_gradient(model, samples, objective, PackingConfig(1000, aggregation))
    assert whole.abs().max() > 1e-4
    shuffled = random.Random(1).sample(samples, len(samples))
    for batch, max_tokens, extra in [
        (samples, 14, {}),
        (samples, 30, {}),
        (shuffled, 1000, {}),
        (shuffled, 20, {"pad_to": 12}),
    ]:
        split_loss, split = loss_and_gradient(model, batch, objective, PackingConfig(max_tokens, aggregation), **extra)
        assert split_loss == pytest.approx(loss, rel=1e-12)
        assert_close(split, whole, 1e-12)


@pytest.mark.parametrize("name", ["llama", "qwen2", "final softcap"])
def test_loss_and_gradients_equal_eager_logits(name):
    model, objective = build(name), objectives.sft()
    samples = [sample for sample in make_samples() if sample.prefix_ids]
    loss, gradient = loss_and_gradient(model, samples, objective, PackingConfig(1000, "token_mean"))
    model.zero_grad()
    logprobs, shares = [], []
    for sample in samples:
        prompt, prefix = sample.problem.prompt_ids, sample.prefix_ids
        token_ids = torch.tensor([[*prompt, *prefix, *sample.completion_ids]])
        logits = model(input_ids=token_ids, use_cache=False).logits[0, len(prompt) - 1 : len(prompt) + len(prefix) - 1]
        logprob = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(prefix)[:, None])[:, 0]
        logprobs.append(logprob)
        shares.append(torch.full_like(logprob, sample.prefix_weight))
    share = torch.cat(shares)
    expected = -(torch.cat(logprobs) * share).sum() / (share != 0).sum()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-7)  # the weights are fp32
    assert_close(gradient, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), 1e-7)


def test_an_empty_micro_batch_has_exactly_zero_gradient():
    silent = [replace(sample, advantage=0.0) for sample in make_samples()]
    loss, gradient = loss_and_gradient(build("llama"), silent, objectives.dr_grpo(), PackingConfig(100))
    assert loss == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_score_is_the_logprob_of_the_loss_and_needs_no_gradient():
    model, objective = build("llama"), objectives.trapo()
    (micro_batch,) = pack(make_samples(), PackingConfig(1000), objective, max_response_tokens=16)
    out = policy_forward(model, micro_batch, objective, temperature=0.8)
    logprob, entropy = score(model, micro_batch, temperature=0.8)
    assert not logprob.requires_grad
    torch.testing.assert_close(logprob, out.logprob, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, out.entropy, rtol=0, atol=1e-12)


def test_only_loss_rows_reach_the_head(monkeypatch):
    model, objective = build("llama"), objectives.dr_grpo()
    (micro_batch,) = pack(make_samples(), PackingConfig(1000), objective, max_response_tokens=16)
    seen = []
    monkeypatch.setattr(PolicyHead, "forward", lambda self, hidden, *_: seen.append(tuple(hidden.shape)))
    policy_forward(model, micro_batch, objective)
    assert seen == [(20, 16)]  # completions with an advantage: 5 + 2 + 3 + 1 + 9


def tokenizer(size: int = 13) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {"$": 0, "<pad>": 1} | {chr(ord("a") + i): i + 2 for i in range(size - 2)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), eos_token="$", pad_token="<pad>")


SCRATCH = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24, max_position=32)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_scratch_model_exports_and_loads_again(architecture, tied, tmp_path):
    scratch = replace(SCRATCH, architecture=architecture, tie_word_embeddings=tied)
    model, words = load_model_and_tokenizer(ModelConfig(scratch=scratch), task_tokenizer=tokenizer(), seed=3)
    assert isinstance(model.lm_head, PolicyHead)
    assert "lm_head.weight" in model.state_dict()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.eos_token_id == words.eos_token_id
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    again, words_again = load_model_and_tokenizer(ModelConfig(name_or_path=str(tmp_path)))
    token_ids = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(plain(token_ids).logits, model(token_ids).logits)
    torch.testing.assert_close(again(token_ids).logits, model(token_ids).logits)
    assert words_again.get_vocab() == words.get_vocab()
    assert policy_head(again).weight.dtype == torch.float32


def test_scratch_weights_follow_the_seed():
    weights = [
        load_model_and_tokenizer(ModelConfig(scratch=SCRATCH), task_tokenizer=tokenizer(), seed=seed)[0].lm_head.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_bfloat16_computes_in_bf16_and_keeps_fp32_weights_and_gradients():
    config = ModelConfig(scratch=SCRATCH, dtype="bfloat16", gradient_checkpointing=True)
    model, _ = load_model_and_tokenizer(config, task_tokenizer=tokenizer())
    model.train()
    linear_dtypes = set()
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: linear_dtypes.add(output.dtype))
    loss, gradient = loss_and_gradient(model, make_samples(), objectives.trapo(), PackingConfig(1000))
    assert linear_dtypes == {torch.bfloat16}
    assert gradient.dtype == torch.float32
    exact_model, _ = load_model_and_tokenizer(ModelConfig(scratch=SCRATCH), task_tokenizer=tokenizer())
    exact_loss, exact_gradient = loss_and_gradient(exact_model, make_samples(), objectives.trapo(), PackingConfig(1000))
    assert loss == pytest.approx(exact_loss, rel=0.02)
    assert nn.functional.cosine_similarity(gradient, exact_gradient, dim=0) > 0.999


def test_logits_scaled_after_the_head_are_refused():
    torch.manual_seed(0)
    config = CohereConfig(**SHAPE, logit_scale=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_IMPLEMENTATION)
    with pytest.raises(ValueError, match="CohereForCausalLM are off by"):
        install_policy_head(model, compute_dtype=torch.float32)


def test_head_that_is_not_linear_is_refused():
    model = build("llama")

    class Adapter(nn.Linear):
        pass

    model.set_output_embeddings(Adapter(16, 13, bias=False))
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Linear, LlamaForCausalLM has Adapter"):
        install_policy_head(model, compute_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"Call install_policy_head"):
        policy_head(model)


def test_head_bias_takes_part():
    model = build("llama")
    head = nn.Linear(16, 13, dtype=torch.float64)
    nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    install_policy_head(model, compute_dtype=torch.float64)
    (micro_batch,) = pack(make_samples(), PackingConfig(1000), objectives.sft(), max_response_tokens=16)
    policy_forward(model, micro_batch, objectives.sft()).loss.backward()
    assert head.bias.grad.abs().max() > 0
    logprob, _ = score(model, micro_batch)
    with torch.no_grad():
        head.bias += torch.linspace(-5, 5, 13)
    assert (score(model, micro_batch)[0] - logprob).abs().max() > 0.1


def test_model_with_fewer_embeddings_than_tokens_is_refused(tmp_path):
    model, _ = load_model_and_tokenizer(ModelConfig(scratch=SCRATCH), task_tokenizer=tokenizer())
    model.save_pretrained(tmp_path / "model")
    tokenizer(20).save_pretrained(tmp_path / "tokenizer")
    config = ModelConfig(name_or_path=str(tmp_path / "model"), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=r"got 20 and 13\. Set model\.tokenizer"):
        load_model_and_tokenizer(config)


def test_scratch_without_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"needs a tokenizer.*Set model\.tokenizer"):
        load_model_and_tokenizer(ModelConfig(scratch=SCRATCH))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "got neither"),
        ({"name_or_path": "x", "scratch": SCRATCH}, "got both"),
        ({"name_or_path": "x", "dtype": "float16"}, r"dtype must be one of float32, bfloat16, got 'float16'"),
        ({"name_or_path": "x", "attention": "sdpa"}, "attention must be one of auto"),
    ],
)
def test_model_config_checks_its_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "gpt2"}, "must be one of llama, qwen2, qwen3, got 'gpt2'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"hidden_size": 18, "num_heads": 4}, r"multiple of 2 · num_heads = 8, got 18"),
        ({"num_kv_heads": 3}, "must divide num_heads = 4, got 3"),
    ],
)
def test_scratch_config_checks_its_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ScratchConfig(**fields)
