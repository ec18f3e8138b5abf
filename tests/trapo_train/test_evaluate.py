"""Evaluation with a scripted engine: counts, estimators and groups, each against a hand-made value."""

import itertools
import math

import pytest

from trapo_train.evaluate import EvalConfig, evaluate, group_problems, pass_at_k, standard_error
from trapo_train.records import Completion, ExpertTrace, Problem
from trapo_train.rollout import RolloutConfig
from trapo_train.tasks import build_tokenizer, pointer_chasing_reward

TOKENIZER = build_tokenizer()
ROLLOUT = RolloutConfig(max_response_tokens=8, paragraph_break="|", top_p=0.95)


def ids(text):
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def problem(index, depth):
    prompt = f"ab?a{index + 1}:"
    return Problem(index, prompt, ids(prompt), "de", (ExpertTrace("#de$", ids("#de$")),), {"depth": depth})


class CyclingEngine:
    """Answers the c-th copy of a prompt right while c is below the number of right answers of that problem."""

    def __init__(self, num_right):
        self.num_right = num_right
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append((prompts, params))
        copies = {}
        completions = []
        for prompt in map(tuple, prompts):
            copy = copies[prompt] = copies.get(prompt, -1) + 1
            index = int(TOKENIZER.decode(list(prompt))[-2]) - 1
            text = "#de$" if copy < self.num_right[index] else "aaaaaaaa"
            completions.append(Completion(ids(text), (0.0,) * len(text), "stop" if "$" in text else "length"))
        return completions


def run(config, num_right=(4, 1, 0), depths=(2, 10, 2), **options):
    engine = CyclingEngine(num_right)
    problems = [problem(i, depth) for i, depth in enumerate(depths)]
    return evaluate(engine, problems, pointer_chasing_reward, TOKENIZER, config, ROLLOUT, **options), engine


def test_accuracy_groups_and_lengths():
    metrics, engine = run(EvalConfig(samples_per_prompt=4, group_by="depth", seed=5))
    assert metrics["accuracy"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert metrics["accuracy_stderr"] == pytest.approx(standard_error([1, 0.25, 0]))
    assert metrics["accuracy/depth_2"] == 0.5
    assert metrics["accuracy_stderr/depth_2"] == pytest.approx(0.5)
    assert metrics["accuracy/depth_10"] == 0.25
    assert math.isnan(metrics["accuracy_stderr/depth_10"])
    assert metrics["reward/mean"] == metrics["finished_share"] == pytest.approx(5 / 12)
    assert metrics["completion_tokens_mean"] == pytest.approx((5 * 4 + 7 * 8) / 12)
    assert metrics["num_problems"] == 3
    [(prompts, params)] = engine.calls
    assert len(prompts) == 12
    assert (params.temperature, params.top_p, params.seed) == (1.0, 0.95, 5)
    assert params.budgets(12) == [8] * 12


def test_pass_at_k_is_reported_for_powers_of_two():
    metrics, _ = run(EvalConfig(samples_per_prompt=4))
    assert metrics["pass@2"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["pass@4"] == pytest.approx((1 + 1 + 0) / 3)
    assert [name for name in metrics if name.startswith("pass")] == ["pass@2", "pass@4"]


@pytest.mark.parametrize(("num_correct", "k"), itertools.product(range(6), (1, 2, 3, 5)))
def test_pass_at_k_equals_counting_all_draws(num_correct, k):
    draws = list(itertools.combinations([True] * num_correct + [False] * (5 - num_correct), k))
    assert pass_at_k(5, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_standard_error_is_that_of_the_mean():
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)
    assert standard_error([1.0, 1.0, 1.0]) == 0.0


def test_greedy_and_num_problems():
    metrics, engine = run(EvalConfig(temperature=0.0, num_problems=2), num_right=(1, 0, 1))
    assert metrics["accuracy"] == 0.5
    assert metrics["num_problems"] == 2
    assert engine.calls[0][1].temperature == 0.0


def test_a_bonus_above_one_counts_as_correct_and_a_partial_reward_does_not():
    config = EvalConfig(samples_per_prompt=2)
    rewards = lambda completions, **columns: [1.1, 0.9] * (len(completions) // 2)  # noqa: E731
    metrics = evaluate(CyclingEngine((0,)), [problem(0, 1)], rewards, TOKENIZER, config, ROLLOUT)
    assert metrics["accuracy"] == 0.5
    assert metrics["reward/mean"] == pytest.approx(1.0)


def test_groups_are_in_the_order_of_their_values():
    problems = [problem(i, depth) for i, depth in enumerate((10, 9, "deep", 10, None))]
    groups = group_problems(problems, "depth")
    assert groups == {"depth_9": [1], "depth_10": [0, 3], "depth_None": [4], "depth_deep": [2]}
    assert list(groups) == ["depth_9", "depth_10", "depth_None", "depth_deep"]
    assert group_problems(problems, None) == {}


def test_bad_input_is_refused_before_sampling():
    with pytest.raises(ValueError, match="at least 1 problem, got none"):
        evaluate(CyclingEngine(()), [], pointer_chasing_reward, TOKENIZER, EvalConfig(), ROLLOUT)
    engine = CyclingEngine((0,))
    with pytest.raises(ValueError, match=r"got 'level'; problem 0 has \['depth'\]"):
        evaluate(engine, [problem(0, 1)], pointer_chasing_reward, TOKENIZER, EvalConfig(group_by="level"), ROLLOUT)
    assert engine.calls == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": -1}, "every must be at least 0, got -1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be .* got -1.0"),
        ({"num_problems": 0}, "num_problems must be .* got 0"),
        ({"temperature": 0.0, "samples_per_prompt": 2}, "must be 1 at temperature 0, got 2"),
    ],
)
def test_config_refuses_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**fields)
