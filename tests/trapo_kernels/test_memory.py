"""The account of a head's buffers against what the allocator counts during a forward and backward."""

import itertools

import pytest
import torch

from benchmarks.memory_plan import allocated_peak
from trapo_kernels import Role, TokenBatch, head_memory, linear_logprob, linear_policy_loss, objectives
from trapo_kernels.backends import native

CASES = list(itertools.product(["native", "torch"], [torch.float32, torch.bfloat16], [True, False], [True, False], [300]))


@pytest.mark.parametrize(
    ("backend", "dtype", "trained", "two_phase", "rows"),
    [*CASES, ("native", torch.float32, True, False, 2100)],  # several chunks
)
def test_the_account_is_what_is_allocated(backend, dtype, trained, two_phase, rows):
    if backend == "native" and native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    hidden_size, vocab_size = 48, 16001
    hidden = torch.randn(rows, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, requires_grad=trained)
    target = torch.arange(rows) % vocab_size
    batch = TokenBatch(target, torch.full((rows,), Role.ROLLOUT, dtype=torch.uint8), torch.ones(rows), torch.ones(rows))
    objective = objectives.trapo(entropy_coef=0.1)

    def call():
        if two_phase:
            out = linear_logprob(hidden, weight, target, with_entropy=True, backend=backend)
            (out.logprob + out.entropy).sum().backward()
        else:
            linear_policy_loss(hidden, weight, batch, objective, backend=backend).loss.backward()
        hidden.grad = weight.grad = None

    predicted = head_memory(
        rows, hidden_size, vocab_size, dtype=dtype, weight_dtype=torch.float32, device_type="cpu", grad_weight=trained,
        in_place=backend == "native",
    )  # fmt: skip
    assert sum(predicted.values()) == pytest.approx(allocated_peak(call), rel=0.02)
    assert (predicted["grad_weight"] > 0) == trained and (predicted["weight"] > 0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("rows", "hidden_size"), [(40, 512), (300, 48), (700, 300)])
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_narrow_weight_whose_gradient_is_rounded_at_the_end(rows, hidden_size, units, with_bias, monkeypatch):
    if native.why_not("cpu") or (units and not native.BF16_UNITS):
        pytest.skip("this machine has no native extension, or does not multiply bf16")
    monkeypatch.setattr(native, "BF16_UNITS", native.BF16_UNITS if units else "")
    vocab_size = 16001
    hidden, weight = (torch.randn(n, hidden_size).bfloat16().requires_grad_() for n in (rows, vocab_size))
    bias = torch.zeros(vocab_size, requires_grad=True) if with_bias else None
    batch = TokenBatch(
        torch.arange(rows) % vocab_size, torch.full((rows,), Role.ROLLOUT, dtype=torch.uint8), torch.ones(rows), torch.ones(rows)
    )

    def call():
        linear_policy_loss(hidden, weight, batch, objectives.trapo(), bias=bias).loss.backward()
        hidden.grad = weight.grad = None
        if bias is not None:
            bias.grad = None

    predicted = head_memory(rows, hidden_size, vocab_size, device_type="cpu")
    assert sum(predicted.values()) == pytest.approx(allocated_peak(call), rel=0.02)


def test_a_gpu_keeps_its_gemms_in_bf16_and_its_chunk_larger():
    sizes = head_memory(32768, 3584, 152064, weight_dtype=torch.float32)
    assert sizes["logits"] == 4 * 4096 * 152064 and sizes["weight"] == 2 * 152064 * 3584
    assert head_memory(32768, 3584, 152064)["weight"] == 0
