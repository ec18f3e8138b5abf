"""Plans without a model: what TRAPO's ladder asks for after every possible sequence of rewards."""

import itertools
from dataclasses import replace
from statistics import fmean

import pytest

from trapo_train.records import ExpertTrace, Problem, Request
from trapo_train.rollouts.plans import DeferredProblems, Outcome, PlanConfig, Rung, build_plan, plan_rungs


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


def finish(config, rewards, num_experts=1, index=0, **at):
    """Run a plan of constant rewards to its end; returns its requests and its outcome."""
    generator = build_plan(config, **at)(replace(problem(num_experts), index=index))
    requests, request = [], next(generator)
    while True:
        requests.append(request)
        try:
            request = generator.send([rewards] * request.num_samples)
        except StopIteration as end:
            return requests, end.value


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
    assert climb(PlanConfig("sft"), [1, 0, 1], num_experts=3) == [Request(1, 1.0, i) for i in range(3)]
    assert climb(PlanConfig("luffy"), [1] * 8, num_experts=2) == [Request(7), Request(1, 1.0, 0)]
    assert climb(PlanConfig("luffy", num_samples=2), [1, 1]) == [Request(1), Request(1, 1.0)]


@pytest.mark.parametrize("name", ["paper", "release", "grpo", "luffy"])
def test_eight_samples_per_problem(name):
    assert sum(rung.samples for rung in plan_rungs(PlanConfig(name))) == 8


@pytest.mark.parametrize("name", ["paper", "release", "sft", "luffy", "prefix_rft", "uft", "hpt", "ladder"])
@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_a_plan_says_which_traces_it_uses(name, num_experts):
    guidance = 0.5 if name in ("prefix_rft", "uft") else None
    rungs = (Rung(1), Rung(1, 0.5, expert_index=2), Rung(1, 0.5, expert_index=7)) if name == "ladder" else ()
    config = PlanConfig(name, guidance=guidance, rungs=rungs)
    requests = [request for index in range(20) for request in finish(config, 0.0, num_experts, index)[0]]
    assert {request.expert_index for request in requests if request.prefix_ratio} == config.traces_used(num_experts)
    assert PlanConfig("grpo").traces_used(num_experts) == set()


def test_a_plan_has_no_memory_between_problems():
    plan = build_plan(PlanConfig("paper"))
    first, second = plan(problem()), plan(problem())
    next(first), next(second)
    assert first.send([0.0] * 4) == Request(2, 0.2)
    assert second.send([1.0] * 4) == Request(2)


RANDOM = {
    "prefix_rft": PlanConfig("prefix_rft", guidance=0.2),
    "uft": PlanConfig("uft", guidance=0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_plans_are_pure_functions_of_problem_step_and_seed(name):
    draw = lambda **at: [r.prefix_ratio for r in finish(RANDOM[name], 0.0, **at)[0]]  # noqa: E731
    assert draw(step=3, seed=1) == draw(step=3, seed=1)
    for others in (
        [{"step": i, "seed": 1} for i in range(9)],
        [{"step": 3, "seed": i} for i in range(9)],
        [{"index": i} for i in range(9)],
    ):
        assert len({tuple(draw(**at)) for at in others}) > 1


def test_prefix_rft_draws_one_prefix_between_the_schedule_and_the_longest():
    schedule = {"schedule": "cosine", "start": 0.9, "end": 0.1, "steps": 10}
    config = PlanConfig("prefix_rft", num_samples=4, guidance=schedule, longest_prefix=0.9)
    assert finish(config, 0.0, step=0)[0] == [Request(3), Request(1, 0.9, snap=False)]
    for step, low in ((5, 0.5), (10, 0.1), (99, 0.1)):
        ratios = [finish(config, 0.0, index=i, step=step)[0][1].prefix_ratio for i in range(200)]
        assert low <= min(ratios) < low + 0.05
        assert 0.85 < max(ratios) <= 0.9
        assert fmean(ratios) == pytest.approx((low + 0.9) / 2, abs=0.05)
    assert finish(config, 0.0, num_experts=0)[0] == [Request(3), Request(1)]


def test_uft_hints_are_binomial_chunks():
    config = PlanConfig("uft", num_samples=3, guidance=0.4, chunks=5)
    requests = [finish(config, 0.0, index=i)[0] for i in range(1000)]
    assert all(len(request) == 1 for request in requests)
    ratios = [request[0].prefix_ratio for request in requests]
    assert set(ratios) == {i / 5 for i in range(6)}
    assert fmean(ratios) == pytest.approx(0.4, abs=0.02)
    assert fmean(ratio**2 for ratio in ratios) == pytest.approx(0.16 + 0.4 * 0.6 / 5, abs=0.02)
    assert {request[0].num_samples for request in requests if request[0].prefix_ratio == 1.0} == {1}
    assert {request[0].num_samples for request in requests if request[0].prefix_ratio < 1.0} == {3}


def test_uft_ends_without_hints():
    config = PlanConfig("uft", guidance={"schedule": "cosine", "start": 0.95, "end": 0.05, "steps": 300, "after": 0})
    assert all(finish(config, 0.0, index=i, step=300)[0] == [Request(8, snap=False)] for i in range(50))
    assert finish(config, 0.0, num_experts=0)[0] == [Request(8, snap=False)]


def test_hpt_replaces_what_failed_by_the_trace():
    config = PlanConfig("hpt", num_samples=4)
    assert finish(config, 0.0) == ([Request(4), Request(1, 1.0)], Outcome(dropped=frozenset({1})))
    assert finish(config, 0.25) == ([Request(4)], Outcome())
    assert finish(config, 0.0, num_experts=0) == ([Request(4)], Outcome())
    assert finish(PlanConfig("hpt", num_samples=4, unsolved_at=0.25), 0.25)[1].dropped == {1}


def test_relift_defers_what_failed():
    config = PlanConfig("relift", num_samples=4)
    assert finish(config, 0.0) == ([Request(4)], Outcome(deferred=True))
    assert finish(config, 0.25) == ([Request(4)], Outcome())
    assert finish(config, 0.0, num_experts=0) == ([Request(4)], Outcome())


def test_deferred_problems_wait_in_order_each_once():
    deferred = DeferredProblems(3)
    deferred.add([5, 2])
    assert deferred.take() == []
    deferred.add([2, 7, 7, 1])
    copy = DeferredProblems(3)
    copy.load_state_dict(deferred.state_dict())
    assert deferred.take() == copy.take() == [5, 2, 7]
    assert deferred.take() == [] and len(deferred) == 1
    none = DeferredProblems(None)
    none.add([1, 2, 3])
    assert none.take() == []


def test_a_problem_that_is_deferred_is_not_compared_with_all_that_wait():
    class Position(int):
        compared = 0
        __hash__ = int.__hash__

        def __eq__(self, other):
            Position.compared += 1
            return int(self) == int(other)

    deferred = DeferredProblems(500)
    for start in (0, 100, 300):
        deferred.add(Position(start + i) for i in range(300))
    assert Position.compared < 1000  # 200 wait already; one by one it would be more than 100 000
    assert deferred.take() == list(range(500))


@pytest.mark.parametrize(
    ("config", "largest", "thresholds"),
    [
        (PlanConfig("paper"), 4, True),
        (PlanConfig("sft"), 0, False),
        (PlanConfig("grpo", num_samples=3), 3, False),
        (PlanConfig("luffy"), 7, False),
        (PlanConfig("uft", guidance=0.5), 8, False),
        (PlanConfig("hpt"), 8, True),
        (PlanConfig("ladder", rungs=(Rung(2), Rung(5, 1.0))), 2, False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_how_many_samples_a_plan_asks_for_at_once_and_whether_it_compares_rewards(config, largest, thresholds):
    assert (config.largest_request, config.has_thresholds) == (largest, thresholds)
    assert (plan_rungs(config) is None) == (config.name in ("uft", "hpt"))


def test_which_plans_use_experts():
    assert not PlanConfig("grpo").guides
    assert not PlanConfig("ladder", rungs=(Rung(2),)).guides
    assert PlanConfig("ladder", rungs=(Rung(2, 0.5),)).guides
    assert all(PlanConfig(name).guides for name in ("paper", "release", "sft", "luffy", "hpt", "relift"))


def test_wrong_number_of_rewards():
    generator = build_plan(PlanConfig("paper"))(problem())
    next(generator)
    with pytest.raises(ValueError, match="asked for 4 samples, got 3 rewards"):
        generator.send([0.0] * 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlanConfig("trape"), "name must be one of paper, release"),
        (lambda: PlanConfig("paper", num_samples=4), "fixed by the plan 'paper', got 4"),
        (lambda: PlanConfig("grpo", num_samples=0), "at least 1, got 0"),
        (lambda: PlanConfig("luffy", num_samples=1), "at least 2, got 1"),
        (lambda: PlanConfig("ladder"), "at least one, got 0"),
        (lambda: PlanConfig("paper", rungs=(Rung(1),)), "got 1 with the plan 'paper'"),
        (lambda: PlanConfig("ladder", rungs=(Rung(1, 0.5, 0.5),)), "threshold must be null, got 0.5"),
        (lambda: PlanConfig("prefix_rft", num_samples=1, guidance=0.5), "at least 2, got 1"),
        (lambda: PlanConfig("uft"), "guidance must be set for the plan 'uft'"),
        (lambda: PlanConfig("uft", guidance=1.5), "stay in [0, 1]"),
        (lambda: PlanConfig("prefix_rft", guidance=0.96), "stay in [0, 0.95]"),
        (lambda: PlanConfig("prefix_rft", guidance={"schedule": "cosin"}), "got 'cosin'"),
        (lambda: PlanConfig("grpo", guidance=0.5), "guidance belongs to prefix_rft, uft, got 0.5 with the plan 'grpo'. Leave it"),
        (lambda: PlanConfig("hpt", buffer_size=3), "buffer_size belongs to relift, got 3"),
        (lambda: PlanConfig("relift", buffer_size=0), "at least 1, got 0"),
        (lambda: PlanConfig("uft", guidance=0.5, chunks=0), "at least 1, got 0"),
        (lambda: Rung(0), "at least 1, got 0"),
        (lambda: Rung(1, 1.5), "in [0, 1], got 1.5"),
        (lambda: Rung(1, 0.5, float("nan")), "got NaN"),
        (lambda: Rung(1, expert_index=-1), "at least 0, got -1"),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)
