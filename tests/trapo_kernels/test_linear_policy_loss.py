"""Contracts of the single pass: normalisation, nothing is nothing, only what is asked, repeatable bits."""

from dataclasses import replace

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import Objective, TokenBatch, linear_logprob, linear_policy_loss, objectives
from trapo_kernels.backends import gemm
from trapo_kernels.gates import Gate
from trapo_kernels.objective import Term

SINGLE_PASS = cases.CHUNKED


@pytest.mark.parametrize("name", objectives.PRESETS)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_any_split_into_micro_batches_in_any_order_gives_the_same_gradient(name, num_parts):
    """What pools over sequences gets whole ones; everything else may be cut anywhere."""
    hidden, weight, _ = cases.head(62, 6, 40)
    b = cases.batch(62, 40)
    objective = objectives.PRESETS[name](entropy_coef=0.1)
    whole = cases.gradients(linear_policy_loss(hidden, weight, b, objective).loss, (hidden, weight))
    pools = any(term.reduction for term in objective.terms)
    order = torch.randperm(62, device=cases.DEVICE)
    parts = cases.whole_sequences(b, num_parts) if pools else order.tensor_split(num_parts)
    loss = sum(linear_policy_loss(hidden[rows], weight, cases.subset(b, rows), objective).loss for rows in parts)
    for part, reference in zip(cases.gradients(loss, (hidden, weight)), whole, strict=True):
        assert cases.error(part, reference) < 1e-14 * max(1.0, reference.abs().max().item())


@pytest.mark.parametrize("backend", ["reference", *SINGLE_PASS])
def test_ignored_rows_filled_with_nan_change_no_bit(backend):
    objective = objectives.trapo(entropy_coef=0.1)
    clean = cases.batch(40, 30, torch.float32)
    ignored = clean.role == 0
    assert ignored.any()
    nan = torch.where(ignored, float("nan"), 0.0)
    streams = {name: getattr(clean, name) + nan for name in ("advantage", "weight", "old_logprob", "entropy_weight")}
    poisoned = TokenBatch(torch.where(ignored, 999_999, clean.target), clean.role, **streams)
    hidden, weight, _ = cases.head(40, 6, 30, torch.float32)
    results = []
    for b, fill in ((clean, 0.0), (poisoned, float("nan"))):
        h = torch.where(ignored[:, None], fill, hidden.detach()).requires_grad_()
        out = linear_policy_loss(h, weight, b, objective, backend=backend)
        results.append([out.loss, out.logprob, out.entropy, *cases.gradients(out.loss, (h, weight)), *out.metrics.values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", *SINGLE_PASS])
def test_a_batch_of_ignored_rows_runs_backward_to_zeros(backend):
    hidden, weight, bias = cases.head(5, 6, 30, torch.float32)
    b = cases.batch(5, 30, torch.float32, roles=(0,))
    out = linear_policy_loss(hidden, weight, b, objectives.trapo(), bias=bias, backend=backend)
    assert out.loss == 0 and out.metrics["expert/count"] == 0
    for grad in cases.gradients(out.loss, (hidden, weight, bias)):
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", *SINGLE_PASS])
@pytest.mark.parametrize("of_token", [1.0, 1000.0])
def test_the_smallest_alpha_has_a_finite_loss_and_the_gradient_of_sft(of_token, backend):
    hidden, weight, _ = cases.head(20, 6, 30, torch.float32)
    weights = torch.full((20,), of_token, device=cases.DEVICE)
    b = cases.batch(20, 30, torch.float32, roles=(2,), weight=weights, entropy_weight=None)
    found = []
    for objective in (objectives.trsft(alpha=1e-30), objectives.sft()):
        out = linear_policy_loss(hidden, weight, b, objective, backend=backend)
        assert out.loss.isfinite()
        found.append(cases.gradients(out.loss, (hidden, weight)))
    torch.testing.assert_close(*found)


def test_rows_that_cannot_contribute_never_reach_a_gemm(monkeypatch):
    seen = []
    original = gemm.HeadGemm.logits
    monkeypatch.setattr(gemm.HeadGemm, "logits", lambda self, x, out: seen.append(x.hidden.shape[0]) or original(self, x, out))
    hidden, weight, _ = cases.head(50, 6, 30, torch.float32)
    weights = torch.ones(50)
    weights[::2] = 0.0
    b = cases.batch(50, 30, torch.float32, roles=(1, 2), weight=weights, entropy_weight=None)
    b = TokenBatch(b.target, b.role, b.advantage, b.weight).with_active_rows(b.active.nonzero().squeeze(1))
    out = linear_policy_loss(hidden, weight, b, objectives.trapo(), backend="torch")
    assert sum(seen) == 25
    assert (out.logprob[::2] == 0).all() and (out.logprob[1::2] != 0).all()


@pytest.mark.parametrize(("frozen", "gemms"), [("weight", ["hidden"]), ("hidden", ["weight"]), ("both", [])])
def test_gradients_that_nobody_asked_for_cost_no_gemm(monkeypatch, frozen, gemms):
    ran = []
    for method, label in (("grad_hidden", "hidden"), ("add_grad_factor", "weight")):
        original = getattr(gemm.HeadGemm, method)
        monkeypatch.setattr(gemm.HeadGemm, method, lambda *a, o=original, label=label: ran.append(label) or o(*a))
    hidden, weight, _ = cases.head(8, 6, 30, torch.float32)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    linear_policy_loss(hidden, weight, cases.batch(8, 30, torch.float32), objectives.trapo(), backend="torch")
    assert ran == gemms


def test_no_grad_computes_no_gradient(monkeypatch):
    monkeypatch.setattr(gemm.HeadGemm, "grad_hidden", lambda *a: pytest.fail("a gradient GEMM ran under no_grad"))
    hidden, weight, _ = cases.head(8, 6, 30, torch.float32)
    with torch.no_grad():
        linear_policy_loss(hidden, weight, cases.batch(8, 30, torch.float32), objectives.trapo(), backend="torch")


@pytest.mark.parametrize("backend", SINGLE_PASS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeatable_bits_and_upstream_scaling(backend, dtype):
    hidden, weight, _ = cases.head(20, 6, 30, dtype)
    b = cases.batch(20, 30, torch.float32)

    def run(upstream):
        out = linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend)
        return out.loss.detach(), *cases.gradients(out.loss * upstream, (hidden, weight))

    first, second, scaled = run(1.0), run(1.0), run(0.3)
    for a, c in zip(first, second, strict=True):
        assert torch.equal(a, c)
    for a, c in zip(first[1:], scaled[1:], strict=True):
        torch.testing.assert_close(c, a * 0.3, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)
        assert c.dtype == dtype


def test_without_old_logprob_the_ratio_is_one_and_carries_the_gradient():
    hidden, weight, _ = cases.head(20, 6, 30)
    b = cases.batch(20, 30, roles=(1,), old_logprob=None, entropy_weight=None)
    logprob, _ = cases.eager_statistics(hidden, weight, b.target)
    expected = (-b.weight * b.advantage * (logprob - logprob.detach()).exp()).sum()
    for backend in ("reference", "torch"):
        out = linear_policy_loss(hidden, weight, b, objectives.trapo(entropy_coef=0.0), backend=backend)
        assert cases.error(out.loss, expected) < 1e-13 and out.metrics["rollout/ratio"] == 1
        for grad, reference in zip(
            cases.gradients(out.loss, (hidden, weight)), cases.gradients(expected, (hidden, weight)), strict=True
        ):
            assert cases.error(grad, reference) < 1e-13


class _Squared(Gate):
    """V = d²/2, G = d: a gate of a user's own."""

    def value(self, d, advantage):
        return d * d / 2

    def slope(self, d, advantage):
        return d


def test_a_gate_of_your_own_runs_in_two_passes_and_says_so():
    hidden, weight, _ = cases.head(20, 6, 30)
    b = cases.batch(20, 30)
    out = linear_policy_loss(hidden, weight, b, Objective(expert=Term(_Squared())), backend="torch")
    assert out.passes == 2
    assert linear_policy_loss(hidden, weight, b, objectives.trapo(), backend="torch").passes == 1
    logprob, _ = cases.eager_statistics(hidden, weight, b.target)
    expected = (-b.weight * logprob**2 / 2)[b.role == 2].sum()
    assert cases.error(out.loss, expected) < 1e-12
    for grad, reference in zip(
        cases.gradients(out.loss, (hidden, weight)), cases.gradients(expected, (hidden, weight)), strict=True
    ):
        assert cases.error(grad, reference) < 1e-12


@pytest.mark.parametrize("backend", cases.QUICK)
def test_low_precision_weight_gradient_is_accumulated_in_fp32(backend, monkeypatch):
    """Many small chunks in bf16: the error must not grow with their number, as it does in a bf16 accumulator."""
    hidden, weight, _ = cases.head(2048, 8, 16, torch.bfloat16)
    b = cases.batch(2048, 16, torch.float32)
    errors = []
    truth_hidden, truth_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    truth = linear_policy_loss(truth_hidden, truth_weight, b, objectives.sft(), backend="reference").loss
    (truth_grad,) = cases.gradients(truth, (truth_weight,))
    for rows in (2048, 16):
        monkeypatch.setattr("trapo_kernels.backends.sweep.chunk_rows", lambda *_, rows=rows, **__: rows)
        out = linear_policy_loss(hidden, weight, b, objectives.sft(), backend=backend)
        errors.append(float((cases.gradients(out.loss, (weight,))[0] - truth_grad).norm() / truth_grad.norm()))
    one, many = errors
    assert one <= torch.finfo(torch.bfloat16).eps / 2 and many <= 1.05 * one


@cases.SLOW_ON_A_CPU
@pytest.mark.parametrize("backend", SINGLE_PASS)
@pytest.mark.parametrize("stream", ["advantage", "ref_logprob", "old_logprob"])
def test_strided_and_expanded_streams_give_the_gradient_of_contiguous_ones(backend, stream):
    hidden, weight, _ = cases.head(16, 6, 30, torch.float32)
    objective = objectives.grpo(beta=0.1)
    wide = -torch.rand(16, 3, device=cases.DEVICE)
    for view in (wide[:, 1], torch.tensor(-1.5, device=cases.DEVICE).expand(16)):
        strided = cases.batch(16, 30, torch.float32, roles=(1,), **{stream: view})
        plain = cases.batch(16, 30, torch.float32, roles=(1,), **{stream: view.contiguous()})
        grads = [
            cases.gradients(linear_policy_loss(hidden, weight, b, objective, backend=backend).loss, (hidden, weight))
            for b in (strided, plain)
        ]
        for ours, expected in zip(*grads, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", ["reference", *SINGLE_PASS])
def test_a_token_of_weight_zero_with_an_entropy_bonus_is_safe_whatever_its_ratio(backend):
    hidden, weight, _ = cases.head(8, 6, 30, torch.float32)
    zero, extreme = torch.ones(8), -torch.ones(8)
    zero[2], extreme[2] = 0.0, -200.0
    b = cases.batch(8, 30, torch.float32, roles=(1,), weight=zero, old_logprob=extreme)
    out = linear_policy_loss(hidden, weight, b, objectives.trapo(entropy_coef=0.1), backend=backend)
    assert torch.isfinite(out.loss) and torch.isfinite(out.metrics["rollout/ratio_max"])
    for grad in cases.gradients(out.loss, (hidden, weight)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ["reference", *SINGLE_PASS])
def test_a_nan_in_old_logprob_shows_in_the_loss_or_is_refused_where_that_costs_no_sync(backend):
    hidden, weight, _ = cases.head(8, 6, 30, torch.float32)
    old = torch.full((8,), -1.0)
    old[3] = float("nan")
    b = cases.batch(8, 30, torch.float32, roles=(1,), old_logprob=old)
    if cases.DEVICE == "cpu":
        with pytest.raises(ValueError, match="batch.old_logprob must be finite, got nan at row 3"):
            linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend)
    else:
        assert linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend).loss.isnan()


def test_fp16_gradients_survive_a_small_loss_under_a_gradient_scaler():
    hidden, weight, _ = cases.head(16, 6, 30, torch.float16)
    b = cases.batch(16, 30, torch.float32, roles=(2,), weight=torch.full((16,), 1e-7))
    out = linear_policy_loss(hidden, weight, b, objectives.sft(), backend="torch")
    assert out.passes == 2
    (grad,) = cases.gradients(out.loss * 65536, (hidden,))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (truth,) = cases.gradients(linear_policy_loss(*exact, b, objectives.sft()).loss * 65536, (exact[0],))
    assert cases.error(grad, truth) <= 2e-3 * truth.abs().max().item()


@pytest.mark.parametrize(
    "again",
    [
        lambda b: b,
        pytest.param(replace, marks=cases.SLOW_ON_A_CPU),
        pytest.param(lambda b: b.to(cases.DEVICE), marks=cases.SLOW_ON_A_CPU),
        pytest.param(lambda b: b.with_active_rows(torch.tensor([0], device=cases.DEVICE)), marks=cases.SLOW_ON_A_CPU),
    ],
    ids=["new", "replace", "to", "with_active_rows"],
)
def test_a_batch_built_while_compiling_still_ignores_nan_rows(again):
    hidden, weight, _ = cases.head(8, 6, 30, torch.float32)
    clean = cases.batch(8, 30, torch.float32)
    assert (clean.role == 0).any()
    poisoned = torch.where((clean.role == 0)[:, None], float("nan"), hidden.detach()).requires_grad_()

    def loss(h, w):
        b = again(TokenBatch(clean.target, clean.role, clean.advantage, clean.weight))
        return linear_policy_loss(h, w, b, objectives.trapo()).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for grad in cases.gradients(compiled(poisoned, weight), (poisoned, weight)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("backend", SINGLE_PASS)
def test_backward_twice_over_a_retained_graph(backend, upstream):
    """The saved gradients may be handed out only when nobody can ask for them again."""
    hidden, weight, _ = cases.head(9, 6, 40, torch.float32)
    b = cases.batch(9, 40, torch.float32)
    once = cases.gradients(
        linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend).loss * upstream, (hidden, weight)
    )
    loss = linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend).loss * upstream
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for parameter, single in zip((hidden, weight), once, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * single)


@pytest.mark.parametrize("backend", SINGLE_PASS)
def test_the_first_chunk_reads_nothing_of_an_uninitialised_gradient(backend, monkeypatch):
    """Memory that comes back from the allocator is full of NaN here; three chunks and an all-ignored batch."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, float("nan"), **options))
    monkeypatch.setattr(gemm, "chunk_rows", lambda *_, **__: 4)
    monkeypatch.setattr("trapo_kernels.backends.sweep.chunk_rows", lambda *_, **__: 4)
    hidden, weight, _ = cases.head(9, 6, 40, torch.float32)
    for role in (2, 0):
        b = cases.batch(9, 40, torch.float32, role=torch.full((9,), role, dtype=torch.uint8))
        grads = []
        for which in ("reference", backend):
            loss = linear_policy_loss(hidden, weight, b, objectives.sft(), backend=which).loss
            grads.append(cases.gradients(loss, (hidden, weight)))
        for reference, ours in zip(*grads, strict=True):
            torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("backend", ["reference", *SINGLE_PASS])
def test_no_tokens_and_a_kl(backend):
    """An empty micro-batch: its streams are there, with nothing in them."""
    hidden, weight, _ = cases.head(4, 8, 20, torch.float32)
    full = cases.batch(4, 20, torch.float32, ref_logprob=torch.zeros(4))
    empty = cases.subset(full, torch.arange(0, device=cases.DEVICE))
    out = linear_policy_loss(hidden[:0], weight, empty, objectives.grpo(beta=0.1), backend=backend)
    out.loss.backward()
    assert out.loss == 0 and not weight.grad.any()


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not looked into: there it is NaN (test_traps.py)")
def test_a_role_without_a_target_is_refused():
    hidden, weight, _ = cases.head(4, 8, 20, torch.float32)
    wrong = cases.batch(
        4, 20, torch.float32, role=torch.tensor([1, 2, 0, 2], dtype=torch.uint8), target=torch.tensor([1, -100, -100, 3])
    )
    with pytest.raises(ValueError, match="must have a target in the vocabulary, got -100 at row 1. Set role to Role.IGNORED"):
        linear_policy_loss(hidden, weight, wrong, objectives.trapo())


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_temperature_per_token_in_value_and_gradient(backend):
    """With rows that are left out, so that a row's temperature is not that of its place in a chunk, and a bias with a stride."""
    inputs, b = cases.head(20, 6, 40, torch.float32), cases.batch(20, 40, torch.float32)
    hidden, weight, bias = inputs
    bias = torch.stack([bias, bias.detach() + 1.0], 1)[:, 0]
    settings = {"bias": bias, "softcap": 5.0, "temperature": torch.linspace(0.5, 2.0, 20, device=cases.DEVICE)}
    target, found = torch.where(b.active, b.target, -100), []
    for which in ("reference", backend):
        policy = linear_policy_loss(hidden, weight, b, objectives.trapo(entropy_coef=0.1), **settings, backend=which).loss
        scored = linear_logprob(hidden, weight, target, with_entropy=True, **settings, backend=which)
        losses = (policy, scored.logprob.sum(), (scored.logprob - scored.entropy).sum())
        found.append([*losses, *(grad for loss in losses for grad in cases.gradients(loss, inputs))])
    for reference, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-5, atol=1e-6 * max(1.0, reference.abs().max().item()))
