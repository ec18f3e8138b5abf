"""Advantages and prefix weights of groups small enough to compute by hand."""

import pytest

from trapo_train.advantages import AdvantageConfig, assign_advantages, assign_prefix_weights
from trapo_train.records import Problem, Sample


def sample(reward, prefix=(), index=0):
    problem = Problem(index, "p", (1,))
    return Sample(problem, 1, 0.5 if prefix else 0.0, prefix, (5,), (-1.0,), "stop", reward=reward)


def advantages(samples, **options):
    assign_advantages([samples], AdvantageConfig(**options))
    return [s.advantage for s in samples]


def test_all_samples_of_the_problem_are_the_baseline_guided_ones_too():
    group = [sample(0.0), sample(0.0), sample(1.0, (7,)), sample(1.0, (7, 8, 9))]
    assert advantages(group) == [-0.5, -0.5, 0.5, 0.5]


def test_unguided_baseline():
    group = [sample(0.0), sample(1.0), sample(1.0, (7,)), sample(0.25, (7,))]
    assert advantages(group, baseline="unguided") == [-0.5, 0.5, 0.5, -0.25]


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


def test_bad_options():
    with pytest.raises(ValueError, match='normalise must be "none" or "group_std", got \'std\''):
        AdvantageConfig(normalise="std")
    with pytest.raises(ValueError, match='baseline must be "all" or "unguided", got \'mean\''):
        AdvantageConfig(baseline="mean")
