"""Reductions over whole sequences: pooled as the papers define, in two passes, and in one where every ratio is 1."""

import math
from dataclasses import replace

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import KL, Objective, Role, Term, TokenBatch, checks, linear_policy_loss, objectives, policy_loss
from trapo_kernels.backends import sweep
from trapo_kernels.gates import Clip, One
from trapo_kernels.sequence import EntropyWeight, MeanRatio, Reduction, Sequences, TopEntropy, TrajectoryWeight

REDUCED = [name for name, preset in objectives.PRESETS.items() if preset().why_two_passes(on_policy=False)]


def sequence_batch(dtype=torch.float64, **changes):
    """30 rollout tokens of 4 interleaved sequences; advantage and weight are constant in a sequence, as in GSPO's paper."""
    labels = torch.randint(4, (30,), generator=torch.Generator().manual_seed(3))
    advantage = torch.tensor([1.5, -0.7, 0.4, -2.0], dtype=dtype)[labels]
    weight = 0.25 / torch.bincount(labels, minlength=4)[labels].to(dtype)
    streams = {"sequence_id": labels, "advantage": advantage, "weight": weight} | changes
    return cases.batch(30, 50, dtype, roles=(1,), **streams)


def test_sums_means_and_ranks_equal_a_loop_over_sequences():
    labels = torch.tensor([900, -4, 900, 7, -4, 900, 7], device=cases.DEVICE)
    counted = torch.tensor([1, 1, 1, 1, 0, 1, 0], dtype=torch.bool, device=cases.DEVICE)
    x = torch.tensor([3.0, 1.0, 5.0, 2.0, float("nan"), 4.0, 9.0], device=cases.DEVICE)
    sequences = Sequences(labels, counted)
    assert sequences.sum(x).tolist() == [12, 1, 12, 2, 1, 12, 2]
    assert sequences.mean(x).tolist() == [4, 1, 4, 2, 1, 4, 2]
    assert sequences.count().tolist() == [3, 1, 3, 1, 1, 3, 1]
    ranks = sequences.rank(x)[counted]
    assert ranks.tolist() == [2, 0, 0, 0, 1]
    assert sequences.rank(-x)[counted].tolist() == [0, 0, 2, 0, 1]  # behind no token that does not count
    assert Sequences(labels, counted & (labels != 7)).mean(x).tolist() == [4, 1, 4, 0, 1, 4, 0]  # 7 has no token that counts
    empty = Sequences(labels[:0], counted[:0])
    assert empty.mean(x[:0]).shape == (0,) and empty.rank(x[:0]).shape == (0,)


def test_sums_of_fp32_values_that_cancel_do_not_depend_on_their_order():
    x = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24), 0.5, 3.0])
    for order in ([0, 1, 2, 3, 4, 5], [1, 0, 4, 2, 5, 3], [5, 3, 2, 1, 0, 4]):
        sequences = Sequences(torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool))
        assert sequences.sum(x[order]).tolist() == [5.5] * 6


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("epsilon", [0.3, 1e9])
def test_gspo_equals_the_loss_of_whole_sequences(backend, epsilon):
    """Without any stop-gradient: 1/G Σ_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean log r)."""
    hidden, weight, _ = cases.head(30, 6, 50)
    b = sequence_batch(old_logprob=torch.rand(30, dtype=torch.float64) - 4.5)
    logprob, _ = cases.eager_statistics(hidden, weight, b.target)
    expected = 0
    for label in range(4):
        rows = b.sequence_id == label
        ratio, a = (logprob - b.old_logprob)[rows].mean().exp(), b.advantage[rows][0]
        expected = expected - torch.minimum(ratio * a, ratio.clamp(1 - min(epsilon, 1.0), 1 + epsilon) * a) / 4
    objective = objectives.gspo(epsilon_low=min(epsilon, 1.0), epsilon_high=epsilon)
    out = linear_policy_loss(hidden, weight, b, objective, backend=backend)
    assert cases.error(out.loss, expected) < 1e-13 and out.passes == 2
    for ours, theirs in zip(cases.gradients(out.loss, (hidden, weight)), cases.gradients(expected, (hidden, weight)), strict=True):
        assert theirs.abs().max() > 0
        assert cases.error(ours, theirs) < 1e-13


@pytest.mark.parametrize("clip", [0.05, 0.4, math.inf])
def test_gmpo_equals_the_geometric_mean_of_whole_sequences(clip):
    hidden, weight, _ = cases.head(30, 6, 50)
    b = sequence_batch(old_logprob=torch.rand(30, dtype=torch.float64) - 4.5)
    logprob, _ = cases.eager_statistics(hidden, weight, b.target)
    expected, clipped = 0, 0
    for label in range(4):
        rows = b.sequence_id == label
        a = b.advantage[rows][0]
        d = (logprob - b.old_logprob)[rows]
        bounded = d.clamp(max=clip) if a >= 0 else d.clamp(min=-clip)
        clipped += int((bounded != d).sum())
        expected = expected - a * bounded.mean().exp() / 4
    out = linear_policy_loss(hidden, weight, b, objectives.gmpo(clip=clip), backend="torch")
    assert cases.error(out.loss, expected) < 1e-13
    for ours, theirs in zip(cases.gradients(out.loss, (hidden, weight)), cases.gradients(expected, (hidden, weight)), strict=True):
        assert cases.error(ours, theirs) < 1e-13
    share = out.metrics["rollout/clip_low"] + out.metrics["rollout/clip_high"]
    assert share.item() == pytest.approx(clipped / 30) and (clipped > 0) == (clip < math.inf)


@pytest.mark.parametrize(("sign", "side", "other"), [(1.0, "high", "low"), (-1.0, "low", "high")])
def test_a_token_that_gmpo_stops_is_held_back_on_the_side_of_its_advantage(sign, side, other):
    role = torch.tensor([Role.ROLLOUT, Role.EXPERT], dtype=torch.uint8).repeat(15)
    b = sequence_batch(advantage=torch.full((30,), sign, dtype=torch.float64), role=role)
    logprob = -3 * torch.rand(30, dtype=torch.float64, device=cases.DEVICE)
    term = Term(Clip(1.0, 1e9), "old", "advantage", reduction=MeanRatio(clip=0.4))
    metrics = policy_loss(logprob, None, b, Objective(expert=term, rollout=term)).metrics
    for name, code in (("rollout", Role.ROLLOUT), ("expert", Role.EXPERT)):
        held = (sign * (logprob - b.old_logprob) > 0.4)[b.role == code].double().mean().item()
        assert metrics[f"{name}/clip_{side}"].item() == pytest.approx(held) and 0 < held < 1
        assert metrics[f"{name}/clip_{other}"] == 0


def test_gmpo_clips_a_token_without_advantage_as_one_with_a_positive():
    one = torch.ones(2, dtype=torch.float64)
    b = TokenBatch(one.long(), one.to(torch.uint8), torch.tensor([0.0, 1.0]).double(), one, one - 3, sequence_id=one.long())
    metrics = policy_loss(torch.tensor([-1.0, -2.0]).double(), None, b, objectives.gmpo(clip=0.4)).metrics  # log-ratios 1 and 0
    assert metrics["rollout/ratio"].item() == pytest.approx(math.exp(0.4 / 2))


def test_an_objective_reads_what_all_of_its_layers_read():
    def nested(innermost):
        return Objective(expert=Term(One()), plus=Objective(expert=Term(One()), plus=innermost))

    plain = nested(Objective(rollout=Term(One())))
    assert plain.reads() == set() and not plain.needs_entropy
    assert nested(Objective(rollout=Term(One()), kl=KL(0.1))).reads() == {"ref_logprob"}
    assert nested(Objective(rollout=Term(One()), entropy_coef=0.1)).needs_entropy
    weighed = nested(Objective(rollout=Term(One(), reduction=EntropyWeight(0.1))))
    assert weighed.needs_entropy and weighed.reads() == {"sequence_id"}


def test_the_ratio_in_the_metrics_is_the_pooled_one():
    b = sequence_batch()
    logprob = -3 * torch.rand(30, dtype=torch.float64, device=cases.DEVICE)
    metrics = policy_loss(logprob, None, b, objectives.gspo()).metrics
    pooled = torch.stack([(logprob - b.old_logprob)[b.sequence_id == k].mean().exp() for k in range(4)])
    torch.testing.assert_close(metrics["rollout/ratio_max"].double(), pooled.max(), rtol=1e-6, atol=0)
    outside = torch.where(b.advantage >= 0, pooled[b.sequence_id] > 1 + 4e-4, pooled[b.sequence_id] < 1 - 3e-4)
    share = metrics["rollout/clip_low"] + metrics["rollout/clip_high"]
    assert share.item() == pytest.approx(outside.double().mean().item())


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_the_kls_in_the_metrics_are_of_each_tokens_own_ratio(name, backend):
    hidden, weight, _ = cases.head(30, 6, 50)
    b = sequence_batch()
    found = linear_policy_loss(hidden, weight, b, objectives.PRESETS[name](), backend=backend).metrics
    logprob, _ = cases.eager_statistics(hidden, weight, b.target)
    d = logprob - b.old_logprob
    expected = {"kl_old_k1": -d.mean(), "kl_old_k3": (d.exp() - 1 - d).mean()}
    for metric, value in expected.items():
        torch.testing.assert_close(found[f"rollout/{metric}"], value.float(), rtol=1e-5, atol=1e-6, msg=metric)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
@pytest.mark.parametrize("backend", ["reference", *cases.QUICK_BY_DEFAULT])
def test_fast_path_where_old_is_current(name, backend):
    dtype = torch.float32
    hidden, weight, _ = cases.head(30, 6, 50, dtype)
    objective = objectives.PRESETS[name](entropy_coef=0.02)
    old, _ = cases.eager_statistics(hidden.detach(), weight.detach(), sequence_batch(dtype).target)
    with_old, without = sequence_batch(dtype, old_logprob=old), sequence_batch(dtype, old_logprob=None, sequence_id=None)
    slow = linear_policy_loss(hidden, weight, with_old, objective, backend=backend)
    fast = linear_policy_loss(hidden, weight, without, objective, backend=backend)
    assert (slow.passes, fast.passes) == (2, 2 if backend == "reference" else 1)
    torch.testing.assert_close(fast.loss, slow.loss, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(
        cases.gradients(fast.loss, (hidden, weight)), cases.gradients(slow.loss, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_passes_say_which_way_the_loss_went(name):
    hidden, weight, _ = cases.head(14, 6, 30)
    objective = objectives.PRESETS[name]()
    out = linear_policy_loss(hidden, weight, cases.batch(14, 30), objective, backend="torch")
    assert out.passes == (2 if name in REDUCED else 1)
    assert ("2 passes" in str(objective)) == (out.passes == 2)


def test_the_reduced_presets_are_those_of_the_field():
    assert set(REDUCED) == {"gspo", "gmpo", "iw_sft", "prefix_rft", "srft"}


def _expert_batch(entropy, **changes):
    """One sequence of as many expert tokens as `entropy` has, weight 1."""
    n = len(entropy)
    ones = torch.ones(n, dtype=torch.float64)
    streams = {"advantage": ones, "weight": ones, "ref_logprob": -ones, "sequence_id": torch.zeros(n, dtype=torch.int64)} | changes
    return TokenBatch(torch.zeros(n, dtype=torch.int64), torch.full((n,), Role.EXPERT, dtype=torch.uint8), **streams)


def _slopes(objective, logprob, entropy, b):
    logprob = logprob.clone().requires_grad_()
    (grad,) = torch.autograd.grad(policy_loss(logprob, entropy, b, objective).loss, logprob)
    return grad


@pytest.mark.parametrize(
    ("share", "n", "kept"),
    [(0.2, 1, 1), (0.2, 4, 1), (0.2, 5, 1), (0.2, 6, 2), (0.2, 10, 2), (0.28, 25, 7), (1e-10, 7, 1), (1.0, 7, 7)],
)
def test_top_entropy_trains_the_ceiling_of_its_share(share, n, kept):
    entropy = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    objective = Objective(expert=Term(One(), reduction=TopEntropy(share)))
    slopes = _slopes(objective, -entropy - 1, entropy, _expert_batch(entropy))
    assert slopes.nonzero().squeeze(1).tolist() == sorted(entropy.topk(kept).indices.tolist())


def test_a_token_without_weight_counts_in_its_sequence():
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    b = _expert_batch(entropy, weight=weight)
    top = _slopes(Objective(expert=Term(One(), reduction=TopEntropy(0.5))), -entropy, entropy, b)
    assert top.tolist() == [0, 0, -1, 0]  # of the two with the largest entropy one has no weight
    pooled = _slopes(Objective(expert=Term(One(), reduction=EntropyWeight(0.5))), -entropy, entropy, b)
    torch.testing.assert_close(pooled, -0.5 * weight * math.exp(-2.5))


def test_a_reduction_of_imitation_reads_no_advantage():
    entropy = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    b = _expert_batch(entropy, advantage=-torch.ones(3, dtype=torch.float64))  # of a sample that is imitated all the same
    found = _slopes(Objective(expert=Term(One(), reduction=EntropyWeight(0.5, positive_only=True))), -entropy, entropy, b)
    torch.testing.assert_close(found, torch.full_like(entropy, -0.5 * math.exp(-2.0)))


@pytest.mark.parametrize("backend", [*cases.CHUNKED, "reference"])
def test_a_mask_in_the_weights_leaves_the_pooled_ratio_alone(backend):
    """IcePop beside GSPO: the ratio is of the whole response, the mask is on the loss; a weight that vanishes has no jump at 0."""
    hidden, weight, _ = cases.head(30, 6, 50, torch.float32)
    b = sequence_batch(torch.float32, device="cpu", old_logprob=torch.rand(30) - 4.5)
    kept = torch.arange(30) % 3 != 0
    out = []
    for rest in (0.0, 1e-12):
        masked = replace(b, weight=torch.where(kept, b.weight, rest * b.weight)).to(cases.DEVICE)
        loss = linear_policy_loss(hidden, weight, masked, objectives.gspo(), backend=backend)
        out.append([loss.loss, loss.logprob, *cases.gradients(loss.loss, (hidden, weight))])
    assert len(masked.active_rows) == 30 and out[0][1].all()  # the logprobs of all 30, of which 10 have no gradient
    logprob, _ = cases.eager_statistics(hidden, weight, b.target.to(hidden.device))
    d, labels = (logprob.detach().cpu() - b.old_logprob), b.sequence_id
    ratio = torch.stack([d[labels == label].mean() for label in labels]).exp()
    clipped = ratio.clamp(1 - 3e-4, 1 + 4e-4)
    expected = -(torch.where(kept, b.weight, 0.0) * torch.minimum(ratio * b.advantage, clipped * b.advantage)).sum()
    torch.testing.assert_close(out[0][0].cpu(), expected)
    for ours, expected in zip(*out, strict=True):
        torch.testing.assert_close(ours, expected)


POOLING = [name for name in REDUCED if objectives.PRESETS[name]().rollout]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("backend", [*cases.QUICK_BY_DEFAULT, "reference"])
@pytest.mark.parametrize("name", POOLING)
def test_the_logprobs_of_a_pass_are_the_old_ones_of_the_next_in_silent_tokens_too(name, backend, known, monkeypatch):
    """Without a change of parameters every ratio is 1, whatever a mask took out; `known`: as where a GPU was told the rows."""
    hidden, weight, _ = cases.head(30, 6, 50, torch.float32)
    b = sequence_batch(torch.float32, device="cpu")
    b = replace(b, weight=torch.where(torch.arange(30) % 3 == 0, 0.0, b.weight), old_logprob=None).to(cases.DEVICE)
    if not known:
        monkeypatch.setattr(checks, "may_look", lambda x: False)
        monkeypatch.setattr(sweep, "_active_rows", lambda active: None)
        b = replace(b)
        assert b.active_rows is None is b.silent_rows
    objective = objectives.PRESETS[name]()
    logprob = linear_policy_loss(hidden, weight, b, objective, backend=backend).logprob
    assert logprob.all()
    again = linear_policy_loss(hidden, weight, replace(b, old_logprob=logprob.detach()), objective, backend=backend)
    ratio = again.metrics.get("rollout/ratio", torch.ones(()))
    torch.testing.assert_close(ratio, torch.ones_like(ratio))
    torch.testing.assert_close(again.logprob, logprob)


def test_what_a_pooled_ratio_reads_must_be_finite_in_silent_tokens_too():
    b = sequence_batch(torch.float32, device="cpu", old_logprob=torch.full((30,), -4.0))
    b = replace(b, weight=torch.where(torch.arange(30) == 7, 0.0, b.weight))
    b.old_logprob[7] = torch.nan
    logprob = torch.full((30,), -4.0)
    policy_loss(logprob, None, b, objectives.grpo())
    with pytest.raises(ValueError, match="batch.old_logprob must be finite, got nan at row 7. Give a token without one the role"):
        policy_loss(logprob, None, b, objectives.gspo())


@pytest.mark.parametrize("backend", cases.CHUNKED)
@pytest.mark.parametrize("on_policy", [True, False])
def test_scored_rows_beside_silent_ones(backend, on_policy):
    hidden, weight, _ = cases.head(30, 6, 50, torch.float32)
    b = sequence_batch(torch.float32, device="cpu", old_logprob=None if on_policy else torch.full((30,), -4.0))
    role = torch.where(torch.arange(30) < 2, 0, b.role).to(torch.uint8)
    silent = torch.where(torch.arange(30) < 5, 0.0, b.weight)
    b = replace(b, role=role, weight=silent, entropy_weight=None, scored_rows=torch.tensor([1, 3])).to(cases.DEVICE)
    assert b.silent_rows.tolist() == [2, 4]
    out = linear_policy_loss(hidden, weight, b, objectives.gspo(), backend=backend)
    expected, _ = cases.eager_statistics(hidden, weight, b.target)
    assert out.logprob[0] == 0
    torch.testing.assert_close(out.logprob[1:], expected[1:])


@pytest.mark.parametrize(("pool", "log_weight"), [("sum", 3 * 0.7), ("mean", 0.7)])
def test_iw_sft_weighs_a_sequence_by_its_capped_ratio(pool, log_weight):
    logprob = torch.full((3,), -0.3, dtype=torch.float64)
    b = _expert_batch(logprob)  # ref_logprob = -1, so every log-ratio is 0.7
    uncapped = _slopes(objectives.iw_sft(cap=16.0, pool=pool), logprob, None, b)
    torch.testing.assert_close(uncapped, torch.full_like(logprob, -math.exp(log_weight)))
    capped = _slopes(objectives.iw_sft(cap=1.5, pool=pool), logprob, None, b)
    torch.testing.assert_close(capped, torch.full_like(logprob, -1.5))
    unlikely = torch.full((3,), -11.0, dtype=torch.float64)  # log-ratios of -10
    small = _slopes(objectives.iw_sft(pool=pool), unlikely, None, b)
    torch.testing.assert_close(small, torch.full_like(unlikely, -math.exp(log_weight / 0.7 * -10)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", REDUCED)
def test_ignored_rows_filled_with_nan_change_no_bit(name):
    objective = objectives.PRESETS[name](entropy_coef=0.1)
    clean = cases.batch(40, 30, torch.float32)
    ignored = clean.role == 0
    names = ("advantage", "weight", "old_logprob", "ref_logprob", "rollout_logprob", "entropy_weight")
    streams = {name: torch.where(ignored, float("nan"), getattr(clean, name)) for name in names}
    poisoned = TokenBatch(clean.target, clean.role, **streams, sequence_id=clean.sequence_id)
    hidden, weight, _ = cases.head(40, 6, 30, torch.float32)
    results = []
    for b, fill in ((clean, 0.0), (poisoned, float("nan"))):
        h = torch.where(ignored[:, None], fill, hidden.detach()).requires_grad_()
        out = linear_policy_loss(h, weight, b, objective, backend="torch")
        results.append([out.loss, *cases.gradients(out.loss, (h, weight)), *out.metrics.values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gspo", pytest.param("prefix_rft", marks=cases.SLOW_ON_A_CPU)])
def test_compile_fullgraph(name):
    """A graph without breaks is also one without a host sync."""
    hidden, weight, _ = cases.head(12, 5, 20, torch.float32)
    b, objective = cases.batch(12, 20, torch.float32), objectives.PRESETS[name](entropy_coef=0.1)

    def step(h, w):
        return linear_policy_loss(h, w, b, objective, backend="torch").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager = cases.gradients(step(hidden, weight), (hidden, weight))
    for ours, expected in zip(cases.gradients(compiled(hidden, weight), (hidden, weight)), eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_what_is_missing_is_named():
    hidden, weight, _ = cases.head(12, 5, 20)
    b = cases.batch(12, 20, sequence_id=None)
    with pytest.raises(
        ValueError,
        match=r"'gspo' reads batch.sequence_id, got None. Pass TokenBatch\(..., sequence_id=...\).* without the reduction",
    ):
        linear_policy_loss(hidden, weight, b, objectives.gspo())
    with pytest.raises(ValueError, match="'srft' weighs tokens by their entropy and needs entropy"):
        policy_loss(torch.zeros(12, dtype=torch.float64, device=cases.DEVICE), None, cases.batch(12, 20), objectives.srft())
    with pytest.raises(TypeError, match="sequence_id must be torch.int64, got torch.int32"):
        cases.batch(12, 20, sequence_id=torch.zeros(12, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match=r"Reduction must implement reduce\(tokens\)"):
        Reduction().reduce(None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MeanRatio(clip=0.0), r"clip must lie in \(0, inf\], got 0.0"),
        (lambda: TrajectoryWeight(cap=-1.0), r"cap must lie in \(0, inf\], got -1.0"),
        (lambda: TrajectoryWeight(pool="max"), "pool must be one of 'sum', 'mean', got 'max'"),
        (lambda: TopEntropy(1.5), r"share must lie in \(0, 1\], got 1.5"),
        (lambda: EntropyWeight(0.1, sign=2), "sign must be one of -1, 1, got 2"),
        (lambda: Term(Clip(), signal="gain"), "signal must be one of .*got 'gain'"),
    ],
)
def test_bad_parameters_say_the_rule_and_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
