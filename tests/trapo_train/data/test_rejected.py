"""Which expert traces a reward rejects while the problems are loaded."""

import pytest

from tests.trapo_train.data.test_dataset import ROWS
from tests.trapo_train.data.test_dataset import load as load
from tests.trapo_train.data.test_dataset import tokenizer as tokenizer
from trapo_train.records import Request
from trapo_train.rewards.builtin import exact_match
from trapo_train.rewards.functions import RewardError, WeightedSum
from trapo_train.rewards.judging import judge_samples
from trapo_train.rollouts.rollout import RolloutConfig, draft

pytestmark = pytest.mark.usefixtures("own_cache")


def test_rejected_experts_are_dropped_and_counted(load):
    dropped = load(ROWS, exact_match, on_rejected_expert="drop")
    assert (dropped.report.experts, dropped.report.dropped_experts, dropped.report.without_expert) == (2, 1, 2)
    assert [len(problem.experts) for problem in dropped] == [1, 0, 0]
    assert "2 expert traces (1 rejected by the reward and dropped)" in str(dropped.report)


def test_a_trace_is_judged_by_the_text_that_a_step_shows_to_the_reward(load, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>"]})
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [1.0] * len(prompts)

    problems = load([{"prompt": "1+1=", "solution": "2", "expert": "so<|channel|>2"}], reward, on_rejected_expert="drop")
    samples = draft(problems[0], Request(1, 1.0), 1, tokenizer, RolloutConfig())
    judge_samples(samples, reward, tokenizer, RolloutConfig())
    assert seen == ["so2", "so2"]


def test_of_several_rewards_the_one_that_says_what_is_correct_rejects_an_expert(load):
    def pleased(prompts, completions, **columns):
        return [1.0] * len(prompts)

    reward = WeightedSum([("exact_match", exact_match, 1.0), ("pleased", pleased, 0.1)])
    dropped = [load(ROWS, reward, name, on_rejected_expert="drop").report.dropped_experts for name in (None, "exact_match")]
    assert dropped == [0, 1]


def test_experts_that_are_kept_anyway_cost_no_reward_call(load):
    def judge(prompts, completions, **columns):
        raise AssertionError("asked about an expert trace")

    kept = load(ROWS, judge)
    assert [len(problem.experts) for problem in kept] == [1, 1, 0]
    assert (kept.report.experts, kept.report.dropped_experts) == (2, 0)
    assert "rejected" not in str(kept.report)


def test_only_the_rejected_traces_of_a_problem_are_dropped(load):
    problems = load([{"prompt": "p", "solution": "2", "expert": ["1", "2", "3"]}], exact_match, on_rejected_expert="drop")
    assert [expert.text for expert in problems[0].experts] == ["2</s>"]


def test_no_opinion_rejects_no_expert(load):
    rows = [{"prompt": "p", "solution": None, "expert": "4"}, ROWS[0] | {"level": None}]
    assert load(rows, exact_match, on_rejected_expert="drop").report.dropped_experts == 0


def test_a_failing_reward_names_itself_and_the_row(load):
    def broken(prompts, completions, level, **columns):
        return [1 / (2 - value) for value in level]

    with pytest.raises(RewardError, match="'broken' raised on row 1: ZeroDivisionError"):
        load(ROWS, broken, on_rejected_expert="drop")
