"""What steps and evaluations show to be wrong is said once, when it begins, and what trained nothing is counted at the end."""

import json
from dataclasses import replace

import pytest

from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train import cli
from trapo_train.checks.symptoms import Symptoms, about_evaluation
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.tasks import build_tokenizer

FINE = {"reward/none_count": 0.0, "num_samples": 8.0, "loss_tokens": 5, "finished_share": 0.5}


def said(steps, before=None):
    """What is said of the metrics of steps that follow each other, and at the end."""
    symptoms = Symptoms(16, "</s>", before or {})
    first = (before or {}).get("step", 0) + 1
    return [
        text for step, metrics in enumerate(steps, first) for text in symptoms.of_step(metrics | {"step": step})
    ], symptoms.at_the_end()


def test_a_step_that_trains_nothing_is_told_when_it_begins_and_counted():
    nothing = FINE | {"loss_tokens": 0}
    equal = nothing | {"reward/equal_share": 1.0}
    steps, end = said([nothing, nothing, FINE, equal, nothing, FINE])
    assert steps == [
        "step 1: nothing was trained, no token was in the loss",
        "step 4: nothing was trained, every problem's rewards were equal",
    ]
    assert end == [
        "3 of 6 steps trained nothing: no token was in the loss",
        "1 of 6 steps trained nothing: every problem's rewards were equal",
    ]
    assert said([equal, FINE], before={"step": 7})[1] == [
        "1 of 2 steps after step 7 trained nothing: every problem's rewards were equal"
    ]
    assert said([FINE, FINE]) == ([], [])


def test_steps_without_an_end_are_told_once_and_not_blamed_on_the_end_token_where_some_had_one():
    endless, traces = FINE | {"finished_share": 0.0}, {"loss_tokens": 5}
    rare = FINE | {"finished_share": 0.1}
    (texts, _) = said([traces, endless, rare, endless, FINE, endless, endless])
    assert [text.split(":")[0] for text in texts] == ["step 2", "step 6"] and "At step 5 50% had one" in texts[1]
    assert texts[0] == (
        "step 2: no completion has an end: all ran to rollout.max_response_tokens = 16. Either that is too small, or the model "
        "ends its turns with another token than </s> (model.eos_token)"
    )
    for before, steps, step in (({}, [FINE, FINE | {"finished_share": 1.0}, FINE, endless], 2), (FINE | {"step": 4}, [endless], 4)):
        ((text,), _) = said(steps, before)
        share = "100%" if step == 2 else "50%"
        assert f"At step {step} {share} had one: either responses have outgrown that" in text
        assert "lower optimizer.learning_rate" in text and "eos_token" not in text


@pytest.mark.parametrize(("silent", "which"), [(0, None), (7, None), (8, "8 of 80 samples"), (80, "any sample")])
def test_a_share_of_samples_without_an_opinion_is_told_once(silent, which):
    metrics = FINE | {"reward/none_count": float(silent), "num_samples": 80.0}
    expected = [] if which is None else [f"the reward had no opinion (None) on {which}, and each counts as 0"]
    assert said([metrics, metrics])[0] == [f"step 1: {text}" for text in expected]
    evaluation = {"reward/none_count": float(silent), "num_problems": 40.0, "samples_per_problem": 2.0}
    assert list(about_evaluation("aime", evaluation).values()) == [f"eval_data.aime: {text}" for text in expected]
    assert about_evaluation("", {"expert_nll": 1.0}) == {}


def test_a_reward_that_falls_silent_altogether_is_told_after_one_that_was_silent_on_some():
    some, other, every = (FINE | {"reward/none_count": silent} for silent in (1.0, 2.0, 8.0))
    told = ["the reward had no opinion (None) on 1 of 8 samples", "the reward had no opinion (None) on any sample"]
    texts, _ = said([some, other, every, FINE, every, some])
    assert texts == [f"step {step}: {text}, and each counts as 0" for step, text in zip((1, 3), told, strict=True)]
    assert len(said([every, some, every])[0]) == 1  # of a reward that recovers nothing new is said
    symptoms, size = Symptoms(16, "</s>", {}), {"num_problems": 4.0, "samples_per_problem": 2.0}
    for name in ("aime", "math"):
        texts = [text for metrics in (some, other, every, FINE, every) for text in symptoms.of_evaluation(name, metrics | size)]
        assert texts == [f"eval_data.{name}: {text}, and each counts as 0" for text in told]


def test_rows_without_a_solution_are_counted_and_what_that_costs_is_told(tmp_path, own_cache, capsys):
    path, tokenizer = tmp_path / "half.jsonl", build_tokenizer()
    rows = [{"prompt": f"ab?a{i}:", "solution": None if i % 2 else "b"} for i in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = (f"data={{path: '{path}'}}", f"eval_data.a.path={path}", f"model.tokenizer={tmp_path / 'tokenizer'}")
    config = build_config(tmp_path, "half", *data, "reward=exact_match", "plan.name=grpo", "objective.name=dr_grpo", "steps=1")
    summary = train_to_end(replace(config, prompts_per_step=4))
    assert "4 problems (4 without expert" in (out := capsys.readouterr().out) and "; 2 problems have no solution" in out
    events = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    for section in ("data", "eval_data.a"):
        assert any(
            text.startswith(f"{section}: 2 of 4 problems have no solution, which the reward exact_match takes") for text in events
        )
    count = len([sample for group in summary.groups for sample in group])
    told = f"the reward had no opinion (None) on {count // 2} of {count} samples, and each counts as 0"
    assert [text for text in events if "no opinion (None) on" in text] == [
        f"step 1: {told}",
        "eval_data.a: the reward had no opinion (None) on 2 of 4 samples, and each counts as 0",
    ]
    assert cli.main(["eval", config.output_dir]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "eval_data.a: " + told.replace(f"{count // 2} of {count}", "2 of 4")


def test_traces_that_the_reward_rejects_are_told_once_they_are_no_accident():
    symptoms, step = Symptoms(10, "</s>", {}), {"num_samples": 8, "loss_tokens": 5}
    seen = [0.0, 0.0, 0.5, 0.0, None, 0.0, 0.0, 0.0]
    told = [
        symptoms.of_step(step | {"step": i} | ({} if share is None else {"accuracy/expert": share})) for i, share in enumerate(seen)
    ]
    assert [len(sentences) for sentences in told] == [0, 0, 0, 0, 0, 0, 1, 0]
    assert "step 6: the reward called no whole expert trace correct in 3 steps" in told[6][0]
