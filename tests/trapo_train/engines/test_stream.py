"""Continuous batching of the embedded engine: what joins, what leaves, what is drawn, and what it costs."""

from __future__ import annotations

import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.trapo_train.engines.test_engine import EOS, RAGGED, VOCAB, engine_of, full_logprobs, tiny_model
from trapo_train.engines import cache
from trapo_train.engines.engine import EngineError, SamplingParams, TransformersEngine

PROMPTS = [[2 + (7 * i + k) % 20 for k in range(length)] for i, length in enumerate([3, 9, 1, 5, 12, 2, 7, 4])]
BUDGETS = (4, 17, 9, 2, 11, 30, 1, 23)
MODELS = {
    "llama": {},
    "window": {"cls": MistralForCausalLM, "config_cls": MistralConfig, "num_key_value_heads": 2, "sliding_window": 5},
    "learned positions": {
        "cls": GPT2LMHeadModel,
        "config_cls": GPT2Config,
        "initializer_range": 0.5,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(params=["small", "roomy"])
def memory(request, monkeypatch):
    """Both ways of holding a cache, the second with so little room that it grows often."""
    if request.param == "roomy":
        monkeypatch.setattr(cache, "SMALL", 0)
        monkeypatch.setattr(cache, "ROOM", 3)


def drain(stream):
    """All completions by ticket, in the order in which they came."""
    done = {}
    while new := stream.advance():
        done |= dict(new)
    return done


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("limit", [pytest.param(60, marks=pytest.mark.slow), 130, pytest.param(10**6, marks=pytest.mark.slow)])
def test_what_a_prompt_draws_depends_on_neither_neighbours_nor_joins(name, limit):
    model, params = tiny_model(**MODELS[name]), SamplingParams(BUDGETS, temperature=1.5, stop_token_ids=(EOS, 2))
    completions = engine_of(model, max_batch_tokens=limit).generate(PROMPTS, params)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        with engine_of(model).stream(params) as stream:
            stream.submit(prompt, BUDGETS[i], key=i)
            ((_, alone),) = drain(stream).items()
        assert alone.token_ids == completion.token_ids and alone.finish_reason == completion.finish_reason
        expected = full_logprobs(model, prompt, completion, 1.5)
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("memory")
def test_prompts_join_a_running_batch_once_half_of_it_has_left(monkeypatch):
    model = tiny_model()
    passes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: passes.append(tuple(kw["input_ids"].shape)) or forward(**kw))
    with engine_of(model).stream(SamplingParams(1, stop_token_ids=())) as stream:
        budgets = [3, 5, 9, 9]
        tickets = [stream.submit(PROMPTS[i], budget, key=i) for i, budget in enumerate(budgets)]
        assert stream.hungry
        assert [ticket for ticket, _ in stream.advance()] == tickets[:1] and not stream.hungry
        late = stream.submit([5] * 20, 4, key=9)
        assert [ticket for ticket, _ in stream.advance()] == tickets[1:2] and stream.hungry
        assert [ticket for ticket, _ in stream.advance()] == [late]
        assert {ticket for ticket, _ in stream.advance()} == set(tickets[2:])
        assert stream.advance() == []
    # a prefill of four, 2 steps, 2 of the three left, the prefill of the late one, 3 steps with it, 1 of the last two
    assert passes == [(4, 9), (4, 1), (4, 1), (3, 1), (3, 1), (1, 20), (3, 1), (3, 1), (3, 1), (2, 1)]
    assert stream.metrics() == {"rollout/engine_steps": 10.0, "rollout/rows_in_flight": pytest.approx(30 / 10)}


def test_waiting_prompts_join_in_order_and_equal_ones_share_a_prefill(monkeypatch):
    model = tiny_model()
    prefills, forward = [], model.forward

    def recording(**kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            prefills.append(kwargs["input_ids"][:, -2:].tolist())
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", recording)
    with engine_of(model, max_batch_tokens=20).stream(SamplingParams(1, stop_token_ids=())) as stream:
        order = [[7, 7], [8, 8], [8, 8], [9, 9], [8, 8], [6, 6]]
        for i, prompt in enumerate(order):
            stream.submit(prompt, 3, key=i)
        done = list(drain(stream))
    assert prefills == [[[7, 7], [8, 8], [9, 9]], [[8, 8], [6, 6]]]  # room for 4 rows of 2 + 3 tokens
    assert done == sorted(done)


@pytest.mark.usefixtures("memory")
def test_the_batch_never_holds_more_than_its_limit(monkeypatch):
    model, held = tiny_model(), []
    forward = model.forward

    def recording(**kwargs):
        out = forward(**kwargs)
        held.append(kwargs["input_ids"].shape[0] * kwargs[cache.cache_name(model)].get_seq_length())
        return out

    monkeypatch.setattr(model, "forward", recording)
    completions = engine_of(model, max_batch_tokens=80).generate(PROMPTS * 3, SamplingParams(BUDGETS * 3, stop_token_ids=()))
    assert 40 < max(held) <= 80
    assert [len(completion.token_ids) for completion in completions] == list(BUDGETS * 3)


def test_padding_that_no_row_needs_is_cut_off(monkeypatch):
    model, columns = tiny_model(), []
    forward = model.forward

    def recording(**kwargs):
        columns.append((kwargs[cache.cache_name(model)].get_seq_length(), kwargs["attention_mask"] is not None))
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", recording)
    engine_of(model).generate([[5] * 30, [6] * 4], SamplingParams((2, 4), stop_token_ids=()))
    assert columns == [(0, True), (30, True), (5, False), (6, False)]


def test_keys_that_a_norm_has_widened_are_held_in_the_type_of_the_values(monkeypatch):
    held = []
    update = cache.RoomyLayer.update

    def watched(layer, *states, **options):
        out = update(layer, *states, **options)
        held.append((states[0].dtype, *(part.dtype for part in out)))
        return out

    monkeypatch.setattr(cache.RoomyLayer, "update", watched)
    model = tiny_model(Qwen3ForCausalLM, Qwen3Config, num_key_value_heads=2, head_dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        engine_of(model).generate(RAGGED, SamplingParams(4))
    assert set(held) == {(torch.float32, torch.bfloat16, torch.bfloat16)}


def test_recurrent_states_take_no_joins_but_the_same_samples():
    config = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 0, "decoder_sparse_step": 2, "mlp_only_layers": [0, 1]}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    types = {"layer_types": ["linear_attention", "full_attention"]}
    model = tiny_model(Qwen3NextForCausalLM, Qwen3NextConfig, **config, **linear, **types)
    params = SamplingParams(BUDGETS[:5], temperature=1.5, stop_token_ids=())
    passes = []
    hook = model.register_forward_pre_hook(lambda _, args, kw: passes.append(kw["input_ids"].shape[0]), with_kwargs=True)
    limited = engine_of(model, max_batch_tokens=60).generate(PROMPTS[:5], params)
    hook.remove()
    together = engine_of(model).generate(PROMPTS[:5], params)
    assert [c.token_ids for c in limited] == [c.token_ids for c in together]
    assert sorted(passes[: passes.index(1)], reverse=True) == passes[: passes.index(1)]  # rows only leave until the batch is empty


def test_logits_that_break_on_the_way_are_reported(monkeypatch):
    model, calls = tiny_model(), []
    forward = model.forward

    def breaking(**kwargs):
        out = forward(**kwargs)
        calls.append(None)
        if len(calls) == 3:
            out.logits[1] = torch.nan
        return out

    monkeypatch.setattr(model, "forward", breaking)
    with pytest.raises(EngineError, match=r"logits must be finite.*earlier checkpoint"):
        engine_of(model).generate(RAGGED, SamplingParams(6, stop_token_ids=()))


def test_too_little_memory_of_a_gpu_names_what_to_lower_and_lets_go_of_what_fills_it(monkeypatch):
    model, frames = tiny_model(), []

    def full(**kwargs):
        cache = torch.zeros(8)
        frames.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(EngineError, match=r"the cache of max_batch_tokens = .* CUDA out of memory. Lower"):
        engine_of(model).generate(RAGGED, SamplingParams(6, stop_token_ids=()))
    assert frames[0]() is None


class ConstantModel:
    """Gives every position the same logits, and a cache of one layer of zeros; its passes cost next to nothing."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits, self.passes = logits, 0
        self.config = tiny_model(num_hidden_layers=1).config

    def modules(self):
        return []

    def eval(self):
        return self

    def forward(self, input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep):
        self.passes += 1
        states = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        cache.update(states, states, 0)
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), 1, -1))

    __call__ = forward


class CountSyncs(TorchDispatchMode):
    """Counts what waits for the device."""

    def __init__(self):
        super().__init__()
        self.counts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item")
        self.counts += any(name in str(func) for name in waits)
        return func(*args, **(kwargs or {}))


def test_one_synchronisation_for_each_pass(monkeypatch):
    model = ConstantModel(torch.zeros(VOCAB))
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(None) or tolist(tensor))
    engine = TransformersEngine(model, SimpleNamespace(eos_token_id=EOS), seed=0, max_batch_tokens=100)
    with CountSyncs() as others:
        engine.generate(PROMPTS * 2, SamplingParams(20))
    assert len(lists) == model.passes > 40 and others.counts == 0


def test_a_cache_of_rows_that_come_and_go_holds_what_a_plain_one_would(monkeypatch):
    """Through every change between small and large, as of the last rows of a batch that was large."""
    monkeypatch.setattr(cache, "SMALL", 64)
    monkeypatch.setattr(cache, "ROOM", 3)
    changes = set()
    for seed in range(40):
        chance = random.Random(seed)
        layer, plain = cache.RoomyLayer(), torch.empty(8, 2, 0, 2)
        for _ in range(40):
            states = torch.rand(len(plain), 2, chance.choice((1, 1, 1, 3)), 2)
            plain = torch.cat([plain, states], 2)
            before = layer._buffers is not None
            keys, values = layer.update(states, -states)
            assert torch.equal(keys, plain) and torch.equal(values, -plain)
            changes.add((before, layer._buffers is not None))
            if chance.random() < 0.3:
                order = chance.sample(range(len(plain)), chance.randint(1, len(plain)))
                columns = chance.randint(1, plain.shape[2])
                plain = plain[order][:, :, -columns:]
                layer.keep(order, columns)
                assert torch.equal(layer.keys, plain) and torch.equal(layer.values, -plain)
    assert changes == {(False, False), (False, True), (True, True), (True, False)}
