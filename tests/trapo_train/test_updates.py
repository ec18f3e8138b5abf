"""Several updates per rollout step: old logprobs from before the first, corrections in the weights, merged metrics."""

import math
from functools import partial

import pytest
import torch

from tests.trapo_train.test_step import make_model, make_samples, packed
from tests.trapo_train.test_train import build_config, train_to_end
from trapo_kernels import Role, corrections, objectives
from trapo_train.display import read_metrics
from trapo_train.model import score
from trapo_train.updates import CorrectionConfig, UpdateConfig, merge_updates, split_groups, with_old_policy


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def test_groups_stay_whole_and_every_sample_is_in_one_mini_batch():
    groups = [[(problem, copy) for copy in range(3)] for problem in range(5)]
    parts = split_groups(groups, 2)
    assert parts == [groups[0] + groups[2] + groups[4], groups[1] + groups[3]]


def test_old_logprobs_are_those_of_the_policy_before_the_updates():
    model, objective = make_model(), objectives.dapo()
    micro_batches = packed(make_samples(), objective, max_tokens=20)
    assert len(micro_batches) > 1
    prepared = with_old_policy(model, micro_batches, UpdateConfig(epochs=2), temperature=1.0)
    for before, after in zip(micro_batches, prepared, strict=True):
        assert torch.equal(after.batch.old_logprob, score(model, before))
        assert torch.equal(after.batch.weight, before.batch.weight)


def test_a_single_update_without_correction_is_left_alone():
    model, objective = make_model(), objectives.dapo()
    micro_batches = packed(make_samples(), objective)
    assert with_old_policy(model, micro_batches, UpdateConfig(), 1.0) == micro_batches


@pytest.mark.parametrize(
    ("name", "options"), [("tis", {"cap": 1.5}), ("icepop", {}), ("mis", {"level": "sequence"}), ("sequence_mask", {})]
)
def test_a_correction_scales_the_weights_of_rollout_tokens(name, options):
    model, objective = make_model(), objectives.trapo()
    (micro_batch,) = packed(make_samples(), objective)
    config = UpdateConfig(correction=CorrectionConfig(name, options))
    (prepared,) = with_old_policy(model, [micro_batch], config, temperature=1.0)
    batch, logprob = micro_batch.batch, score(model, micro_batch)
    extra = {} if name == "icepop" else {"sequence_id": batch.sequence_id}
    factor = getattr(corrections, name)(batch.role, logprob, batch.rollout_logprob, **extra, **options)
    assert torch.equal(prepared.batch.weight, batch.weight * factor)
    expert = batch.role == Role.EXPERT
    assert torch.equal(prepared.batch.weight[expert], batch.weight[expert])
    assert prepared.batch.old_logprob is None  # one update: the policy is its own old one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UpdateConfig(mini_batches=0), "mini_batches must be at least 1, got 0"),
        (lambda: CorrectionConfig("vtrace"), "name must be one of tis, mis, icepop, sequence_mask, got 'vtrace'"),
        (lambda: CorrectionConfig("tis", {"low": 1}), "options of tis are cap, level, got 'low'"),
        (lambda: CorrectionConfig("tis", {"cap": -1.0}), r"cap must lie in \(0"),
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
    assert merge_updates([skipped, skipped])["skipped_step"] == 2 and math.isnan(merge_updates([skipped, skipped])["loss"])


def coin(prompts, completions, **columns):
    """A reward that an untrained model earns half of the time."""
    return [float(sum(map(ord, completion)) % 2) for completion in completions]


def test_a_run_with_four_updates_per_step_leaves_the_old_policy(configure):
    overrides = (
        "reward='tests.trapo_train.test_updates:coin'",
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
