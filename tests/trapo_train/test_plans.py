"""Plans without a model: what TRAPO's ladder asks for after every possible sequence of rewards."""

import itertools

import pytest

from trapo_train.plans import PlanConfig, Rung, build_plan, plan_rungs
from trapo_train.records import ExpertTrace, Problem, Request


def problem(num_experts=1):
    return Problem(0, "p", (1,), "s", tuple(ExpertTrace(str(i), (i, 9)) for i in range(num_experts)))


def climb(config, rewards, num_experts=1):
    """Run a plan on a fixed list of rewards and return its requests."""
    generator = build_plan(config)(problem(num_experts))
    requests, rewards = [], list(rewards)
    request = next(generator)
    while True:
        requests.append(request)
        received, rewards = rewards[: request.num_samples], rewards[request.num_samples :]
        try:
            request = generator.send(received)
        except StopIteration:
            return requests


def release_by_sums(rewards, num_experts):
    """The authors' rules as they write them: sums over the samples so far."""
    second = sum(rewards[:4]) < 2
    third = sum(rewards[:6]) < 4
    fourth = sum(rewards[:7]) < 7
    last = 1 if num_experts > 1 else 0
    return [
        Request(4),
        Request(2, 0.25, 0) if second else Request(2),
        Request(1, 0.5, 0) if third else Request(1),
        Request(1, 1.0, last) if fourth else Request(1),
    ]


@pytest.mark.parametrize("num_experts", [1, 2])
def test_release_is_the_authors_sums_for_all_binary_rewards(num_experts):
    for rewards in itertools.product([0.0, 1.0], repeat=8):
        assert climb(PlanConfig("release"), rewards, num_experts) == release_by_sums(rewards, num_experts)


@pytest.mark.parametrize("num_experts", [1, 2])
def test_paper_is_the_papers_means_for_all_binary_rewards(num_experts):
    for rewards in itertools.product([0, 1], repeat=8):
        # In whole numbers: mean < 0.5 of 4, < 0.7 of 6, < 0.9 of 7.
        guided = [10 * sum(rewards[:4]) < 20, 10 * sum(rewards[:6]) < 42, 10 * sum(rewards[:7]) < 63]
        expected = [
            Request(4),
            Request(2, 0.2, 0) if guided[0] else Request(2),
            Request(1, 0.5, 0) if guided[1] else Request(1),
            Request(1, 1.0, num_experts - 1) if guided[2] else Request(1),
        ]
        assert climb(PlanConfig("paper"), rewards, num_experts) == expected


def test_paper_and_release_differ_at_four_of_six():
    rewards = [1, 1, 1, 0, 1, 0, 1, 1]
    assert climb(PlanConfig("paper"), rewards)[2] == Request(1, 0.5)
    assert climb(PlanConfig("release"), rewards)[2] == Request(1)


def test_each_rung_is_decided_afresh():
    # None of 4 right → guided; then 2 of 6 right → guided; here 0 → 1 → 0 → 3: the third rung is skipped, the fourth not.
    config = PlanConfig("ladder", rungs=(Rung(2), Rung(4, 0.3, 0.5), Rung(1, 0.5, 0.6), Rung(1, 1.0, 0.9)))
    requests = climb(config, [0, 0, 1, 1, 1, 1, 0, 0])
    assert [request.prefix_ratio for request in requests] == [0.0, 0.3, 0.0, 1.0]


@pytest.mark.parametrize("name", ["paper", "release", "sft", "luffy"])
def test_a_problem_without_expert_is_never_guided(name):
    assert all(request.prefix_ratio == 0 for request in climb(PlanConfig(name), [0.0] * 8, num_experts=0))


def test_other_plans():
    assert climb(PlanConfig("grpo"), [0] * 8) == [Request(8)]
    assert climb(PlanConfig("grpo", num_samples=3), [0] * 3) == [Request(3)]
    assert climb(PlanConfig("sft"), [1]) == [Request(1, 1.0)]
    assert climb(PlanConfig("luffy"), [1] * 8, num_experts=2) == [Request(7), Request(1, 1.0, 0)]
    assert climb(PlanConfig("luffy", num_samples=2), [1, 1]) == [Request(1), Request(1, 1.0)]


@pytest.mark.parametrize("name", ["paper", "release", "grpo", "luffy"])
def test_eight_samples_per_problem(name):
    assert sum(rung.samples for rung in plan_rungs(PlanConfig(name))) == 8


def test_a_plan_has_no_memory_between_problems():
    plan = build_plan(PlanConfig("paper"))
    first, second = plan(problem()), plan(problem())
    next(first), next(second)
    assert first.send([0.0] * 4) == Request(2, 0.2)
    assert second.send([1.0] * 4) == Request(2)


def test_wrong_number_of_rewards():
    generator = build_plan(PlanConfig("paper"))(problem())
    next(generator)
    with pytest.raises(ValueError, match="asked for 4 samples, got 3 rewards"):
        generator.send([0.0] * 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlanConfig("trapo"), "one of ['paper'"),
        (lambda: PlanConfig("paper", num_samples=4), "fixed by the plan 'paper', got 4"),
        (lambda: PlanConfig("grpo", num_samples=0), "at least 1, got 0"),
        (lambda: PlanConfig("luffy", num_samples=1), "at least 2, got 1"),
        (lambda: PlanConfig("ladder"), "at least one, got 0"),
        (lambda: PlanConfig("paper", rungs=(Rung(1),)), "got 1 with the plan 'paper'"),
        (lambda: PlanConfig("ladder", rungs=(Rung(1, 0.5, 0.5),)), "threshold must be null, got 0.5"),
        (lambda: Rung(0), "at least 1, got 0"),
        (lambda: Rung(1, 1.5), "in [0, 1], got 1.5"),
        (lambda: Rung(1, 0.5, float("nan")), "got NaN"),
        (lambda: Rung(1, expert_index=-1), "≥ 0, got -1"),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)
