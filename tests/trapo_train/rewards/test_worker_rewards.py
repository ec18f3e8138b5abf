"""A user's reward in worker programs: what it does to itself, what it is told, and in which words it is refused."""

import sys

import pytest

from tests.trapo_train.rewards.test_rewards import ABOUT, problems
from trapo_train.rewards.functions import RewardError, RewardTerm, judge, load_reward, take_metrics

RISKY = """
import os, time
from fractions import Fraction

def tokens(completions, completion_tokens, depth, solution, prompts):
    return completion_tokens

def careless(completions, **columns):
    odd = {"object": [object()], "fraction": [Fraction(1, 2)], "set": {0.5}}
    return ({"number": 1.0, "two": [1.0, 2.0], "text": ["good"]} | odd)[completions[0]]

def risky(prompts, completions, depth, **columns):
    print("noise")
    (word,) = completions
    if word == "hang":
        time.sleep(600)
    if word == "exit":
        os._exit(1)
    if word == "abort":
        os.abort()
    if word == "bug":
        raise KeyError("no such key")
    if word == "memory":
        bytearray(8 * 2**30)
    return [None if word == "none" else float("nan") if word == "nan" else depth[0] + len(word)]
"""


RAISED_AT = f"risky_rewards.py:{RISKY.split('raise KeyError')[0].count(chr(10)) + 1}"


@pytest.fixture
def risky(tmp_path, monkeypatch):
    (tmp_path / "risky_rewards.py").write_text(RISKY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load_reward([RewardTerm("risky_rewards:risky", in_worker=True, time_limit_s=1.0, memory_limit_mib=4096)])


@pytest.mark.slow
def test_an_own_reward_in_workers_survives_itself(risky):
    texts = ["ab", "hang", "exit", "none", "abort", "memory", "abc"]
    assert judge(risky, problems(7), texts) == [2.0, 0.0, 0.0, None, 0.0, 0.0, 9.0]
    metrics = take_metrics(risky)
    assert (metrics["reward/timeouts"], metrics["reward/crashes"]) == (1.0, 3.0)
    assert metrics["reward/failed_share/risky_rewards:risky"] == 4 / 7
    assert metrics["reward/risky_rewards:risky"] == pytest.approx(11 / 6)
    for word, reason in [("bug", f"row 11: .*KeyError.*such key.* at {RAISED_AT}"), ("nan", "finite numbers, got nan on row 11")]:
        with pytest.raises(RewardError, match=f"'risky_rewards:risky' .*{reason}"):
            judge(risky, problems(2), ["a", word])


def test_a_reward_in_workers_is_told_about_the_responses_too(risky):
    reward = load_reward([RewardTerm("risky_rewards:tokens", in_worker=True)])
    assert judge(reward, problems(2), ["a", "b"], ABOUT) == [3.0, 9.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("number", "must return a list with one number per completion, got float. Return a list"),
        ("two", "must return one number per completion = 1, got 2. Return a list"),
        ("text", r"must return numbers or None, got 'good' \(str\) on row 10"),
        ("object", r"must return numbers or None, got <object object at .*> \(object\)\."),
    ],
)
def test_what_a_reward_in_workers_returns_is_refused_in_the_same_words(returned, message, risky):
    reward = load_reward([RewardTerm("risky_rewards:careless", in_worker=True)])
    with pytest.raises(RewardError, match=f"^Reward 'risky_rewards:careless' {message}"):
        judge(reward, problems(1), [returned])


def test_a_reward_in_workers_may_return_any_kind_of_number(risky):
    reward = load_reward([RewardTerm("risky_rewards:careless", in_worker=True)])
    assert judge(reward, problems(2), ["fraction", "set"]) == [0.5, 0.5]


def test_a_reward_that_raises_is_named_by_its_path_with_the_line(risky):
    reward = load_reward("risky_rewards:risky")
    with pytest.raises(RewardError) as error:
        judge(reward, problems(2), ["a", "bug"])
    assert str(error.value) == (
        f"Reward 'risky_rewards:risky' raised on row 11: KeyError('no such key') at {RAISED_AT}. Its completion: 'bug'. "
        "--traceback shows how it got there"
    )
