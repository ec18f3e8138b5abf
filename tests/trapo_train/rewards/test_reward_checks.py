"""A reward that cannot be called is refused before anything is sampled; one that failed is not asked again without end."""

import re
import sys
import time
from functools import partial

import pytest

from tests.trapo_train.rewards.test_rewards import problems
from tests.trapo_train.test_train import EVALUATED, build_config, train_to_end
from trapo_train.checkpoints.checkpoint import CheckpointError
from trapo_train.checks.symptoms import Symptoms
from trapo_train.metrics import merge_metrics
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.rewards import functions as rewards
from trapo_train.rewards.functions import RewardError, RewardTerm, judge, load_reward
from trapo_train.rewards.grading import FAILED_SHARE, MathVerify
from trapo_train.schema import UserError
from trapo_train.tasks import build_tokenizer
from trapo_train.trainer import Trainer

MODULE = """
import os

class Format:
    def __call__(self, completions, **columns):
        return [0.0 for _ in completions]

made = Format()

def of_ids(completion_ids, completions, **columns):
    return [0.0 for _ in completions]

def of_depth(completions, *, depth):
    return [0.0 for _ in completions]

def of_answer(completions, answer, **columns):
    return [0.0 for _ in completions]

def of_all(prompts, completions, solution, completion_tokens, finish_reasons, level=None):
    return [0.0 for _ in completions]

def raises(completions, **columns):
    raise KeyError("bug")

def interrupts(completions, **columns):
    os.kill(os.getpid(), 15)
    return [0.0 for _ in completions]

def crashes(completions, **columns):
    os._exit(1)
"""


@pytest.fixture
def configure(tmp_path, monkeypatch):
    (tmp_path / "odd_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield partial(build_config, tmp_path, "run")
    sys.modules.pop("odd_rewards", None)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("odd_rewards:Format", r"must be a function or an object that can be called, got the class Format\. Make an instance in"),
        ("odd_rewards:of_ids", "reward 'of_ids' must take what it is called with, got one that needs completion_ids as well"),
        ("[{name: odd_rewards:of_ids}]", "reward 'odd_rewards:of_ids' must take .* completion_ids as well; for data it is"),
        ("[{name: odd_rewards:of_ids, in_worker: true}]", "needs completion_ids as well"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_before_anything_is_sampled(configure, reward, message):
    with pytest.raises(ValueError, match=message):
        Trainer(configure(f"reward={reward}"))


def test_a_reward_may_need_what_the_data_brings_in_every_set(configure, tmp_path):
    for reward in (
        "odd_rewards:made",
        "odd_rewards:of_all",
        "[{name: odd_rewards:of_all, in_worker: true}]",
        "odd_rewards:of_depth",
    ):
        Trainer(configure(f"reward={reward}"))
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "ab?a1:", "solution": "b"}')
    held_out = (*EVALUATED, "reward=odd_rewards:of_depth", "eval_data={aime: {path: held_out.jsonl}}")
    with pytest.raises(ValueError, match=r"needs depth as well; for eval_data\.aime it is called with prompts, "):
        Trainer(configure(*held_out))


@pytest.mark.parametrize(
    ("reward", "column", "message"),
    [
        ("exact_match", "null", r"needs solution as well; .*\. Set data\.solution_column to the column that holds the solutions"),
        (
            "odd_rewards:of_answer",
            "answer",
            r"needs answer as well; .*\. Rename the argument: the column 'answer' arrives as 'solution'",
        ),
    ],
)
def test_a_reward_that_never_gets_the_solution_is_told_where_it_is(configure, tmp_path, reward, column, message):
    (tmp_path / "train.jsonl").write_text('{"prompt": "ab?a1:", "answer": "b", "expert": "ab#ab$"}')
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = f"data={{path: train.jsonl, task: null, num_problems: null, solution_column: {column}, expert_column: expert}}"
    with pytest.raises(ValueError, match=message):
        Trainer(configure(data, "model.tokenizer=tokenizer", "eval_data=null", f"reward={reward}"))


def _counted(calls, error, seconds=0.0):
    def service(completions, **columns):
        calls.append(len(completions))
        time.sleep(seconds)
        if len(completions) > 1:
            raise error
        return [0.0]

    return service


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionResetError("down")])
def test_a_service_that_is_slow_or_down_is_not_asked_again_for_every_row(error):
    calls = []
    with pytest.raises(RewardError, match=r"'service' raised on a call with 3 rows: \w+Error\('(slow|down)'\)"):
        judge(_counted(calls, error), problems(3), ["x"] * 3)
    assert calls == [3]


def test_the_search_for_the_row_that_raised_takes_seconds_at_most(monkeypatch):
    monkeypatch.setattr(rewards, "SEARCH_S", 0.05)
    calls = []
    with pytest.raises(RewardError, match=r"'service' raised on a call with 100 rows: KeyError\('busy'\)"):
        judge(_counted(calls, KeyError("busy"), seconds=0.02), problems(100), ["x"] * 100)
    assert calls[0] == 100 and 2 <= len(calls) < 10


def test_a_reward_that_fails_on_most_rows_is_said_once(configure):
    reward = "reward=[{name: odd_rewards:crashes, in_worker: true}]"
    config = configure(reward, "plan={name: grpo, num_samples: 2}", "steps=2", "prompts_per_step=1", "checkpoint.every=0")
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event" and "crashed" in row["text"]]
    assert told == [
        "step 1: 100% of the gradings of odd_rewards:crashes timed out or crashed, and each counts as 0. Raise its time_limit_s or "
        "memory_limit_mib, or try it with in_worker: false"
    ]


def test_each_reward_of_which_half_the_gradings_fail_is_named_and_no_other():
    said, symptoms = [], Symptoms(16, "</s>", {})
    mine, math = f"{FAILED_SHARE}mine:reward", f"{FAILED_SHARE}math_verify"
    failed = {"reward/timeouts": 9.0, "reward/crashes": 9.0, "num_samples": 4}
    for shares in ({mine: 0.49, math: 0.0}, {mine: 0.5, math: 0.49}, {mine: 0.75, math: 0.5}):
        said += symptoms.of_step({"step": 1, "loss_tokens": 7, **failed, **shares})
    assert said == [
        "step 1: 50% of the gradings of mine:reward timed out or crashed, and each counts as 0. Raise its time_limit_s or "
        "memory_limit_mib, or try it with in_worker: false",
        "step 1: 50% of the gradings of math_verify timed out or crashed, and each counts as 0. Look at the "
        "responses in samples/ (tracking.samples_every=1), or raise its time_limit_s or memory_limit_mib",
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"name": "m:f", "time_limit_s": 5.0},
            "got {'time_limit_s': 5.0} of 'm:f', which is called in the process that trains. ",
        ),
        ({"name": "m:f", "memory_limit_mib": 100}, "got {'memory_limit_mib': 100} of 'm:f'"),
        ({"name": "exact_match", "time_limit_s": 5.0}, "got {'time_limit_s': 5.0} of 'exact_match'"),
    ],
)
def test_a_limit_that_nothing_reads_is_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        RewardTerm(**settings)
    _, (name, limit) = settings.items()
    assert getattr(RewardTerm("m:f", in_worker=True, **{name: limit}), name) == limit


def test_math_verify_keeps_the_limits_it_is_given():
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra [math])")
    total = load_reward([RewardTerm("math_verify", time_limit_s=0.01), RewardTerm("exact_match")])
    grader = total.terms[0][1]
    slow = " + ".join(f"\\sqrt{{{i}}}" for i in range(2, 200))
    assert grader(["p"], [f"\\boxed{{{slow}}}"], [slow]) == [0.0]
    assert grader.take_metrics()["reward/timeouts"] == 1.0
    assert load_reward([RewardTerm("math_verify")]).terms[0][1](["p"], ["\\boxed{4}"], ["4"]) == [1.0]


def test_the_share_of_failed_gradings_is_that_of_all_ranks_and_calls():
    grader = MathVerify()
    parts = []
    for outcomes in (["ok", "timeout", "ok"], [], ["crash"]):
        grader._counts.update(outcomes)
        parts.append(grader.take_metrics())
    assert f"{FAILED_SHARE}math_verify" not in parts[1]
    assert merge_metrics(parts) == {"reward/timeouts": 1.0, "reward/crashes": 1.0, f"{FAILED_SHARE}math_verify": 0.5}


def test_a_run_whose_first_step_failed_begins_with_another_reward(configure):
    settings = ("plan={name: grpo, num_samples: 2}", "steps=1", "prompts_per_step=1", "checkpoint.resume=true")
    with pytest.raises(RewardError, match="KeyError"):
        train_to_end(configure("reward=odd_rewards:raises", *settings))
    assert train_to_end(configure("reward=odd_rewards:made", *settings)).steps == 1


def test_what_was_saved_before_any_training_belongs_to_its_reward(configure):
    settings = ("steps=1", *EVALUATED, "checkpoint.resume=true")
    summary = train_to_end(configure("reward=odd_rewards:interrupts", *settings))
    assert (summary.steps, summary.stopped_by) == (0, "SIGTERM")
    with pytest.raises(CheckpointError, match="a different run: .* of step 0, before any training: delete it, and the run starts"):
        train_to_end(configure("reward=odd_rewards:made", *settings))


def test_a_reward_gets_the_columns_that_it_takes():
    assert judge(lambda completions: [1.0] * len(completions), problems(2), ["a", "b"]) == [1.0, 1.0]
    assert judge(lambda prompts, depth: depth, problems(2), ["a", "b"]) == [problem.columns["depth"] for problem in problems(2)]


def test_a_module_with_a_mistake_in_its_syntax_is_told_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "bad_syntax.py").write_text("def f(completions):\n    return [1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError, match=r"importing the module 'bad_syntax' failed at bad_syntax\.py:2: .*never closed\."):
        load_reward("bad_syntax:f")
