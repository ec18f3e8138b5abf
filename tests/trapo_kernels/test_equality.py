"""Contract 2: eager fp64 = policy_loss ∘ linear_logprob = linear_policy_loss, for every preset and backend."""

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import linear_logprob, linear_policy_loss, objectives, policy_loss, token_logprob

PRESETS = list(objectives.PRESETS)
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 4.0, "temperature": 1.3},
}


def _beta(name, scale=1.0):
    """What can have a KL term is tested with it; k3 = exp(ref - logp) overflows fp32 for everyone where logits are peaked."""
    return 0.2 if name in ("grpo", "uft") and scale == 1.0 else 0.0


def _objective(name, beta=None):
    options = {"beta": _beta(name) if beta is None else beta} if name in ("grpo", "uft") else {}
    return objectives.PRESETS[name](entropy_coef=0.03, **options)


def _eager(name, inputs, b, settings, beta):
    hidden, weight, bias = inputs
    logprob, entropy = cases.eager_statistics(hidden, weight, b.target, bias, **settings)
    return cases.eager_loss(name, logprob, entropy, b, entropy_coef=0.03, beta=beta)


def test_every_preset_has_a_published_formula_here():
    assert set(cases.PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_fp64_equality(backend, name, setting, scale):
    inputs = cases.head(23, 7, 57, scale=scale)
    b = cases.batch(23, 57)
    expected = _eager(name, inputs, b, SETTINGS[setting], _beta(name))
    hidden, weight, bias = inputs
    single = linear_policy_loss(hidden, weight, b, _objective(name), bias=bias, backend=backend, **SETTINGS[setting])
    scored = linear_logprob(hidden, weight, b.target, bias=bias, with_entropy=True, backend=backend, **SETTINGS[setting])
    composed = policy_loss(scored.logprob, scored.entropy, b, _objective(name), backend=backend)
    expected_grads = cases.gradients(expected, inputs)
    size = max(1.0, *(g.abs().max().item() for g in expected_grads))
    assert single.metrics.keys() == composed.metrics.keys()
    for key, value in single.metrics.items():
        torch.testing.assert_close(value, composed.metrics[key], rtol=1e-6, atol=1e-6, msg=key)
    for out in (single, composed):
        assert cases.error(out.loss, expected) < 1e-11 * max(1.0, abs(expected.item()))
        for grad, expected_grad in zip(cases.gradients(out.loss, inputs), expected_grads, strict=True):
            assert cases.error(grad, expected_grad) < 1e-11 * size


@pytest.mark.parametrize("name", cases.SURROGATES)
def test_gradient_is_that_of_the_published_loss_with_a_stop_gradient(name):
    hidden, weight, _ = cases.head(40, 6, 50)
    b = cases.batch(40, 50)
    logprob, entropy = cases.eager_statistics(hidden, weight, b.target)
    expected = cases.eager_loss(name, logprob, entropy, b, formulas=cases.SURROGATES)
    loss = linear_policy_loss(hidden, weight, b, objectives.PRESETS[name](entropy_coef=0.0), backend="torch").loss
    for ours, theirs in zip(cases.gradients(loss, (hidden, weight)), cases.gradients(expected, (hidden, weight)), strict=True):
        assert cases.error(ours, theirs) < 1e-12


@pytest.mark.parametrize("backend", cases.COMPILED)
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=cases.SLOW_ON_A_CPU), 30.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_compiled_backend_is_as_close_to_fp64_as_fp32_eager(name, scale, backend):
    shape = (19, 7, 2500)  # two tiles of the vocabulary, the second ragged
    exact_inputs, exact_batch = cases.head(*shape, scale=scale), cases.batch(19, 2500)
    beta = _beta(name, scale)
    exact_loss = _eager(name, exact_inputs, exact_batch, {}, beta)
    exact = [exact_loss, *cases.gradients(exact_loss, exact_inputs)]

    inputs, b = cases.head(*shape, torch.float32, scale), cases.batch(19, 2500, torch.float32)
    eager_loss = _eager(name, inputs, b, {}, beta)
    eager = [eager_loss, *cases.gradients(eager_loss, inputs)]
    hidden, weight, bias = inputs
    out = linear_policy_loss(hidden, weight, b, _objective(name, beta), bias=bias, backend=backend)
    cases.check_as_close_as_eager([out.loss, *cases.gradients(out.loss, inputs)], eager, exact)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_policy_loss_of_a_compiled_backend_equals_the_reference(backend, name):
    b = cases.batch(300, 50, torch.float32)
    logprob = (-4 * torch.rand(300)).to(cases.DEVICE).requires_grad_()
    entropy = torch.rand(300).to(cases.DEVICE).requires_grad_()
    results = []
    for which in ("reference", backend):
        out = policy_loss(logprob, entropy, b, _objective(name), backend=which)
        results.append([out.loss, *cases.gradients(out.loss, (logprob, entropy)), *out.metrics.values()])
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-6, atol=1e-7)


def test_metrics_agree_across_backends_and_with_a_hand_computation():
    hidden, weight, _ = cases.head(40, 8, 90, torch.float32)
    b = cases.batch(40, 90, torch.float32)
    outs = [linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=w) for w in ("reference", *cases.CHUNKED)]
    for out in outs[1:]:
        assert out.metrics.keys() == outs[0].metrics.keys()
        for key, value in out.metrics.items():
            torch.testing.assert_close(value, outs[0].metrics[key], rtol=1e-5, atol=1e-6, msg=key)
    logprob, entropy = cases.eager_statistics(hidden, weight, b.target)
    expert, rollout, metrics = b.role == 2, b.role == 1, outs[0].metrics
    p, ratio = logprob.exp(), (logprob - b.old_logprob).exp()
    by_hand = {
        "expert/count": expert.sum().float(),
        "expert/prob": p[expert].mean(),
        "expert/entropy": entropy[expert].mean(),
        "expert/trsft_weight": (p / 0.1).clamp(max=1)[expert].mean(),
        "expert/share_below_alpha": (p < 0.1)[expert].float().mean(),
        "rollout/logprob": logprob[rollout].mean(),
        "rollout/ratio": ratio[rollout].mean(),
        "rollout/ratio_max": ratio[rollout].max(),
        "rollout/trained_count": rollout.sum().float(),
        "rollout/kl_old_k1": (b.old_logprob - logprob)[rollout].mean(),
        "rollout/kl_old_k3": (ratio - 1 - (logprob - b.old_logprob))[rollout].mean(),
    }
    for key, value in by_hand.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_kl_metrics_of_the_reference_model():
    hidden, weight, _ = cases.head(40, 8, 90, torch.float32)
    b = cases.batch(40, 90, torch.float32)
    metrics = linear_policy_loss(hidden, weight, b, objectives.grpo(beta=0.1)).metrics
    logprob, _ = cases.eager_statistics(hidden, weight, b.target)
    d = (logprob - b.ref_logprob)[b.role == 1]
    torch.testing.assert_close(metrics["rollout/kl_ref_k1"], d.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["rollout/kl_ref_k3"], (torch.exp(-d) - 1 + d).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("temperature", [0.6, "per token"])
def test_token_logprob_equals_eager_fp64_in_value_and_gradient(backend, temperature):
    logits = (5 * torch.randn(4, 9, 33, dtype=torch.float64, device=cases.DEVICE)).requires_grad_()
    target = torch.randint(33, (4, 9), device=cases.DEVICE)
    if temperature == "per token":
        temperature = torch.rand(4, 9, dtype=torch.float64, device=cases.DEVICE) + 0.5
    out = token_logprob(logits, target, temperature=temperature, softcap=6.0, with_entropy=True, backend=backend)
    column = temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature
    log_p = (6.0 * torch.tanh(logits / 6.0) / column).log_softmax(-1)
    logprob, entropy = log_p.gather(-1, target[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    assert out.logprob.shape == target.shape
    assert cases.error(out.logprob, logprob) < 1e-12 and cases.error(out.entropy, entropy) < 1e-12
    upstream = torch.randn_like(logprob)
    ours = cases.gradients((out.logprob * upstream - 0.3 * out.entropy * upstream).sum(), logits)[0]
    theirs = cases.gradients((logprob * upstream - 0.3 * entropy * upstream).sum(), logits)[0]
    assert cases.error(ours, theirs) < 1e-12


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_token_logprob_of_transposed_logits(backend):
    logits = torch.randn(50, 7, device=cases.DEVICE).t().requires_grad_()  # [7, 50], as from (weight @ hidden.T).T
    target = torch.arange(7, device=cases.DEVICE) * 6
    results = []
    for x in (logits, logits.detach().contiguous().requires_grad_()):
        out = token_logprob(x, target, with_entropy=True, backend=backend)
        results.append([out.logprob, out.entropy, *cases.gradients((out.logprob + out.entropy).sum(), (x,))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", cases.CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_logprob_of_a_chunked_backend_matches_the_reference(dtype, backend):
    logits = (5 * torch.randn(11, 2100, device=cases.DEVICE)).to(dtype).requires_grad_()
    target = torch.randint(2100, (11,), device=cases.DEVICE)
    target[3] = -100
    grads = []
    for which in ("reference", backend):
        out = token_logprob(logits, target, temperature=0.8, with_entropy=True, backend=which)
        grads.append([out.logprob, out.entropy, *cases.gradients((out.logprob + 0.2 * out.entropy).sum(), logits)])
        grads[-1] += cases.gradients(out.entropy.sum(), (logits,))
    for reference, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, rtol=torch.finfo(dtype).eps, atol=1e-5)
