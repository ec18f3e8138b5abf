"""Rewards: what is passed to them, what is accepted from them, and grading of real answers."""

import asyncio
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from trapo_train.records import Problem
from trapo_train.rewards.builtin import REWARDS, exact_match
from trapo_train.rewards.functions import RewardError, RewardTerm, WeightedSum, judge, load_reward, may_overlap, take_metrics
from trapo_train.tasks import pointer_chasing_reward

math_verify = REWARDS["math_verify"]
MATH_EVAL = Path(__file__).parents[4] / "shared" / "data" / "math_eval"


def problems(count):
    return [Problem(10 + i, f"prompt {i}", (1,), f"s{i}", columns={"depth": i}) for i in range(count)]


def returning(values):
    def fixed_reward(prompts, completions, **columns):
        return values

    return fixed_reward


def test_a_reward_gets_every_column_as_a_list():
    calls = []

    def spy(**arguments):
        calls.append(arguments)
        return [1, 2]

    assert judge(spy, problems(2), ["a", "b"]) == [1.0, 2.0]
    assert calls == [{"prompts": ["prompt 0", "prompt 1"], "completions": ["a", "b"], "solution": ["s0", "s1"], "depth": [0, 1]}]


ABOUT = {"completion_tokens": [3, 9], "finish_reasons": ["stop", "length"]}


class Strict:
    """A reward without **columns, which declares one of the two."""

    def __call__(self, prompts, completions, solution, depth, finish_reasons):
        return [float(reason == "stop") for reason in finish_reasons]


def test_a_reward_is_told_the_length_and_the_end_of_a_response_if_it_takes_them():
    calls = []

    def spy(**arguments):
        calls.append({name: arguments[name] for name in ABOUT})
        return [1.0] * len(arguments["completions"])

    async def later(prompts, completions, completion_tokens, **columns):
        return completion_tokens

    def neither(prompts, completions, solution, depth):
        return [0.5] * len(completions)

    assert judge(spy, problems(2), ["a", "b"], ABOUT) == [1.0, 1.0] and calls == [ABOUT]
    assert judge(later, problems(2), ["a", "b"], ABOUT) == [3.0, 9.0]
    assert judge(Strict(), problems(2), ["a", "b"], ABOUT) == [1.0, 0.0]
    assert judge(neither, problems(2), ["a", "b"], ABOUT) == [0.5, 0.5]
    assert judge(WeightedSum([("one", Strict(), 1.0), ("two", later, 0.1)]), problems(2), ["a", "b"], ABOUT) == [1.3, 0.9]


def test_the_row_that_raises_is_found_with_its_own_length():
    def picky(completion_tokens, **columns):
        return [1 / (tokens - 9) for tokens in completion_tokens]

    with pytest.raises(RewardError, match=r"'picky' raised on row 11: ZeroDivisionError"):
        judge(picky, problems(2), ["a", "b"], ABOUT)


def test_overlong_is_the_soft_punishment_of_dapo():
    reward = load_reward([RewardTerm("overlong", 2.0, {"max_tokens": 20, "buffer": 5})])
    lengths = [1, 14, 15, 16, 17, 19, 20, 21, 99]
    about = {"completion_tokens": lengths, "finish_reasons": ["stop"] * 9}
    # equation 13 of arXiv 2503.14476, with L_max = 20 and L_cache = 5
    punishment = [0.0 if n <= 15 else (15 - n) / 5 if n <= 20 else -1.0 for n in lengths]
    assert judge(reward, problems(9), ["x"] * 9, about) == [2.0 * value for value in punishment]
    assert take_metrics(reward) == {"reward/overlong": pytest.approx(sum(punishment) / 9)}
    assert may_overlap(reward)


def test_numbers_of_any_kind_become_floats():
    values = judge(returning([1, True, 0.5, np.float32(0.25), Fraction(1, 8)]), problems(5), ["x"] * 5)
    assert values == [1.0, 1.0, 0.5, 0.25, 0.125]
    assert all(type(value) is float for value in values)
    assert judge(returning(np.array([0.0, 1.0])), problems(2), ["x"] * 2) == [0.0, 1.0]
    assert judge(returning([np.bool_(True), torch.tensor(0.5), np.array(2)]), problems(3), ["x"] * 3) == [1.0, 0.5, 2.0]
    assert judge(returning(torch.tensor([0.0, 1.0])), problems(2), ["x"] * 2) == [0.0, 1.0]


def test_none_is_no_opinion():
    assert judge(returning([None, 1.0, None]), problems(3), ["x"] * 3) == [None, 1.0, None]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "one number per completion = 2, got 1"),
        ([1.0, 2.0, 3.0], "one number per completion = 2, got 3"),
        ([1.0, float("nan")], "finite numbers, got nan on row 11"),
        ([float("inf"), 1.0], "finite numbers, got inf on row 10"),
        ([1.0, "1"], "numbers or None, got '1' (str) on row 11"),
        ([[1.0], 1.0], "got [1.0] (list) on row 10"),
        (None, "a list with one number per completion, got NoneType"),
        (1.0, "a list with one number per completion, got float"),
        ("ab", "a list with one number per completion, got str"),
    ],
)
def test_bad_returns(values, words):
    with pytest.raises(RewardError) as error:
        judge(returning(values), problems(2), ["x", "y"])
    assert words in str(error.value)
    assert "'fixed_reward'" in str(error.value)


def test_an_exception_is_wrapped_with_the_reward_and_the_row():
    def picky(prompts, completions, **columns):
        return [1 / (completion != "bad") for completion in completions]

    with pytest.raises(RewardError, match=r"'picky' raised on row 12: ZeroDivisionError.*'bad'") as error:
        judge(picky, problems(4), ["a", "b", "bad", "c"])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_exception_of_the_whole_batch_only():
    def lonely(prompts, completions, **columns):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    with pytest.raises(RewardError, match="raised on 2 rows, though on none of them alone"):
        judge(lonely, problems(2), ["a", "b"])


def test_texts_and_problems_must_match_and_may_be_none():
    with pytest.raises(ValueError, match="one text per problem = 2, got 1"):
        judge(exact_match, problems(2), ["a"])
    assert judge(returning(None), [], []) == []


def test_exact_match():
    assert exact_match(["p"] * 3, [" 5\n", "6", "x"], ["5", "5", None], depth=[0]) == [1.0, 0.0, None]


def test_load_reward_by_name_and_by_path(tmp_path, monkeypatch):
    assert load_reward("exact_match") is exact_match
    assert load_reward("pointer_chasing") is pointer_chasing_reward
    assert load_reward("trapo_train.rewards.builtin:exact_match") is exact_match
    (tmp_path / "my_own_rewards.py").write_text("def length(completions, **columns):\n    return [len(c) for c in completions]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert judge(load_reward("my_own_rewards:length"), problems(1), ["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact_mach", "Did you mean 'exact_match'?"),
        ("nothing like it", "or a path like my_rewards:my_reward, got 'nothing like it'"),
        ("module:", "got 'module:'"),
        ("overlong", "reward overlong needs options: [{name: overlong"),
        ("no_such_module_here:f", "'no_such_module_here'. Modules are looked for where Python looks, and in "),
        ("my_rewards.py:f", "Leave out the ending .py."),
        ("trapo_train.rewards.functions:no_such", "has no function or class 'no_such'"),
        ("trapo_train.rewards.functions:SEARCH_S", "must name a function, got float"),
        ("trapo_train.rewards.functions:f:g", "reward must be a path like my_rewards:my_reward"),
        (":f", "reward must be a path like"),
        (".here:f", "reward must be a path like"),
    ],
)
def test_rewards_that_cannot_be_loaded(name, words):
    with pytest.raises(ValueError) as error:
        load_reward(name)
    assert words in str(error.value)


def test_math_verify_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'trapo\[math\]'"):
        load_reward("math_verify")


@pytest.mark.parametrize(
    ("completion", "solution", "expected"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("so it is \\boxed{0.5}", "\\frac12", 1.0),
        ("The final answer is $x = 3$.", "3", 1.0),
        ("\\boxed{4}", "3", 0.0),
        ("\\boxed{(1, 2]}", "(1,2]", 1.0),
        ("\\boxed{[1, 2]}", "(1,2]", 0.0),
        ("3 + 1 = 4, and then", "4", 0.0),
        ("", "4", 0.0),
        ("\\boxed{4", "4", 0.0),
        ("\\boxed{4}", None, None),
        ("\\boxed{4}", "", None),
        ("\\boxed{4}", "$4$", 1.0),
        ("\\boxed{4}", "\\boxed{4}", 1.0),
    ],
)
def test_math_verify(completion, solution, expected):
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra [math])")
    assert math_verify(["p"], [completion], [solution], depth=[1]) == [expected]


def test_math_verify_works_outside_the_main_thread():
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra [math])")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math_verify, ["p"], ["\\boxed{4}"], ["4"]).result() == [1.0]


@pytest.mark.parametrize("name", ["aime", "amc", "math"])
def test_math_verify_on_real_answers(name):
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra [math])")
    file = MATH_EVAL / f"{name}.parquet"
    if not file.is_file():
        pytest.skip(f"{file.name} is not there: real answers are checked where shared/data/math_eval is")
    import pyarrow.parquet

    cells = pyarrow.parquet.read_table(file, columns=["reward_model"]).column("reward_model").to_pylist()
    answers = sorted({cell["ground_truth"] for cell in cells})[:60]
    rows = ["p"] * len(answers)
    right = math_verify(rows, [f"Hence the answer is \\boxed{{{answer}}}." for answer in answers], answers)
    assert right == [1.0] * len(answers)
    shifted = answers[1:] + answers[:1]
    wrong = math_verify(rows, [f"Hence the answer is \\boxed{{{answer}}}." for answer in shifted], answers)
    # A few neighbours in the sorted list are equal, such as 30^\circ and 30.
    assert sum(wrong) <= 0.05 * len(answers)
    assert math_verify(rows, ["No answer."] * len(answers), answers) == [0.0] * len(answers)


def test_an_async_reward_is_awaited():
    async def later(prompts, completions, **columns):
        return [float(len(completion)) for completion in completions]

    assert judge(later, problems(2), ["a", "bcd"]) == [1.0, 3.0]


def test_a_reward_that_ends_the_process_is_an_error_of_its_row():
    def leaves(completions, **columns):
        return sys.exit(3) if "bad" in completions else [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'leaves' raised on row 11: SystemExit\(3\)"):
        judge(leaves, problems(2), ["good", "bad"])


def test_a_dict_is_no_list_of_rewards():
    with pytest.raises(RewardError, match="must return a list with one number per completion, got dict"):
        judge(lambda completions, **_: dict.fromkeys(range(2), 1.0), problems(2), ["a", "b"])


def test_an_async_reward_that_raises_names_its_row():
    async def broken(prompts, completions, **columns):
        if "bad" in completions:
            raise KeyError("no such key")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="raised on row 11: KeyError"):
        judge(broken, problems(2), ["good", "bad"])


def test_several_rewards_are_weighted_and_reported_one_by_one():
    def brevity(prompts, completions, **columns):
        return [1.0 / len(completion) for completion in completions]

    total = WeightedSum([("exact", exact_match, 2.0), ("brevity", brevity, -0.5), ("none", returning([None, None]), 9.0)])
    assert judge(total, problems(2), ["s0", "long"]) == [2.0 - 0.25, -0.125]
    assert take_metrics(total) == {"reward/exact": 0.5, "reward/brevity": 0.375}
    assert take_metrics(total) == {}
    assert judge(WeightedSum([("none", returning([None]), 1.0)]), problems(1), ["x"]) == [None]


def test_several_rewards_by_name():
    reward = load_reward([RewardTerm("exact_match"), RewardTerm("pointer_chasing", 0.1)])
    assert [weight for _, _, weight in reward.terms] == [1.0, 0.1] and take_metrics(exact_match) == {}
    with pytest.raises(ValueError, match="Did you mean 'exact_match'"):
        load_reward([RewardTerm("exact_mach")])
    with pytest.raises(ValueError, match="weight must be a finite number, got nan"):
        RewardTerm("exact_match", float("nan"))


def test_a_term_of_several_is_named_when_it_is_wrong():
    total = WeightedSum([("exact", exact_match, 1.0), ("mine", returning([1.0, float("nan")]), 0.0)])
    with pytest.raises(RewardError, match="'fixed_reward' must return finite numbers, got nan on row 11"):
        judge(total, problems(2), ["a", "b"])
    with pytest.raises(RewardError, match="one number per completion = 2, got 1"):
        judge(WeightedSum([("short", returning([1.0]), 1.0)]), problems(2), ["a", "b"])


def test_an_async_reward_runs_under_a_running_event_loop():
    async def later(prompts, completions, **columns):
        return [1.0] * len(completions)

    async def notebook():
        return judge(later, problems(1), ["a"])

    assert asyncio.run(notebook()) == [1.0]


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"name": ""}, "name must be a text that is not empty"),
        ({"name": "m:f", "time_limit_s": 0.0}, "time_limit_s must be a finite number above 0, got 0.0"),
        ({"name": "m:f", "memory_limit_mib": 1}, "memory_limit_mib must be at least 64, got 1"),
        ({"name": "overlong"}, "options of overlong are max_tokens and buffer, got {}"),
        ({"name": "overlong", "options": {"max_tokens": 8, "bufer": 2}}, "options of overlong are max_tokens and buffer, got"),
        (
            {"name": "overlong", "options": {"max_tokens": 8, "buffer": 9}},
            "buffer <= max_tokens, got buffer = 9, max_tokens = 8",
        ),
        ({"name": "overlong", "options": {"max_tokens": 8, "buffer": 0.5}}, "needs whole numbers"),
        ({"name": "exact_match", "options": {"buffer": 1}}, "options belong to the reward overlong, got {'buffer': 1}"),
        ({"name": "exact_match", "in_worker": True}, "in_worker is for your own function, got name 'exact_match'"),
    ],
)
def test_bad_terms(term, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        RewardTerm(**term)


def test_the_same_reward_twice_or_none_at_all():
    for terms in ([], [RewardTerm("exact_match"), RewardTerm("exact_match", 2.0)]):
        with pytest.raises(ValueError, match="at least one reward, each once"):
            load_reward(terms)
