"""The embedded engine against transformers' own generate and full forward passes, on a tiny Llama from scratch."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from trapo_train.engines.cache import cache_name
from trapo_train.engines.engine import EngineError, SamplingParams, TransformersEngine

EOS, VOCAB = 1, 23
TOKENIZER = SimpleNamespace(eos_token_id=EOS)
RAGGED = [[5, 6, 7], [8], [9, 3, 4, 5, 6, 2, 11], [5, 6, 7], [12, 13]]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_model(cls=LlamaForCausalLM, config_cls=LlamaConfig, **kwargs):
    torch.manual_seed(0)
    config = config_cls(vocab_size=VOCAB, max_position_embeddings=64, **(SIZES | kwargs))
    model = cls(config)
    with torch.no_grad():  # peaked enough that temperature, top_k and top_p make a difference
        model.lm_head.weight.mul_(40)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def engine_of(model, seed=0, max_batch_tokens=4096, tokenizer=TOKENIZER):
    return TransformersEngine(model, tokenizer, seed=seed, max_batch_tokens=max_batch_tokens)


def full_logprobs(model, prompt, completion, temperature):
    """Logprob of every completion token from one unpadded forward pass."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def test_greedy_equals_generate(model):
    completions = engine_of(model).generate(RAGGED, SamplingParams(12, temperature=0.0))
    for prompt, completion in zip(RAGGED, completions, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert completion.token_ids == tuple(expected.tolist())


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
def test_logprobs_equal_a_full_forward_pass(model, temperature):
    completions = engine_of(model).generate(RAGGED, SamplingParams((3, 16, 9, 5, 12), temperature=temperature))
    for prompt, completion in zip(RAGGED, completions, strict=True):
        assert len(completion.logprobs) == len(completion.token_ids)
        expected = full_logprobs(model, prompt, completion, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, rtol=0, atol=1e-4)


def test_truncation_does_not_change_the_reported_logprobs(model):
    completions = engine_of(model).generate(RAGGED, SamplingParams(8, top_k=2, top_p=0.9))
    for prompt, completion in zip(RAGGED, completions, strict=True):
        expected = full_logprobs(model, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, rtol=0, atol=1e-4)


def test_ragged_prompts_equal_one_at_a_time(model):
    params = SamplingParams(12, temperature=0.0)
    together = engine_of(model).generate(RAGGED, params)
    alone = [engine_of(model).generate([prompt], params)[0] for prompt in RAGGED]
    split = engine_of(model, max_batch_tokens=40).generate(RAGGED, params)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone] == [c.token_ids for c in split]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]


def test_sliding_window_cache_equals_one_at_a_time():
    model = tiny_model(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=4)
    params = SamplingParams(12, temperature=0.0)
    together = engine_of(model).generate(RAGGED, params)
    for prompt, completion in zip(RAGGED, together, strict=True):
        expected = full_logprobs(model, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, rtol=0, atol=1e-4)


def test_padding_takes_no_positions():
    """GPT-2 learns a vector for each position, so that a shifted prompt would show; rotary embeddings hide it."""
    model = tiny_model(GPT2LMHeadModel, GPT2Config, initializer_range=0.5, tie_word_embeddings=False)
    completions = engine_of(model).generate(RAGGED, SamplingParams(12))
    for prompt, completion in zip(RAGGED, completions, strict=True):
        expected = full_logprobs(model, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, rtol=0, atol=1e-4)


def test_packed_training_attention_generates_like_sdpa(model):
    from trapo_train.models.attention import PACKED_IMPLEMENTATION

    params = SamplingParams(12, temperature=0.0)
    packed = tiny_model(attn_implementation=PACKED_IMPLEMENTATION)
    completions = engine_of(packed).generate(RAGGED, params)
    assert [c.token_ids for c in completions] == [c.token_ids for c in engine_of(model).generate(RAGGED, params)]


def test_batches_respect_the_token_limit_and_keep_the_order(model, monkeypatch):
    sizes = []
    forward = model.forward

    def recording(**kwargs):
        if kwargs[cache_name(model)].get_seq_length() == 0:
            sizes.append(kwargs["input_ids"].shape)
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", recording)
    prompts = [[2 + i % 20] * length for i, length in enumerate([7, 1, 4, 4, 2, 6])]
    limited = engine_of(model, max_batch_tokens=20).generate(prompts, SamplingParams(3, temperature=0.0))
    assert len(sizes) > 1
    assert all(rows * (width + 3) <= 20 for rows, width in sizes)
    unlimited = engine_of(model).generate(prompts, SamplingParams(3, temperature=0.0))
    assert [c.token_ids for c in limited] == [c.token_ids for c in unlimited]


def test_batches_count_the_largest_budget_of_their_rows(model, monkeypatch):
    rows = []
    forward = model.forward

    def recording(**kwargs):
        if kwargs[cache_name(model)].get_seq_length() == 0:
            rows.append(len(kwargs["input_ids"]))
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", recording)
    prompts = [[2, 2], [3, 3], [4, 4], [5, 5]]
    engine_of(model, max_batch_tokens=11).generate(prompts, SamplingParams((9, 9, 1, 1)))
    assert rows == [1, 1, 2]


def test_equal_prompts_share_a_prefill_but_not_their_samples(model, monkeypatch):
    rows = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: rows.append(len(kw["input_ids"])) or forward(**kw))
    completions = engine_of(model).generate([[5, 6, 7]] * 6, SamplingParams(8, temperature=2.0, stop_token_ids=()))
    assert rows == [1] + [6] * 7
    assert len({c.token_ids for c in completions}) > 1


def test_every_row_has_its_own_budget_and_stops_at_its_own_token(model):
    completions = engine_of(model).generate(RAGGED, SamplingParams((1, 2, 3, 4, 5), stop_token_ids=()))
    assert [len(c.token_ids) for c in completions] == [1, 2, 3, 4, 5]
    assert {c.finish_reason for c in completions} == {"length"}
    free = engine_of(model).generate([[5, 6, 7]], SamplingParams(10, temperature=0.0, stop_token_ids=()))[0]
    stop = free.token_ids[4]
    stopped = engine_of(model).generate([[5, 6, 7]], SamplingParams(10, temperature=0.0, stop_token_ids=(stop,)))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


def test_stop_at_the_last_token_of_the_budget_counts_as_stop(model):
    first = engine_of(model).generate([[5, 6, 7]], SamplingParams(1, temperature=0.0, stop_token_ids=()))[0].token_ids
    completion = engine_of(model).generate([[5, 6, 7]], SamplingParams(1, temperature=0.0, stop_token_ids=first))[0]
    assert completion.finish_reason == "stop"


def test_a_call_goes_on_where_another_ended(model):
    engine = engine_of(model)
    prompts = [RAGGED[0]] * 6
    whole = engine.generate(prompts, SamplingParams(8, seed=3))
    parts = [engine.generate(prompts[at : at + 2], SamplingParams(8, seed=3, first_key=at)) for at in (0, 2, 4)]
    assert [completion.token_ids for part in parts for completion in part] == [completion.token_ids for completion in whole]
    assert len({completion.token_ids for completion in whole}) > 1


def test_sampling_frequencies_follow_temperature_top_k_and_top_p(model):
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    params = SamplingParams(1, temperature=2.0, top_k=6, top_p=0.8, stop_token_ids=())
    prob, order = (logits / 2.0).softmax(-1).sort(descending=True)
    prob = prob[:6] / prob[:6].sum()
    kept = int((prob.cumsum(0) < 0.8).sum()) + 1
    assert 1 < kept < 6  # otherwise the test would not test top_p
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    expected[order[:kept]] = prob[:kept] / prob[:kept].sum()
    completions = engine_of(model, max_batch_tokens=10**6).generate([[5, 6, 7]] * 4000, params)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    torch.testing.assert_close(counts / 4000, expected.float(), rtol=0, atol=0.035)


def test_resume_from_state_is_exact(model):
    params = SamplingParams(8, temperature=1.5)
    engine = engine_of(model, seed=3)
    first = engine.generate(RAGGED, params)
    state = engine.state_dict()
    second = engine.generate(RAGGED, params)
    assert first != second
    assert engine_of(model, seed=3).generate(RAGGED, params) == first
    resumed = engine_of(model, seed=99)
    resumed.load_state_dict(state)
    assert resumed.generate(RAGGED, params) == second


def test_a_seeded_call_repeats_and_leaves_the_random_states_alone(model):
    engine = engine_of(model)
    before, global_before = engine.state_dict(), torch.get_rng_state()
    seeded = SamplingParams(8, temperature=1.5, seed=7)
    assert engine.generate(RAGGED, seeded) == engine.generate(RAGGED, seeded)
    assert engine.state_dict() == before
    engine.generate(RAGGED, SamplingParams(8))
    assert engine.state_dict() != before
    assert torch.equal(torch.get_rng_state(), global_before)


def test_modes_are_restored_even_after_an_error(model):
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    engine_of(model).generate(RAGGED, SamplingParams(2))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        engine_of(model).generate([[VOCAB + 5]], SamplingParams(2))
    assert [module.training for module in model.modules()] == modes


def test_weights_train_after_generation(model):
    engine_of(model).generate(RAGGED, SamplingParams(2))
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_autocast_around_the_call_applies(model):
    dtypes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine_of(model).generate(RAGGED, SamplingParams(4))
    hook.remove()
    assert set(dtypes) == {torch.bfloat16}


def test_no_prompts_is_no_completions(model):
    assert engine_of(model).generate([], SamplingParams(4)) == []


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[3], []], SamplingParams(4), "at least 1 token, got an empty one"),
        ([[3] * 60], SamplingParams(5), r"64 positions, got 60 \+ 5 = 65\. Shorten"),
        ([[3] * 30], SamplingParams(21), r"max_batch_tokens = 50, got 30 \+ 21 = 51\. Raise"),
        ([[3], [4]], SamplingParams((4,)), r"one per prompt \(2\), got 1"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(model, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        engine_of(model, max_batch_tokens=50).generate(prompts, params)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", (3, 0)),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("first_key", -1),
    ],
)
def test_sampling_params_refuse_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**({"max_new_tokens": 4} | {field: value}))


def test_other_errors_name_rule_and_remedy(model):
    with pytest.raises(ValueError, match="max_batch_tokens must be at least 2, got 1"):
        engine_of(model, max_batch_tokens=1)
    with pytest.raises(ValueError, match=r"eos_token_id None. Set tokenizer\.eos_token"):
        engine_of(model, tokenizer=SimpleNamespace(eos_token_id=None)).generate([[3]], SamplingParams(2))


def test_diverged_weights_are_reported():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match=r"logits must be finite.*earlier checkpoint"):
        engine_of(model).generate([[3]], SamplingParams(2))
