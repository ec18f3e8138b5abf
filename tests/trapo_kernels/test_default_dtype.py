"""The defaults of the process change no bit: what the code makes for itself says its dtype and its device."""

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import (
    LoraHead,
    Role,
    TokenBatch,
    aggregate,
    corrections,
    doctor,
    linear_logprob,
    linear_policy_loss,
    loss_totals,
    merged_metrics,
    objectives,
    policy_loss,
    silenced_weight,
    token_logprob,
)
from trapo_kernels.weights import AGGREGATIONS

N, D, V = 11, 8, 61
DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def check():
    """Runs a function under every default dtype, and under a default device that is no data's, and compares, bit by bit, with what
    it returns under float32 and "cpu"."""
    default = torch.get_default_dtype()

    def compare(run):
        expected = run()
        for dtype in DEFAULTS:
            torch.set_default_dtype(dtype)
            found = run()
            torch.set_default_dtype(default)
            assert [x.dtype for x in found] == [x.dtype for x in expected], dtype
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), dtype
        with torch.device("meta"):
            found = run()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), "default device"

    yield compare
    torch.set_default_dtype(default)


CALLS = [
    pytest.param(dtype, backend, marks=() if backend in ("reference", *cases.QUICK) else cases.SLOW_ON_A_CPU)
    for dtype in DTYPES
    for backend in ["reference", *cases.backends(dtype)]
]


@pytest.mark.parametrize(("dtype", "backend"), CALLS, ids=str)
def test_scoring(check, dtype, backend):
    hidden, weight, bias = cases.head(N, D, V, dtype, scale=4.0)
    lora = LoraHead(torch.ones_like(hidden[:2]), torch.ones_like(weight[:, :2]), 0.25)
    b = cases.batch(N, V, torch.float32)
    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    temperature = torch.linspace(0.5, 2.0, N, device=cases.DEVICE)

    def run():
        options = {"with_entropy": True, "softcap": 5.0, "temperature": temperature, "backend": backend}
        at_hand = token_logprob(logits, b.target, **options)
        out = linear_logprob(hidden, weight, b.target, bias=bias, lora=lora, **options)
        results = [*at_hand, *out]
        for of, inputs in ((out, (hidden, weight, bias)), (at_hand, (logits,))):
            results += torch.autograd.grad((of.logprob - 0.1 * of.entropy).sum(), inputs)
        return results

    check(run)


@pytest.mark.parametrize("num_rows", [0, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_whose_logits_stay_on_the_chip(check, dtype, num_rows):
    hidden, weight, _ = cases.head(num_rows, D, V, dtype, scale=4.0)
    target, rows = torch.arange(num_rows, device=cases.DEVICE), torch.arange(0, num_rows, 2, device=cases.DEVICE)

    def run():
        results = []
        for active_rows in (None, rows):
            out = linear_logprob(
                hidden, weight, target, with_entropy=True, active_rows=active_rows, backend="triton_fused", softcap=5.0
            )
            results += [*out, *torch.autograd.grad(out.logprob.sum(), (hidden, weight))]
        return results

    check(run)


@pytest.mark.parametrize("preset", ["trapo", "gspo"])  # one pass and two
@pytest.mark.parametrize(("dtype", "backend"), CALLS, ids=str)
def test_policy_losses(check, dtype, backend, preset):
    hidden, weight, bias = cases.head(N, D, V, dtype)
    b, objective = cases.batch(N, V, torch.float32), objectives.PRESETS[preset](entropy_coef=0.1)
    logprob, entropy = (torch.linspace(*ends, N, dtype=torch.float32, device=cases.DEVICE) for ends in ((-6, -0.1), (1, 3)))
    logprob.requires_grad_()

    def run():
        out = linear_policy_loss(hidden, weight, b, objective, bias=bias, softcap=5.0, backend=backend)
        given = policy_loss(logprob, entropy, b, objective, backend=backend)
        merged = merged_metrics([out.metrics, out.metrics])
        grads = [
            *torch.autograd.grad(out.loss, (hidden, weight, bias), retain_graph=True),
            *torch.autograd.grad(3 * out.loss, (hidden, weight, bias)),
            *torch.autograd.grad(given.loss, logprob),
        ]
        return [out.loss, out.logprob, given.loss, *grads, *out.metrics.values(), *given.metrics.values(), *merged.values()]

    check(run)


def test_weights_and_corrections(check):
    role = torch.tensor([2, 2, 2, 1, 1, 1, 1, 0, 1, 1, 1], dtype=torch.uint8)
    sequence = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    old, sampled = (-torch.linspace(*ends, 11, dtype=torch.float32) for ends in ((0.1, 4), (0.3, 3.7)))
    pairs = (role, old, sampled)
    totals = loss_totals(role, sequence, sequence)

    def run():
        labels = {"sequence_id": sequence, "prompt_id": sequence, "max_tokens": 7, "totals": totals}
        share = corrections.duplicate_share(torch.where(sequence < 2, 5, -1), sequence)
        weights = [aggregate(role, mode=mode, share=share, **labels) for mode in AGGREGATIONS]
        return [
            *weights,
            share,
            silenced_weight(role, weights[0], torch.where(old < -2, 0, old), objectives.grpo()),
            corrections.tis(*pairs, level="geometric", sequence_id=sequence),
            corrections.icepop(*pairs),
            corrections.mis(*pairs, sequence_id=sequence),
            corrections.sequence_mask(*pairs, sequence, low=0.9),
            corrections.drop_overlong(role, sequence, sequence == 1),
        ]

    check(run)


@pytest.mark.parametrize("role", [Role.ROLLOUT, Role.EXPERT])
def test_padded_batches(check, role):
    mask = torch.arange(7) < torch.tensor([7, 3, 0, 5])[:, None]
    advantage = torch.linspace(-1, 1, 4, dtype=torch.float32)

    def run():
        b = TokenBatch.from_padded(target=mask.long(), mask=mask, role=role, advantage=advantage, aggregation="sequence_mean")
        return [b.role, b.advantage, b.weight, b.sequence_id]

    check(run)


def test_the_doctor_s_self_test_draws_on_the_cpu(check):
    device = torch.device(cases.DEVICE)
    check(lambda: [torch.tensor(doctor._self_test("torch", device), dtype=torch.float32, device="cpu")])
