"""Headroom with a scripted engine whose success depends on the length of the prefix that it is given."""

import os
import re
from dataclasses import replace

import pytest

from tests import ranks
from tests.trapo_train.test_train import build_config
from trapo_train.evaluation import headroom
from trapo_train.evaluation.evaluate import standard_error
from trapo_train.evaluation.headroom import HeadroomConfig, measure_headroom
from trapo_train.evaluation.headroom import measure as measure_trainer
from trapo_train.records import Completion, ExpertTrace, Problem
from trapo_train.rewards.functions import WeightedSum
from trapo_train.rollouts.rollout import RolloutConfig
from trapo_train.tasks import build_tokenizer, pointer_chasing_reward
from trapo_train.trainer import Trainer

TOKENIZER = build_tokenizer()
ROLLOUT = RolloutConfig(max_response_tokens=20, paragraph_break="|", snap_window=0.0)
EXPERT = "ab|bc|cd|de#de$"
CONFIG = HeadroomConfig(samples_per_prompt=4, group_by="depth")


def ids(text):
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def problem(index, depth=4, experts=(EXPERT,)):
    prompt = f"ab?a{depth}:"
    traces = tuple(ExpertTrace(text, ids(text)) for text in experts)
    return Problem(index, prompt, ids(prompt), "de", traces, {"depth": depth})


class PrefixEngine:
    """Answers num_right(prompt, prefix) of each 4 copies right; depth and prefix are read from the prompt."""

    def __init__(self, num_right):
        self.num_right = num_right
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append(params)
        completions = []
        for i, prompt in enumerate(prompts):
            head, prefix = TOKENIZER.decode(list(prompt)).split(":")
            right = i % 4 < self.num_right(int(head[-1]), prefix)
            text = EXPERT[len(prefix) :] if right else "a$"
            completions.append(Completion(ids(text), (0.0,) * len(text), "stop"))
        return completions


def measure(num_right, problems=None, config=CONFIG, rollout=ROLLOUT):
    engine = PrefixEngine(num_right)
    problems = problems or [problem(0, 4), problem(1, 6)]
    return measure_headroom(engine, problems, pointer_chasing_reward, TOKENIZER, config, rollout), engine


def test_a_length_penalty_beside_the_verifier_changes_no_pass_rate():
    def num_right(depth, prefix):
        return min(4, {4: 1, 6: 0}[depth] + len(prefix) // 3)

    def short(completions, **columns):
        return [-0.1] * len(completions)

    reward = WeightedSum([("right", pointer_chasing_reward, 1.0), ("short", short, 1.0)])
    problems = [problem(0, 4), problem(1, 6)]
    found = measure_headroom(PrefixEngine(num_right), problems, reward, TOKENIZER, CONFIG, replace(ROLLOUT, correct_by="right"))
    assert repr(found) == repr(measure(num_right)[0])  # a standard error of NaN equals none
    with pytest.raises(ValueError, match="the verifier accepts, got 0 of 2"):
        measure_headroom(PrefixEngine(num_right), problems, reward, TOKENIZER, CONFIG, ROLLOUT)


def test_rows_and_gain():
    def num_right(depth, prefix):
        return min(4, {4: 1, 6: 0}[depth] + len(prefix) // 3)

    report, engine = measure(num_right, rollout=replace(ROLLOUT, temperature=0.7))
    assert [(row.fraction, row.group) for row in report.rows] == [
        (fraction, group) for fraction in (0.0, 0.25, 0.5, 0.75) for group in ("depth_4", "depth_6", "all")
    ]
    assert [row.pass_rate for row in report.rows] == [0.25, 0, 0.125, 0.5, 0.25, 0.375, 0.75, 0.5, 0.625, 1.0, 0.75, 0.875]
    assert [row.n for row in report.rows] == [1, 1, 2] * 4
    assert report.overall()[0].standard_error == pytest.approx(standard_error([0.25, 0.0]))
    assert report.gain == 0.75
    assert report.gain_standard_error == 0.0  # paired: both problems gain the same
    [params] = engine.calls
    assert (params.temperature, params.seed) == (0.7, 0)
    assert params.budgets(32) == ([20] * 4 + [17] * 4 + [13] * 4 + [10] * 4) * 2
    good, sentence = report.verdict()
    assert good
    assert re.search(r"got 12\.5% without and 87\.5% after 75% .*\+75\.0 ± 0\.0 points, 2 problems", sentence)


def test_calls_of_the_engine_and_ranks_that_share_them_change_no_figure(monkeypatch):
    def num_right(depth, prefix):
        return min(4, {4: 1, 6: 0}[depth] + len(prefix) // 3)

    problems = [problem(i, 4 + 2 * (i % 2)) for i in range(5)]
    whole, _ = measure(num_right, problems)
    monkeypatch.setattr(headroom, "RESPONSES_PER_CALL", 32)
    report, engine = measure(num_right, problems)
    assert report == whole
    assert [(params.first_key, len(params.max_new_tokens)) for params in engine.calls] == [(0, 32), (32, 32), (64, 16)]
    told = []
    measure_headroom(PrefixEngine(num_right), problems, pointer_chasing_reward, TOKENIZER, CONFIG, ROLLOUT, progress=told.append)
    assert told == [0, 1 / 3, 2 / 3]


def _headroom(rank, size, config, directory):
    headroom.RESPONSES_PER_CALL = 64  # of this process, which ends with it
    report = measure_trainer(Trainer(config), HeadroomConfig(samples_per_prompt=2))
    (directory / f"{rank}_of_{size}").write_text(repr(report))
    os._exit(0)


@pytest.mark.slow
def test_ranks_find_what_one_process_does(tmp_path):
    held_out = "eval_data={task: pointer_chasing, split: test, num_problems: 20, task_options: {depths: [1, 2]}}"
    config = build_config(tmp_path, "run", held_out)
    for size in (1, 2):
        ranks.start(_headroom, size, size, config, tmp_path)
    reports = {path.name: path.read_text() for path in tmp_path.glob("*_of_*")}
    assert reports["0_of_2"] == reports["1_of_2"] == reports["0_of_1"]


def test_gain_is_that_of_the_best_fraction():
    report, _ = measure(lambda depth, prefix: {0: 1, 3: 3, 7: 2, 10: 2}[len(prefix)])
    assert report.gain == 0.5
    assert "after 25% of the expert trace" in report.verdict()[1]


@pytest.mark.parametrize(
    ("rights", "message"),
    [
        ((1, 1), r"raise the pass rate by at least 10 points, got 25\.0% without.*first train it"),
        ((0, 4), r"unguided pass rate must be 5% to 60%, got 0\.0%.*easier problems"),
        ((3, 4), r"unguided pass rate must be 5% to 60%, got 75\.0%.*harder problems"),
    ],
)
def test_verdict_refuses_with_rule_actual_and_remedy(rights, message):
    report, _ = measure(lambda depth, prefix: rights[bool(prefix)])
    good, sentence = report.verdict()
    assert not good
    assert re.search(message, sentence)


def test_a_gain_within_its_error_is_not_shown():
    report, _ = measure(lambda depth, prefix: 4 if prefix and depth == 4 else 1)
    good, sentence = report.verdict()
    assert not good and re.search(
        r"must be twice its error, got 25\.0% .*\+37\.5 ± 37\.5 points, 2 problems\)\. Take more", sentence
    )


def test_only_problems_with_an_accepted_expert_are_measured_each_with_its_first_accepted_one():
    problems = [
        problem(0, experts=()),
        problem(1, experts=("ab#ab$",)),
        problem(2, experts=("ab#ab$", EXPERT)),
        problem(3),
        problem(4),
    ]
    seen = []
    config = replace(CONFIG, num_problems=2)
    report, _ = measure(lambda depth, prefix: seen.append(prefix) or 4, problems, config)
    assert report.overall()[0].n == 2
    assert report.num_rejected == 2
    assert set(seen) == {"", EXPERT[:3], EXPERT[:7], EXPERT[:10]}


def test_traces_longer_than_a_response_may_be_are_left_out(tmp_path):
    held_out = "eval_data={task: pointer_chasing, split: test, num_problems: 12, task_options: {depths: [1, 8]}}"
    trainer = Trainer(build_config(tmp_path, "run", held_out))
    problems = trainer.eval_sets[""].problems
    lengths = [len(trace.token_ids) for problem in problems for trace in problem.experts]
    report = measure_trainer(trainer, HeadroomConfig(samples_per_prompt=1))
    assert max(lengths) > trainer.config.rollout.max_response_tokens
    assert report.overall()[0].n == sum(length <= trainer.config.rollout.max_response_tokens for length in lengths)


def test_answers_that_the_prefix_already_states_are_reported():
    early = [problem(index, experts=("ab|de#de$",)) for index in (0, 1)]
    report, _ = measure(lambda depth, prefix: 4, early)
    assert [row.answer_in_prefix for row in report.overall()] == [0.0, 0.0, 0.0, 1.0]


def test_too_few_accepted_experts_is_an_error():
    with pytest.raises(ValueError, match=r"at least 2 problems with an expert trace.*got 1 of 2"):
        measure(lambda depth, prefix: 4, [problem(0), problem(1, experts=("ab#ab$",))])


@pytest.mark.parametrize(
    "fields",
    [
        {"samples_per_prompt": 0},
        {"num_problems": 1},
    ],
)
def test_config_refuses_values_out_of_range(fields):
    [(name, value)] = fields.items()
    with pytest.raises(ValueError, match=re.escape(name) + r" must be .*, got " + re.escape(repr(value))):
        HeadroomConfig(**fields)
