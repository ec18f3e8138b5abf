"""A LoRA'd head equals the head with the sum of its weights, in values and in the gradients of every factor."""

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import LoraHead, autograd, linear_logprob, linear_policy_loss, objectives, terms


def _factors(dtype, hidden_size=6, vocab_size=40, rank=3):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(cases.DEVICE, dtype).requires_grad_()

    return draw(rank, hidden_size), draw(vocab_size, rank)


def _poisoned(hidden, batch):
    return torch.where(batch.active[:, None], hidden, float("nan"))


@pytest.mark.parametrize("name", ["trapo", "sft", "grpo", "gmpo"])
@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_policy_loss_equals_that_of_the_summed_weight(backend, name):
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    hidden, weight, bias = cases.head(19, 6, 40, dtype)
    a, b = _factors(dtype)
    batch = cases.batch(19, 40, dtype)
    objective = objectives.PRESETS[name](entropy_coef=0.1)
    inputs = (hidden, weight, bias, a, b)
    summed = linear_policy_loss(hidden, weight + 0.5 * b @ a, batch, objective, bias=bias, backend="reference")
    out = linear_policy_loss(
        _poisoned(hidden, batch), weight, batch, objective, bias=bias, lora=LoraHead(a, b, 0.5), backend=backend
    )
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(out.loss, summed.loss, **tolerance)
    for ours, truth in zip(cases.gradients(out.loss, inputs), cases.gradients(summed.loss, inputs), strict=True):
        torch.testing.assert_close(ours, truth, **tolerance)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("backend", cases.QUICK_BY_DEFAULT)
def test_logprob_equals_that_of_the_summed_weight(backend, batch_invariant):
    dtype = torch.float64 if backend == "torch" else torch.float32
    hidden, weight, _ = cases.head(19, 6, 40, dtype)
    a, b = _factors(dtype)
    target = cases.batch(19, 40).target
    inputs = (hidden, weight, a, b)

    def total(out):
        return (out.logprob * torch.linspace(-1, 1, 19, device=cases.DEVICE)).sum() + 0.3 * out.entropy.sum()

    summed = total(linear_logprob(hidden, weight + 2.0 * b @ a, target, with_entropy=True, backend="reference"))
    settings = {"with_entropy": True, "batch_invariant": batch_invariant, "backend": backend}
    ours = total(linear_logprob(hidden, weight, target, lora=LoraHead(a, b, 2.0), **settings))
    for got, truth in zip(cases.gradients(ours, inputs), cases.gradients(summed, inputs), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_frozen_weight_gets_no_gradient_and_the_factors_do(backend):
    hidden, weight, _ = cases.head(9, 6, 40, torch.bfloat16)
    weight = weight.detach()
    a, b = _factors(torch.bfloat16)
    loss = linear_policy_loss(
        hidden, weight, cases.batch(9, 40, torch.float32), objectives.sft(), lora=LoraHead(a, b), backend=backend
    )
    loss.loss.backward()
    assert weight.grad is None
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.abs().sum() > 0 for x in (hidden, a, b))


@pytest.mark.parametrize("wide_factors", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", cases.QUICK_BY_DEFAULT)
def test_the_logits_of_a_16_bit_head_are_exact_in_its_low_rank_part_too(backend, dtype, wide_factors):
    """The product with lora_a is not rounded on its way to lora_b, nor is scaling · a, nor are fp32 factors."""
    hidden, weight, _ = (x.detach() for x in cases.head(40, 64, 300, dtype))
    a, b = (x.detach().to(torch.float32 if wide_factors else dtype) for x in _factors(torch.float64, 64, 300, rank=8))
    lora, exact = LoraHead(a / 8, b, 0.3), LoraHead((a / 8).double(), b.double(), 0.3)
    target = torch.randint(300, (40,), device=cases.DEVICE)
    truth = linear_logprob(hidden.double(), weight.double(), target, lora=exact, backend="reference").logprob
    assert cases.error(linear_logprob(hidden, weight, target, backend=backend).logprob, truth) > 0.1  # the adapter matters
    in_fp32 = linear_logprob(
        hidden.float(), weight.float(), target, lora=LoraHead(lora.a.float(), lora.b.float(), 0.3), backend="reference"
    )
    ours, eager = (
        (out.logprob - truth).abs().max() for out in (linear_logprob(hidden, weight, target, lora=lora, backend=backend), in_fp32)
    )
    assert ours <= 2 * eager + 4e-6  # logprobs down to -40; rounded once the low-rank part would be off by 0.01


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_float32_factors_beside_bfloat16_hidden_states_get_unrounded_gradients(backend, autocast):
    hidden, weight, _ = cases.head(40, 6, 40, torch.float32 if autocast else torch.bfloat16)
    factors = _factors(torch.float32)
    with torch.autocast(cases.DEVICE, dtype=torch.bfloat16, enabled=autocast):
        loss = linear_policy_loss(
            hidden, weight, cases.batch(40, 40, torch.float32), objectives.sft(), lora=LoraHead(*factors, 0.3), backend=backend
        ).loss
    for grad in cases.gradients(loss, factors):
        assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_one_token_and_rank_1(backend, dtype):
    hidden, weight, _ = cases.head(1, 6, 40, dtype)
    factors = _factors(dtype, rank=1)
    results = []
    for which in ("reference", backend):
        out = linear_logprob(hidden, weight, torch.tensor([7], device=cases.DEVICE), lora=LoraHead(*factors), backend=which)
        results.append(cases.gradients(out.logprob.sum(), (hidden, weight, *factors)))
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_rank_1_in_two_chunks(backend, dtype, monkeypatch):
    """The second chunk adds to gradients of one row and of one column, shapes for which a GPU's library has GEMMs of their own."""
    monkeypatch.setattr("trapo_kernels.backends.sweep.chunk_rows", lambda *_, **__: 5)
    hidden, weight, _ = cases.head(9, 8, 40, dtype)
    inputs = (hidden, weight, *_factors(dtype, 8, 40, rank=1))
    batch, grads = cases.batch(9, 40, torch.float32, roles=(1, 2)), []
    for which in ("reference", backend):
        loss = linear_policy_loss(hidden, weight, batch, objectives.trapo(), lora=LoraHead(*inputs[2:], 0.5), backend=which).loss
        grads.append(cases.gradients(loss, inputs))
    for reference, ours in zip(*grads, strict=True):
        near = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, reference, rtol=near, atol=near * float(reference.abs().max()))


def test_opcheck():
    hidden, weight, bias = cases.head(6, 5, 20, torch.float32)
    lora_a, lora_b = _factors(torch.float32, 5, 20)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    b = cases.batch(6, 20, torch.float32)
    scoring = (
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        b.target,
        None,
        None,
        None,
        1.0,
        None,
        True,
        torch.float32,
        False,
        "",
        "torch",
    )
    torch.library.opcheck(autograd.linear_logprob, scoring, test_utils=checks)
    streams = terms.pack(terms.streams(b, objectives.trapo()))
    settings = (None, 1.0, None, *terms.encode(objectives.trapo()), True, torch.float32, False, "", [True] * 5)
    loss = (hidden, weight, bias, lora_a, lora_b, b.target, streams, b.active_rows, None, *settings, torch.float32, "torch")
    torch.library.opcheck(autograd.linear_policy_loss, loss, test_utils=checks)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3), torch.zeros(4, 3), r"a must be a tensor of shape \[R, D\]"),
        (torch.zeros(2, 6), torch.zeros(40, 3), "must agree in R, got 2 and 3"),
        (torch.zeros(3, 5), torch.zeros(40, 3), r"must have D = 6 and V = 40 of the head"),
        (torch.zeros(3, 6).double(), torch.zeros(40, 3).double(), "lora.a must be torch.float32 on cpu as hidden is, or float32"),
    ],
)
def test_bad_factors(a, b, message):
    hidden, weight = torch.randn(4, 6), torch.randn(40, 6)
    with pytest.raises((ValueError, TypeError), match=message):
        linear_logprob(hidden, weight, torch.zeros(4, dtype=torch.int64), lora=LoraHead(a, b))


def test_what_is_not_a_lora_is_refused():
    hidden, weight, target = torch.randn(4, 6), torch.randn(40, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="lora must be a LoraHead"):
        linear_logprob(hidden, weight, target, lora=(weight, weight))
    with pytest.raises(ValueError, match="scaling must be a finite number"):
        LoraHead(torch.zeros(3, 6), torch.zeros(40, 3), float("nan"))


def test_the_references_gradient_of_16_bit_hidden_states_is_rounded_once():
    """The factors take back most of the weight: parts rounded before they are added would leave the rounding of the weight's."""
    hidden, weight, _ = cases.head(9, 6, 40, torch.bfloat16)
    lora = LoraHead(torch.eye(6, device=cases.DEVICE), -weight.detach().float() * 63 / 64)
    target = torch.arange(9, device=cases.DEVICE)
    exact = hidden.detach().double().requires_grad_()
    summed = linear_logprob(exact, weight.detach().double() / 64, target, backend="reference")
    (truth,) = cases.gradients(summed.logprob.sum(), (exact,))
    out = linear_logprob(hidden, weight, target, lora=lora, backend="reference")
    (grad,) = cases.gradients(out.logprob.sum(), (hidden,))
    torch.testing.assert_close(grad.double(), truth, rtol=2**-8, atol=1e-5)
