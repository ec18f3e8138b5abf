"""batch_invariant=True: a row's bits do not depend on the rest of the batch; the default is only repeatable."""

import itertools

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import LoraHead, linear_logprob, linear_policy_loss, objectives

OPERANDS = list(itertools.product([torch.float32, torch.bfloat16], [0, 8]))
CALLS = [
    pytest.param(call, name, *operands, marks=() if name in cases.QUICK else cases.SLOW_ON_A_CPU)
    for call, name in itertools.product(["logprob", "policy"], cases.CHUNKED)
    for operands in (OPERANDS if name in cases.QUICK else [(torch.float32, 0), (torch.bfloat16, 8)])  # its GEMMs are torch's
]


@pytest.mark.parametrize(("call", "backend", "dtype", "rank"), CALLS)
def test_a_row_has_the_same_bits_in_any_batch(call, backend, dtype, rank):
    hidden, weight, _ = cases.head(150, 48, 67, dtype)
    batch, objective = cases.batch(150, 67, torch.float32, roles=(1, 2)), objectives.trapo(entropy_coef=0.1)
    a, b = (torch.randn(*shape, device=cases.DEVICE).to(dtype) for shape in ((rank, 48), (67, rank)))
    settings = {"lora": LoraHead(a, b, 0.3) if rank else None, "batch_invariant": True, "backend": backend}

    def run(rows):
        if call == "logprob":
            with torch.no_grad():
                return linear_logprob(hidden[rows], weight, batch.target[rows], with_entropy=True, **settings)
        out = linear_policy_loss(hidden[rows], weight, cases.subset(batch, rows), objective, **settings)
        assert out.passes == 1
        return out.logprob, out.entropy, cases.gradients(out.loss, (hidden,))[0][rows]

    whole = run(slice(0, 150))
    for rows in (slice(149, 150), torch.randperm(150, device=cases.DEVICE)[:99]):
        for ours, expected in zip(run(rows), whole, strict=True):
            assert torch.equal(ours, expected[rows])


@pytest.mark.parametrize(("hidden_size", "vocab_size", "rank"), [(770, 500, 8), (33, 7, 0), (39, 3079, 0), (30, 9, 3)])
def test_thin_products_whose_rows_mkl_treats_differently(hidden_size, vocab_size, rank):
    hidden, weight, _ = cases.head(64, hidden_size, vocab_size, torch.float32)
    target = torch.randint(vocab_size, (64,), device=cases.DEVICE)
    a, b = (torch.randn(*shape, device=cases.DEVICE) for shape in ((rank, hidden_size), (vocab_size, rank)))
    settings = {"lora": LoraHead(a, b, 0.3) if rank else None, "batch_invariant": True, "backend": "torch"}

    def run(rows):
        out = linear_logprob(hidden[rows], weight, target[rows], **settings)
        return out.logprob.detach(), cases.gradients(out.logprob.sum(), (hidden,))[0][rows]

    whole = run(slice(0, 64))
    for row in (0, 5, 17, 40, 63):
        alone = run(slice(row, row + 1))
        assert torch.equal(alone[0], whole[0][row : row + 1])
        assert torch.equal(alone[1], whole[1][row : row + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_row_has_the_same_bits_in_any_batch_of_a_7b_model(backend):
    """At the shapes that users run a GPU has other GEMM kernels than at the small ones above."""
    hidden = torch.randn(1500, 3584, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(152_064, 3584, device="cuda", dtype=torch.bfloat16) / 60
    target = torch.randint(152_064, (1500,), device="cuda")

    def run(rows):
        out = linear_logprob(hidden[rows], weight, target[rows], with_entropy=True, batch_invariant=True, backend=backend)
        return [*(part.detach() for part in out), cases.gradients((out.logprob + out.entropy).sum(), (hidden,))[0][rows]]

    whole = run(slice(0, 1500))
    for row in (0, 1, 127, 128, 1023, 1499):
        for alone, expected in zip(run(slice(row, row + 1)), whole, strict=True):
            assert torch.equal(alone[0], expected[row])


def test_gradients_are_those_of_the_default_path_and_bitwise_repeatable():
    hidden, weight, bias = cases.head(150, 48, 67)
    b, objective = cases.batch(150, 67), objectives.trapo(entropy_coef=0.1)

    def run(batch_invariant):
        out = linear_policy_loss(hidden, weight, b, objective, bias=bias, batch_invariant=batch_invariant)
        return [out.loss, *cases.gradients(out.loss, (hidden, weight, bias))]

    first, second, default = run(True), run(True), run(False)
    for a, again, other in zip(first, second, default, strict=True):
        assert torch.equal(a, again)
        assert cases.error(a, other) < 1e-13


@pytest.mark.parametrize("backend", cases.QUICK_BY_DEFAULT)
def test_a_row_has_the_same_gradient_in_any_batch_with_a_lora(backend):
    hidden, weight, _ = cases.head(70, 48, 67, torch.float32)
    target = torch.randint(67, (70,), device=cases.DEVICE)
    lora = LoraHead(torch.randn(8, 48, device=cases.DEVICE), torch.randn(67, 8, device=cases.DEVICE), 0.3)

    def grad_hidden(rows):
        out = linear_logprob(hidden[rows], weight, target[rows], lora=lora, batch_invariant=True, backend=backend)
        return cases.gradients(out.logprob.sum(), (hidden,))[0][rows]

    whole = grad_hidden(slice(0, 70))
    for count in (1, 65):  # the last chunk has one row
        assert torch.equal(grad_hidden(slice(0, count)), whole[:count])


def test_a_peaked_neighbour_changes_no_bit():
    hidden, weight, _ = cases.head(3, 8, 67, torch.float32)
    target = torch.randint(67, (3,), device=cases.DEVICE)
    peaked = hidden.detach().clone()
    peaked[1] *= 200
    runs = [linear_logprob(h, weight, target, with_entropy=True, batch_invariant=True) for h in (hidden, peaked)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a[::2], b[::2])
