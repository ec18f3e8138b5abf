"""Float32 master weights beside low-precision hidden states: computed as if rounded first, with a gradient that never is."""

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import linear_logprob, linear_policy_loss, objectives


def _policy(hidden, weight, backend):
    out = linear_policy_loss(
        hidden, weight, cases.batch(19, 40, torch.float32), objectives.trapo(entropy_coef=0.1), backend=backend
    )
    return out.logprob, out.loss


def _logprob(hidden, weight, backend):
    target = cases.batch(19, 40).target
    out = linear_logprob(hidden, weight, target, with_entropy=True, backend=backend)
    return out.logprob, (out.logprob + 0.3 * out.entropy).sum()


@pytest.mark.parametrize("call", [_policy, _logprob])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", *cases.QUICK_BY_DEFAULT])
def test_values_are_those_of_the_rounded_weight_and_its_gradient_is_not_rounded(backend, dtype, call):
    master = cases.head(19, 6, 40, torch.float32)[1]
    hidden = cases.head(19, 6, 40, dtype)[0]
    rounded = master.detach().to(dtype).requires_grad_()
    logprob, loss = call(hidden, master, backend)
    expected_logprob, expected_loss = call(hidden, rounded, backend)
    assert torch.equal(logprob, expected_logprob)
    grad_hidden, grad_master = cases.gradients(loss, (hidden, master))
    expected_hidden, grad_rounded = cases.gradients(expected_loss, (hidden, rounded))
    assert torch.equal(grad_hidden, expected_hidden)
    assert grad_master.dtype == torch.float32 and torch.equal(grad_master.to(dtype), grad_rounded)
    assert not torch.equal(grad_master, grad_rounded.float())  # there were digits to lose


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_scoring_rounds_the_weight_as_well(dtype):
    hidden, master = cases.head(19, 6, 40, dtype)[0], cases.head(19, 6, 40, torch.float32)[1]
    logprob, expected = (_logprob(hidden, weight, "triton_fused")[0] for weight in (master, master.detach().to(dtype)))
    assert torch.equal(logprob, expected)


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_against_fp64(backend):
    """Rounding the weight moves values by about 2^-9 of their size; the gradient in fp32 adds nothing to that."""
    hidden, weight, _ = cases.head(19, 6, 40, torch.float64)
    low, master = hidden.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    exact = low.detach().double().requires_grad_()
    truth = cases.gradients(_policy(exact, weight, "reference")[1], (exact, weight))
    ours = cases.gradients(_policy(low, master, backend)[1], (low, master))
    eager = [low.detach().requires_grad_(), weight.detach().bfloat16().requires_grad_()]
    baseline = cases.gradients(_policy(*eager, "reference")[1], eager)
    for mine, theirs, exactly in zip(ours, baseline, truth, strict=True):
        assert (mine.double() - exactly).norm() <= 2 * (theirs.double() - exactly).norm() + 1e-6 * exactly.norm()


def test_autocast_leaves_the_gradient_of_a_float32_weight_in_float32():
    hidden, weight, _ = cases.head(19, 6, 40, torch.float32)
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        loss = _policy(hidden, weight, "auto")[1]
    grad = cases.gradients(loss, (weight,))[0]
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())
