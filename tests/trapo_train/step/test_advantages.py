"""Advantages and prefix weights of groups small enough to compute by hand."""

import math
from statistics import fmean, stdev
from typing import get_args, get_type_hints

import pytest

from trapo_train.records import Problem, Sample
from trapo_train.step.advantages import (
    AdvantageConfig,
    assign_advantages,
    assign_prefix_weights,
)

NORMALISATIONS, BASELINES, CENTERS = (
    get_args(get_type_hints(AdvantageConfig)[name]) for name in ("normalise", "baseline", "center")
)


def sample(reward, prefix=(), index=0):
    problem = Problem(index, "p", (1,))
    return Sample(problem, 1, 0.5 if prefix else 0.0, prefix, (5,), (-1.0,), "stop", reward=reward)


def advantages(samples, **options):
    assign_advantages([samples], AdvantageConfig(**options))
    return [s.advantage for s in samples]


def test_all_samples_of_the_problem_are_the_baseline_guided_ones_too():
    group = [sample(0.0), sample(0.0), sample(1.0, (7,)), sample(1.0, (7, 8, 9))]
    assert advantages(group) == [-0.5, -0.5, 0.5, 0.5]


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_the_last_digits_of_a_weighted_sum_are_no_difference(normalise):
    group = [sample(0.1 + 0.2), sample(0.3)]  # 0.30000000000000004 and 0.3
    assert group[0].reward != group[1].reward
    assert advantages(group, normalise=normalise) == [0.0, 0.0]
    assert advantages([sample(1.0 + 2**-20), sample(1.0)], normalise=normalise)[0] > 0  # which is one


def test_the_mean_of_a_group_is_computed_once_for_all_of_its_samples(monkeypatch):
    means = []
    monkeypatch.setattr("trapo_train.step.advantages.fmean", lambda values: means.append(len(values)) or fmean(values))
    assert advantages([sample(float(i)) for i in range(5)]) == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert means == [5]


def test_unguided_baseline():
    group = [sample(0.0), sample(1.0), sample(1.0, (7,)), sample(0.25, (7,))]
    assert advantages(group, baseline="unguided") == [-0.5, 0.5, 0.5, -0.25]


@pytest.mark.parametrize("normalise", ["group_std", "batch_std"])
@pytest.mark.parametrize("expert", [1.0, 0.25])
def test_the_deviation_is_of_the_samples_that_the_mean_is_of(normalise, expert):
    rewards = [1.0, 0.0, 0.0, 0.0]
    found = advantages([*map(sample, rewards), sample(expert, (7,))], normalise=normalise, baseline="unguided")
    assert found == pytest.approx([(r - 0.25) / stdev(rewards) for r in [*rewards, expert]])
    assert found[:4] == advantages([*map(sample, rewards)], normalise=normalise)


def test_a_guided_sample_beside_unguided_ones_that_are_all_alike_is_divided_by_nothing():
    for rewards in ([1.0, 1.0, 1.0], [1.0]):
        group = [*map(sample, rewards), sample(0.25, (7,))]
        assert advantages(group, normalise="group_std", baseline="unguided") == [0.0] * len(rewards) + [-0.75]


def test_unguided_rewards_that_differ_in_their_last_digits_have_no_deviation():
    group = [sample(0.1 + 0.2 + 0.3), sample(0.3 + 0.2 + 0.1), sample(1.0, (7,))]
    assert group[0].reward != group[1].reward
    assert advantages(group, normalise="group_std", baseline="unguided")[2] == pytest.approx(0.4)


def test_unguided_baseline_without_unguided_sample_is_zero():
    assert advantages([sample(0.0, (7,)), sample(1.0, (7,))], baseline="unguided") == [0.0, 0.0]


def test_group_std_divides_by_the_standard_deviation():
    assert advantages([sample(0.0), sample(2.0), sample(4.0)], normalise="group_std") == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("normalise", ["none", "group_std"])
@pytest.mark.parametrize("baseline", ["all", "unguided"])
@pytest.mark.parametrize("rewards", [[1.0], [0.1, 0.1, 0.1], [0.0] * 8])
def test_equal_rewards_and_single_samples_are_exactly_zero(rewards, normalise, baseline):
    group = [sample(reward) for reward in rewards]
    for s in group:
        s.advantage = 99.0
    assert advantages(group, normalise=normalise, baseline=baseline) == [0.0] * len(rewards)


def test_groups_do_not_mix_and_may_be_empty():
    first = [sample(0.0, index=0), sample(1.0, index=0)]
    second = [sample(10.0, index=1), sample(30.0, index=1)]
    assign_advantages([first, [], second], AdvantageConfig())
    assert [s.advantage for s in first + second] == [-0.5, 0.5, -10.0, 10.0]


def test_a_group_of_two_problems_is_refused():
    with pytest.raises(ValueError, match=r"samples of one problem, got problems \[0, 1\]"):
        assign_advantages([[sample(0.0, index=0), sample(1.0, index=1)]], AdvantageConfig())


def test_identical_prefixes_share_one_weight():
    group = [sample(0, (7, 8)), sample(0, (7, 8)), sample(0, (7, 8, 9)), sample(0), sample(0)]
    group[3].prefix_weight = 0.5
    assign_prefix_weights(group)
    assert [s.prefix_weight for s in group] == [0.5, 0.5, 1.0, 1.0, 1.0]
    assign_prefix_weights(group[:1])
    assert group[0].prefix_weight == 1.0


def grouped(*groups):
    """Samples without prefix from lists of rewards, one group per list."""
    return [[sample(reward, index=index) for reward in rewards] for index, rewards in enumerate(groups)]


def step_advantages(groups, **options):
    assign_advantages(groups, AdvantageConfig(**options))
    return [s.advantage for group in groups for s in group]


def test_batch_std_divides_by_the_deviation_of_all_rewards_of_the_step():
    deviation = stdev([0.0, 1.0, 4.0, 6.0])
    assert step_advantages(grouped([0.0, 1.0], [4.0, 6.0]), normalise="batch_std") == pytest.approx(
        [-0.5 / deviation, 0.5 / deviation, -1.0 / deviation, 1.0 / deviation]
    )


def test_rloo_leaves_the_sample_itself_out():
    rewards = [0.0, 1.0, 1.0, 4.0]
    expected = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert step_advantages(grouped(rewards), center="leave_one_out") == pytest.approx(expected)


def test_rloo_with_the_unguided_baseline_compares_guided_samples_with_all_unguided_ones():
    group = [sample(0.0), sample(1.0), sample(1.0, (7,))]
    assert advantages(group, center="leave_one_out", baseline="unguided") == [-1.0, 1.0, 0.5]


def test_rloo_without_another_unguided_sample_is_zero():
    assert advantages([sample(1.0), sample(0.0, (7,))], center="leave_one_out", baseline="unguided") == [0.0, -1.0]


def test_reinforce_pp_whitens_the_rewards_of_the_step():
    values = step_advantages(grouped([0.0, 1.0, 1.0], [2.0]), center="none", normalise="batch")
    deviation = stdev([0.0, 1.0, 1.0, 2.0])
    assert values == pytest.approx([-1.0 / deviation, 0.0, 0.0, 1.0 / deviation])


def test_whitening_takes_a_mean_away_however_small_it_is_beside_the_deviation():
    values = step_advantages(grouped([1.0], [-1.0], [1.0], [-0.998]), center="none", normalise="batch")
    assert sum(values) == pytest.approx(0.0, abs=1e-9)


def test_reinforce_pp_with_a_baseline_whitens_what_the_group_mean_leaves():
    values = step_advantages(grouped([0.0, 1.0], [4.0, 6.0]), normalise="batch")
    deviation = stdev([-0.5, 0.5, -1.0, 1.0])
    assert values == pytest.approx([-0.5 / deviation, 0.5 / deviation, -1.0 / deviation, 1.0 / deviation])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_whitening_centred_advantages_leaves_zeros_exactly_zero(scale):
    groups = [[scale * reward for reward in group] for group in ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0])]
    values = step_advantages(grouped(*groups), normalise="batch")
    centred = step_advantages(grouped(*groups))
    assert fmean(centred) != 0.0  # which rounding left
    assert values[6:] == [0.0] * 3
    assert values == pytest.approx([value / stdev(centred) for value in centred])


def test_a_step_of_rewards_that_differ_in_their_last_digits_is_whitened_to_exactly_zero():
    assert step_advantages(grouped([0.1 + 0.2], [0.3]), center="none", normalise="batch") == [0.0, 0.0]


def test_without_centre_the_advantage_is_the_reward():
    assert step_advantages(grouped([2.0], [1.0, 1.0]), center="none") == [2.0, 1.0, 1.0]


def test_same_prefix_compares_samples_that_start_alike():
    group = [sample(0.0), sample(1.0), sample(1.0, (7,)), sample(0.0, (7,)), sample(1.0, (7, 8))]
    assert advantages(group, baseline="same_prefix") == [-0.5, 0.5, 0.5, -0.5, 0.0]
    assert advantages(group, baseline="same_prefix", center="leave_one_out") == [-1.0, 1.0, 1.0, -1.0, 0.0]
    scale = stdev([0.0, 1.0])
    assert advantages(group, baseline="same_prefix", normalise="group_std") == pytest.approx(
        [-0.5 / scale, 0.5 / scale, 0.5 / scale, -0.5 / scale, 0.0]
    )


VALID = [
    {"normalise": normalise, "baseline": baseline, "center": center}
    for normalise in NORMALISATIONS
    for baseline in BASELINES
    for center in CENTERS
    if center != "none" or (baseline == "all" and normalise in ("none", "batch"))
]


@pytest.mark.parametrize("options", VALID, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("rewards", [[], [[]], [[1.0]], [[0.1] * 3, [0.1]], [[0.1, 0.1, 0.1], [0.0, 1.0]]])
def test_nothing_to_compare_is_never_nan(options, rewards):
    groups = grouped(*rewards)
    values = step_advantages(groups, **options)
    assert all(math.isfinite(value) for value in values)
    flat = [(s.advantage, {peer.reward for peer in group}) for group in groups for s in group]
    equal = [value for value, group_rewards in flat if len(group_rewards) == 1]
    if options["center"] != "none" and equal:
        assert len(set(equal)) == 1
        assert equal[0] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "std"}, "normalise must be one of none, group_std, batch_std, batch, got 'std'"),
        ({"baseline": "mean"}, "baseline must be one of all, unguided, same_prefix, got 'mean'"),
        ({"center": "median"}, "center must be one of mean, leave_one_out, none, got 'median'"),
        ({"center": "none", "normalise": "group_std"}, "got 'group_std'.*Use center=\"mean\""),
        ({"center": "none", "baseline": "unguided"}, "got baseline 'unguided'. Leave baseline out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdvantageConfig(**options)
