"""Several updates per rollout step: old logprobs from before the first, corrections in the weights, merged metrics."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.trapo_train.step.test_optimizer_step import make_model, make_samples, packed, step, with_stream
from tests.trapo_train.test_train import build_config, train_to_end
from trapo_kernels import Role, TokenBatch, corrections, objectives
from trapo_train.metrics import Mean
from trapo_train.models.model import policy_forward, score, score_all
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.step import updates as updates_module
from trapo_train.step.packing import PackingConfig
from trapo_train.step.tally import Tally, quantile
from trapo_train.step.updates import CorrectionConfig, UpdateConfig, merge_updates, split_groups, with_old_policy, with_reference
from trapo_train.trainer import Trainer


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def test_groups_stay_whole_and_every_sample_is_in_one_mini_batch():
    groups = [[(problem, copy) for copy in range(3)] for problem in range(5)]
    parts = split_groups(groups, 2)
    assert parts == [groups[0] + groups[2] + groups[4], groups[1] + groups[3]]


@pytest.mark.parametrize("updates", [{"epochs": 2}, {"mini_batches": 2}])
def test_old_logprobs_are_those_of_the_policy_before_the_updates(updates):
    model, objective = make_model(), objectives.dapo()
    micro_batches = packed(make_samples(), objective, max_tokens=20)
    assert len(micro_batches) > 1
    prepared = with_old_policy(model, micro_batches, objective, UpdateConfig(**updates), temperature=0.5)
    for before, after in zip(micro_batches, prepared, strict=True):
        assert torch.equal(after.batch.old_logprob, score(model, before, 0.5))
        assert torch.equal(after.batch.weight, before.batch.weight)


def test_a_single_update_without_correction_is_left_alone():
    model, objective = make_model(), objectives.dapo()
    micro_batches = packed(make_samples(), objective)
    assert with_old_policy(model, micro_batches, objective, UpdateConfig(), 1.0) == micro_batches


@pytest.mark.parametrize(
    ("objective", "updates", "passes"),
    [
        (objectives.sft(), {"mini_batches": 4}, 0),
        (objectives.trsft(entropy_coef=0.1), {"epochs": 2}, 0),
        (objectives.sft(), {"correction": CorrectionConfig("tis")}, 0),  # as a chooser may have it of a step
        (objectives.psft(), {"epochs": 2}, 1),  # whose expert term has a ratio
        (objectives.rloo(), {"epochs": 2}, 1),  # which has none, but the sampler is measured by the policy that sampled
        (objectives.trapo(), {"correction": CorrectionConfig("tis")}, 1),
    ],
)
def test_the_policy_is_scored_only_where_that_is_read_and_in_the_mode_of_the_updates(objective, updates, passes, monkeypatch):
    ran, model = [], make_model().eval()  # as evaluating and sampling leave it
    monkeypatch.setattr(updates_module, "score_all", lambda *given: ran.append(model.training) or score_all(*given))
    micro_batches = packed(make_samples(), objective)
    prepared = with_old_policy(model, micro_batches, objective, UpdateConfig(**updates), temperature=1.0)
    assert ran == [True] * passes and (passes or prepared == micro_batches)


@pytest.mark.parametrize("in_second_layer", [False, True])
@pytest.mark.parametrize("name", ["icepop", "tis"])
def test_a_correction_leaves_the_kl_term_and_the_entropy_bonus_alone(name, in_second_layer):
    """As TRL and verl have it: the importance ratio belongs to the policy loss."""
    model, objective = make_model(), objectives.grpo(beta=0.2, entropy_coef=0.05)
    objective = replace(objectives.sft(), plus=objective) if in_second_layer else objective
    (micro_batch,) = packed(make_samples(prefixes=(0, 0, 0)), objective)  # all ratios are between 0.6 and 0.8
    batch = replace(micro_batch.batch, ref_logprob=torch.linspace(-4, -1, 15))
    config = UpdateConfig(correction=CorrectionConfig(name, {"high": 0.6} if name == "icepop" else {"cap": 0.5}))
    (prepared,) = with_old_policy(model, [replace(micro_batch, batch=batch)], objective, config, temperature=1.0)
    assert prepared.batch.active_rows.tolist() == list(range(15))  # of icepop by the KL and the bonus alone
    out = policy_forward(model, prepared, objective)
    factor = torch.zeros(15) if name == "icepop" else torch.full((15,), 0.5)
    d = out.logprob - batch.ref_logprob
    kl, bonus = (batch.weight * (torch.expm1(-d) + d)).sum(), (batch.entropy_weight * out.entropy).sum()
    expected = -(batch.weight * factor * batch.advantage).sum() + 0.2 * kl - 0.05 * bonus
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_of_padded_tensors_takes_a_correction_as_the_trainer_does():
    objective, correction = objectives.grpo(beta=0.2, entropy_coef=0.05), CorrectionConfig("tis", {"cap": 0.65})
    (micro_batch,) = packed(make_samples(prefixes=(0, 0, 0)), objective)  # all ratios are between 0.6 and 0.8
    (prepared,) = with_old_policy(make_model(), [micro_batch], objective, UpdateConfig(correction=correction), temperature=1.0)
    packing, batch = PackingConfig(), prepared.batch
    padded = TokenBatch.from_padded(
        batch.target.view(3, 5),
        torch.ones(3, 5),
        aggregation=packing.aggregation,
        max_tokens=10,
        correction=prepared.correction["factor"].view(3, 5),
    )
    assert len(padded.weight.unique()) > 1
    for name in ("weight", "kl_weight", "entropy_weight"):
        torch.testing.assert_close(getattr(padded, name), getattr(batch, name))


@pytest.mark.parametrize(
    ("name", "options"), [("tis", {"cap": 1.5}), ("icepop", {}), ("mis", {"level": "sequence"}), ("sequence_mask", {})]
)
def test_a_correction_scales_the_weights_of_rollout_tokens(name, options):
    model, objective = make_model(), objectives.trapo()
    (micro_batch,) = packed(make_samples(), objective)
    config = UpdateConfig(correction=CorrectionConfig(name, options))
    (prepared,) = with_old_policy(model, [micro_batch], objective, config, temperature=1.0)
    batch, logprob = micro_batch.batch, score(model, micro_batch)
    extra = {} if name == "icepop" else {"sequence_id": batch.sequence_id}
    factor = getattr(corrections, name)(batch.role, logprob, batch.rollout_logprob, **extra, **options)
    assert torch.equal(prepared.batch.weight, batch.weight * factor)
    expert = batch.role == Role.EXPERT
    assert torch.equal(prepared.batch.weight[expert], batch.weight[expert])
    assert prepared.batch.old_logprob is None  # one update: the policy is its own old one


@pytest.mark.parametrize("name", ["tis", "mis", "icepop", "sequence_mask"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_logprob_that_is_not_finite_shows_in_the_loss_and_stops_no_rank_on_the_way(name, epochs):
    model, objective = make_model(), objectives.trapo()
    micro_batches = packed(make_samples(), objective)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    config = UpdateConfig(epochs=epochs, correction=CorrectionConfig(name))
    for prepared in with_old_policy(model, micro_batches, objective, config, temperature=1.0):
        out = policy_forward(model, prepared, objective)
        assert not out.loss.isfinite()
        tally = Tally()
        tally.add(out, prepared, objective)
        assert math.isnan(tally.result({})["rollout/mismatch_kl"])


@pytest.mark.parametrize(("negative_only", "kept"), [(True, [1, 0, 1]), (False, [0, 0, 0])])
def test_a_sequence_mask_of_one_side_leaves_sequences_of_positive_advantage(negative_only, kept):
    model, objective = make_model(), objectives.dr_grpo()
    (micro_batch,) = packed(make_samples((0.5, -0.5, 0.25), (0, 0, 0)), objective)
    correction = CorrectionConfig("sequence_mask", {"low": 2.0, "negative_only": negative_only})  # every ratio is below
    (prepared,) = with_old_policy(model, [micro_batch], objective, UpdateConfig(correction=correction), temperature=1.0)
    assert torch.equal(prepared.batch.weight, micro_batch.batch.weight * torch.tensor(kept).repeat_interleave(5))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("icepop", {"low": 0.9, "high": 1.1}),
        ("mis", {"low": 5.0, "high": 6.0}),  # masks everything
        ("tis", {"cap": 1.05}),
        ("tis", {"cap": 1.0, "level": "sequence"}),
        ("sequence_mask", {"low": 1.0}),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2])
def test_metrics_tell_the_mismatch_before_a_correction_and_what_it_did_however_the_batch_is_split(name, options, epochs):
    objective = objectives.trapo(entropy_coef=0.0)
    samples = make_samples((0.5, -0.5, 0.25, 0.0), (0, 0, 4, 0))  # the last is in no loss
    for sample, noise in zip(samples, ((0.0, 0.3, -0.3, 0.05, 1.0), (-0.1,) * 5, (0.2,) * 5, (9.0,) * 5), strict=True):
        sample.completion_logprobs = tuple(-2.4 + x for x in noise)
    config = UpdateConfig(epochs=epochs, correction=CorrectionConfig(name, options))
    found = []
    for max_tokens in (1000, 14):
        prepared = with_old_policy(make_model(), packed(samples, objective, max_tokens), objective, config, temperature=1.0)
        found.append(step(make_model(), prepared, objective))
    whole, split = found
    assert split.pop("micro_batches") > whole.pop("micro_batches") == 1
    assert whole.pop("trsft/weight_histogram") == split.pop("trsft/weight_histogram")
    assert whole == pytest.approx(split, rel=1e-5, abs=1e-7)

    (micro_batch,) = packed(samples, objective)
    batch, model = micro_batch.batch, make_model()
    rollout, logprob = batch.role == Role.ROLLOUT, score(model, micro_batch)
    log_ratio = (logprob - batch.rollout_logprob)[rollout]
    extra = {} if name == "icepop" else {"sequence_id": batch.sequence_id}
    factor = getattr(corrections, name)(batch.role, logprob, batch.rollout_logprob, **extra, **options)[rollout]
    expected = {
        "rollout/mismatch_kl": -log_ratio.mean(),
        "rollout/mismatch_above_10_percent": ((log_ratio.exp() - 1).abs() > 0.1).float().mean(),
        "rollout/mismatch_p95": quantile(log_ratio.abs(), 0.95),
        "correction/mean": factor.mean(),
        "correction/masked_share": (factor == 0).float().mean(),
        "correction/capped_share": ((factor == options.get("cap")) if name == "tis" else 0 * factor).float().mean(),
    }
    for key, value in expected.items():
        assert whole[key] == pytest.approx(float(value), rel=1e-5, abs=1e-7), key
    touched = whole["correction/capped_share" if name == "tis" else "correction/masked_share"]
    assert touched == 1.0 if name == "mis" else 0 < touched < 1


def test_what_a_correction_did_is_that_of_all_ranks():
    objective, config = objectives.dapo(), UpdateConfig(correction=CorrectionConfig("icepop", {"low": 0.9, "high": 1.1}))
    model = make_model()
    prepared = with_old_policy(model, packed(make_samples(prefixes=(0, 2, 4)), objective, 14), objective, config, temperature=1.0)
    assert len(prepared) == 3
    alone, ranks = Tally(), [Tally() for _ in prepared]
    for micro_batch, rank in zip(prepared, ranks, strict=True):
        out = policy_forward(model, micro_batch, objective)
        alone.add(out, micro_batch, objective)
        rank.add(out, micro_batch, objective)
    together = Tally.merged([rank.on_cpu() for rank in ranks]).result({})
    assert together == pytest.approx(alone.result({}), rel=1e-6)
    assert together["correction/masked_share"] > 0 and together["rollout/mismatch_kl"] != 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UpdateConfig(mini_batches=0), "mini_batches must be at least 1, got 0"),
        (lambda: CorrectionConfig("vtrace"), "name must be one of tis, mis, icepop, sequence_mask, got 'vtrace'"),
        (lambda: CorrectionConfig("tis", {"low": 1}), "options of tis are cap, level, got 'low'"),
        (lambda: CorrectionConfig("tis", {"cap": -1.0}), r"cap must lie in \(0"),
        (lambda: CorrectionConfig("tis", {"cap": True}), r"cap must lie in \(0, inf\], got True"),
        (lambda: CorrectionConfig("tis", {"negative_only": True}), "options of tis are cap, level, got 'negative_only'"),
        (lambda: CorrectionConfig("sequence_mask", {"advantage": 1}), "are low, high, negative_only, got 'advantage'"),
        (lambda: CorrectionConfig("sequence_mask", {"negative_only": "yes"}), "must be true or false, got 'yes'"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_metrics_of_updates_are_merged():
    updates = [
        {"loss": 1.0, "loss_tokens": 3, "rollout/ratio_max": 2.0, "learning_rate": 0.1, "skipped_step": 0, "h": [1, 0]},
        {"loss": 3.0, "loss_tokens": 4, "rollout/ratio_max": 1.5, "learning_rate": 0.2, "skipped_step": 0, "h": [0, 2]},
    ]
    whole = {"loss": 2.0, "loss_tokens": 7, "rollout/ratio_max": 2.0, "learning_rate": 0.2, "skipped_step": 0, "h": [1, 2]}
    assert merge_updates(updates) == whole
    skipped = {"loss": float("nan"), "loss_tokens": 5, "rollout/ratio_max": 9.0, "learning_rate": 0.3, "skipped_step": 1}
    assert merge_updates([*updates, skipped]) == whole | {"loss_tokens": 12, "learning_rate": 0.3, "skipped_step": 1}
    empty = {"loss": 0.0, "loss_tokens": 0, "learning_rate": 0.4, "skipped_step": 0}  # of a mini-batch that nothing is left of
    assert merge_updates([*updates, empty]) == whole | {"learning_rate": 0.4} and merge_updates([empty, empty])["loss"] == 0.0
    masked = empty | {"correction/masked_share": 1.0}  # which tells of the correction, and nothing of a loss
    both = merge_updates([updates[0] | {"correction/masked_share": 0.5}, masked])
    assert (both["loss"], both["correction/masked_share"]) == (1.0, 0.75)
    assert merge_updates([skipped, skipped])["skipped_step"] == 2 and math.isnan(merge_updates([skipped, skipped])["loss"])


def test_means_over_tokens_are_those_of_all_tokens_of_all_updates():
    """Mini-batches of two and four samples, each the first update of one model, report what one update of all six does."""
    objective, found = objectives.chord_mu(), []
    samples = make_samples() + make_samples(prefixes=(1, 1, 1))
    for parts in ([samples[:2], samples[2:]], [samples]):
        updates = [packed(part, objective) for part in parts]
        updates = [[with_stream(m, "old_logprob", -m.batch.target.float()) for m in update] for update in updates]
        reported = [step(make_model(), update, objective) for update in updates]
        found.append(merge_updates(reported))
    split, whole = found
    means = [name for name, value in reported[0].items() if isinstance(value, Mean) and not name.endswith(("_max", "_p95"))]
    assert {"rollout/clip_high", "rollout/mismatch_kl", "expert/logprob", "entropy/rollout"} <= set(means)
    assert {name: split[name] for name in means} == pytest.approx({name: whole[name] for name in means}, rel=1e-5)
    assert split["rollout/ratio_max"] == pytest.approx(whole["rollout/ratio_max"])


def coin(prompts, completions, **columns):
    """A reward that an untrained model earns half of the time."""
    return [float(sum(map(ord, completion)) % 2) for completion in completions]


def test_the_reference_of_a_model_with_lora_is_the_model_without_its_adapters(configure):
    pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    trainer = Trainer(configure("run", "model.lora={rank: 2}", "objective={name: grpo, options: {beta: 0.1}}"))
    micro_batches = packed(make_samples(), trainer.objective)
    before = score_all(trainer.model, micro_batches, 1.0)  # adapters add 0 as yet
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    (scored,) = with_reference(trainer.reference, micro_batches, trainer.objective, 1.0)
    torch.testing.assert_close(scored.batch.ref_logprob, before[0])
    assert not torch.allclose(score(trainer.model, scored), before[0], atol=1e-3)


def test_the_reference_holds_its_matrices_in_the_compute_type_and_scores_as_before(configure):
    trainer = Trainer(configure("run", "model.dtype=bfloat16", "objective={name: grpo, options: {beta: 0.1}}"))
    held = {p.dtype for p in trainer.reference.parameters() if p.ndim == 2}
    assert held == {torch.bfloat16} and {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    micro_batches = packed(make_samples(), trainer.objective)
    (scored,) = with_reference(trainer.reference, micro_batches, trainer.objective, 1.0)
    assert torch.equal(scored.batch.ref_logprob, score_all(trainer.model, micro_batches, 1.0)[0])


def test_a_run_with_four_updates_per_step_leaves_the_old_policy(configure):
    overrides = (
        "reward='tests.trapo_train.step.test_updates:coin'",
        "updates={mini_batches: 2, epochs: 2, correction: {name: tis}}",
        "objective={name: dapo}",
        "plan.name=grpo",
        "optimizer.schedule=linear",
        "optimizer.warmup_steps=0",
        "optimizer.learning_rate=0.02",
    )
    whole = configure("whole", *overrides)
    train_to_end(whole)
    rows = [row for row in read_metrics(f"{whole.output_dir}/metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == whole.steps
    assert any(abs(row.get("rollout/ratio_max", 1.0) - 1.0) > 1e-4 for row in rows)  # later updates are off-policy
    assert rows[-1]["learning_rate"] == pytest.approx(0.02 / (4 * whole.steps))  # the schedule counts optimizer steps
