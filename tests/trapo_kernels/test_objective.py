"""Gates are (V, G) pairs with V' = G, compiled to the same slopes; objectives encode, decode and print."""

import copy
import math
import textwrap
from dataclasses import replace

import pytest
import torch

from tests.trapo_kernels import cases
from tests.trapo_kernels.gate_cases import GATE_CASES, KL_CASES, check_coefficients
from trapo_kernels import KL, Objective, Term, TokenBatch, gates, linear_policy_loss, objectives, policy_loss, terms
from trapo_kernels.backends import native, triton_ops
from trapo_kernels.gates import GATES, Band, Clip, One, Phi, Ratio, Sapo, Shape, Truncate
from trapo_kernels.objective import KL_ESTIMATORS
from trapo_kernels.sequence import TopEntropy

COMPILED = {"triton": triton_ops, "native": native}


def _grid(gate):
    """Log-ratios on both sides of every kink, none within 1e-3 of one."""
    d = torch.linspace(-6.0, 2.5, 4001, dtype=torch.float64)
    kinks = [math.log(s) for s in gate.scalars if 0 < s < math.inf] if isinstance(gate, Clip | Truncate | Band) else []
    for kink in kinks:
        d = d[(d - kink).abs() > 1e-3]
    return d


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("gate", GATE_CASES, ids=str)
def test_slope_is_the_derivative_of_value_by_finite_differences_and_by_autograd(gate, sign):
    d = _grid(gate).requires_grad_()
    advantage = torch.full_like(d, sign)
    step = 1e-6
    difference = (gate.value(d.detach() + step, advantage) - gate.value(d.detach() - step, advantage)) / (2 * step)
    slope = gate.slope(d.detach(), advantage)
    torch.testing.assert_close(difference, slope, rtol=1e-6, atol=1e-8)
    (autograd,) = torch.autograd.grad(gate.value(d, advantage).sum(), d)
    torch.testing.assert_close(autograd, slope, rtol=1e-12, atol=1e-12)


def test_every_gate_is_tested_above():
    assert {type(gate) for gate in GATE_CASES} == set(GATES.values())


@pytest.mark.parametrize("gate", [Clip(0.2, 0.28, dual=3.0), Truncate(low=0.8, high=1.28), Band(0.5, 2.0)], ids=str)
def test_clip_branches_are_exercised(gate):
    d = _grid(gate)
    low_up, high_up = gate.clipped(d, torch.ones_like(d))
    low_down, high_down = gate.clipped(d, -torch.ones_like(d))
    assert high_up.any() and not high_up.all()
    assert low_down.any() and not low_down.all()
    if isinstance(gate, Clip):
        assert not low_up.any() and high_down.any() and (gate.slope(d, -torch.ones_like(d))[low_down | high_down] == 0).all()
    else:
        assert low_up.any()


def test_values_are_continuous_where_the_potential_changes_branch():
    for gate in (Truncate(high=0.1, scale=10.0), Truncate(low=0.8, high=1.28), Clip(), Band(0.5, 2.0)):
        for kink in (math.log(s) for s in gate.scalars[:2] if 0 < s < math.inf):
            sides = torch.tensor([kink - 1e-9, kink + 1e-9], dtype=torch.float64)
            for sign in (1.0, -1.0):
                below, above = gate.value(sides, torch.full_like(sides, sign))
                assert abs(below - above) < 1e-7


def _differentiates_a_clamp(x):
    """Whether autograd goes through one on the way back from x: from torch 2.14 on its gradient is 0 on a bound."""
    nodes = [x.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None]
    return any("Clamp" in node.name() for node in nodes)


@pytest.mark.parametrize("gate", [Clip(0.0), Truncate(high=1.0), Truncate(low=1.0), Band(0.5, 1.0), Band(1.0, 2.0)], ids=str)
def test_a_ratio_on_a_bound_is_within(gate):
    """As every ratio on-policy is here."""
    d, advantage = torch.zeros(2, requires_grad=True), torch.tensor([1.0, -1.0])
    value = gate.value(d, advantage)
    assert _differentiates_a_clamp(d.clamp(max=1.0)) and not _differentiates_a_clamp(value)
    (grad,) = torch.autograd.grad(value.sum(), d)
    assert grad.tolist() == gate.slope(d.detach(), advantage).tolist() == [1.0, 1.0]


def test_extreme_log_ratios_give_no_nan():
    d = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    for gate in GATE_CASES:
        for sign in (1.0, -1.0):
            slope = gate.slope(d, torch.full_like(d, sign))
            if not isinstance(gate, Phi):  # r(1-r) at r = inf is -inf; its anchor is zero, where r ≤ 1
                assert not slope.isnan().any(), gate


@pytest.mark.parametrize("clamp", [math.inf, 1.0])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_slope_is_the_derivative_of_its_value(estimator, clamp):
    logprob = torch.linspace(-4, 0, 102, dtype=torch.float64, requires_grad=True)
    kl = KL(0.1, estimator, clamp)
    value = kl.value(logprob + 1.3, logprob + 2.1)
    (grad,) = torch.autograd.grad(value.sum(), logprob)
    slope = kl.slope(logprob.detach() + 1.3, logprob.detach() + 2.1)
    torch.testing.assert_close(grad, slope)
    step, x = 1e-6, logprob.detach()
    up, down = (kl.value(x + 1.3 + s, x + 2.1 + s) for s in (step, -step))
    torch.testing.assert_close((up - down) / (2 * step), slope, rtol=1e-6, atol=1e-8)
    if clamp < math.inf and estimator != "k3_corrected":
        outside = (x + 1.3).abs() > clamp
        assert outside.any() and (slope[outside] == 0).all()


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_a_kl_on_a_bound_is_within(estimator):
    d, kl = torch.tensor([-1.0, 1.0], requires_grad=True), KL(0.1, estimator, clamp=1.0)
    value = kl.value(d, d)
    assert not _differentiates_a_clamp(value)
    (grad,) = torch.autograd.grad(value.sum(), d)
    slope = kl.slope(d.detach(), d.detach())
    assert slope.all()
    torch.testing.assert_close(grad, slope)


def test_a_clamped_kl_stays_finite_where_the_plain_one_overflows():
    far = torch.tensor([-200.0])
    assert KL(0.1).value(far, far).isinf()
    assert KL(0.1, clamp=10.0).value(far, far).item() == pytest.approx(math.exp(10.0) - 1 - 10.0)


@pytest.mark.parametrize("kl", KL_CASES, ids=str)
@pytest.mark.parametrize("gate", GATE_CASES, ids=str)
@pytest.mark.parametrize("backend", cases.COMPILED)
def test_compiled_coefficients_equal_the_slopes_of_every_gate_and_kl(gate, kl, backend):
    check_coefficients(COMPILED[backend].coefficients, gate, kl)


@pytest.mark.parametrize("backend", cases.CHUNKED)
@pytest.mark.parametrize("gate", GATE_CASES, ids=str)
def test_every_gate_runs_in_the_single_pass(gate, backend):
    hidden, weight, _ = cases.head(20, 6, 40, torch.float32)
    b = cases.batch(20, 40, torch.float32)
    objective = Objective(Term(gate, scale=0.5), Term(gate, anchor="old", signal="advantage"), KL(0.1, "k2"), 0.01)
    results = []
    for which in ("reference", backend):
        out = linear_policy_loss(hidden, weight, b, objective, backend=which)
        results.append([out.loss, *cases.gradients(out.loss, (hidden, weight)), *out.metrics.values()])
    assert out.passes == 1
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-5, atol=2e-6 * max(1.0, reference.abs().max().item()))


def test_a_clip_follows_the_sign_of_the_signal_and_not_of_an_advantage_it_does_not_use():
    """An expert token of a bad sample has a negative advantage; imitation (PSFT) clips above all the same."""
    b = cases.batch(40, 50, roles=(2,))
    logprob = (b.old_logprob + 0.5).requires_grad_()  # r = 1.65, beyond 1 + ε
    for backend in ("reference", "torch"):
        (grad,) = torch.autograd.grad(policy_loss(logprob, None, b, objectives.psft(), backend=backend).loss, logprob)
        assert (b.advantage < 0).any() and (grad == 0).all()


def test_the_custom_gate_of_the_docs_is_a_gate():
    """The example in `Gate`'s docstring, run as it stands."""
    example = textwrap.dedent(gates.Gate.__doc__.split("of expert tokens:\n")[1])
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    scope = {"Gate": gates.Gate, "Objective": Objective, "Term": Term}
    exec(example, scope)
    gate, objective = scope["Tempered"](), scope["objective"]
    d = torch.linspace(-2, 2, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gate.value(d, d).sum(), d)
    torch.testing.assert_close(slope, gate.slope(d.detach(), d))
    assert scope["Tempered"]() == gate and hash(scope["Tempered"]()) == hash(gate) and gate != gates.One()
    assert copy.deepcopy(objective) == objective
    assert objective.why_two_passes(on_policy=True) and "2 passes: the gate Tempered has no compiled form" in str(objective)


def test_trsft_limits_are_sft_and_dft():
    logp = torch.linspace(-8, -1e-3, 200, dtype=torch.float64)
    one = torch.ones_like(logp)
    assert torch.equal(objectives.trsft(alpha=1.0).expert.gate.slope(logp, one), objectives.dft().expert.gate.slope(logp, one))
    tiny = objectives.trsft(alpha=1e-9).expert.gate.slope(logp, one)
    torch.testing.assert_close(tiny, objectives.sft().expert.gate.slope(logp, one))


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_presets_survive_the_op_boundary_and_print_their_formula(name):
    objective = objectives.PRESETS[name](entropy_coef=0.25)
    decoded = terms.decode(*terms.encode(objective))
    for role in ("expert", "rollout"):
        ours, back = getattr(objective, role), getattr(decoded, role)
        assert (back is None) == (ours is None) and (ours is None or back.gate == ours.gate)
    assert name in str(objective) and "0.25" in str(objective)


@pytest.mark.parametrize("log_ratio", [-20.0, -12.0, -1.0, 0.0, 1.0])
def test_autograd_through_a_potential_has_the_digits_of_its_slope(log_ratio):
    d = torch.tensor([log_ratio], requires_grad=True)
    for gate in (Sapo(), Sapo(0.5, 2.0), Phi(), Clip(), Ratio(), Shape()):
        (through_value,) = torch.autograd.grad(gate.value(d, torch.ones(1)).sum(), d)
        exact = gate.slope(d.detach().double(), torch.ones(1, dtype=torch.float64)).float()
        torch.testing.assert_close(through_value, exact, rtol=2e-5, atol=1e-38)


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
@pytest.mark.parametrize(
    ("objective", "role", "advantage"),
    [
        (objectives.sft(), 2, 1.0),
        (objectives.grpo(), 1, 1.0),
        (objectives.grpo(beta=0.1, kl="k1"), 1, 0.0),
        (objectives.sft(entropy_coef=0.1), 2, 1.0),
    ],
    ids=["sft", "on policy", "k1", "entropy"],
)
def test_an_impossible_target_has_a_finite_gradient(backend, objective, role, advantage):
    """A target whose column is masked by a bias of -inf: the loss is infinite, dWeight is not, and all backends agree."""
    hidden, weight, _ = cases.head(2, 8, 10, torch.float32)
    bias = torch.zeros(10, device=cases.DEVICE)
    bias[3] = float("-inf")
    role = torch.tensor([role, role], dtype=torch.uint8, device=cases.DEVICE)
    one = torch.ones(2, device=cases.DEVICE)
    batch = TokenBatch(torch.tensor([3, 1], device=cases.DEVICE), role, one * advantage, one, ref_logprob=-one)
    grads = []
    for which in ("torch", backend):
        loss = linear_policy_loss(hidden, weight, batch, objective, bias=bias, backend=which).loss
        grads.append(cases.gradients(loss, (hidden, weight)))
    for ours, others in zip(*grads, strict=True):
        assert ours.isfinite().all() and ours.any()
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-5)


def test_metrics_of_a_kl_that_is_only_watched_and_of_one_without_a_rollout_term():
    logprob, batch = torch.tensor([-1.0, -2.0]), TokenBatch(
        torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.uint8), torch.ones(2), torch.ones(2),
        ref_logprob=torch.tensor([-1.5, -1.0]),
    )  # fmt: skip
    watched = policy_loss(logprob, None, batch, Objective(rollout=Term(Ratio(), "old", "advantage"), kl=KL(0.0))).metrics
    assert watched["rollout/kl_ref"] == watched["rollout/kl_ref_k3"] > 0
    alone = policy_loss(logprob, None, batch, Objective(expert=Term(One()), kl=KL(0.1))).metrics
    assert alone["rollout/kl_ref"] == watched["rollout/kl_ref"]


def test_metrics_by_hand_of_both_sides_of_a_clip_and_of_a_token_without_weight():
    """Clip(0.2, 0.3) on ratios ½, 2, ½, 2, 1, 2, 9 with advantages of both signs; the last token of each role has weight 0."""
    ratio = torch.tensor([0.5, 2.0, 0.5, 2.0, 1.0, 2.0, 9.0, 1.0, 1.0])
    advantage = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    role = torch.tensor([1] * 7 + [2] * 2, dtype=torch.uint8)
    weight = torch.tensor([1.0] * 6 + [0.0, 1.0, 0.0])
    logprob = torch.tensor([0.5, 0.5, 0.25, 0.5, 0.25, 0.5, 0.125, 0.5, 0.25]).log()
    batch = TokenBatch(
        torch.zeros(9, dtype=torch.int64), role, advantage, weight, old_logprob=logprob - ratio.log(), entropy_weight=torch.ones(9)
    )
    objective = Objective(expert=Term(One()), rollout=Term(Clip(0.2, 0.3), "old", "advantage"), entropy_coef=0.1)
    found = policy_loss(logprob, torch.ones(9), batch, objective).metrics
    expected = {
        "rollout/count": 7, "rollout/trained_count": 6, "rollout/clip_low": 1 / 6, "rollout/clip_high": 2 / 6,
        "rollout/ratio": 8 / 6, "rollout/ratio_max": 2.0, "rollout/prob": 2.625 / 7,
        "rollout/kl_old_k1": -math.log(2) / 6, "rollout/kl_old_k3": (8 - 6 - math.log(2)) / 6,
        "rollout/logprob": -(4 * 1 + 2 * 2 + 3) * math.log(2) / 7,
        "expert/count": 2, "expert/trained_count": 1, "expert/prob": 0.375, "expert/logprob": -1.5 * math.log(2),
    }  # fmt: skip
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)
    for gate, below, above in (
        (Clip(0.2, 0.3), [0], [1, 5, 6]),
        (Truncate(0.8, 1.3), [0, 2], [1, 3, 5, 6]),
        (Band(0.8, 1.3), [0, 2], [1, 3, 5, 6]),
    ):
        assert [mask.nonzero().squeeze(1).tolist() for mask in gate.clipped(ratio.log(), advantage)] == [below, above]
    alone = policy_loss(logprob, torch.ones(9), replace(batch, entropy_weight=None), objective).metrics
    assert alone["rollout/count"] == 6  # a token that contributes nothing counts in nothing
    batch = replace(batch, old_logprob=logprob - math.log(0.5))  # the ratio of the token without weight is read as 1
    assert policy_loss(logprob, torch.ones(9), batch, objective).metrics["rollout/ratio_max"] == 0.5


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_loss_of_fp32_terms_that_cancel_does_not_depend_on_their_order(backend):
    """Advantages of 2^24, which leave nothing of 1 in an fp32 sum, and an entropy bonus likewise."""
    advantage = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24), 0.5, 3.0])
    role, zero = torch.ones(6, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    objective = Objective(rollout=Term(Ratio(), "old", "advantage"), entropy_coef=-1.0)
    for order in ([0, 1, 2, 3, 4, 5], [1, 0, 4, 2, 5, 3], [5, 3, 2, 1, 0, 4]):
        streams = (advantage[order], torch.ones(6), torch.full((6,), -1.0))
        batch = TokenBatch(zero, role, *streams, entropy_weight=advantage[order]).to(cases.DEVICE)
        logprob = torch.full((6,), -1.0, device=cases.DEVICE)
        assert policy_loss(logprob, torch.full_like(logprob, 2.0), batch, objective, backend=backend).loss == -5.5 + 2 * 5.5


def test_trsft_has_metrics_of_its_own_and_every_other_expert_term_those_of_a_rollout_term_and_its_slope():
    """Ratios ½, 1, 2 and a token without weight, all of experts."""
    ratio, weight = torch.tensor([0.5, 1.0, 2.0, 9.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    logprob = torch.tensor([0.5, 0.25, 0.125, 0.5]).log()
    batch = TokenBatch(
        torch.zeros(4, dtype=torch.int64), torch.full((4,), 2, dtype=torch.uint8), torch.ones(4), weight,
        old_logprob=logprob - ratio.log(), entropy_weight=torch.ones(4),
    )  # fmt: skip

    def found(gate, anchor):
        metrics = policy_loss(logprob, torch.ones(4), batch, Objective(expert=Term(gate, anchor), entropy_coef=0.1)).metrics
        of_every_role = ("count", "logprob", "prob", "entropy")
        own = {name.removeprefix("expert/"): value.item() for name, value in metrics.items() if name.startswith("expert/")}
        return {name: value for name, value in own.items() if not name.endswith(of_every_role)}

    trsft, d = found(Truncate(high=0.25, scale=4.0), "zero"), ratio[:3].log()
    assert trsft == pytest.approx({"trsft_weight": 2.5 / 3, "share_below_alpha": 1 / 3}, rel=1e-6)
    of_ratio = {"ratio": 3.5 / 3, "ratio_max": 2.0, "kl_old_k1": 0.0, "kl_old_k3": (torch.expm1(d) - d).mean().item()}
    for gate, slope, low, high in ((Truncate(0.8, 1.5), 3.3, 1, 1), (Clip(0.2, 0.5), 1.5, 0, 1)):
        expected = {"slope": slope / 3, "clip_low": low / 3, "clip_high": high / 3}
        assert found(gate, "old") == pytest.approx(expected | of_ratio, rel=1e-6, abs=1e-7)
    assert found(Ratio(), "old") == pytest.approx({"slope": 3.5 / 3} | of_ratio, rel=1e-6, abs=1e-7)  # nothing to clip
    assert found(One(), "zero") == {}  # whose slope is 1


def test_the_share_below_alpha_has_the_digits_of_logprob():
    logprob = torch.tensor([-1e-9, 0.0])
    batch = TokenBatch(torch.zeros(2, dtype=torch.int64), torch.full((2,), 2, dtype=torch.uint8), torch.ones(2), torch.ones(2))
    assert (
        policy_loss(logprob, None, batch, objectives.trapo(alpha=1.0, entropy_coef=0.0)).metrics["expert/share_below_alpha"] == 0.5
    )


def test_streams_have_the_dtype_of_the_kernels_whatever_that_of_the_batch():
    s = terms.streams(cases.batch(12, 50, torch.float64), objectives.grpo(beta=0.1))
    assert {x.dtype for x in vars(s).values()} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("name", ["grpo", "gspo", "trapo"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_loss_has_the_dtype_of_the_logprobs_whatever_that_of_the_streams(backend, name):
    b = cases.batch(12, 50, torch.float64)
    logprob = (b.old_logprob / 2).float().requires_grad_()
    loss = policy_loss(logprob, -logprob.detach(), b, objectives.PRESETS[name](entropy_coef=0.1), backend=backend).loss
    assert loss.dtype == torch.float32


def test_the_reference_has_forward_mode_and_torch_func():
    """What the kernels refuse, naming the reference."""
    b = cases.batch(6, 50, torch.float64, roles=(1,), old_logprob=None, ref_logprob=None)

    def loss(logprob):
        return policy_loss(logprob, None, b, objectives.grpo(), backend="reference").loss

    logprob = -torch.rand(6, dtype=torch.float64, device=cases.DEVICE)
    gradient = torch.func.grad(loss)(logprob)
    direction = torch.randn(6, dtype=torch.float64, device=cases.DEVICE)
    _, tangent = torch.func.jvp(loss, (logprob,), (direction,))
    torch.testing.assert_close(tangent, gradient @ direction)
    assert gradient.any()


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
@pytest.mark.parametrize(
    ("gate", "log_ratio"),
    [
        (Sapo(), 2.8),
        (Sapo(), 2.5),
        (Sapo(), 100.0),  # where r itself is infinite in fp32
        (Sapo(tau_negative=1e-6), 16.67),
        (Shape(), 10.0),
        (Shape(1e-8), 0.0),
        (Phi(), -1e-7),
        (Phi(), -1e-5),
    ],
    ids=str,
)
def test_gradients_keep_their_digits_where_a_gate_saturates(gate, log_ratio, backend):
    """In fp32 σ(1-σ) has none left where σ rounds to 1, nor r(1-r) by autograd of r - r²/2."""
    for sign in (1.0, -1.0):
        one = torch.ones(1, device=cases.DEVICE)
        b = TokenBatch(one.long(), one.to(torch.uint8), sign * one, one, old_logprob=torch.full_like(one, -20.0))
        logprob = torch.tensor([log_ratio - 20.0], device=cases.DEVICE, requires_grad=True)
        if log_ratio < 0:
            b = replace(b, old_logprob=0 * one)
            logprob = torch.tensor([log_ratio], device=cases.DEVICE, requires_grad=True)
        objective = Objective(rollout=Term(gate, anchor="old", signal="advantage"))
        (grad,) = torch.autograd.grad(policy_loss(logprob, None, b, objective, backend=backend).loss, logprob)
        d = logprob.detach().double() - b.old_logprob.double()
        torch.testing.assert_close(grad.double(), -sign * gate.slope(d, sign * one.double()), rtol=2e-4, atol=0.0)


def test_a_scale_of_any_sign_prints_once():
    assert str(Term(One(), scale=-0.5)) == "0.5·log r, r = p" and str(Term(One())) == "-log r, r = p"
    assert "  entropy  0.3 · " in str(Objective(expert=Term(One()), entropy_coef=-0.3))
    assert "the 0.005 of" in str(TopEntropy(0.005))


def test_a_kl_of_weight_zero_is_nothing_however_far_the_reference_is():
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [-100.0], [0.0]], requires_grad=True)
    one = torch.ones(1)
    b = TokenBatch(one.long(), one.to(torch.uint8), one, one, ref_logprob=-one)
    objective = Objective(rollout=Term(Ratio(), "self", "advantage"), kl=KL(0.0))
    for backend in ("reference", "torch"):
        out = linear_policy_loss(hidden, weight, b, objective, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, hidden)
        assert (out.loss.item(), grad.item()) == (-1.0, 100.0)
