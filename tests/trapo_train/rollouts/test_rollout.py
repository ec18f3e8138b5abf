"""Rollouts with a scripted engine: what is sampled, when, after which prefix, with which budget, and how it is judged."""

from dataclasses import replace

import pytest

from tests.trapo_train.scripted import ScriptedEngine
from trapo_train.records import ExpertTrace, Problem, Request
from trapo_train.rewards.functions import RewardError, WeightedSum
from trapo_train.rollouts.plans import PlanConfig, build_plan
from trapo_train.rollouts.rollout import RolloutConfig, merge_results, run_plans
from trapo_train.step.advantages import AdvantageConfig, assign_advantages
from trapo_train.tasks import build_tokenizer, pointer_chasing_reward

TOKENIZER = build_tokenizer()
CONFIG = RolloutConfig(max_response_tokens=20, paragraph_break="|")
EXPERT = "ab|bc|cd|de#de$"
RIGHT, WRONG = "#de$", "#aa$"


def ids(text):
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def text_of(token_ids):
    return TOKENIZER.decode(list(token_ids))


def problem(index=0, prompt="ab,bc?a4:", solution="de", experts=(EXPERT,)):
    return Problem(index, prompt, ids(prompt), solution, tuple(ExpertTrace(text, ids(text)) for text in experts))


def always(text):
    return lambda prompt: text


def run(problems, plan="paper", script=None, reward=pointer_chasing_reward, config=CONFIG, **plan_options):
    engine = ScriptedEngine(TOKENIZER, script or always(WRONG))
    plan = plan if callable(plan) else build_plan(PlanConfig(plan, **plan_options))
    return run_plans(problems, plan, engine, reward, TOKENIZER, config), engine


def test_ladder_is_climbed_when_everything_fails():
    result, engine = run([problem()])
    [group] = result.groups
    assert [s.micro_group for s in group] == [1, 1, 1, 1, 2, 2, 3, 4]
    assert [text_of(s.prefix_ids) for s in group] == [""] * 4 + ["ab|"] * 2 + ["ab|bc|cd|"] + [EXPERT]
    assert [s.reward for s in group] == [0.0] * 7 + [1.0]
    assert [s.finish_reason for s in group] == ["stop"] * 7 + ["expert"]
    assert group[-1].completion_ids == group[-1].completion_logprobs == ()
    assert text_of(group[4].completion_ids) == WRONG
    assert len(group[4].completion_logprobs) == len(ids(WRONG))
    assert len(engine.calls) == 3  # micro-group 4 generates nothing


def test_ladder_is_not_climbed_when_everything_is_right():
    result, engine = run([problem()], script=always(RIGHT))
    assert all(not s.guided and s.finish_reason == "stop" for s in result.groups[0])
    assert [len(call) for call in engine.calls] == [4, 2, 1, 1]
    assert {budget for call in engine.calls for _, budget in call} == {20}


def test_prefix_follows_the_prompt_and_reduces_the_budget():
    _, engine = run([problem()])
    assert engine.calls[1] == [("ab,bc?a4:ab|", 17)] * 2
    assert engine.calls[2] == [("ab,bc?a4:ab|bc|cd|", 11)]


def test_no_response_is_longer_than_the_budget_even_if_the_expert_just_fits():
    config = replace(CONFIG, max_response_tokens=len(ids(EXPERT)), snap_window=0.0)
    plan = lambda problem: iter_requests([Request(1, 0.99), Request(1, 1.0)])  # noqa: E731
    result, engine = run([problem()], plan, script=always("||||||"), config=config)
    assert [budget for _, budget in engine.calls[0]] == [2]
    assert [len(s.prefix_ids) + len(s.completion_ids) for s in result.groups[0]] == [15, 15]


def iter_requests(requests):
    """A plan's generator that asks for `requests` whatever the rewards."""
    for request in requests:  # noqa: UP028 (`yield from` would send the rewards on to the list)
        yield request


def test_each_round_is_one_engine_call_for_all_live_problems_in_order():
    problems = [problem(i, f"ab?a{i + 1}:") for i in range(3)]
    sent = {}

    def plan(problem):
        for round_number in range(3 - problem.index):
            sent[problem.index, round_number] = yield Request(2)

    result, engine = run(problems, plan, script=lambda text: RIGHT if text == "ab?a2:" else WRONG)
    assert [[text for text, _ in call] for call in engine.calls] == [
        ["ab?a1:"] * 2 + ["ab?a2:"] * 2 + ["ab?a3:"] * 2,
        ["ab?a1:"] * 2 + ["ab?a2:"] * 2,
        ["ab?a1:"] * 2,
    ]
    assert [[s.problem.index for s in group] for group in result.groups] == [[0] * 6, [1] * 4, [2] * 2]
    assert sent[1, 0] == [1.0, 1.0]
    assert sent[0, 2] == [0.0, 0.0]


def test_full_trajectories_make_no_engine_call():
    result, engine = run([problem(0), problem(1)], "sft")
    assert engine.calls == []
    assert [text_of(s.prefix_ids) for group in result.groups for s in group] == [EXPERT] * 2
    assert result.metrics["reward/mean"] == 1.0
    assert "finished_share" not in result.metrics


def test_a_full_trajectory_never_waits_for_the_generation_of_another_problem():
    """Problem 1 is past its expert trace before the first engine call, so its next request joins that call."""
    plans = {0: [Request(1)], 1: [Request(2, 1.0), Request(1)]}
    result, engine = run([problem(0), problem(1)], lambda problem: iter_requests(plans[problem.index]))
    assert [len(call) for call in engine.calls] == [2]
    assert [s.micro_group for s in result.groups[1]] == [1, 1, 2]


def test_reward_sees_the_response_or_the_completion_alone():
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return pointer_chasing_reward(prompts, completions, **columns)

    plan = lambda problem: iter_requests([Request(1, 0.5), Request(1, 1.0)])  # noqa: E731
    run([problem()], plan, script=always("a#aa$"), reward=reward)
    assert seen == ["ab|bc|cd|a#aa", "ab|bc|cd|de#de"]
    seen.clear()
    run([problem()], plan, script=always("a#aa$"), reward=reward, config=replace(CONFIG, verify="completion"))
    assert seen == ["a#aa", "ab|bc|cd|de#de"]  # nothing was generated after a full trace, so it is judged whole


def test_the_plans_that_draw_their_ratio_cut_exactly_there_and_no_paragraph_later():
    hinted = PlanConfig("uft", num_samples=2, guidance=0.4)
    drawn = PlanConfig("prefix_rft", num_samples=2, guidance=0.4, longest_prefix=0.5)
    plans = [build_plan(config, step=step) for config in (hinted, drawn) for step in range(40)]
    body = len(ids(EXPERT)) - 1
    for plan in plans:
        result, _ = run([problem()], plan, script=always("e$"))
        for sample in result.groups[0]:
            if 0 < sample.prefix_ratio < 1:
                assert len(sample.prefix_ids) == max(1, int(sample.prefix_ratio * body + 1e-9))
    result, _ = run([problem()], lambda problem: iter_requests([Request(1, 0.4)]), script=always("e$"))
    assert len(result.groups[0][0].prefix_ids) == 6  # behind the second paragraph, where a ladder's rung goes on


def test_verifying_the_completion_denies_the_reward_for_an_answer_in_the_prefix():
    plan = lambda problem: iter_requests([Request(1, 0.99)])  # noqa: E731
    config = replace(CONFIG, snap_window=0.0)
    result, _ = run([problem()], plan, script=always("e$"), config=config)
    assert (result.groups[0][0].reward, result.metrics["answer_in_prefix"]) == (1.0, 1.0)
    result, _ = run([problem()], plan, script=always("e$"), config=replace(config, verify="completion"))
    assert (result.groups[0][0].reward, result.metrics["answer_in_prefix"]) == (0.0, 1.0)


def test_a_reward_is_told_the_tokens_of_the_whole_response_and_how_it_ended():
    seen = []

    def reward(completions, completion_tokens, finish_reasons, **columns):
        seen.extend(zip(completions, completion_tokens, finish_reasons, strict=True))
        return [0.0] * len(completions)

    def plan(problem):
        return iter_requests([Request(1, 0.5), Request(1), Request(1, 1.0)])

    def script(text):
        return "a#aa$" if text.endswith("|") else "b" * 30

    run([problem()], plan, script=script, reward=reward, config=replace(CONFIG, verify="completion"))
    assert seen == [("a#aa", 9 + 5, "stop"), ("b" * 20, 20, "length"), ("ab|bc|cd|de#de", 15, "expert")]


def test_masking_takes_what_was_cut_off_out_of_the_loss_and_leaves_its_reward_in_the_baseline():
    def script(text):
        return RIGHT if text.endswith("|") else "a" * 30

    for mode, cut in (("keep", False), ("mask", True)):
        result, _ = run([problem()], script=script, config=replace(CONFIG, on_truncated=mode))
        assign_advantages(result.groups, AdvantageConfig())
        [group] = result.groups
        assert [s.finish_reason for s in group] == ["length"] * 4 + ["stop"] * 3 + ["expert"]
        assert [s.masked for s in group] == [cut] * 4 + [False] * 4
        assert [s.advantage for s in group] == [-4 / 8] * 4 + [4 / 8] * 4
        assert all(len(s.completion_ids) == 20 for s in group[:4])  # metrics and files show it


def test_rewards_that_differ_in_their_last_digits_are_equal_for_metrics_as_for_advantages():
    def reward(prompts, completions, **columns):
        return [0.1 + 0.2, 0.3]

    result, _ = run([problem()], "grpo", reward=reward, num_samples=2)
    assign_advantages(result.groups, AdvantageConfig())
    assert {sample.reward for sample in result.groups[0]} == {0.1 + 0.2, 0.3} and result.metrics["reward/equal_share"] == 1
    assert [sample.advantage for sample in result.groups[0]] == [0, 0]


def test_metrics():
    script = lambda text: RIGHT if text.startswith("ab?a1:") else "aaaaaaaaaaaaaaaaaaaaaaaa"  # noqa: E731
    result, _ = run([problem(0, "ab?a1:"), problem(1, "ab?a2:")], script=script)
    metrics = result.metrics
    assert metrics["reward/mean"] == (8 + 1) / 16
    assert metrics["reward/std"] == pytest.approx((9 / 16 * 7 / 16) ** 0.5) and metrics["reward/equal_share"] == 0.5
    assert metrics["reward/unguided"] == metrics["accuracy/unguided"] == metrics["reward/micro_group_1"] == 0.5
    assert metrics["reward/micro_group_4"] == 1.0
    assert metrics["guided_share"] == 4 / 16
    assert [metrics[f"guided_share/micro_group_{k}"] for k in (1, 2, 3, 4)] == [0, 0.5, 0.5, 0.5]
    assert metrics["answer_in_prefix"] == 0.0
    assert metrics["finished_share"] == 8 / 15
    assert metrics["response_tokens"] == 8 * 4 + 7 * 20 + 15
    assert metrics["completion_tokens_mean"] == (8 * 4 + 4 * 20 + 2 * 17 + 11) / 15
    assert metrics["reward/none_count"] == 0
    assert metrics["reward/all_correct_share"] == 0.5 and metrics["reward/none_correct_share"] == 0.0  # the trace is correct
    lengths = sorted([4] * 8 + [20] * 4 + [17] * 2 + [11])
    assert metrics["completion_tokens_p95"] == lengths[14] and metrics["completion_tokens_max"] == 20
    assert metrics["entropy/sampled"] == 0.5  # the script's logprob of every token is -0.5


def test_the_sampled_entropy_is_a_mean_over_tokens_and_the_halves_of_equal_rewards_add_up():
    script = {"ab?a1:": RIGHT, "ab?a2:": WRONG, "ab?a3:": "a" * 30}
    problems = [problem(i, prompt) for i, prompt in enumerate(script)]
    result, _ = run(problems, "grpo", script.get, num_samples=2)
    halves = [result.metrics[f"reward/{name}_correct_share"] for name in ("all", "none")]
    assert halves == [1 / 3, 2 / 3] and sum(halves) == result.metrics["reward/equal_share"]
    for group in result.groups:
        for sample in group:
            sample.completion_logprobs = tuple(-0.1 * k for k in range(len(sample.completion_ids)))
    values = [0.1 * k for group in result.groups for sample in group for k in range(len(sample.completion_ids))]
    assert merge_results([result]).metrics["entropy/sampled"] == pytest.approx(sum(values) / len(values))


def test_none_counts_as_zero_and_is_counted():
    result, _ = run([problem()], "grpo", num_samples=3, reward=lambda completions, **columns: [None, 1.0, None])
    assert [s.reward for s in result.groups[0]] == [0.0, 1.0, 0.0]
    assert result.metrics["reward/none_count"] == 2


def test_sampling_parameters_reach_the_engine():
    _, engine = run([problem()], "grpo", config=replace(CONFIG, temperature=0.7, top_p=0.9, top_k=20))
    params = engine.params[0]
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.7, 0.9, 20, None)


def test_problem_without_expert_and_no_problems():
    result, engine = run([problem(experts=())])
    assert [len(call) for call in engine.calls] == [4, 2, 1, 1]
    assert "answer_in_prefix" not in result.metrics
    result, _ = run([])
    assert result.groups == []


def test_an_expert_longer_than_the_budget_is_refused_before_any_work():
    config = replace(CONFIG, max_response_tokens=14)
    engine = ScriptedEngine(TOKENIZER, always(WRONG))
    plan = build_plan(PlanConfig("paper"))
    with pytest.raises(ValueError, match=r"max_response_tokens = 14, got 15 tokens in problem 1.*without_long_experts"):
        run_plans([problem(0, experts=()), problem(1)], plan, engine, pointer_chasing_reward, TOKENIZER, config)
    assert engine.calls == []


def test_a_plan_that_names_a_missing_expert_is_refused():
    with pytest.raises(ValueError, match="one of the 1 expert traces of problem 0, got 1"):
        run([problem()], lambda problem: iter_requests([Request(1, 0.5, expert_index=1)]))


def test_a_failing_reward_names_the_row():
    with pytest.raises(RewardError, match="row 7"):
        run([problem(7)], reward=lambda completions, **columns: [float("nan")] * len(completions))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("temperature", 1e-45),
        ("temperature", 1e39),
        ("top_p", 0.0),
        ("top_k", -1),
        ("max_response_tokens", 0),
        ("paragraph_break", ""),
        ("snap_window", 1.5),
        ("verify", "prefix"),
        ("on_truncated", "drop"),
        ("correct_at", float("nan")),
        ("engine", "sglang"),
        ("max_batch_tokens", 1),
    ],
)
def test_config_refuses_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got"):
        RolloutConfig(**{field: value})


def test_what_a_plan_drops_is_not_trained_on_but_counted():
    solved = {0: RIGHT, 1: WRONG}
    problems = [problem(0, prompt="ab,bc?a1:"), problem(1)]
    script = lambda prompt: solved[0] if prompt.startswith("ab,bc?a1:") else solved[1]  # noqa: E731
    result, engine = run(problems, "hpt", script, num_samples=3)
    assert [[s.finish_reason for s in group] for group in result.groups] == [["stop"] * 3, ["expert"]]
    assert result.metrics["reward/micro_group_1"] == pytest.approx(0.5)
    assert result.metrics["reward/mean"] == pytest.approx(4 / 7)
    assert [len(call) for call in engine.calls] == [6]
    assert result.deferred == ()


def test_plans_decide_by_the_reward_that_says_what_is_correct_and_advantages_are_of_the_sum():
    def constant(value):
        return lambda completions, **columns: [value] * len(completions)

    def trained(plan, text, other, correct_by, weight=1.0, **options):
        reward = WeightedSum([("math", pointer_chasing_reward, weight), ("other", constant(other), 0.5)])
        config = replace(CONFIG, correct_by=correct_by)
        return run([problem()], plan, always(text), reward, config, **options)[0]

    whole, alone = ("stop", "stop"), ("expert",)
    for correct_by, wrong in (("math", alone), (None, whole)):  # all wrong, and paid for their format
        found = trained("hpt", WRONG, 0.2, correct_by, num_samples=2)
        assert tuple(s.finish_reason for s in found.groups[0]) == wrong
        assert trained("relift", WRONG, 0.2, correct_by, num_samples=2).deferred == ((0,) if correct_by else ())
    for correct_by, guided in (("math", 0), (None, 4)):  # all right, and punished for their length
        found = trained("paper", RIGHT, -1.5, correct_by)
        assert sum(s.guided for s in found.groups[0]) == guided
        assert [s.reward for s in found.groups[0]] == [1.0 - 0.5 * 1.5] * 8
        assert found.metrics["accuracy/unguided"] == (1.0 if correct_by else 0.0)  # as an evaluation would count it
        assert found.metrics["reward/unguided"] == 1.0 - 0.5 * 1.5
    assert not any(s.guided for s in trained("paper", RIGHT, 0.0, "math", weight=0.1).groups[0])  # the value is unweighted


def test_deferred_problems_are_named_by_their_place():
    problems = [problem(7), problem(3, experts=()), problem(5)]
    result, _ = run(problems, "relift", num_samples=2)
    assert result.deferred == (0, 2)
    assert [len(group) for group in result.groups] == [2, 2, 2]


def test_deferred_problems_of_ranks_are_named_by_their_place_in_the_whole_step():
    first, second = (run([problem(i) for i in places], "relift", num_samples=2)[0] for places in ((0, 2, 4), (1, 3)))
    assert merge_results([replace(first, deferred=(1,)), replace(second, deferred=(0,))]).deferred == (1, 2)


def test_p95_is_the_shortest_length_that_95_percent_do_not_exceed():
    script = {"b" * k + "?a1:": "a" * k for k in range(1, 21)}
    metrics = run([problem(i, prompt) for i, prompt in enumerate(script)], "grpo", script.get, num_samples=1)[0].metrics
    assert metrics["completion_tokens_p95"] == 19 and metrics["completion_tokens_max"] == 20


def test_a_plan_may_end_without_an_outcome():
    def plan(problem):
        yield Request(1)

    result, _ = run([problem()], plan)
    assert len(result.groups[0]) == 1 and result.deferred == ()
