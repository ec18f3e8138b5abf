"""What a step reports is that of all of its tokens, however micro-batches and ranks share them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.trapo_train.step.test_optimizer_step import make_model, make_samples, packed, step, with_stream
from trapo_kernels import objectives
from trapo_train.models.model import policy_forward, score
from trapo_train.step.tally import Tally, quantile
from trapo_train.step.updates import CorrectionConfig, UpdateConfig, with_old_policy


def test_the_quantile_is_that_of_torch_and_takes_any_number_of_values():
    for values in (torch.randn(1), torch.randn(1001), torch.full((3,), torch.nan)):
        values[::3] = torch.nan if len(values) > 1 else values[0]
        expected = torch.nanquantile(values.double(), 0.95)
        torch.testing.assert_close(quantile(values, 0.95), expected, equal_nan=True)
    many = torch.ones(2**24 + 1)  # one more than torch.nanquantile takes
    assert quantile(many, 0.95) == 1.0


def test_metrics_of_a_kl_term_are_means_over_the_tokens_whose_kl_has_a_weight():
    """As beside a correction that masks tokens: they count in the KL term alone."""
    objective, found = objectives.grpo(beta=0.1), []
    for max_tokens in (1000, 8):
        micro_batches = []
        for micro_batch in packed(make_samples(prefixes=(0, 0, 0)), objective, max_tokens):
            target, weight = micro_batch.batch.target, micro_batch.batch.weight
            micro_batch = with_stream(micro_batch, "kl_weight", weight)
            micro_batch = with_stream(micro_batch, "weight", torch.where(target < 4, 0.0, weight))
            micro_batches.append(with_stream(micro_batch, "ref_logprob", -target.float()))
        found.append(step(make_model(), micro_batches, objective))
    whole, split = found
    assert (whole.pop("micro_batches"), split.pop("micro_batches")) == (1, 3)
    assert whole == pytest.approx(split, rel=1e-5) and whole["rollout/kl_ref"] != whole["rollout/kl_ref_k1"]


@pytest.mark.parametrize("correction", [None, CorrectionConfig("tis")])
def test_tokens_of_the_entropy_bonus_alone_tell_nothing_of_the_sampler(correction):
    objective, config = objectives.dr_grpo(entropy_coef=0.1), UpdateConfig(correction=correction)
    samples, found = make_samples((0.5, 0.0), (0, 0)), []
    samples[1].completion_logprobs = (-9.0,) * 5
    for part in (samples, samples[:1]):
        model = make_model()
        metrics = step(model, with_old_policy(model, packed(part, objective), objective, config, 1.0), objective)
        found.append({name: value for name, value in metrics.items() if name.startswith(("rollout/mismatch", "correction/"))})
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == (3 if correction is None else 6)


def test_a_maximum_is_that_of_all_ranks_in_any_order():
    model, objective, ranks = make_model(), objectives.dapo(), []
    for micro_batch, log_ratio in zip(packed(make_samples(prefixes=(0, 0, 0)), objective, 8), (0.1, 0.9, 0.5), strict=True):
        micro_batch = with_stream(micro_batch, "old_logprob", score(model, micro_batch) - log_ratio)
        ranks.append(Tally())
        ranks[-1].add(policy_forward(model, micro_batch, objective), micro_batch, objective)
    for order in itertools.permutations(ranks):
        assert Tally.merged(order).result({})["rollout/ratio_max"] == pytest.approx(math.exp(0.9), rel=1e-5)
