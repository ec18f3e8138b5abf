"""Accuracy and edges of linear_logprob: every dtype, peaked and flat logits, ragged sizes, ignored rows, strange layouts."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.trapo_kernels import cases, cuda_checks
from trapo_kernels import linear_logprob, token_logprob
from trapo_kernels.backends import cpu_gemm, gemm, native, sweep, triton_ops
from trapo_kernels.backends.logits import LogitTransform


@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("shape", [(5, 3, 2), (1, 1, 1), (33, 17, 131), (130, 24, 1031)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_error_is_at_most_twice_that_of_eager_with_fp32_logits(backend, dtype, shape, scale):
    if backend not in cases.backends(dtype) or (backend == "triton" and shape[0] > 100):
        pytest.skip("triton computes in fp32; the interpreter is too slow for the largest shape")
    hidden, weight, bias = cases.head(*shape, dtype, scale)
    target = torch.randint(shape[2], (shape[0],), device=cases.DEVICE)
    upstream = torch.randn(2, shape[0], device=cases.DEVICE)

    def loss(logprob, entropy):
        return (logprob * upstream[0].to(logprob.dtype) + entropy * upstream[1].to(logprob.dtype)).sum()

    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    exact = cases.eager_statistics(*exact_inputs[:2], target, exact_inputs[2])
    exact_grads = cases.gradients(loss(*exact), exact_inputs)
    upcast = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = gemm.operand_dtype(dtype, cases.DEVICE)  # bf16 instructions take the gradient of the logits in 16 bits, too
    eager = cases.eager_statistics(hidden.to(upcast), weight.to(upcast), target, bias.to(upcast), grad_dtype=rounded)
    eager_grads = cases.gradients(loss(*eager), (hidden, weight, bias))
    out = linear_logprob(hidden, weight, target, bias=bias, with_entropy=True, backend=backend)
    grads = cases.gradients(loss(out.logprob, out.entropy), (hidden, weight, bias))
    floor = torch.finfo(upcast).eps * (8 if dtype == torch.float64 else 4)  # the truth of fp64 is itself rounded
    triples = zip([out.logprob, out.entropy, *grads], [*eager, *eager_grads], [*exact, *exact_grads], strict=True)
    for ours, theirs, truth in triples:
        assert cases.error(ours, truth) <= 2 * cases.error(theirs, truth) + floor * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_target_gradient_is_right_as_p_approaches_one(backend):
    """1 - p = 1e-9 is far below fp32's resolution at 1; p computed first would give a gradient that is off by 100 %."""
    gap = torch.tensor([5.0, 12.0, 20.7])  # logit of the target above the other
    hidden, weight = gap[:, None].to(cases.DEVICE).requires_grad_(), torch.tensor([[1.0], [0.0]], device=cases.DEVICE)
    out = linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64, device=cases.DEVICE), backend=backend)
    exact = torch.sigmoid(-gap.double())  # 1 - p, the gradient of logp with respect to the gap
    (grad,) = cases.gradients(out.logprob.sum(), (hidden,))
    torch.testing.assert_close(grad[:, 0].double().cpu(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.logprob.double().cpu(), -torch.log1p((-gap.double()).exp()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_columns_masked_to_minus_infinity_have_no_probability_and_no_gradient(backend):
    hidden, weight, _ = cases.head(6, 5, 40, torch.float32)
    bias = torch.zeros(40, device=cases.DEVICE)
    bias[10:] = float("-inf")
    target = torch.randint(10, (6,), device=cases.DEVICE)
    out = linear_logprob(hidden, weight, target, bias=bias, with_entropy=True, backend=backend)
    small = linear_logprob(hidden, weight[:10], target, with_entropy=True, backend="reference")
    torch.testing.assert_close(out.logprob, small.logprob)
    torch.testing.assert_close(out.entropy, small.entropy)
    grad_hidden, grad_weight = cases.gradients((out.logprob + out.entropy).sum(), (hidden, weight))
    assert torch.isfinite(grad_hidden).all()
    assert (grad_weight[10:] == 0).all() and torch.isfinite(grad_weight).all()


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
@pytest.mark.parametrize("kind", ["equal", "one huge"])
def test_extreme_logits(backend, kind):
    weight = torch.zeros(50, 4, device=cases.DEVICE)
    if kind == "one huge":
        weight[7] = 1e4
    hidden, target = torch.ones(3, 4, device=cases.DEVICE), torch.tensor([7, 7, 8], device=cases.DEVICE)
    out = linear_logprob(hidden, weight, target, with_entropy=True, backend=backend)
    expected = torch.tensor([-3.9120230054] * 3) if kind == "equal" else torch.tensor([0.0, 0.0, -4e4])
    torch.testing.assert_close(out.logprob.cpu(), expected)
    torch.testing.assert_close(out.entropy.cpu(), torch.full((3,), 3.9120230054 if kind == "equal" else 0.0))


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_ignored_rows_filled_with_nan_change_no_bit(backend):
    hidden, weight, _ = cases.head(30, 6, 70, torch.float32)
    target = torch.randint(70, (30,), device=cases.DEVICE)
    target[::3] = -100
    results = []
    for fill in (0.0, float("nan")):
        poisoned = torch.where((target == -100)[:, None], fill, hidden.detach()).requires_grad_()
        out = linear_logprob(poisoned, weight, target, with_entropy=True, backend=backend)
        results.append([*out, *cases.gradients((out.logprob - out.entropy).sum(), (poisoned, weight))])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    assert (results[0][0][::3] == 0).all() and (results[0][3][::3] == 0).all()


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_no_rows_and_only_ignored_rows_still_run_backward(backend):
    for num_rows in (0, 4):
        hidden, weight, _ = cases.head(num_rows, 6, 20, torch.float32)
        out = linear_logprob(hidden, weight, torch.full((num_rows,), -100, device=cases.DEVICE), backend=backend)
        grad_hidden, grad_weight = cases.gradients(out.logprob.sum(), (hidden, weight))
        assert grad_hidden.shape == hidden.shape and (grad_weight == 0).all()
        logits = torch.randn(num_rows, 20, device=cases.DEVICE, requires_grad=True)
        out = token_logprob(logits, torch.full((num_rows,), -100, device=cases.DEVICE), with_entropy=True, backend=backend)
        (grad,) = cases.gradients(out.logprob.sum() + out.entropy.sum(), (logits,))
        assert grad.shape == logits.shape and not grad.any()


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_per_token_temperature_equals_one_call_per_temperature(backend):
    hidden, weight, _ = cases.head(6, 5, 40, torch.float32)
    target = torch.randint(40, (6,), device=cases.DEVICE)
    temperature = torch.tensor([0.5, 0.5, 1.0, 1.0, 2.0, 2.0], device=cases.DEVICE)
    out = linear_logprob(hidden, weight, target, temperature=temperature, with_entropy=True, backend=backend)
    for i, value in enumerate((0.5, 1.0, 2.0)):
        rows = slice(2 * i, 2 * i + 2)
        part = linear_logprob(hidden[rows], weight, target[rows], temperature=value, with_entropy=True, backend=backend)
        torch.testing.assert_close(out.logprob[rows], part.logprob)
        torch.testing.assert_close(out.entropy[rows], part.entropy)


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_non_contiguous_inputs(backend):
    hidden, weight, _ = cases.head(12, 10, 30, torch.float32)
    target = torch.randint(30, (24,), device=cases.DEVICE)[::2]
    strided_hidden, strided_weight = hidden.t().contiguous().t(), weight.repeat(1, 2)[:, ::2].repeat(1, 2)[:, :10]
    out = linear_logprob(strided_hidden, strided_weight, target, backend=backend)
    expected = linear_logprob(hidden, strided_weight.contiguous(), target, backend="reference")
    torch.testing.assert_close(out.logprob, expected.logprob)
    ours = cases.gradients(out.logprob.sum(), (hidden, weight))
    for grad, reference in zip(ours, cases.gradients(expected.logprob.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("processor", (cpu_gemm._INTEL, cpu_gemm._OTHER))
def test_a_chunk_on_a_cpu_is_small_beside_eager_pytorch_or_beside_the_gradient_of_the_weight(processor, monkeypatch):
    monkeypatch.setattr(cpu_gemm, "tuning", lambda: processor)
    for num_rows, hidden_size in ((512, 896), (512, 256), (1024, 2048), (700, 64), (5000, 4096), (128, 896), (100, 8192)):
        rows = gemm.chunk_rows(num_rows, hidden_size, 151936, "cpu")
        eighth = max(5 * num_rows - hidden_size, hidden_size) / 8
        assert min(num_rows, 112) <= rows <= min(processor.most_rows, 512, max(eighth, 128)), (num_rows, hidden_size)
        narrow = gemm.chunk_rows(num_rows, hidden_size, 151936, "cpu", operands=torch.bfloat16)
        assert rows <= narrow <= max(rows, hidden_size // 2), (num_rows, hidden_size)  # beside the rounding of dWeight
    assert gemm.chunk_rows(5000, 64, 40, "cpu") == 5000  # all logits are less than 4 MiB
    assert gemm.chunk_rows(4096, 896, 32768, "cpu") == processor.most_rows  # 128 MiB of logits, or less
    of_either = [gemm.chunk_rows(512, 896, 151936, "cpu", operands=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert of_either == [176, 256]  # an eighth of eager's, and half of dWeight


def test_a_large_chunk_on_a_cpu_has_128_mib_of_logits_at_most():
    for vocab_size in (1000, 16384, 32768, 50257, 128256, 151936):
        rows = cpu_gemm.most_rows(vocab_size)
        assert rows <= 512 or rows * vocab_size <= 2**25, vocab_size


@pytest.mark.parametrize("vocab_size", [16, 37, 50257])
def test_every_row_of_a_chunk_is_aligned_as_the_first(vocab_size):
    """Or an odd vocabulary would be loaded number by number."""
    hidden, weight, _ = (x.detach() for x in cases.head(2, 4, vocab_size, torch.float32))
    buffer = gemm.HeadGemm(gemm.Head(hidden, weight), torch.float32).buffer(3)
    assert buffer.shape == (3, vocab_size) and buffer.stride() == (-(-vocab_size // 16) * 16, 1)


@pytest.mark.parametrize("vocab_size", [40, 32000, 50257, 128256, 151936, 152064, 201088, 256000, 262208])
def test_a_chunk_on_a_gpu_has_as_many_logits_as_is_said_at_most(vocab_size):
    most = 4096 * 152064 // vocab_size
    for num_rows in (1, 127, 4096, most - 1, most, most + 1, 2 * most + 1, 12289, 32768, 65537):
        rows = gemm.chunk_rows(num_rows, 4096, vocab_size, "cuda")
        assert rows * vocab_size <= 4096 * 152064 and (rows == num_rows or rows % 128 == 0)
        assert -(-num_rows // rows) == -(-num_rows // min(num_rows, most // 128 * 128 if num_rows > most else most))


@pytest.mark.parametrize("num_rows", [0, 1, 5, 23, 128, 2305, 32768, 39296, 65536])
@pytest.mark.parametrize("size", [1, 5, 48, 128, 2304])
def test_chunks_are_as_few_as_they_can_be_and_even(num_rows, size):
    bounds = gemm.chunk_bounds(num_rows, size)
    rows = [end - start for start, end in bounds]
    assert len(rows) == -(-num_rows // size) and sum(rows) == num_rows and all(0 < count <= size for count in rows)
    assert bounds == sorted(bounds) and max(rows, default=0) - min(rows, default=0) < 2 * min(size, 128)
    assert all(start % (128 if size % 128 == 0 else 1) == 0 for start, _ in bounds)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_many_chunks_equal_one(dtype, tolerance, monkeypatch):
    inputs = cases.head(700, 5, 40, dtype)
    target, upstream = torch.randint(40, (700,), device=cases.DEVICE), torch.randn(700, device=cases.DEVICE)
    results = []
    for rows in (700, 128):
        monkeypatch.setattr("trapo_kernels.backends.sweep.chunk_rows", lambda *_, rows=rows, **__: rows)
        out = linear_logprob(*inputs[:2], target, bias=inputs[2], backend="torch")
        results.append([out.logprob, *cases.gradients((upstream * out.logprob).sum(), inputs)])
    for one, many in zip(*results, strict=True):
        assert cases.error(many, one) <= tolerance * one.abs().max()


def test_chunks_are_those_of_what_the_gemms_take(monkeypatch):
    """Half of dWeight where that is 16 bits, an eighth where it is fp32."""
    hidden, weight, _ = (x.detach() for x in cases.head(9, 6, 40, torch.bfloat16))
    target, asked = torch.zeros(9, dtype=torch.int64, device=cases.DEVICE), []
    monkeypatch.setattr(sweep, "chunk_rows", lambda *given: asked.append(given[-1]) or gemm.chunk_rows(*given))
    for units in ("", native.BF16_UNITS):
        monkeypatch.setattr(native, "BF16_UNITS", units)
        linear_logprob(hidden, weight, target, backend="torch")
        assert asked.pop() == gemm.operand_dtype(torch.bfloat16, cases.DEVICE)


def test_logits_dtype_rounds_logits_as_a_low_precision_sampler_does():
    hidden, weight, _ = cases.head(9, 16, 60, torch.bfloat16, 5.0)
    target = torch.randint(60, (9,), device=cases.DEVICE)
    rounded = (hidden.float() @ weight.float().T).bfloat16().float().log_softmax(-1).gather(1, target[:, None])[:, 0]
    for backend in ("reference", *cases.CHUNKED):
        out = linear_logprob(hidden, weight, target, logits_dtype=torch.bfloat16, backend=backend)
        torch.testing.assert_close(out.logprob, rounded, rtol=0, atol=1e-5)
    master = cases.head(9, 16, 60, torch.float32)[1]
    hidden = cases.head(9, 16, 60, torch.bfloat16, 10.0)[0]
    truth, *ours = (
        cases.gradients(
            linear_logprob(hidden, master, target, logits_dtype=torch.bfloat16, backend=backend).logprob.sum(), (master,)
        )
        for backend in ("reference", *cases.CHUNKED)
    )
    for (grad,) in ours:  # of the logits that were rounded, which backward computes again
        assert (grad - truth[0]).norm() <= 0.01 * truth[0].norm()


def test_activation_checkpointing_and_retained_graphs_give_the_same_gradient():
    hidden, weight, _ = cases.head(12, 10, 30, torch.float32)
    target = torch.randint(30, (12,), device=cases.DEVICE)

    def f(h, w):
        return linear_logprob(h, w, target, with_entropy=True, backend="torch").logprob.sum()

    expected = cases.gradients(f(hidden, weight), (hidden, weight))
    loss = checkpoint(f, hidden, weight, use_reentrant=False)
    for _ in range(2):
        for grad, reference in zip(cases.gradients(loss, (hidden, weight)), expected, strict=True):
            assert torch.equal(grad, reference)


def test_autocast_casts_as_linear_does():
    hidden, weight, _ = cases.head(6, 8, 30, torch.float32)
    target = torch.randint(30, (6,), device=cases.DEVICE)
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        out = linear_logprob(hidden, weight, target)
    expected = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(out.logprob, expected.logprob)
    assert cases.gradients(out.logprob.sum(), (hidden,))[0].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_more_than_two_to_the_31_logits(backend):
    num_rows, vocab_size = 16800, 131072  # 2.2e9 logits
    hidden = torch.randn(num_rows, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab_size, 64, device="cuda", dtype=torch.bfloat16) / 8
    target = torch.randint(vocab_size, (num_rows,), device="cuda")
    out = linear_logprob(hidden, weight, target, backend=backend)
    last = slice(num_rows - 64, None)
    reference = linear_logprob(hidden[last], weight, target[last], backend="reference")
    torch.testing.assert_close(out.logprob[last], reference.logprob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [100, 5000, pytest.param(152_064, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", cases.COMPILED)
def test_rows_more_than_two_to_the_31_elements_apart(backend, vocab_size, grad_dtype, tmp_path):
    """What no chunk is large enough for; 32-bit addresses end outside of the process's memory, and so the process."""
    room = 4 * cuda_checks.far_size(vocab_size)
    if cases.DEVICE == "cuda" and (free := torch.cuda.mem_get_info()[0]) < room + 2**30:
        pytest.skip(f"needs {room / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free")  # beside the tests of other processes
    cuda_checks.check_far_rows({"triton": triton_ops, "native": native}[backend], vocab_size, grad_dtype, tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(low, marks=cases.SLOW_ON_A_CPU) for low in (torch.bfloat16, torch.float16))]
)
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=cases.SLOW_ON_A_CPU), 40.0], ids=["flat", "peaked"])
def test_fused_scoring_equals_the_chunked_path_on_ragged_sizes(dtype, scale):
    hidden, weight, bias = cases.head(67, 29, 301, dtype, scale)
    target = torch.randint(301, (67,), device=cases.DEVICE)
    target[::5] = -100
    hidden = torch.where((target == -100)[:, None], float("nan"), hidden.detach()).requires_grad_()
    settings = {"bias": bias, "softcap": 30.0, "temperature": torch.rand(67, device=cases.DEVICE) + 0.5, "with_entropy": True}
    fused = linear_logprob(hidden, weight, target, backend="triton_fused", **settings)
    exact = linear_logprob(
        hidden.detach().double(),
        weight.detach().double(),
        target,
        backend="torch",
        **settings | {"bias": bias.detach().double(), "temperature": settings["temperature"].double()},
    )
    atol = 1e-5 if cases.DEVICE == "cpu" else 2e-5  # z reaches 60, where fp32 has a spacing of 4e-6; a GPU's exp is not a CPU's
    for ours, truth in zip(fused, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=atol)
    grads = cases.gradients((fused.logprob + fused.entropy).sum(), (hidden, weight))
    chunked = linear_logprob(hidden, weight, target, backend="triton", **settings)
    for ours, expected in zip(grads, cases.gradients((chunked.logprob + chunked.entropy).sum(), (hidden, weight)), strict=True):
        distance = (ours - expected).float().norm() / expected.float().norm()
        assert distance <= (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("tiles", [5, 2, 1])
def test_fused_scoring_whatever_the_tiles_of_a_split(tiles, monkeypatch):
    hidden, weight, bias = (x.detach() for x in cases.head(5, 16, 301, torch.float32, 3.0))
    target = torch.tensor([0, 70, 150, 300, 301], device=cases.DEVICE)  # the last is in no vocabulary
    bias[70] = float("-inf")  # an impossible one
    monkeypatch.setitem(triton_ops.fused_scoring.__globals__, "tiles_of_split", lambda *of: tiles)
    transposed = (x.t().contiguous().t() for x in (hidden, weight))
    found = triton_ops.fused_scoring(*transposed, target, LogitTransform(bias))
    exact = linear_logprob(hidden[:4], weight, target[:4], bias=bias, with_entropy=True, backend="torch")
    torch.testing.assert_close(found.logprob[:4], exact.logprob, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(found.entropy[:4], exact.entropy, rtol=2e-6, atol=1e-5)
    assert found.logprob[4].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 5])
def test_fused_scoring_whatever_the_blocks_of_a_group(group, monkeypatch):
    hidden, weight, _ = (x.detach() for x in cases.head(300, 16, 301, torch.float32, 3.0))  # 5 blocks of 64 rows, 5 of columns
    target = torch.randint(301, (300,), device=cases.DEVICE)
    monkeypatch.setitem(triton_ops.fused_scoring.__globals__, "tiles_of_split", lambda *of: 2)
    whole = triton_ops.fused_scoring(hidden, weight, target, LogitTransform())
    exact = linear_logprob(hidden, weight, target, with_entropy=True, backend="torch")
    scope = triton_ops.fused_scoring.__globals__
    monkeypatch.setitem(scope, "TILE_FP32", scope["TILE_FP32"] | {"GROUP": group})
    found = triton_ops.fused_scoring(hidden, weight, target, LogitTransform())
    assert all(torch.equal(ours, expected) for ours, expected in zip(found, whole, strict=True))
    torch.testing.assert_close(found.logprob, exact.logprob, rtol=2e-6, atol=1e-5)


def test_fused_scoring_of_a_nan_logit_is_nan():
    cuda_checks.check_scoring_of_nan(triton_ops)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_fused_scoring_of_a_target_without_a_finite_logit(value):
    """By a bias, which touches one logit of a row; NaN must not become an impossible token."""
    hidden, weight, bias = (x.detach() for x in cases.head(3, 16, 301, torch.float32))
    bias[5] = value
    target = torch.tensor([5, 70, -100], device=cases.DEVICE)
    expected, found = (
        linear_logprob(hidden, weight, target, bias=bias, with_entropy=True, backend=backend)
        for backend in ("reference", "triton_fused")
    )
    torch.testing.assert_close(found.logprob, expected.logprob, rtol=2e-6, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=2e-6, atol=1e-5, equal_nan=True)


def test_fused_scoring_keeps_the_digits_of_p_close_to_one():
    hidden, weight = torch.tensor([[20.7]], device=cases.DEVICE), torch.tensor([[1.0], [0.0]], device=cases.DEVICE)
    out = linear_logprob(hidden, weight, torch.tensor([0], device=cases.DEVICE), backend="triton_fused")
    torch.testing.assert_close(out.logprob.cpu(), torch.tensor([-1.0232e-9]), rtol=1e-3, atol=0)


def test_fused_scoring_with_no_rows():
    hidden, weight, _ = cases.head(0, 6, 20, torch.float32)
    out = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64, device=cases.DEVICE), backend="triton_fused")
    assert out.logprob.shape == (0,)


def test_a_z_loss_has_its_logsumexp_in_the_target_logit_and_the_logprob():
    """As the README says; the output's own logsumexp carries no gradient."""
    hidden, weight, _ = cases.head(9, 6, 40)
    target = torch.randint(40, (9,), device=cases.DEVICE)
    z = (hidden * weight[target]).sum(-1) - linear_logprob(hidden, weight, target).logprob
    expected = (hidden @ weight.T).logsumexp(-1)
    for ours, exact in zip(
        cases.gradients((z**2).sum(), (hidden, weight)), cases.gradients((expected**2).sum(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, exact)
