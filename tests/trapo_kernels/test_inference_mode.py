"""What a sampler made under torch.inference_mode() goes into a loss as it is."""

from dataclasses import replace

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import KL, TokenBatch, linear_logprob, linear_policy_loss, objectives, policy_loss, token_logprob

N, D, V = 8, 6, 20
TWO_PASSES = replace(objectives.gspo(entropy_coef=0.1), kl=KL(0.1))
STREAMS = ("target", "role", "advantage", "weight", "old_logprob", "ref_logprob", "entropy_weight", "sequence_id")


def _sampled():
    """temperature [N], active_rows [M], a batch."""
    b = cases.batch(N, V, torch.float32, roles=(1, 2))
    streams = {name: getattr(b, name).clone() for name in STREAMS}
    temperature = torch.linspace(0.5, 1.5, N, device=cases.DEVICE)
    return temperature, torch.arange(0, N, 2, device=cases.DEVICE), TokenBatch(**streams)


def _gradients(call):
    """Of `call` with plain tensors, then with those of a sampler."""
    results = []
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            sampled = _sampled()
        hidden, weight, _ = cases.head(N, D, V, torch.float32)
        results.append(cases.gradients(call(hidden, weight, *sampled), (hidden, weight)))
    return results


@pytest.mark.parametrize("passing", [(), ("temperature",), ("active_rows",), ("temperature", "active_rows")])
@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_linear_logprob(backend, passing):
    def call(hidden, weight, temperature, rows, b):
        given = {"temperature": temperature, "active_rows": rows}
        options = {name: given[name] for name in passing}
        out = linear_logprob(hidden, weight, b.target, with_entropy=True, backend=backend, **options)
        return (out.logprob + out.entropy).sum()

    plain, sampled = _gradients(call)
    assert all(map(torch.equal, plain, sampled))


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_token_logprob(backend):
    def call(hidden, weight, temperature, rows, b):
        return token_logprob(hidden @ weight.T, b.target, temperature=temperature, backend=backend).logprob.sum()

    plain, sampled = _gradients(call)
    assert all(map(torch.equal, plain, sampled))


@pytest.mark.parametrize("objective", [objectives.trapo(entropy_coef=0.1), TWO_PASSES], ids=["one pass", "two passes"])
@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_policy_losses(backend, objective):
    def whole(hidden, weight, temperature, rows, b):
        return linear_policy_loss(hidden, weight, b, objective, temperature=temperature, backend=backend).loss

    def of_logprobs(hidden, weight, temperature, rows, b):
        out = linear_logprob(hidden, weight, b.target, with_entropy=True)
        return policy_loss(out.logprob, out.entropy, b, objective, backend=backend).loss

    for call in (whole, of_logprobs):
        plain, sampled = _gradients(call)
        assert all(map(torch.equal, plain, sampled))
