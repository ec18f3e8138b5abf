"""The account of a head's buffers against what the allocator counts during a forward and backward."""

import itertools

import pytest
import torch

from benchmarks.memory_plan import allocated_peak
from tests.trapo_kernels import cases
from trapo_kernels import Role, TokenBatch, dispatch, head_memory, linear_logprob, linear_policy_loss, objectives, token_logprob
from trapo_kernels.backends import in_weight, native
from trapo_kernels.backends.gemm import chunk_bounds, chunk_rows

BOTH, SIZES = [True, False], (300, 48, 16001)
CASES = list(itertools.product(["native", "torch"], [torch.float32, torch.bfloat16], BOTH, BOTH, [SIZES]))
SEVERAL_CHUNKS = ("native", torch.float32, True, False, (2100, 48, 16001))
OF_ROWS = (200, 240, 16400), (1600, 1600, 16384)
IN_WEIGHT = [
    pytest.param(*case, marks=pytest.mark.slow if case[-1][0] == 1600 else ())
    for case in itertools.product(["native"], [torch.float32, torch.bfloat16], [True], BOTH, OF_ROWS)
]
MOSTLY_HIDDEN = ("torch", torch.float32, False, False, (600, 16001, 48)), ("torch", torch.bfloat16, True, True, (600, 16001, 48))


def test_a_head_of_8b_on_a_gpu_takes_at_most_5_gib():
    assert sum(head_memory(8192, 4096, 151_936).values()) <= 5.0 * 2**30  # a chunk of logits, and 2.3 GiB of dWeight


@pytest.mark.parametrize(
    ("backend", "dtype", "trained", "two_phase", "sizes"), [*CASES, SEVERAL_CHUNKS, *IN_WEIGHT, *MOSTLY_HIDDEN]
)
def test_the_account_is_what_is_allocated(backend, dtype, trained, two_phase, sizes):
    _compare(backend, dtype, trained, two_phase, sizes)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(300, 48, 16001), (300, 4001, 480), (2100, 2001, 480)])
def test_the_account_of_a_head_that_ranks_share(one_rank, sizes, dtype, backend):
    _compare(backend, dtype, True, False, sizes, one_rank)


def _compare(backend, dtype, trained, two_phase, sizes, group=None):
    if backend == "native" and native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    rows, hidden_size, vocab_size = sizes
    hidden = torch.randn(rows, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, requires_grad=trained)
    target = torch.arange(rows) % vocab_size
    batch = TokenBatch(target, torch.full((rows,), Role.ROLLOUT, dtype=torch.uint8), torch.ones(rows), torch.ones(rows))
    objective = objectives.trapo(entropy_coef=0.1)

    def call():
        if two_phase:
            out = linear_logprob(hidden, weight, target, with_entropy=True, backend=backend, process_group=group)
            (out.logprob + out.entropy).sum().backward()
        else:
            linear_policy_loss(hidden, weight, batch, objective, backend=backend, process_group=group).loss.backward()
        hidden.grad = weight.grad = None

    predicted = head_memory(
        rows, hidden_size, vocab_size, dtype=dtype, weight_dtype=torch.float32, device_type="cpu", grad_weight=trained,
        in_place=backend == "native", vocab_parallel=group is not None,
    )  # fmt: skip
    assert sum(predicted.values()) == pytest.approx(allocated_peak(call), rel=0.02)
    assert (predicted["grad_weight"] > 0) == trained and (predicted["weight"] > 0) == (dtype == torch.bfloat16)


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="the group is one of CPU processes")
@pytest.mark.parametrize("backend", cases.CHUNKED)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_ranks_that_share_a_head_copy_its_logits_only_where_statistics_overwrite_them(one_rank, backend, entropy_coef, monkeypatch):
    rows, seen = dispatch.rows(backend), []
    for name in ("statistics", "logprob_gradient"):
        run = getattr(rows, name)
        monkeypatch.setattr(rows, name, lambda *given, run=run: seen.append((given[0].data_ptr(), given[5:6])) or run(*given))
    hidden, weight, _ = cases.head(8, 6, 40, torch.float32)
    batch, objective = cases.batch(8, 40, torch.float32), objectives.trapo(entropy_coef=entropy_coef)
    linear_policy_loss(hidden, weight, batch, objective, backend=backend, process_group=one_rank)
    (first, _), (second, (grad_entropy,)) = seen
    assert (first != second) == rows.statistics_overwrite(hidden)
    assert (grad_entropy is None) == (entropy_coef == 0.0)


@pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
def test_logits_at_hand_are_copied_by_the_chunk_and_their_gradient_is_made_in_its_place():
    logits, target = torch.randn(600, 16001, requires_grad=True), torch.arange(600)
    rows = chunk_rows(600, 0, 16001, "cpu")
    chunk = 4 * 16001 * max(end - start for start, end in chunk_bounds(600, rows))
    assert allocated_peak(lambda: token_logprob(logits.detach(), target)) == pytest.approx(chunk, rel=0.02)
    logprob = token_logprob(logits, target).logprob.sum()
    assert allocated_peak(lambda: torch.autograd.grad(logprob, logits)) == pytest.approx(4 * logits.numel(), rel=0.02)


@pytest.mark.parametrize(
    ("rows", "hidden_size", "vocab_size"),
    [(40, 512, 16001), (300, 48, 16001), (700, 300, 16001), (200, 512, 16400), (400, 512, 16400), (512, 512, 24000)],
)
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("with_bias", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_narrow_weight_whose_gradient_is_rounded(rows, hidden_size, vocab_size, units, with_bias, monkeypatch):
    """At the end; where the processor multiplies bf16 and at most D rows are one chunk, by the GEMM itself."""
    if native.why_not("cpu") or (units and not native.BF16_UNITS):
        pytest.skip("this machine has no native extension, or does not multiply bf16")
    monkeypatch.setattr(native, "BF16_UNITS", native.BF16_UNITS if units else "")
    hidden, weight = (torch.randn(n, hidden_size).bfloat16().requires_grad_() for n in (rows, vocab_size))
    bias = torch.zeros(vocab_size, requires_grad=True) if with_bias else None
    batch = TokenBatch(
        torch.arange(rows) % vocab_size, torch.full((rows,), Role.ROLLOUT, dtype=torch.uint8), torch.ones(rows), torch.ones(rows)
    )

    def call():
        linear_policy_loss(hidden, weight, batch, objectives.trapo(), bias=bias).loss.backward()
        hidden.grad = weight.grad = None
        if bias is not None:
            bias.grad = None

    predicted = head_memory(rows, hidden_size, vocab_size, device_type="cpu")
    assert sum(predicted.values()) == pytest.approx(allocated_peak(call), rel=0.02)


@pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
def test_master_weights_without_instructions_for_16_bits_are_copied(monkeypatch):
    """Rounded to bf16, then widened again."""
    monkeypatch.setattr(native, "BF16_UNITS", "")
    _compare("native", torch.bfloat16, True, False, SIZES)


@pytest.mark.skipif(not native.BF16_UNITS, reason="this processor does not multiply bf16")
def test_operands_of_16_bits_have_larger_chunks():
    wide, narrow = (
        head_memory(512, 896, 151936, dtype=dtype, device_type="cpu", grad_weight=False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (wide["logits"], narrow["logits"]) == tuple(4 * rows * 151936 for rows in (176, 256))


@pytest.mark.parametrize(("rows", "block"), [(512, 8192), (896, 8192), (8, 8192)])
def test_logits_that_find_room_in_a_trained_weight_take_none_of_their_own(rows, block):
    """But for those of one block of tokens."""
    assert head_memory(rows, 896, 151936, dtype=torch.float32, device_type="cpu")["logits"] == 4 * rows * block
    assert not in_weight.fits(512, 896, 16383) and not in_weight.fits(63, 896, 16384) and in_weight.fits(64, 64, 16384)
    apart = {"grad_weight": False}, {"in_place": False}, {"vocab_parallel": True}, {"device_type": "cuda"}, {"num_rows": 897}
    for change in apart:
        given = {"num_rows": rows, "device_type": "cpu"} | change
        sizes = head_memory(hidden_size=896, vocab_size=151936, dtype=torch.float32, **given)
        assert sizes["logits"] >= 4 * min(given["num_rows"], 128) * 151936


def test_a_gpu_keeps_its_gemms_in_bf16_and_its_chunk_larger():
    sizes = head_memory(32768, 3584, 152064, weight_dtype=torch.float32)
    assert sizes["logits"] == 4 * 4096 * 152064 and sizes["weight"] == 2 * 152064 * 3584
    assert sizes["hidden chunk"] == (2 + 4) * 4096 * 3584  # a copy with zeros for rows that do not count, and its gradient
    assert all(head_memory(32768, 3584, 152064, dtype=dtype)["weight"] == 0 for dtype in (torch.bfloat16, torch.float16))
    assert head_memory(32768, 3584, 19008, vocab_parallel=True)["logits"] == 4 * 4096 * 19008  # and no copy of them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": -5}, "num_rows must be an integer ≥ 1, got -5"),
        ({"num_rows": 10.5}, "num_rows must be an integer ≥ 1, got 10.5"),
        ({"vocab_size": 0}, "vocab_size must be an integer ≥ 1, got 0"),
        ({"hidden_size": None}, "hidden_size must be an integer ≥ 1, got None"),
        ({"device_type": "gpu"}, "device_type must be one of 'cuda', 'cpu', got 'gpu'"),
        ({"dtype": torch.float64}, "dtype must be one of torch.bfloat16, .*got torch.float64"),
        (
            {"dtype": torch.float32, "weight_dtype": torch.bfloat16},
            "weight_dtype must be one of torch.float32, got torch.bfloat16",
        ),
        ({"weight_dtype": torch.float16}, "weight_dtype must be one of torch.bfloat16, torch.float32, got torch.float16"),
    ],
)
def test_what_is_no_head_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^head_memory: {message}"):
        head_memory(**{"num_rows": 8, "hidden_size": 4, "vocab_size": 10} | changes)
