"""Where implementations of these objectives go wrong, one test per trap."""

import math
from dataclasses import replace

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import (
    LossTotals,
    Objective,
    Role,
    Term,
    TokenBatch,
    aggregate,
    checks,
    corrections,
    linear_policy_loss,
    loss_totals,
    objectives,
    policy_loss,
)
from trapo_kernels.gates import Ratio

BACKENDS = ["reference", "torch"]


def _slope(objective, ratio, advantage, backend="torch"):
    """dL/dlogp of one rollout token with weight 1."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    b = TokenBatch(zero.long(), one.to(torch.uint8), advantage * one, one, old_logprob=-1.0 * one)
    logprob = (ratio * one).log().sub(1.0).requires_grad_()
    return torch.autograd.grad(policy_loss(logprob, None, b, objective, backend=backend).loss, logprob)[0].item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cispo_of_trl_has_an_absolute_cap_and_no_floor_that_of_verl_one_plus_minus_epsilon(backend):
    trl, verl = objectives.cispo(), objectives.cispo(bounds="relative", epsilon_high=0.28)
    for ratio, absolute, relative in ((0.1, 0.1, 0.8), (0.9, 0.9, 0.9), (1.5, 1.5, 1.28), (7.0, 5.0, 1.28)):
        for advantage in (1.0, -2.0):
            assert _slope(trl, ratio, advantage, backend) == pytest.approx(-advantage * absolute)
            assert _slope(verl, ratio, advantage, backend) == pytest.approx(-advantage * relative)
    # One number, two meanings: TRL's 5.0 read as verl's ε would cap at 6.
    assert _slope(objectives.cispo(epsilon_high=5.0, bounds="relative"), 7.0, 1.0, backend) == pytest.approx(-6.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_advantage_is_unbounded_without_the_two_sided_clip(backend):
    assert _slope(objectives.grpo(), 50.0, -1.0, backend) == pytest.approx(50.0)
    assert _slope(objectives.grpo(delta=4.0), 50.0, -1.0, backend) == 0.0
    assert _slope(objectives.ppo(dual=4.0), 3.0, -1.0, backend) == pytest.approx(3.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_bonus_has_its_own_normaliser(backend):
    b = cases.batch(40, 30)
    entropy = torch.rand(40, dtype=torch.float64, device=cases.DEVICE)
    logprob = -entropy - 1.0

    def bonus(weight):
        scaled = cases.batch(40, 30, weight=weight)
        parts = [policy_loss(logprob, entropy, scaled, objectives.trapo(entropy_coef=c), backend=backend).loss for c in (0.5, 0.0)]
        return parts[0] - parts[1]

    expected = -0.5 * (b.entropy_weight * entropy)[b.role != 0].sum()
    torch.testing.assert_close(bonus(b.weight), expected)
    torch.testing.assert_close(bonus(b.weight * 1000), expected)
    torch.testing.assert_close(bonus(b.weight * 0), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_token", [False, True])
def test_temperature_divides_the_logits_and_with_them_the_gradient(backend, per_token):
    hidden, weight, _ = cases.head(20, 6, 40)
    b = cases.batch(20, 40)
    temperature = torch.rand(20, dtype=torch.float64, device=cases.DEVICE) + 0.5 if per_token else 0.7
    column = temperature[:, None] if per_token else temperature
    divided = (hidden.detach() / column).requires_grad_()
    warm = linear_policy_loss(hidden, weight, b, objectives.trapo(), temperature=temperature, backend=backend)
    plain = linear_policy_loss(divided, weight, b, objectives.trapo(), backend=backend)
    torch.testing.assert_close(warm.loss, plain.loss)
    grad_hidden, grad_weight = cases.gradients(warm.loss, (hidden, weight))
    grad_divided, grad_weight_divided = cases.gradients(plain.loss, (divided, weight))
    torch.testing.assert_close(grad_hidden, grad_divided / column)
    torch.testing.assert_close(grad_weight, grad_weight_divided)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_equal_rewards_has_no_advantage_but_its_expert_tokens_still_train(backend):
    hidden, weight, _ = cases.head(30, 6, 40)
    b = cases.batch(30, 40, advantage=torch.zeros(30, dtype=torch.float64))
    out = linear_policy_loss(hidden, weight, b, objectives.trapo(entropy_coef=0.0), backend=backend)
    (grad,) = cases.gradients(out.loss, (hidden,))
    assert (grad[b.role == Role.EXPERT].abs().amax(1) > 0).all()
    assert (grad[b.role != Role.EXPERT] == 0).all()
    expert_alone = linear_policy_loss(hidden, weight, b, objectives.trsft(), backend=backend)
    torch.testing.assert_close(out.loss, expert_alone.loss)


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_no_advantage_is_no_loss_however_large_the_ratio_and_a_weight_of_0_hides_a_nan_advantage(backend):
    hidden, weight, _ = cases.head(6, 5, 20, torch.float32)
    numbers = {
        "role": torch.ones(6, dtype=torch.uint8),
        "advantage": torch.tensor([0.0, 1.0, 0.0, float("nan"), -1.0, 1.0]),
        "weight": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0]),
        "entropy_weight": torch.ones(6),
    }
    objective = Objective(rollout=Term(Ratio(), anchor="old", signal="advantage"), entropy_coef=0.01)

    def run(old_logprob):
        b = cases.batch(6, 20, torch.float32, **numbers, old_logprob=torch.tensor(old_logprob))
        out = linear_policy_loss(hidden, weight, b, objective, backend=backend)
        return out, cases.gradients(out.loss, (hidden, weight))

    huge, grads = run([-200.0, -3.0, -3.0, -3.0, -3.0, -3.0])
    plain, expected = run([-3.0] * 6)
    torch.testing.assert_close(huge.loss, plain.loss, rtol=0, atol=0)
    for ours, same in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, same, rtol=0, atol=0)
        assert ours.isfinite().all()


def test_divergence_from_the_sampler_is_told_where_the_ratio_is_0_in_fp32():
    one = torch.ones(1)
    b = TokenBatch(torch.zeros(1, dtype=torch.int64), one.to(torch.uint8), one, one, old_logprob=-1.0 * one)
    metrics = policy_loss(-201.0 * one, None, b, objectives.grpo()).metrics
    assert metrics["rollout/kl_old_k1"] == 200.0
    assert metrics["rollout/kl_old_k3"] == 199.0
    of_no_policy = policy_loss(-one, None, b, objectives.rloo()).metrics
    assert not [name for name in of_no_policy if "kl_old" in name or "ratio" in name]


def test_an_impossible_token_leaves_no_nan_in_the_metrics_of_a_pooled_ratio():
    """Its advantage is 0, so that the loss is finite; the ratio of its sequence is 0."""
    b = cases.batch(4, 20, torch.float32, roles=(1,), advantage=torch.zeros(4), sequence_id=torch.tensor([0, 0, 1, 1]))
    logprob = torch.tensor([-float("inf"), -1.0, -1.0, -2.0], device=cases.DEVICE)
    out = policy_loss(logprob, None, b, objectives.gspo())
    assert out.loss == 0
    assert out.metrics["rollout/ratio"].isfinite() and out.metrics["rollout/ratio_max"].isfinite()


def test_k_copies_of_a_prefix_at_weight_1_over_k_are_one_prefix():
    hidden, weight, _ = cases.head(6, 5, 30)
    one = cases.batch(6, 30, roles=(2,))
    copies = torch.arange(6).repeat(3)
    sequence = torch.arange(3).repeat_interleave(6)
    share = corrections.duplicate_share(torch.zeros(18, dtype=torch.int64), sequence).to(cases.DEVICE)
    thrice = cases.subset(one, copies)
    thrice = TokenBatch(thrice.target, thrice.role, thrice.advantage, thrice.weight * share.double())
    expected = linear_policy_loss(hidden, weight, one, objectives.trsft(), backend="torch").loss
    shared = linear_policy_loss(hidden[copies], weight, thrice, objectives.trsft(), backend="torch").loss
    for ours, theirs in zip(cases.gradients(shared, (hidden, weight)), cases.gradients(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # 1/3 is an fp32 weight


def test_a_mean_per_micro_batch_depends_on_the_split_and_totals_do_not():
    role = torch.tensor([1, 1, 1, 1, 2, 2, 2, 1], dtype=torch.uint8)
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    parts = [slice(0, 3), slice(3, 8)]
    for mode in ("token_mean", "role_mean"):
        whole = aggregate(role, sequence, mode=mode)
        naive = torch.cat([aggregate(role[p], sequence[p], mode=mode) / len(parts) for p in parts])
        assert not torch.allclose(naive, whole)
        totals = sum((loss_totals(role[p], sequence[p]) for p in parts), LossTotals(0, 0, 0))
        right = torch.cat([aggregate(role[p], sequence[p], mode=mode, totals=totals) for p in parts])
        assert torch.equal(right, whole)


def test_trapo_has_the_units_of_the_release_sum_of_tokens_over_the_longest_response():
    """-p/max(sg(p), α) and -A·r, summed and divided by 8192 alone: not by sequences, micro-batches or GPUs."""
    b = cases.batch(60, 50, roles=(1, 2))
    weight = aggregate(b.role.cpu(), b.sequence_id.cpu(), mode="length", max_tokens=8192).double().to(cases.DEVICE)
    logprob = (b.old_logprob / 2).requires_grad_()
    b = cases.batch(60, 50, roles=(1, 2), weight=weight)
    p, ratio = logprob.exp(), (logprob - b.old_logprob).exp()
    published = torch.where(b.role == Role.EXPERT, -p / p.detach().clamp(min=0.1), -b.advantage * ratio).sum() / 8192
    (expected,) = torch.autograd.grad(published, logprob)
    for backend in BACKENDS:
        loss = policy_loss(logprob, None, b, objectives.trapo(alpha=0.1, entropy_coef=0.0), backend=backend).loss
        torch.testing.assert_close(torch.autograd.grad(loss, logprob)[0], expected)


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
@pytest.mark.parametrize("preset", ["sft", "trapo", "gspo", "prefix_rft"])  # one pass and two
def test_a_token_with_a_role_and_no_target_is_nan_where_nobody_looks(preset, backend, monkeypatch):
    """-100 padding whose role was set: refused on a CPU; on a GPU and while compiling its logprob must not be taken for 0."""
    hidden, weight, _ = cases.head(12, 6, 40, torch.float32)
    b = cases.batch(12, 40, torch.float32, roles=(1, 2))
    b = replace(b, target=b.target.index_fill(0, torch.tensor([4, 5], device=cases.DEVICE), -100))
    if cases.DEVICE == "cpu":
        with pytest.raises(ValueError, match="a token with a role must have a target in the vocabulary, got -100 at row 4"):
            linear_policy_loss(hidden, weight, b, getattr(objectives, preset)(), backend=backend)
    monkeypatch.setattr(checks, "may_look", lambda x: False)
    out = linear_policy_loss(hidden, weight, replace(b), getattr(objectives, preset)(), backend=backend)
    assert out.logprob[4:6].isnan().all() and out.logprob[:4].isfinite().all()
    assert out.loss.isnan()


def test_a_clip_share_counts_neither_advantages_of_zero_nor_the_second_bound_of_negative_ones():
    """Ratios e, e, 9, 9 and ½ with advantages 0, 1, -1, 0 and 0: one token is held by the upper bound, one by the dual."""
    d = torch.tensor([1.0, 1.0, math.log(9.0), math.log(9.0), math.log(0.5)])
    advantage = torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0])
    b = TokenBatch(
        torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.uint8), advantage, torch.ones(5), old_logprob=-1 - d
    )
    logprob = torch.full((5,), -1.0)
    found = policy_loss(logprob, None, b, objectives.ppo(dual=3.0)).metrics
    shares = {name: found[f"rollout/{name}"].item() for name in ("clip_low", "clip_high", "clip_dual")}
    assert shares == pytest.approx({"clip_low": 0.0, "clip_high": 0.2, "clip_dual": 0.2})
    single = policy_loss(logprob, None, b, objectives.ppo()).metrics
    assert "rollout/clip_dual" not in single and single["rollout/clip_high"] == 0.2
    assert single["expert/trained_count"] == 0  # a role without a term trains nothing


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED])
def test_what_a_head_of_ones_own_gives_for_ignored_tokens_goes_nowhere(backend):
    b = cases.batch(40, 50, torch.float32)
    ignored, found = b.role == 0, []
    for fill in (0.0, float("nan")):
        inputs = [torch.where(ignored, fill, x).requires_grad_() for x in (b.old_logprob / 2, -b.old_logprob)]
        out = policy_loss(*inputs, b, objectives.trapo(entropy_coef=0.1), backend=backend)
        found.append([out.loss, *cases.gradients(out.loss, inputs), *out.metrics.values()])
    for clean, poisoned in zip(*found, strict=True):
        assert torch.equal(clean, poisoned)
