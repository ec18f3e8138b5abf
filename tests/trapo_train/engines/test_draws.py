"""Draws: the reference generator's bits, independence of everything but the request, and the right frequencies."""

import pytest
import torch

from trapo_train.engines.draws import draw_token, rank_seed, request_key, uniforms
from trapo_train.random_states import keep_generators, seed_generators

KEYS = [request_key(3, i) for i in range(4)] + [0, -1, 2**63 - 1, -(2**63)]


def splitmix64(key, count):
    """Vigna's C code (prng.di.unimi.it/splitmix64.c) in Python, its 53 highest bits as a fraction."""
    mask, state, numbers = 2**64 - 1, key % 2**64, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(((z ^ (z >> 31)) >> 11) / 2**53)
    return numbers


def test_uniforms_are_splitmix64():
    drawn = uniforms(torch.tensor(KEYS), torch.zeros(len(KEYS), dtype=torch.int64), 20)
    assert drawn.tolist() == [splitmix64(key, 20) for key in KEYS]


def test_a_draw_depends_on_key_and_position_alone():
    key = torch.tensor(KEYS)
    whole = uniforms(key, torch.zeros_like(key), 50)
    start = torch.tensor([0, 7, 3, 44, 1, 2, 9, 12])
    parts = uniforms(key, start, 5)
    for row, first in enumerate(start.tolist()):
        assert torch.equal(parts[row], whole[row, first : first + 5])
    assert torch.equal(uniforms(key[[5]], start[[5]], 5), parts[[5]])


def test_keys_differ_and_are_signed_64_bit():
    keys = {request_key(*parts) for parts in [(1,), (2,), (1, 1), (11,), (1, 2), (2, 1), (0,), (-1,)]}
    assert len(keys) == 8 and all(-(2**63) <= key < 2**63 for key in keys)
    assert request_key(5, 7) == 2848631328137088587  # the same in every process and version, or no run could resume


def test_streams_of_neighbouring_keys_are_uniform_and_uncorrelated():
    key = torch.tensor([request_key(0, i) for i in range(400)])
    drawn = uniforms(key, torch.zeros_like(key), 400)
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    counts = torch.histc(drawn.float(), 20, 0, 1)
    expected = drawn.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 50  # chi-squared, 19 degrees of freedom: above once in 8000
    correlation = torch.corrcoef(drawn)
    assert float((correlation - torch.eye(400)).abs().max()) < 6 / 400**0.5


def test_a_token_is_the_inverse_of_the_cumulative_distribution():
    logprob = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw_token(logprob, uniform, top_k=0, top_p=1.0).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("vocabulary", [5, 32768])
def test_a_token_without_probability_is_never_drawn(vocabulary):
    logprob = torch.log_softmax(torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(0)), -1)
    logprob[:, 0] = logprob[:, -1] = -torch.inf  # both ends, where rounding could fall over the edge
    for value in (0.0, 1 - 2**-53):
        token = draw_token(logprob, torch.full((64,), value, dtype=torch.float64), top_k=0, top_p=1.0)
        assert torch.isfinite(logprob.gather(1, token[:, None])).all()


def test_top_k_and_top_p_cut_the_tail():
    logprob = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().repeat(1000, 1)
    uniform = torch.arange(1000, dtype=torch.float64) / 1000
    assert torch.bincount(draw_token(logprob, uniform, top_k=2, top_p=1.0), minlength=4).tolist() == [0, 572, 428, 0]
    assert torch.bincount(draw_token(logprob, uniform, top_k=0, top_p=0.6), minlength=4).tolist() == [0, 572, 428, 0]
    assert set(draw_token(logprob, uniform, top_k=1, top_p=1.0).tolist()) == {1}
    assert set(draw_token(logprob, uniform, top_k=2, top_p=0.5).tolist()) == {1}  # 4/7 of what top_k leaves
    equal = torch.zeros(1000, 4).log_softmax(-1)  # two of which are exactly half
    assert len(set(draw_token(equal, uniform, top_k=0, top_p=0.5).tolist())) == 2


def test_not_a_number_stays_in_range():
    token = draw_token(torch.full((2, 7), torch.nan), torch.tensor([0.1, 0.9], dtype=torch.float64), top_k=0, top_p=1.0)
    assert ((token >= 0) & (token < 7)).all()


def test_no_start_of_a_run_uses_the_seeds_of_another():
    fresh = {rank_seed(3, 0, 64, rank) for rank in range(64)}
    starts = [(step, size, rank) for step in (1, 5, 99, 100, 200, 400) for size in range(1, 65) for rank in range(size)]
    resumed = {rank_seed(3, *start) for start in starts}
    assert len(fresh) == 64 and len(resumed) == len(starts) and not fresh & resumed
    with keep_generators():
        seed_generators(max(resumed))  # torch and numpy take them
    assert min(resumed) >= 0
    assert [rank_seed(3, 0, size, 2) for size in (3, 8)] == [3 + 2 * 1_000_003] * 2  # runs start as they always did
