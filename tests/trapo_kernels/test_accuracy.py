"""Accuracy against fp64 at the sizes of real heads: a vocabulary of 152k in bf16, and dWeight summed over many chunks."""

import pytest
import torch

from tests.trapo_kernels import cases, cuda_checks
from trapo_kernels import dispatch, linear_logprob, linear_policy_loss, objectives, token_logprob
from trapo_kernels.backends import gemm


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("backend", cases.QUICK)
def test_bf16_head_of_a_large_vocabulary(backend, scale):
    hidden, weight, _ = (x.detach() for x in cases.head(12, 64, 152_064, torch.bfloat16, scale))
    target = torch.randint(152_064, (12,), device=cases.DEVICE)
    target[::2] = (hidden[::2].float() @ weight.float().T).argmax(-1)  # likely tokens as well as unlikely ones
    out = linear_logprob(hidden, weight, target, with_entropy=True, backend=backend)
    logprob, entropy = cases.eager_statistics(hidden.double(), weight.double(), target)
    # 1e-5, or what fp32 can hold where that is more: a logit of 130 has a spacing of 1.5e-5.
    largest = torch.maximum((hidden.double() @ weight.double().T).abs().amax(-1), logprob.abs())
    bound = (2 * torch.finfo(torch.float32).eps * largest).clamp(min=1e-5)
    assert ((out.entropy - entropy).abs() <= (1e-5 if cases.DEVICE == "cpu" else bound)).all()
    assert ((out.logprob - logprob).abs() <= bound).all()


@pytest.fixture(scope="module", params=[4096, pytest.param(152_064, marks=pytest.mark.slow)])
def large_head(request):
    """hidden [8, 3584] and weight [V, 3584] in bf16, and their logits [8, V] in fp64 and in fp32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.cat([torch.randn(64, 3584, generator=generator).bfloat16() / 60 for _ in range(request.param // 64)])
    hidden, weight = (11 * torch.randn(8, 3584, generator=generator)).bfloat16().to(cases.DEVICE), weight.to(cases.DEVICE)
    parts = [part.t() for part in weight.split(8192)]
    return hidden, weight, *(torch.cat([hidden.to(x) @ part.to(x) for part in parts], 1) for x in (torch.float64, torch.float32))


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_bf16_head_of_a_large_hidden_size_is_as_exact_as_a_plain_fp32_gemm(large_head, backend):
    """Logits to ±50 that are sums of 3584 products: fp32 itself errs by about 1e-5 there, whoever adds them up."""
    weight, num_rows = large_head[1], 4 if backend == "triton" else 8
    hidden, exact, plain = (x[:num_rows] for x in (large_head[0], *large_head[2:]))
    target = torch.randint(weight.shape[0], (num_rows,), device=cases.DEVICE)
    target[::2] = exact[::2].argmax(-1)
    out = linear_logprob(hidden, weight, target, backend=backend)
    truth, theirs = (x.double().log_softmax(-1).gather(1, target[:, None])[:, 0] for x in (exact, plain))
    assert exact.abs().max() > 40
    assert cases.error(out.logprob, truth) <= 2 * cases.error(theirs, truth) + 1e-5


@pytest.mark.parametrize("backend", cases.QUICK)
def test_weight_gradient_of_many_chunks_is_no_worse_than_of_one(backend, monkeypatch):
    """64k rows; fp32 accumulation over 512 chunks against one GEMM over all rows."""
    hidden, weight, _ = cases.head(65_536, 8, 64, torch.float32)
    b = cases.batch(65_536, 64, torch.float32)
    truth_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = cases.batch(65_536, 64)
    loss = linear_policy_loss(*truth_inputs, exact, objectives.trapo(), backend="torch").loss
    truth = cases.gradients(loss, truth_inputs)[1]
    errors = []
    for rows in (65_536, 128):
        monkeypatch.setattr(gemm, "chunk_rows", lambda *_, rows=rows, **__: rows)
        monkeypatch.setattr("trapo_kernels.backends.sweep.chunk_rows", lambda *_, rows=rows, **__: rows)
        grad = cases.gradients(linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend).loss, (weight,))[0]
        errors.append(float((grad - truth).norm() / truth.norm()))
    assert errors[1] <= 1.5 * errors[0] + 1e-7


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("backend", cases.QUICK)
def test_bf16_gradients_are_never_worse_than_those_of_eager_bf16(backend, scale):
    """Eager as a model has it: logits in bf16, their softmax in fp32. Where both round dLogits to bf16, on a GPU with flat logits,
    that rounding is all the error of either, and chance decides by a per cent."""
    hidden, weight, _ = cases.head(128, 64, 4096, torch.bfloat16, scale)
    target = torch.randint(4096, (128,), device=cases.DEVICE)
    upstream = torch.randn(128, device=cases.DEVICE)

    def eager(h, w, upcast):
        log_p = (h @ w.T).to(upcast).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return ((log_p.gather(1, target[:, None])[:, 0] + 0.1 * entropy) * upstream).sum()

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = cases.gradients(eager(*exact, torch.float64), exact)
    theirs = cases.gradients(eager(hidden, weight, torch.float32), (hidden, weight))
    out = linear_logprob(hidden, weight, target, with_entropy=True, backend=backend)
    ours = cases.gradients(((out.logprob + 0.1 * out.entropy) * upstream).sum(), (hidden, weight))
    for mine, other, exactly in zip(ours, theirs, truth, strict=True):
        assert (mine.double() - exactly).norm() <= 1.05 * (other.double() - exactly).norm()


@pytest.mark.parametrize("in_policy", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("backend", cases.QUICK)
def test_bf16_gradients_have_at_most_twice_the_error_of_eager_with_fp32_logits(backend, scale, in_policy):
    """Of eager that rounds nothing but its results, though our GEMMs may take dLogits in bf16; by the L2 norm."""
    hidden, weight, _ = cases.head(128, 64, 4096, torch.bfloat16, scale)
    b, exact_b = (cases.batch(128, 4096, dtype) for dtype in (torch.float32, torch.float64))

    def eager(h, w, batch):
        return cases.eager_loss("trapo", *cases.eager_statistics(h, w, batch.target), batch, entropy_coef=0.1)

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = cases.gradients(eager(*exact, exact_b), exact)
    theirs = cases.gradients(eager(hidden.float(), weight.float(), b), (hidden, weight))
    if in_policy:
        loss = linear_policy_loss(hidden, weight, b, objectives.trapo(entropy_coef=0.1), backend=backend).loss
    else:
        out = linear_logprob(hidden, weight, b.target, with_entropy=True, backend=backend)
        loss = cases.eager_loss("trapo", out.logprob, out.entropy, b, entropy_coef=0.1)
    for mine, other, exactly in zip(cases.gradients(loss, (hidden, weight)), theirs, truth, strict=True):
        assert (mine.double() - exactly).norm() <= 2 * (other.double() - exactly).norm()


@pytest.mark.parametrize("backend", cases.CHUNKED)
@pytest.mark.parametrize("in_policy", [False, True])
def test_the_entropy_gradient_of_a_peaked_row_whose_neighbours_have_none(backend, in_policy):
    """The rows whose logits are recomputed are others than before, so their last bits are, and p (log p + H) cancels as p → 1."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 896, generator=generator).to(cases.DEVICE) for n in (64, 4096))
    weight /= 896**0.5
    hidden += 25 * weight[:64]
    target, only = torch.arange(64, device=cases.DEVICE) * 3, torch.zeros(64, device=cases.DEVICE)
    only[5] = 1.0
    batch = cases.batch(64, 4096, torch.float32, weight=only + 1, entropy_weight=only, target=target, advantage=0 * only)
    objective = objectives.gspo(entropy_coef=0.1)

    def gradient(dtype, which):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        if in_policy:
            loss = linear_policy_loss(*inputs, batch, objective, backend=which).loss
        else:
            loss = (linear_logprob(*inputs, target, with_entropy=True, backend=which).entropy * only.to(dtype)).sum()
        return cases.gradients(loss, inputs)[0][5]

    truth, eager = gradient(torch.float64, "reference"), gradient(torch.float32, "reference")
    assert 0 < truth.abs().max() < 1e-3  # a peaked row
    assert cases.error(gradient(torch.float32, backend), truth) <= 2 * cases.error(eager, truth) + 1e-5 * truth.abs().max()


@cases.SLOW_ON_A_CPU
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=cases.SLOW_ON_A_CPU), 0.7])
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_the_gradient_through_a_softcap(backend, temperature):
    cuda_checks.check_softcap(dispatch.rows(backend), temperature)


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_wide_softcap_keeps_the_digits_of_small_logits(backend):
    """tanh from exp alone would have an error of 6e-8 however small its argument is: 6e-5 nats at a cap of 1000."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).to(cases.DEVICE)
    target = torch.arange(6, device=cases.DEVICE)
    found = token_logprob(logits, target, softcap=1000.0, backend=backend).logprob
    exact = token_logprob(logits.double(), target, softcap=1000.0, backend="reference").logprob
    assert cases.error(found, exact) < 2e-6
