"""One chunk of 16-bit operands: dWeight is rounded by its GEMM, and no fp32 one exists."""

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import LoraHead, Role, head_memory, linear_logprob, linear_policy_loss, objectives
from trapo_kernels.backends import gemm, in_weight, native
from trapo_kernels.backends.gemm import grad_weight_dtype
from trapo_kernels.backends.logits import statistics_dtype

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HIDDEN_SIZE, VOCAB_SIZE = 48, 1003
needs_units = pytest.mark.skipif(
    cases.DEVICE == "cpu" and not native.BF16_UNITS, reason="this processor does not multiply bf16: its GEMMs are fp32"
)


@pytest.fixture(autouse=True)
def small_heads_too(monkeypatch):
    monkeypatch.setattr(gemm, "_LEAST_ROUNDED_GPU", 0)
    for name, value in {"_LEAST_LOGITS": 0, "_LEAST_VOCABULARY": 0, "_BLOCK": 96}.items():
        monkeypatch.setattr(in_weight, name, value)


@pytest.mark.parametrize(
    ("rows", "weight", "operands", "device", "options", "expected"),
    [
        (4096, BF16, BF16, "cuda", {}, BF16),
        (4096, FP16, FP16, "cuda", {}, FP16),
        (4097, BF16, BF16, "cuda", {}, FP32),  # two chunks
        (4096, BF16, BF16, "cuda", {"batch_invariant": True}, FP32),  # chunks of 1024
        (4096, BF16, BF16, "cuda", {"sharded": True}, BF16),
        (4097, BF16, BF16, "cuda", {"sharded": True}, FP32),
        (4096, FP32, BF16, "cuda", {}, FP32),  # master weights
        (4096, FP32, FP32, "cuda", {}, FP32),
        (4096, torch.float64, torch.float64, "cuda", {}, torch.float64),
        (3584, BF16, BF16, "cpu", {}, BF16),
        (3585, BF16, BF16, "cpu", {}, FP32),  # logits would take more than the fp32 dWeight
        (3584, BF16, BF16, "cpu", {"sharded": True}, FP32),
        (3584, BF16, FP32, "cpu", {}, FP32),  # no instructions for bf16
        (0, BF16, BF16, "cpu", {}, BF16),
    ],
)
def test_who_rounds(rows, weight, operands, device, options, expected):
    assert grad_weight_dtype(rows, 3584, 152064, weight, operands, device, **options) == expected


def test_a_small_head_is_rounded_at_the_end_on_a_gpu(monkeypatch):
    """cuBLAS splits sums to fill a GPU, and adds the parts in 16 bits."""
    monkeypatch.undo()
    assert grad_weight_dtype(4096, 64, 1000, BF16, BF16, "cuda") == FP32


def test_a_gpu_holds_no_fp32_gradient_of_one_chunk():
    one, two = (head_memory(rows, 3584, 152064) for rows in (4096, 4097))
    assert one["grad_weight"] == 2 * 3584 * 152064 == two["grad_weight"] // 2
    assert one["rounding"] == 0 and two["rounding"] == 0  # it takes the room of the chunk


def _lora(dtype):
    a, b = torch.linspace(-0.3, 0.3, 2 * HIDDEN_SIZE).view(2, -1), torch.linspace(-1, 1, 2 * VOCAB_SIZE).view(-1, 2)
    return LoraHead(a.to(cases.DEVICE, dtype), b.to(cases.DEVICE, dtype))


OPTIONS = {"plain": {}, "lora": {"lora": None}, "softcap": {"softcap": 4.0, "temperature": 0.7}}


def _gradients(backend, inputs, batch, options, factor=1.0):
    hidden, weight, bias = inputs
    options = options | ({"lora": _lora(statistics_dtype(hidden))} if "lora" in options else {})
    objective = objectives.trapo(entropy_coef=0.03)
    return cases.gradients(
        factor * linear_policy_loss(hidden, weight, batch, objective, bias=bias, backend=backend, **options).loss, inputs
    )


# Of bf16 dWeight 24 find room for all of their logits.
ROWS = [*(pytest.param(rows, marks=cases.SLOW_ON_A_CPU) for rows in (1, 20, 48)), 40]


@needs_units
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_it_is_as_exact_as_fp32_sums_that_are_rounded(backend, name, rows, monkeypatch):
    inputs, b = cases.head(rows, HIDDEN_SIZE, VOCAB_SIZE, BF16), cases.batch(rows, VOCAB_SIZE, FP32)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_batch = cases.batch(rows, VOCAB_SIZE)
    of_gemm = _gradients(backend, inputs, b, OPTIONS[name])
    truth = _gradients("reference", exact_inputs, exact_batch, OPTIONS[name])
    for module in ("inputs", "backends.sweep"):
        monkeypatch.setattr(f"trapo_kernels.{module}.grad_weight_dtype", lambda *_: FP32)
    at_the_end = _gradients(backend, inputs, b, OPTIONS[name])
    for ours, theirs, expected, x in zip(of_gemm, at_the_end, truth, inputs, strict=True):
        assert ours.dtype == x.dtype
        assert (ours - expected).norm() <= 1.05 * (theirs - expected).norm() + 1e-9 * expected.norm()


@needs_units
@pytest.mark.parametrize("backend", cases.CHUNKED)
@pytest.mark.parametrize("factor", [1.0, 0.25, 1 / 3])
def test_an_upstream_gradient_that_is_no_power_of_two_rounds_once_more(factor, backend):
    inputs, b = cases.head(40, HIDDEN_SIZE, VOCAB_SIZE, BF16), cases.batch(40, VOCAB_SIZE, FP32)
    plain, scaled = (_gradients(backend, inputs, b, {}, by)[1] for by in (1.0, factor))
    assert torch.equal(scaled, (plain.float() * torch.tensor(factor)).to(BF16))


@needs_units
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_rows_that_do_not_count_leave_no_trace(backend):
    """They may hold NaN, be most of the rows, or all."""
    hidden, weight, _ = cases.head(HIDDEN_SIZE, HIDDEN_SIZE, VOCAB_SIZE, BF16)
    target = torch.arange(HIDDEN_SIZE, device=cases.DEVICE)
    for counts in (target % 5 == 0, target < 0):
        role = torch.where(counts, Role.EXPERT, Role.IGNORED).to(torch.uint8)
        b = cases.batch(HIDDEN_SIZE, VOCAB_SIZE, FP32, role=role)
        poisoned = torch.where(counts[:, None], hidden.detach(), float("nan")).requires_grad_()
        loss = linear_policy_loss(poisoned, weight, b, objectives.sft(), backend=backend).loss
        grad_hidden, grad_weight = torch.autograd.grad(loss, (poisoned, weight))
        assert grad_weight.dtype == BF16 and grad_weight.isfinite().all() and bool(grad_weight.any()) == bool(counts.any())
        assert not grad_hidden[~counts].any() and grad_hidden.isfinite().all()


@needs_units
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_it_is_repeatable_in_both_ops(backend):
    hidden, weight, _ = cases.head(40, HIDDEN_SIZE, VOCAB_SIZE, BF16)
    b = cases.batch(40, VOCAB_SIZE, FP32)
    for call in (
        lambda: linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend).loss,
        lambda: linear_logprob(hidden, weight, b.target, backend=backend).logprob.sum(),
    ):
        once, again = (cases.gradients(call(), (hidden, weight)) for _ in range(2))
        assert all(map(torch.equal, once, again)) and once[1].dtype == BF16
