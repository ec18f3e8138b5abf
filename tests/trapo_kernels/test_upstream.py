"""The upstream gradient costs nothing where it is 1, and is multiplied in fp32 where it is not."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.trapo_kernels import cases
from trapo_kernels import autograd, dispatch, linear_logprob, linear_policy_loss, objectives, policy_loss
from trapo_kernels.backends import native, triton_ops
from trapo_kernels.backends.triton_ops import scale

SIGNALLING_NAN = 0x7F800001  # any multiplication makes it a quiet one, 0x7FC00001: a store of grad · 1 shows in the bits


@pytest.mark.parametrize("num_elements", [1, 4096, 3 * 4096 + 5])
def test_a_factor_of_one_touches_nothing(num_elements, monkeypatch):
    monkeypatch.setattr(scale, "MAX_PROGRAMS", 2)  # fewer than tiles, so that a program has several
    grad = torch.full((num_elements,), SIGNALLING_NAN, dtype=torch.int32, device=cases.DEVICE).view(torch.float32)
    triton_ops.scale_to(grad, torch.tensor(1.0, device=cases.DEVICE), grad)
    assert (grad.view(torch.int32) == SIGNALLING_NAN).all()
    triton_ops.scale_to(grad, torch.tensor(2.0, device=cases.DEVICE), grad)
    assert (grad.view(torch.int32) != SIGNALLING_NAN).all() and grad.isnan().all()


@pytest.mark.parametrize("scaling", [triton_ops.scale_to, *(partial(dispatch.scale_to, backend=name) for name in cases.CHUNKED)])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, -1.0, 0.0])
def test_every_element_is_multiplied_in_fp32_and_rounded_once(scaling, in_place, dtype, factor, monkeypatch):
    monkeypatch.setattr(scale, "MAX_PROGRAMS", 3)
    grad = torch.randn(5, 3001, device=cases.DEVICE).to(dtype if in_place else torch.float32)
    out, given = grad if in_place else torch.full_like(grad, torch.nan, dtype=dtype), grad.clone()
    scaling(grad, torch.tensor(factor, device=cases.DEVICE), out)
    expected = (given.float() * torch.tensor(factor)).to(dtype)
    if dtype == torch.bfloat16 and scaling is triton_ops.scale_to and cases.DEVICE == "cpu":  # whose interpreter cuts digits off
        torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(out, expected)
    assert in_place or torch.equal(grad, given)


@pytest.mark.parametrize("backend", ["torch", "triton", "native"])
def test_on_a_gpu_only_triton_launches_triton(backend, monkeypatch):
    """Who names another may have no C compiler, which Triton wants."""
    launched = []
    monkeypatch.setattr(triton_ops, "scale_to", lambda *_: launched.append("triton"))
    monkeypatch.setattr(native, "scale_to", lambda *_: launched.append("native"))
    with FakeTensorMode():
        grad, factor = torch.ones(5, 7, device="cuda"), torch.ones((), device="cuda")
        dispatch.scale_to(grad, factor, grad, backend)
    assert launched == [backend] * (backend != "torch")
    assert grad._version == (backend == "torch")  # in place


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_backward_scales_with_the_backend_of_its_call(backend, monkeypatch):
    named, hidden, weight = [], *cases.head(20, 6, 30, torch.float32)[:2]
    monkeypatch.setattr(dispatch, "scale_to", lambda grad, factor, out, backend: named.append(backend))
    linear_policy_loss(hidden, weight, cases.batch(20, 30, torch.float32), objectives.trapo(), backend=backend).loss.backward()
    assert named == [backend] * 2


def test_no_gradient_of_an_empty_batch_is_scaled():
    grad = torch.zeros(0, 7, device=cases.DEVICE)
    triton_ops.scale_to(grad, torch.tensor(3.0, device=cases.DEVICE), grad)
    assert grad.shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_their_dtype_are_handed_out_as_they_are(dtype, monkeypatch):
    """fp32: both gradients; bf16: dHidden, while dWeight, accumulated in fp32, is rounded to the dtype of the weight."""
    handed_out = []
    scaled = autograd._scaled

    def spy(grad, *rest):
        out = scaled(grad, *rest)
        handed_out.append(out.data_ptr() == grad.data_ptr())
        return out

    monkeypatch.setattr(autograd, "_scaled", spy)
    hidden, weight, _ = cases.head(20, 6, 30, dtype)
    loss = linear_policy_loss(hidden, weight, cases.batch(20, 30, torch.float32), objectives.trapo()).loss
    assert all(grad.dtype == dtype for grad in torch.autograd.grad(loss, (hidden, weight)))
    assert handed_out == [True, dtype == torch.float32]


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_what_a_hook_of_saved_tensors_keeps_is_left_as_it_is(backend):
    """The caller's own tensors, of which several backward passes may be made, and of which the op knows nothing."""
    kept, (hidden, weight, _) = [], cases.head(20, 6, 30, torch.float32)
    b = cases.batch(20, 30, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.clone()) or len(kept) - 1, lambda k: kept[k]):
        loss = linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend).loss
    before = [x.clone() for x in kept]
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))
    assert len(kept) >= 2 and all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))
    plain = linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend).loss
    assert all(torch.equal(x, y) for x, y in zip(grads, cases.gradients(3.0 * plain, (hidden, weight)), strict=True))


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", *cases.QUICK_BY_DEFAULT])
def test_a_gradient_is_no_part_of_a_graph(backend, dtype, factor, retained):
    hidden, weight, bias = cases.head(20, 6, 30, dtype)
    b, out = cases.batch(20, 30, torch.float32), []
    passed = hidden * 1  # whose hook sees the gradient before it is accumulated
    passed.register_hook(out.append)
    policy = linear_policy_loss(passed, weight, b, objectives.trapo(), bias=bias, backend=backend).loss
    scored = linear_logprob(hidden, weight, b.target, with_entropy=True, bias=bias, backend=backend)
    given = policy_loss(scored.logprob, scored.entropy, b, objectives.trapo(entropy_coef=0.1), backend=backend).loss
    for loss in (policy, given):
        out += torch.autograd.grad(factor * loss, (hidden, weight, bias), retain_graph=retained)
    assert len(out) == 7 and all(grad.any() for grad in out)
    assert not any(grad.requires_grad or grad.grad_fn for grad in out)


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_a_loss_of_given_logprobs_scales_both_of_its_gradients(backend):
    inputs = [torch.linspace(low, high, 20, device=cases.DEVICE).requires_grad_() for low, high in ((-6, -1), (1, 3))]
    loss = policy_loss(*inputs, cases.batch(20, 30, torch.float32), objectives.trapo(entropy_coef=0.1), backend=backend).loss
    for grad, scaled in zip(cases.gradients(loss, inputs), cases.gradients(-3.0 * loss, inputs), strict=True):
        assert grad.any()
        torch.testing.assert_close(scaled, -3.0 * grad)
