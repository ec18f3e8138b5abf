"""A KL term with a weight of its own: a correction or a mask on the policy loss leaves it alone, on every backend. Where there is
nothing for a KL, and what the gradient of each estimator is, capped and times a pooled ratio as well."""

import math
import pickle
import warnings
from dataclasses import replace

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import KL, Objective, Term, TokenBatch, linear_policy_loss, objectives, policy_loss
from trapo_kernels.gates import Ratio
from trapo_kernels.objective import KL_ESTIMATORS
from trapo_kernels.sequence import MeanRatio, TopEntropy

BETA = 0.2
PASSES = {"grpo": 1, "gmpo": 2}


def _batch(name, estimator, dtype=torch.float64):
    """A third of the rows without a policy loss, of which the KL term alone is left, and a fifth without a KL term: what nothing
    reads is NaN there."""
    b, row = cases.batch(23, 57, dtype), torch.arange(23, device=cases.DEVICE)
    muted, without_kl = row % 3 == 0, row % 5 == 1
    assert (without_kl & ~muted & (b.role == 1)).any() and (without_kl & muted).any()
    assert (muted & (b.role == 1)).any() and (~muted & (b.role == 1)).any()
    unread = muted & (PASSES[name] == 1)  # the ratio of a whole sequence reads its silent tokens, too
    weight, nan = torch.where(muted, 0.0, b.weight), torch.where(unread, torch.nan, 0.0).to(dtype)
    return replace(
        b,
        weight=weight,
        entropy_weight=weight,
        kl_weight=torch.where(without_kl, 0.0, b.entropy_weight),
        ref_logprob=torch.where(without_kl, torch.nan, b.ref_logprob),
        advantage=b.advantage + nan,
        old_logprob=b.old_logprob if estimator == "k3_corrected" else b.old_logprob + nan,
    )


def _objective(name, estimator):
    return replace(objectives.PRESETS[name](entropy_coef=0.03), kl=KL(BETA, estimator))


def _eager(name, estimator, inputs, b):
    """The published loss where it has a weight, and the KL estimate where that has one."""
    hidden, weight, bias = inputs
    logprob, entropy = cases.eager_statistics(hidden, weight, b.target, bias)
    known = {k: torch.nan_to_num(getattr(b, k), nan=-1.0) for k in ("advantage", "old_logprob", "ref_logprob")}
    loss = cases.eager_loss(name, logprob, entropy, replace(b, **known), entropy_coef=0.03)
    d, ratio = logprob - known["ref_logprob"], (logprob - known["old_logprob"]).exp()
    k3 = torch.expm1(-d) + d
    estimate = {"k1": d, "k2": d * d / 2, "k3": k3, "k3_corrected": ratio * k3}[estimator]
    return loss + BETA * (b.kl_weight * estimate)[b.role == 1].sum()


def _cases():
    return [("grpo", estimator) for estimator in KL_ESTIMATORS] + [("gmpo", "k3")]  # one pass, and two


@pytest.mark.parametrize(("name", "estimator"), _cases())
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_fp64_equality(backend, name, estimator):
    inputs, b = cases.head(23, 7, 57), _batch(name, estimator)
    expected = _eager(name, estimator, inputs, b)
    hidden, weight, bias = inputs
    out = linear_policy_loss(hidden, weight, b, _objective(name, estimator), bias=bias, backend=backend)
    assert out.passes == (2 if backend == "reference" else PASSES[name])
    assert cases.error(out.loss, expected) < 1e-12
    for ours, theirs in zip(cases.gradients(out.loss, inputs), cases.gradients(expected, inputs), strict=True):
        assert cases.error(ours, theirs) < 1e-12
    assert all(value.isfinite() for value in out.metrics.values())
    in_kl = (b.role == 1) & (b.kl_weight != 0)
    assert out.metrics["rollout/kl_count"] == in_kl.sum() > out.metrics["rollout/trained_count"]
    torch.testing.assert_close(out.metrics["rollout/kl_ref_k1"], (out.logprob - b.ref_logprob)[in_kl].mean().float())


@pytest.mark.parametrize(("name", "estimator"), _cases())
@pytest.mark.parametrize("backend", cases.COMPILED)
def test_a_compiled_backend_is_as_close_to_fp64_as_fp32_eager(backend, name, estimator):
    exact, eager = [], []
    for dtype, found in ((torch.float64, exact), (torch.float32, eager)):
        inputs, b = cases.head(23, 7, 57, dtype), _batch(name, estimator, dtype)
        loss = _eager(name, estimator, inputs, b)
        found += [loss, *cases.gradients(loss, inputs)]
    hidden, weight, bias = inputs
    out = linear_policy_loss(hidden, weight, b, _objective(name, estimator), bias=bias, backend=backend)
    cases.check_as_close_as_eager([out.loss, *cases.gradients(out.loss, inputs)], eager, exact)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_policy_loss_of_a_chunked_backend_equals_the_reference(backend, estimator):
    b = _batch("grpo", estimator, torch.float32)
    logprob = (-4 * torch.rand(23)).to(cases.DEVICE).requires_grad_()
    entropy = torch.rand(23).to(cases.DEVICE).requires_grad_()
    results = []
    for which in ("reference", backend):
        out = policy_loss(logprob, entropy, b, _objective("grpo", estimator), backend=which)
        results.append([out.loss, *cases.gradients(out.loss, (logprob, entropy)), *out.metrics.values()])
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_without_one_it_is_the_weight(backend):
    hidden, weight, _ = cases.head(23, 7, 57, torch.float32)
    b = cases.batch(23, 57, torch.float32)
    found = [
        cases.gradients(
            linear_policy_loss(hidden, weight, which, objectives.grpo(beta=BETA), backend=backend).loss, (hidden, weight)
        )
        for which in (b, replace(b, kl_weight=b.weight))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_of_the_kl_alone_are_active_and_stay_known():
    zero, role = torch.zeros(4), torch.tensor([0, 1, 1, 2], dtype=torch.uint8)
    kl_weight = torch.tensor([float("nan"), 1.0, 0.0, 1.0])  # unread but on rollout tokens
    b = TokenBatch(torch.zeros(4, dtype=torch.int64), role, None, zero, kl_weight=kl_weight)
    assert b.active_rows.tolist() == [1] and b.target_to_score(pools=False).tolist() == [-100, 0, -100, -100]
    for same in (b.to(cases.DEVICE), pickle.loads(pickle.dumps(b)), b.with_active_rows(torch.tensor([1]))):
        assert same.active_rows.tolist() == [1] and same.kl_weight[1] == 1
    kl_weight[2] = 0.5
    assert b.active_rows.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"weight, entropy weight or KL weight is not 0, \[1, 2\]"):
        b.with_active_rows(torch.tensor([1]))
    with pytest.raises(ValueError, match="KL weight 0.*got row 1"):
        replace(b, scored_rows=torch.tensor([1]))


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not asked what the streams hold")
@pytest.mark.parametrize(("estimator", "name"), [("k3", "ref_logprob"), ("k3_corrected", "old_logprob")])
def test_what_the_kl_reads_must_be_finite_where_it_has_a_weight(estimator, name):
    hidden, weight, _ = cases.head(23, 7, 57)
    b = _batch("grpo", estimator)
    row = int(((b.weight == 0) & (b.kl_weight != 0) & (b.role == 1)).nonzero()[0])
    broken = getattr(b, name).clone()
    broken[row] = torch.nan
    with pytest.raises(ValueError, match=f"batch.{name} must be finite, got nan at row {row}"):
        linear_policy_loss(hidden, weight, replace(b, **{name: broken}), _objective("grpo", estimator))


def _of_roles(*role):
    zero = torch.zeros(len(role), device=cases.DEVICE)
    role = torch.tensor(role, dtype=torch.uint8, device=cases.DEVICE)
    return TokenBatch(zero.long(), role, zero + 1, zero + 1, ref_logprob=zero - 1)


def _with_kl(objective, beta, where):
    layer = replace(objectives.sft(), kl=KL(beta))
    return replace(objective, kl=layer.kl) if where == "its own layer" else replace(objective, plus=layer)


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not asked which roles a batch has")
@pytest.mark.parametrize("where", ["its own layer", "another"])
def test_a_kl_without_a_token_to_hold_is_said(where):
    """As on the expert tokens of an SFT, whose loss is the same for every β."""
    (hidden, weight, _), b = cases.head(3, 7, 57, torch.float32), _of_roles(2, 0, 2)
    objective, other = (_with_kl(objectives.sft(), beta, where) for beta in (0.1, 50.0))
    rule = "a KL is of rollout tokens, and 'sft' trains on expert tokens alone, which is all that this batch has"
    with pytest.warns(UserWarning, match=f"^linear_policy_loss: {rule}: the loss is the same without the KL. Leave it out, or"):
        loss = linear_policy_loss(hidden, weight, b, objective).loss
        assert torch.equal(loss, linear_policy_loss(hidden, weight, b, other).loss)
    with pytest.warns(UserWarning, match=f"^policy_loss: {rule}"):
        policy_loss(torch.zeros(3) - 1, None, b, objective)


@pytest.mark.parametrize("where", ["its own layer", "another"])
@pytest.mark.parametrize(
    ("objective", "roles", "changes", "beta"),
    [
        (objectives.sft(), (2, 1, 2), {}, 0.1),
        (objectives.relift(), (2, 2, 2), {}, 0.1),  # a part of a batch of both
        (objectives.sft(), (0, 0, 0), {}, 0.1),  # a rank without tokens
        (objectives.sft(), (2, 2, 2), {"weight": torch.zeros(3, device=cases.DEVICE)}, 0.1),
        (objectives.sft(), (2, 2, 2), {}, 0.0),  # only watched
    ],
)
def test_nothing_is_said_of_a_kl_beside_expert_tokens_where_it_may_be_right(objective, roles, changes, beta, where):
    (hidden, weight, _), b = cases.head(3, 7, 57, torch.float32), replace(_of_roles(*roles), **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert linear_policy_loss(hidden, weight, b, _with_kl(objective, beta, where)).loss.isfinite()


@pytest.mark.filterwarnings("ignore:linear_policy_loss. a KL is of rollout tokens")
@pytest.mark.parametrize("where", ["its own layer", "another"])
def test_parts_of_a_batch_with_a_kl_add_up_where_one_has_expert_tokens_alone(where):
    (hidden, weight, _), b = cases.head(5, 7, 57), cases.batch(5, 57, role=torch.tensor([2, 2, 1, 2, 1], dtype=torch.uint8))
    objective = _with_kl(objectives.sft(), 0.1, where)
    losses = [
        linear_policy_loss(hidden[rows], weight, b.rows(rows), objective, backend="torch").loss
        for rows in (slice(None), slice(0, 2), slice(2, 5))
    ]
    whole, *parts = ([loss, *cases.gradients(loss, (hidden, weight))] for loss in losses)
    for wanted, *found in zip(whole, *parts, strict=True):
        assert cases.error(sum(found), wanted) < 1e-12


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_the_expected_gradient_of_an_estimate_is_the_one_that_its_docstring_names(estimator):
    logits, ref_logits, old_logits = torch.randn(3, 9, dtype=torch.float64, generator=torch.manual_seed(0))
    logits.requires_grad_()
    logprob, ref_logprob, old = logits.log_softmax(0), ref_logits.log_softmax(0), old_logits.log_softmax(0)
    d = logprob - ref_logprob
    forward, backward = (logprob.exp() * d).sum(), (ref_logprob.exp() * -d).sum()
    wanted = {"k1": 0 * forward, "k2": forward, "k3": backward, "k3_corrected": forward}[estimator]
    sampler = old if estimator == "k3_corrected" else logprob.detach()
    with torch.no_grad():
        slope = KL(BETA, estimator).slope(d, logprob - sampler)
    expected = (sampler.exp() * slope * logprob).sum()  # over all tokens, each as often as it is sampled
    found, right = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (expected, wanted))
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_a_capped_k3_is_verls_low_var_kl(backend):
    """Below, at and beyond the cap on both sides of 0, beyond verl's clamp of 20, and where k3 is infinite in fp32."""
    objective = objectives.grpo(beta=0.5, kl_clamp=20.0, kl_cap=10.0)
    low, high = objective.kl.bounds
    far = [-200.0, -25.0, -21.0, low - 1e-4, 12.0, high + 1e-4, 25.0]
    d = torch.tensor([*far, low + 1e-4, -1.5, -1e-3, 0.0, 0.7, 5.0, high - 1e-4], dtype=torch.float64, device=cases.DEVICE)
    one, logprob = torch.ones_like(d).float(), d.clamp(max=0.0) - torch.rand_like(d)
    b = TokenBatch(one.long(), one.to(torch.uint8), 0 * one, one, ref_logprob=(logprob - d).float())
    policy = logprob.float().requires_grad_()
    out = policy_loss(policy, None, b, objective, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, policy)

    exact = policy.detach().double().requires_grad_()
    kl = torch.clamp(b.ref_logprob.double() - exact, min=-20, max=20)
    expected = 0.5 * torch.clamp(kl.exp() - kl - 1, min=-10, max=10)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    assert (slope[: len(far)] == 0).all() and slope[len(far) :].count_nonzero() == 6
    assert (grad[: len(far)] == 0).all()
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.loss.double(), expected.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.metrics["rollout/kl_ref"].double(), 2 * expected.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cap", [1e-12, 0.5, 10.0, 1e30])
def test_a_kl_is_flat_from_its_cap_on(cap):
    kl = KL(0.1, cap=cap)
    bounds = torch.tensor(kl.bounds, dtype=torch.float64)
    assert bounds[0] < 0 < bounds[1] <= cap + 1
    torch.testing.assert_close(kl.value(bounds, bounds), torch.full_like(bounds, cap), rtol=1e-6, atol=0)
    assert (kl.slope(bounds * (1 - 1e-6), bounds) != 0).all() and (kl.slope(bounds * (1 + 1e-3), bounds) == 0).all()
    assert (kl.value(2 * bounds, bounds) == cap).all() and kl.value(torch.tensor([torch.nan]), bounds[:1]).isnan()
    assert KL(0.1, clamp=1e-7, cap=cap).bounds == (-1e-7, 1e-7)
    assert KL(0.1).bounds == (-math.inf, math.inf)


def test_a_cap_is_printed():
    assert str(KL(0.1, "k3", 20.0, 10.0)) == "0.1 · Σ w_K · min(k3(π ‖ π_ref), 10) on rollout tokens, |log π/π_ref| ≤ 20"


def _sequences(dtype, **changes):
    """30 rollout tokens of 4 interleaved sequences, a fifth of them without a KL, as is all of the last sequence; row 6 has a KL
    alone, row 10 neither."""
    row = torch.arange(30, device=cases.DEVICE)
    labels = row % 4
    old_logprob = torch.rand(30, dtype=torch.float64, generator=torch.manual_seed(0)).to(dtype) - 4.5
    b = cases.batch(30, 50, dtype, roles=(1,), sequence_id=labels, old_logprob=old_logprob)
    advantage = torch.tensor([1.5, -0.7, 0.4, -2.0], dtype=dtype, device=cases.DEVICE)[labels]
    weight, in_kl = 1 / (4 + labels.to(dtype)), (labels != 3) & (row % 5 != 0)
    b = replace(b, advantage=advantage, weight=torch.where((row == 6) | (row == 10), 0.0, weight), kl_weight=in_kl * weight)
    return replace(b, entropy_weight=b.weight, **changes)


def _eager_sequences(hidden, weight, b, clip):
    """TRL's importance_sampling_level="sequence" with use_bias_correction_kl, whose ratio has its own gradient; GSPO's is of each
    token."""
    logprob, _ = cases.eager_statistics(hidden, weight, b.target)
    old, loss = logprob.detach() if b.on_policy else b.old_logprob, 0
    for label in range(4):
        rows = b.sequence_id == label
        a, d = b.advantage[rows][0], (logprob - old)[rows]
        bounded = d.clamp(max=clip) if a >= 0 else d.clamp(min=-clip)
        ratio, d_ref = bounded.mean().exp(), (logprob - b.ref_logprob)[rows]
        of_token = ratio.detach() * (bounded - bounded.detach()).exp()
        k3 = (-d_ref).exp() - 1 + d_ref
        loss = loss + (-a * of_token * b.weight[rows] + BETA * b.kl_weight[rows] * ratio * k3).sum()
    return loss


def _pooled(clip):
    return Objective(rollout=Term(Ratio(), "old", "advantage", reduction=MeanRatio(clip)), kl=KL(BETA, "k3_corrected"))


@pytest.mark.parametrize("scored_rows", [None, [10]])
@pytest.mark.parametrize("clip", [math.inf, 0.4])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_corrected_kl_beside_a_pooled_ratio_is_times_that_ratio_and_its_gradient_too(backend, on_policy, clip, scored_rows):
    hidden, weight, _ = cases.head(30, 6, 50)
    scored = None if scored_rows is None else torch.tensor(scored_rows, device=cases.DEVICE)
    b = _sequences(torch.float64, scored_rows=scored, **({"old_logprob": None} if on_policy else {}))
    assert b.active.sum() == 29
    expected = _eager_sequences(hidden, weight, b, clip)
    out = linear_policy_loss(hidden, weight, b, _pooled(clip), backend=backend)
    assert out.passes == 2 and cases.error(out.loss, expected) < 1e-12
    for ours, theirs in zip(cases.gradients(out.loss, (hidden, weight)), cases.gradients(expected, (hidden, weight)), strict=True):
        assert theirs[10].any() and cases.error(ours, theirs) < 1e-12


@pytest.mark.parametrize("backend", cases.COMPILED)
def test_a_corrected_kl_beside_a_pooled_ratio_on_a_compiled_backend(backend):
    exact, eager = [], []
    for dtype, found in ((torch.float64, exact), (torch.float32, eager)):
        inputs, b = cases.head(30, 6, 50, dtype)[:2], _sequences(dtype)
        loss = _eager_sequences(*inputs, b, 0.4)
        found += [loss, *cases.gradients(loss, inputs)]
    loss = linear_policy_loss(*inputs, b, _pooled(0.4), backend=backend).loss
    cases.check_as_close_as_eager([loss, *cases.gradients(loss, inputs)], eager, exact)


def test_a_corrected_kl_that_overflows_is_infinite():
    one = torch.ones(2, device=cases.DEVICE)
    logprob = (-201 * one).requires_grad_()
    streams = {"old_logprob": -201 * one, "ref_logprob": -one, "sequence_id": torch.zeros_like(one).long()}
    b = TokenBatch(one.long(), one.to(torch.uint8), one, one, **streams)
    loss = policy_loss(logprob, None, b, _pooled(math.inf)).loss
    assert loss == math.inf
    assert not cases.gradients(loss, (logprob,))[0].isfinite().any()


def test_a_corrected_kl_beside_a_pooled_ratio_reads_the_sequences_on_policy_too_and_says_why():
    objective = replace(objectives.gspo(), kl=KL(BETA, "k3_corrected"))
    assert "is times the ratio of its" in objective.why_two_passes(on_policy=True)
    assert "sequence_id" in objective.reads(on_policy=True)
    for beta, estimator in ((BETA, "k3"), (0.0, "k3_corrected")):
        plain = replace(objectives.gspo(), kl=KL(beta, estimator))
        assert "sequence_id" not in plain.reads(on_policy=True) and plain.why_two_passes(on_policy=True) is None
    with pytest.raises(ValueError, match='needs a rollout term with anchor "old" and no reduction but MeanRatio, got .*entropy'):
        replace(objective, rollout=replace(objective.rollout, reduction=TopEntropy()))


@pytest.mark.parametrize("d", [-0.5, -1.5, -16.0, -20.0, -60.0, -89.0])
@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
def test_the_slope_of_a_corrected_kl_far_below_the_reference_is_exact_in_two_passes_too(backend, d):
    one = torch.ones(1, device=cases.DEVICE)
    logprob, half = torch.full_like(one, d - 1.0), objectives.grpo(beta=0.04, kl="k3_corrected")
    streams = {"old_logprob": logprob.clone(), "ref_logprob": -one}
    b = TokenBatch(one.long(), one.to(torch.uint8), 0 * one, one, **streams)
    for objective in (half, replace(half, plus=Objective(entropy_coef=0.0, expert=half.rollout))):  # the second takes two passes
        policy = logprob.clone().requires_grad_()
        out = policy_loss(policy, None, b, objective, backend=backend)
        torch.testing.assert_close(cases.gradients(out.loss, (policy,))[0], 0.04 * d * one, rtol=1e-5, atol=0)
        expected = 0.04 * (torch.tensor(-d).expm1() + d)  # infinite in fp32 at -89
        torch.testing.assert_close(out.loss.cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("logprob", [-95.0, -130.0])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
def test_a_corrected_kl_is_finite_where_the_policy_has_left_its_reference_and_its_sampler(backend, preset, logprob):
    """r·k3 tends to π_ref/π_old: 0 · inf where k3, or r, leaves fp32."""
    one = torch.ones(1, device=cases.DEVICE)
    streams = {"old_logprob": -3 * one, "ref_logprob": -2.5 * one, "sequence_id": one.long()}
    b = TokenBatch(one.long(), one.to(torch.uint8), 0 * one, one, **streams)
    policy = torch.full_like(one, logprob).requires_grad_()
    objective = replace(objectives.PRESETS[preset](), kl=KL(1.0, "k3_corrected"))
    out = policy_loss(policy, None, b, objective, backend=backend)
    expected = torch.tensor(math.exp(0.5))
    torch.testing.assert_close(out.loss.cpu(), expected)
    torch.testing.assert_close(out.metrics["rollout/kl_ref"].cpu(), expected)
    assert abs(cases.gradients(out.loss, (policy,))[0]) < 1e-37


def test_a_cap_holds_where_the_policy_finds_a_token_impossible():
    one = torch.ones(2, device=cases.DEVICE)
    policy = torch.tensor([-math.inf, -1.0], device=cases.DEVICE).requires_grad_()
    b = TokenBatch(one.long(), one.to(torch.uint8), 0 * one, one, ref_logprob=-one)
    loss = policy_loss(policy, None, b, objectives.grpo(beta=1.0, kl_cap=10.0)).loss
    assert loss == 10.0 and cases.gradients(loss, (policy,))[0].tolist() == [0.0, 0.0]
