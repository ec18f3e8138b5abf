"""Heads on a CPU: GEMMs of our own, of bf16 by bf16 instructions, in fp32 where there are none; the sums are fp32 either way."""

import itertools

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import linear_logprob
from trapo_kernels.backends import cpu_gemm, gemm, native

needs_native = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
needs_bf16 = pytest.mark.skipif(not native.BF16_UNITS, reason="this processor does not multiply bf16")
has_tiles = bool(native.BF16_UNITS) and torch.cpu._is_avx512_bf16_supported()  # also beside AMX, whose processors have both
needs_tiles = pytest.mark.skipif(not has_tiles, reason="this processor has no AVX512_BF16")
in_own_tiles = pytest.mark.skipif(native.BF16_UNITS == "AMX", reason="MKL multiplies bf16 here, whose sums promise no order")
of_either_dtype = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=needs_bf16), pytest.param(torch.float32, marks=needs_tiles)],
    ids=["bf16", "fp32"],
)
on_a_cpu = pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU takes 16 bits as they are")


def _matrix(rows, columns, in_columns, gap, dtype):
    """Random numbers with a stride of one in a row or in a column, and `gap` NaN between one line and the next."""
    lines = torch.full((columns, rows + gap) if in_columns else (rows, columns + gap), float("nan"), dtype=dtype)
    kept = lines[:, : lines.shape[1] - gap].normal_()
    return kept.t() if in_columns else kept


@of_either_dtype
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (1, 7, 3), (5, 1, 9), (64, 100, 33), (17, 1, 64), (130, 257, 65), (3, 4, 0), (0, 4, 3), (300, 410, 2100)],
    ids=str,
)
@pytest.mark.parametrize("beta", [0, 1])
def test_products_of_every_layout(sizes, beta, dtype):
    rows, columns, inner = sizes
    for a_in_columns, b_in_columns, out_in_columns, gap in itertools.product((False, True), (False, True), (False, True), (0, 5)):
        a = _matrix(rows, inner, a_in_columns, gap, dtype)
        b = _matrix(inner, columns, b_in_columns, gap, dtype)
        out = _matrix(rows, columns, out_in_columns, gap, torch.float32)
        expected = beta * out.double() + a.double() @ b.double()
        if beta == 0:
            out.fill_(float("nan"))  # is not read
        assert cpu_gemm.product(a, b, out, beta) is out
        atol = max(
            1e-5, 5e-8 * inner
        )  # rounding of an fp32 sum of `inner` products of about 1; one missing would be 1000 times that
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=atol)


@needs_tiles
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=in_own_tiles), torch.float32], ids=["bf16", "fp32"])
def test_a_sum_has_the_same_bits_whatever_is_computed_beside_it(dtype):
    a, b = torch.randn(300, 2100).to(dtype), torch.randn(2100, 700).to(dtype)
    whole = cpu_gemm.product(a, b, torch.empty(300, 700))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows, columns in ((slice(0, 300), slice(0, 700)), (slice(7, 8), slice(0, 700)), (slice(290, 300), slice(33, 650))):
                part = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
                assert torch.equal(cpu_gemm.product(a[rows], b[:, columns], part), whole[rows, columns])
    finally:
        torch.set_num_threads(threads)


@needs_bf16
def test_operands_without_unit_stride_are_copied():
    a, b = torch.randn(6, 20).bfloat16()[:, ::2], torch.randn(1, 4).bfloat16().expand(10, 4)
    out = cpu_gemm.product(a, b, torch.empty(6, 4))
    torch.testing.assert_close(out, a.float() @ b.float())


@needs_bf16
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(3, 4)}, r"b must be torch.bfloat16, got torch.float32. Convert it with"),
        ({"out": torch.zeros(2, 4).bfloat16()}, r"out must be torch.float32, got torch.bfloat16"),
        ({"b": torch.zeros(3).bfloat16()}, r"b must have two dimensions, got \[3\]. Pass a matrix"),
        (
            {"b": torch.zeros(2, 4).bfloat16()},
            r"out \[M, N\] must be a \[M, K\] times b \[K, N\], got \[2, 4\], \[2, 3\] and \[2, 4\]. Trans",
        ),
        (
            {"a": torch.zeros(2, 6).bfloat16()[:, ::2]},
            r"a must have unit stride in a row or in a column, got strides 6 and 2. Pass a.cont",
        ),
        ({"out": torch.zeros(1, 4).expand(2, 4)}, r"out must have unit stride in a row or in a column, got strides 0 and 1"),
    ],
)
def test_bad_arguments_of_the_op(change, message):
    arguments = {"a": torch.zeros(2, 3).bfloat16(), "b": torch.zeros(3, 4).bfloat16(), "out": torch.zeros(2, 4)} | change
    with pytest.raises(RuntimeError, match=f"gemm: {message}"):
        torch.ops.trapo_native.gemm(**arguments, beta=0.0)


@needs_native
@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        pytest.param(torch.bfloat16, "Compute in float32", marks=pytest.mark.skipif(bool(native.BF16_UNITS), reason="it has them")),
        pytest.param(torch.float32, "Call torch.mm", marks=pytest.mark.skipif(has_tiles, reason="it has them")),
    ],
)
def test_without_such_instructions_the_op_says_so(dtype, remedy):
    with pytest.raises(
        RuntimeError, match=f"a processor with AVX512_BF16 or, in bf16, one with AMX and a torch with MKL. {remedy}"
    ):
        torch.ops.trapo_native.gemm(torch.zeros(2, 3, dtype=dtype), torch.zeros(3, 4, dtype=dtype), torch.zeros(2, 4), 0.0)


@on_a_cpu
@pytest.mark.parametrize("make", ["_INTEL", "_OTHER", pytest.param("_OTHER_WITH_TILES", marks=needs_tiles)])
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "strided weight"])
def test_what_suits_one_processor_is_right_on_another(make, strided, monkeypatch):
    """fp32 logprobs, entropies and gradients under every tuning, over several blocks and chunks, against fp64."""
    tuning = getattr(cpu_gemm, make)._replace(block=400)
    monkeypatch.setattr(cpu_gemm, "tuning", lambda: tuning)
    hidden, weight, _ = cases.head(300, 24, 8209, torch.float32, 1.0)
    if strided:
        weight = torch.stack((weight.detach(), torch.full_like(weight, float("nan"))), -1)[..., 0].requires_grad_()
    target = torch.randint(8209, (300,))
    exact = cases.eager_statistics(hidden.double(), weight.double(), target)
    eager = cases.eager_statistics(hidden, weight, target)
    out = linear_logprob(hidden, weight, target, with_entropy=True)
    for ours, truth in zip((out.logprob, out.entropy), exact, strict=True):
        assert (ours - truth).abs().max() <= 1e-5
    ours, theirs, truth = (cases.gradients(lp.sum() + h.sum(), (hidden, weight)) for lp, h in (out[:2], eager, exact))
    for mine, peer, true in zip(ours, theirs, truth, strict=True):
        assert cases.error(mine, true) <= 2 * cases.error(peer, true)


@on_a_cpu
@pytest.mark.parametrize("backend", cases.COMPILED)
@pytest.mark.parametrize("units", [pytest.param(True, marks=needs_bf16), False])
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 30.0], ids=["flat", "peaked"])
def test_logits_are_exact_and_gradients_as_good_as_the_operands(backend, units, scale, monkeypatch):
    """Against fp64: logprobs to fp32; gradients unrounded without such units, with dLogits rounded to bf16 on them."""
    monkeypatch.setattr(native, "BF16_UNITS", native.BF16_UNITS if units else "")
    hidden, weight, _ = cases.head(60, 64, 1001, torch.bfloat16, scale)
    assert gemm.operand_dtype(torch.bfloat16, "cpu") == (torch.bfloat16 if units else torch.float32)
    target = torch.randint(1001, (60,))
    exact = cases.eager_statistics(hidden.double(), weight.double(), target)
    eager = cases.eager_statistics(hidden.float(), weight.float(), target, grad_dtype=torch.bfloat16 if units else torch.float32)
    out = linear_logprob(hidden, weight, target, with_entropy=True, backend=backend)
    for ours, truth in zip((out.logprob, out.entropy), exact, strict=True):
        assert (ours - truth).abs().max() <= 1e-5 * max(1.0, truth.abs().max().item())
    ours, theirs, truth = (cases.gradients(lp.sum() + h.sum(), (hidden, weight)) for lp, h in (out[:2], eager, exact))
    for mine, peer, true in zip(ours, theirs, truth, strict=True):
        assert cases.error(mine, true) <= 2 * cases.error(peer, true)
