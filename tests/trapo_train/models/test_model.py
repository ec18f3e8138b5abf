"""The model and its loss on packed rows: equal for any split into micro-batches; loading and its refusals."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from tests.trapo_train.models.small_models import SHAPE, assert_close, build
from trapo_kernels import objectives
from trapo_kernels.weights import AGGREGATIONS
from trapo_train.models.attention import PACKED_IMPLEMENTATION
from trapo_train.models.model import (
    ModelConfig,
    PolicyHead,
    body_autocast,
    install_policy_head,
    load_model_and_tokenizer,
    policy_forward,
    policy_head,
    score,
)
from trapo_train.models.scratch import ScratchConfig
from trapo_train.records import Problem, Sample
from trapo_train.step.packing import PackingConfig, pack


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
        (samples, 20, {"ranks": 3}),
        (shuffled, 20, {"ranks": 12}),
    ]:
        split_loss, split = loss_and_gradient(model, batch, objective, PackingConfig(max_tokens, aggregation), **extra)
        assert split_loss == pytest.approx(loss, rel=1e-12)
        assert_close(split, whole, 1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", [*OBJECTIVES, objectives.chord_mu(mu=0.3)], ids=lambda objective: objective.name)
def test_masking_completions_is_deleting_them_whatever_the_split(aggregation, objective):
    model, samples = build("llama"), make_samples()
    masked = [replace(sample, masked=i in (1, 2, 5, 7)) for i, sample in enumerate(samples)]
    gone = {"completion_ids": (), "completion_logprobs": ()}
    deleted = [replace(sample, **gone) if i in (1, 2, 5, 7) else sample for i, sample in enumerate(samples)]
    assert any(s.masked and s.prefix_ids and s.completion_ids for s in masked)
    loss, whole = loss_and_gradient(model, deleted, objective, PackingConfig(1000, aggregation))
    for max_tokens, extra in ((1000, {}), (14, {}), (20, {"ranks": 3})):
        split_loss, split = loss_and_gradient(model, masked, objective, PackingConfig(max_tokens, aggregation), **extra)
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
    expected = -(torch.cat(logprobs) * share).sum() / share.sum()
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
    logprob = score(model, micro_batch, temperature=0.8)
    assert not logprob.requires_grad
    torch.testing.assert_close(logprob, out.logprob, rtol=0, atol=1e-12)


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


EMBEDDED = {
    "llama": LlamaConfig(**SHAPE),
    "scaled": Gemma2Config(**SHAPE | {"hidden_size": 24}),  # √24 has no bfloat16
    "learned positions": GPT2Config(vocab_size=13, n_embd=16, n_head=2, n_layer=2, n_positions=16),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_residual_stream_is_in_the_compute_type_from_the_embedding_on(name):
    """As it is where FSDP gathers weights in that type, and in a sampler."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(EMBEDDED[name]), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.copy_(parameter.bfloat16())  # what a checkpoint in that type has
    whole = copy.deepcopy(model).bfloat16()
    install_policy_head(model, compute_dtype=torch.bfloat16)
    block = model.base_model.h[0] if name == "learned positions" else model.base_model.layers[0]
    plain = whole.base_model.h[0] if name == "learned positions" else whole.base_model.layers[0]
    streams, outputs = [], []
    for each in (block, plain):
        each.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
        each.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    ids = torch.arange(5)[None]
    with body_autocast(model):
        model.base_model(input_ids=ids, use_cache=False)
    whole.base_model(input_ids=ids, use_cache=False)
    assert streams[0].dtype == torch.bfloat16 == outputs[0].dtype and torch.equal(*streams)
    assert model.base_model(input_ids=ids, use_cache=False).last_hidden_state.dtype == torch.float32  # without autocast


SCALED = dict(**SHAPE, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SCALED, logit_scale=0.1),
        GraniteConfig(**SCALED, logits_scaling=8.0),
        HyperCLOVAXConfig(**SCALED, logits_scaling=0.125),  # by which it multiplies
        LlamaConfig(**SCALED),
    ],
    ids=lambda config: config.model_type,
)
def test_a_constant_that_logits_are_multiplied_by_is_part_of_the_temperature(config):
    """Of the loss, of scores, and of what the model's own logits are sampled with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_IMPLEMENTATION)
    install_policy_head(model, compute_dtype=torch.float32)
    (sample,) = [sample for sample in make_samples() if len(sample.completion_ids) == 9]
    (micro_batch,) = pack([sample], PackingConfig(1000), objectives.dr_grpo(), max_response_tokens=16)
    prompt, answer = sample.problem.prompt_ids, sample.completion_ids
    logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = (logits.detach() / 0.8).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert expected.std() > 1e-3
    torch.testing.assert_close(score(model, micro_batch, temperature=0.8), expected, rtol=1e-5, atol=1e-5)
    out = policy_forward(model, micro_batch, objectives.dr_grpo(), temperature=0.8)
    torch.testing.assert_close(out.logprob, expected, rtol=1e-5, atol=1e-5)


def test_an_attention_in_16_bits_only_does_not_see_the_float32_weights_of_loading():
    """As FlashAttention, which refuses a query in float32; passes of the trainer are under autocast."""

    def refuse(module, query, *arguments, **options):
        raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type, got {query.dtype}")

    AttentionInterface.register("sixteen_bits", refuse)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation="sixteen_bits")
    install_policy_head(model, compute_dtype=torch.bfloat16)
    assert model.config._attn_implementation == "sixteen_bits"
    with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
        model(input_ids=torch.tensor([[0, 1]]))


def test_logits_that_are_no_multiple_of_the_heads_are_refused(monkeypatch):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation=PACKED_IMPLEMENTATION)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits.sinh() * 1.1))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM are off by .*choose another model"):
        install_policy_head(model, compute_dtype=torch.float32)


def test_a_model_that_names_no_body_is_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(type(model), "base_model_prefix", "language_model")  # of Llama4ForCausalLM, which has no such part
    with pytest.raises(ValueError, match=r"LlamaForCausalLM must name its body in base_model_prefix, got none\. Choose another"):
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


def test_a_head_with_rows_that_the_model_leaves_out_is_refused_in_words_for_who_trains():
    model = build("llama")
    model.config.unpadded_vocab_size = 11
    words = r"^model: .* all rows of its head, got unpadded_vocab_size = 11 of 13\. LlamaForCausalLM .*: choose another model\.$"
    with pytest.raises(ValueError, match=words):
        install_policy_head(model, compute_dtype=torch.float32)


def test_a_model_that_may_ignore_the_cap_of_its_text_is_refused_in_words_for_who_trains():
    model = build("llama")
    text = model.config
    text.final_logit_softcapping = 30.0
    model.config = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    words = r"^model: a cap or a scale .* of llama in llava, which may ignore them\. LlamaForCausalLM .*: choose another model\.$"
    with pytest.raises(ValueError, match=words):
        install_policy_head(model, compute_dtype=torch.float32)


def test_head_bias_takes_part():
    model = build("llama")
    head = nn.Linear(16, 13, dtype=torch.float64)
    nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    install_policy_head(model, compute_dtype=torch.float64)
    (micro_batch,) = pack(make_samples(), PackingConfig(1000), objectives.sft(), max_response_tokens=16)
    policy_forward(model, micro_batch, objectives.sft()).loss.backward()
    assert head.bias.grad.abs().max() > 0
    logprob = score(model, micro_batch)
    with torch.no_grad():
        head.bias += torch.linspace(-5, 5, 13)
    assert (score(model, micro_batch) - logprob).abs().max() > 0.1


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
