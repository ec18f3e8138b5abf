"""The settings of a dataset, and the generated task as one."""

import json

import pytest

from tests.trapo_train.test_train import build_config
from trapo_train.config import load_config, to_yaml
from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.evaluation.eval_sets import UNNAMED, EvalConfig, load_eval_sets
from trapo_train.schema import UserError
from trapo_train.tasks import PointerChasingConfig, build_tokenizer, pointer_chasing_reward


def test_the_demo_task():
    tokenizer = build_tokenizer()
    options = PointerChasingConfig(depths=(3, 6), expert_noise=0.3)
    config = DataConfig(task="pointer_chasing", num_problems=200, task_options=options, on_rejected_expert="drop")
    problems = load_problems(config, tokenizer, pointer_chasing_reward)
    assert len(problems) == 200
    assert {problem.columns["depth"] for problem in problems} == {3, 6}
    assert tokenizer.decode(problems[0].prompt_ids) == problems[0].prompt
    # A trace of 3 steps is right with probability .73³ = .39, one of 6 with .15.
    assert 0.6 < problems.report.dropped_experts / 200 < 0.85
    assert problems.report.without_expert == problems.report.dropped_experts
    kept = next(problem for problem in problems if problem.experts)
    assert tokenizer.decode(kept.experts[0].token_ids).endswith(f"#{kept.solution}$")
    held_out = load_problems(DataConfig(task="pointer_chasing", split="test", num_problems=50), tokenizer, None)
    assert not {problem.prompt for problem in held_out} & {problem.prompt for problem in problems}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Give either task or path"),
        ({"task": "pointer_chasing", "path": "x"}, "Give either task or path"),
        ({"task": "sorting"}, "task must be one of pointer_chasing or null, got 'sorting'"),
        ({"path": "x", "task_options": PointerChasingConfig(num_nodes=8, depths=(2,))}, "belong to a task"),
        ({"task": "pointer_chasing", "name": "main"}, "name belongs to a dataset, got 'main' with task = pointer_chasing"),
        ({"task": "pointer_chasing", "seed": -1}, "seed must be at least 0 and below 2^63, got -1"),
        ({"path": "x", "seed": 2**63}, "seed must be at least 0 and below 2^63, got 9223372036854775808"),
        ({"path": "x", "max_prompt_tokens": 0}, "at least 1, got 0"),
        ({"path": "x", "num_problems": 0}, "num_problems must be null or at least 1, got 0"),
        ({"path": "x", "on_long_prompt": "cut"}, "one of error, drop, got 'cut'"),
        ({"path": "x", "on_rejected_expert": "no"}, "one of keep, drop, got 'no'"),
        ({"path": "x", "think_tags": "drop"}, "one of keep, strip, add, require, got 'drop'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError) as error:
        DataConfig(**options)
    assert words in str(error.value)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match=r"preset must be one of luffy, messages or null, got 'verl'"):
        DataConfig(path="d", preset="verl")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "trian.jsonl"}, "{section}.path must name a file: there is no file 'trian.jsonl'"),
        ({"path": "*.jsonl.gz"}, "{section}.path must match files"),
        ({"revision": "v1"}, "{section}.revision must be null but for a dataset on the hub, got 'v1'"),
        ({"split": "train[:0]"}, "{section}: reading the dataset "),
        ({"solution_column": "answer"}, "Set {section}.solution_column to one of them, or to null."),
        ({"max_prompt_tokens": 1}, "Raise {section}.max_prompt_tokens, or drop such rows with {section}.on_long_prompt=drop."),
        ({"max_prompt_tokens": 1, "on_long_prompt": "drop"}, "within {section}.max_prompt_tokens = 1."),
        ({"think_tags": "require"}, "{section}: rows.jsonl, split train, row 0: an expert trace must open with <think>"),
    ],
)
def test_an_error_names_the_section_whose_key_it_is_about(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "ab|", "solution": "bc", "expert": "de"}))
    config, tokenizer = DataConfig(**{"path": "rows.jsonl"} | options), build_tokenizer()
    for section, load in {
        "data": lambda: load_problems(config, tokenizer, None),
        "eval_data": lambda: load_eval_sets({UNNAMED: config}, EvalConfig(), tokenizer),
        "eval_data.aime": lambda: load_eval_sets({"aime": config}, EvalConfig(), tokenizer),
    }.items():
        with pytest.raises(UserError) as raised:
            load()
        assert words.format(section=section) in str(raised.value)


def test_a_column_that_is_set_to_its_default_name_overrides_the_preset(tmp_path):
    given = build_config(tmp_path, "run", "data={path: x.jsonl, preset: luffy, expert_column: expert}")
    data = given.data
    assert (data.prompt_column, data.solution_column, data.expert_column) == ("prompt", "reward_model.ground_truth", "expert")
    (tmp_path / "again.yaml").write_text(to_yaml(given))
    assert load_config(tmp_path / "again.yaml").data == data and type(data.prompt_column) is str
