"""The head where models put it: tied to the embedding, under checkpointing and autocast, in strange layouts, without rows."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.trapo_kernels import cases
from trapo_kernels import linear_logprob, linear_policy_loss, objectives

N, D, V = 21, 10, 37


def _policy(hidden, weight, b, backend="auto"):
    return linear_policy_loss(hidden, weight, b, objectives.trapo(entropy_coef=0.1), backend=backend).loss


def _scored(hidden, weight, b, backend="auto"):
    out = linear_logprob(hidden, weight, b.target_to_score(pools=False), with_entropy=True, backend=backend)
    return (out.logprob - 0.2 * out.entropy).sum()


CALLS = pytest.mark.parametrize("call", [_policy, _scored])


@CALLS
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_head_tied_to_the_embedding_gets_both_gradients(call, backend):
    dtype = torch.float64 if backend == "torch" else torch.float32
    token = torch.randint(V, (N,), device=cases.DEVICE)
    weight, b = cases.head(N, D, V, dtype)[1], cases.batch(N, V, dtype)
    grads = []
    for which in (backend, "reference"):
        weight.grad = None
        hidden = torch.nn.functional.embedding(token, weight).tanh()
        call(hidden, weight, b, which).backward()
        grads.append(weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-9 if dtype == torch.float64 else 1e-4, atol=1e-6)


@CALLS
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_activation_checkpointing_changes_no_bit(call, backend):
    hidden, weight, _ = cases.head(N, D, V, torch.float32)
    b = cases.batch(N, V, torch.float32)
    plain = torch.autograd.grad(call(hidden, weight, b, backend), (hidden, weight))
    again = torch.autograd.grad(checkpoint(call, hidden, weight, b, backend, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(ours, expected) for ours, expected in zip(again, plain, strict=True))


@CALLS
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_inputs(call):
    hidden, weight, _ = cases.head(N, D, V, torch.float32)
    b = cases.batch(N, V, torch.float32)
    with torch.autocast(cases.DEVICE, torch.bfloat16):
        loss = call(hidden, weight, b)
    assert torch.equal(loss, call(hidden.bfloat16(), weight, b))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, (hidden, weight)))


@CALLS
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_strided_inputs_equal_contiguous_ones(call, backend):
    hidden, weight, _ = cases.head(N, D, V, torch.float32)
    b = cases.batch(N, V, torch.float32)
    strided = [hidden.t().contiguous().t(), weight.repeat(1, 2)[:, :D]]
    assert not any(x.is_contiguous() for x in strided)
    grads = [torch.autograd.grad(call(*inputs, b, backend), (hidden, weight)) for inputs in (strided, (hidden, weight))]
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@CALLS
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_an_empty_batch_has_a_loss_of_zero_and_gradients_of_zero(call, backend):
    hidden, weight, _ = cases.head(0, D, V, torch.float32)
    b = cases.batch(0, V, torch.float32)
    loss = call(hidden, weight, b, backend)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and grad_hidden.shape == (0, D) and not grad_weight.any()


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_what_is_kept_for_the_backward(backend):
    """Recomputation: the inputs and four numbers per row. A single pass: the two gradients, nothing else."""
    hidden, weight, _ = cases.head(N, D, V, torch.float32)
    b, kept = cases.batch(N, V, torch.float32), []
    for call in (_scored, _policy):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            call(hidden, weight, b, backend)
        inputs = {hidden.data_ptr(), weight.data_ptr(), b.target.data_ptr()}
        sizes = sorted(x.numel() for x in kept if x.data_ptr() not in inputs and x.numel() > N)
        assert sizes == ([] if call is _scored else [N * D, V * D])
        kept.clear()
