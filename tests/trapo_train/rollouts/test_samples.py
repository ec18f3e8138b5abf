"""The files of samples: whole texts as JSON lines, of training steps and of evaluations, replaced as a whole."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from tests.trapo_train.evaluation.test_evaluate import ROLLOUT, CyclingEngine, problem
from tests.trapo_train.test_train import EVALUATED, StopAfter, build_config, exported, train_to_end
from trapo_train import cli
from trapo_train.evaluation.eval_sets import EvalConfig, EvalSet
from trapo_train.evaluation.evaluate import evaluate
from trapo_train.files import replace_text
from trapo_train.records import Problem, Sample
from trapo_train.rewards.functions import RewardTerm, load_reward
from trapo_train.rollouts import samples
from trapo_train.rollouts.samples import write_samples
from trapo_train.tasks import build_tokenizer
from trapo_train.train import run

TOKENIZER = build_tokenizer()


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_line_holds_the_whole_texts_with_special_tokens(tmp_path):
    prefix, completion = (tuple(TOKENIZER(text)["input_ids"]) for text in ("ab|" * 300, "cd$"))
    sample = Sample(Problem(4, "ab?a1:", (1,), "x"), 2, 0.25, prefix, completion, (-1.0, -2.0, -3.0), "stop")
    sample.reward, sample.advantage, sample.rewards, sample.prefix_weight = 1.0, 0.5, {"exact": 1.0, "none": None}, 0.5
    path = write_samples([[sample], []], TOKENIZER, tmp_path, 7)
    (line,) = lines(path.with_suffix(".jsonl"))
    assert line == {
        "step": 7, "problem": 4, "prompt": "ab?a1:", "solution": "x", "micro_group": 2, "prefix_ratio": 0.25, "prefix_weight": 0.5,
        "prefix": "ab|" * 300, "prefix_tokens": 900, "completion": "cd$", "completion_tokens": 3, "finish_reason": "stop",
        "masked": False, "reward": 1.0, "correct": False,
        "rewards": {"exact": 1.0, "none": None}, "advantage": 0.5, "answer_in_prefix": False, "logprob_mean": -2.0,
    }  # fmt: skip
    write_samples([[sample]], TOKENIZER, tmp_path, 7, judged=False)
    (line,) = lines(path.with_suffix(".jsonl"))
    assert line["reward"] is None and "| – | +0.500 |" in path.read_text()


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "samples" / "lines.jsonl"
    samples.write_lines(path, [{"text": "é\u2028"}])
    monkeypatch.setattr(Path, "replace", lambda *paths: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        samples.write_lines(path, [{"text": "other"}])
    assert lines(path) == [{"text": "é\u2028"}]


@pytest.mark.slow
def test_a_sum_leaves_its_parts_in_samples_and_metrics_and_a_resumed_run_the_same_lines_and_bits(configure):
    terms = "reward=[{name: pointer_chasing}, {name: 'tests.trapo_train.step.test_updates:coin', weight: 0.5}]"
    settings = (*EVALUATED, terms, "tracking.samples_every=1", "steps=3")
    whole, stopped = (configure(name, *settings) for name in ("whole", "stopped"))
    once = train_to_end(whole)
    assert run(stopped, StopAfter(stopped.output_dir, 1)).interrupted
    again = train_to_end(configure("stopped", *settings, "checkpoint.resume=true"))
    for name in ("reward/pointer_chasing", "reward/tests.trapo_train.step.test_updates:coin"):
        assert again.metrics[name] == once.metrics[name] and name in next(iter(once.evaluation.values()))
    assert exported(stopped) == exported(whole)
    found = [[lines(path) for path in sorted(Path(c.output_dir, "samples").glob("*.jsonl"))] for c in (whole, stopped)]
    assert found[0] == found[1] and len(found[0]) == 3
    for line in (line for step in found[0] for line in step):
        parts = line["rewards"]
        assert line["reward"] == parts["pointer_chasing"] + 0.5 * parts["tests.trapo_train.step.test_updates:coin"]


@pytest.mark.parametrize("per_call", [256, 2])
def test_an_evaluation_keeps_its_responses(tmp_path, per_call):
    config = EvalConfig(samples_per_prompt=2, save_samples=True, responses_per_call=per_call)
    eval_set = EvalSet.of([problem(i, 2) for i in range(3)], config)
    reward = load_reward([RewardTerm("pointer_chasing")])
    path = tmp_path / "samples" / "eval.jsonl"
    metrics = evaluate(CyclingEngine((2, 1, 0)), eval_set, reward, TOKENIZER, config, ROLLOUT, save_to=path)
    found = lines(path)
    assert [line["problem"] for line in found] == [0, 0, 1, 1, 2, 2]
    assert [line["correct"] for line in found] == [True, True, True, False, False, False]
    assert (found[0]["completion"], found[-1]["completion"], found[0]["rewards"]) == ("#de$", "a" * 8, {"pointer_chasing": 1.0})
    assert sum(line["correct"] for line in found) / 6 == metrics["accuracy"]


def test_a_run_and_the_command_write_a_file_per_set_and_step(configure, capsys):
    sets = "eval_data={near: {task: pointer_chasing, split: test, num_problems: 2}}"
    config = configure("run", *EVALUATED, sets, "evaluation.save_samples=true", "steps=3")
    train_to_end(config)
    directory = Path(config.output_dir, "samples")
    assert sorted(path.name for path in directory.iterdir()) == [f"eval_near_step_0000000{step}.jsonl" for step in (0, 3)]
    assert cli.main(["eval", config.output_dir]) == 0  # of the trained model, as the last evaluation of the run
    (of_model,) = directory.glob("eval_near_of_run--model--*.jsonl")
    assert of_model.name in capsys.readouterr().out.replace("\n", "")
    assert lines(of_model) == lines(directory / "eval_near_step_00000003.jsonl")


def test_responses_that_nobody_samples_cannot_be_kept():
    with pytest.raises(ValueError, match="save_samples must not be set where sample is false, got True"):
        EvalConfig(sample=False, save_samples=True)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_text_that_cannot_be_written_leaves_nothing_but_what_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "table.md"
    replace_text(path, "first")

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="no space left"):
        replace_text(path, "second")
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.md"] and path.read_text() == "first"
