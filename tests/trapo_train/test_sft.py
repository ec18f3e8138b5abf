"""SFT without a reward: nothing is judged, no metric speaks of it, and where a reward is needed it is asked for."""

import json
from functools import partial
from pathlib import Path

import pytest

from tests.trapo_train.parallel.test_parallel import ranks_train
from tests.trapo_train.test_train import EVALUATED, build_config, exported, rows, train_to_end
from trapo_train import cli
from trapo_train.checks.advice import advice
from trapo_train.config import load_config
from trapo_train.parallel.world import World
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.step.objective import build_objective
from trapo_train.tasks import build_tokenizer
from trapo_train.train import Trainer

SFT = ("reward=null", "plan.name=sft", "objective.name=sft", "packing.aggregation=token_mean")


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def test_without_a_reward_the_weights_are_the_same_and_no_metric_speaks_of_one(configure):
    with_reward = configure("judged", *SFT[1:], "steps=3")
    config = configure("run", *SFT, *EVALUATED, "evaluation.sample=false", "tracking.samples_every=1", "steps=3")
    train_to_end(with_reward)
    train_to_end(config)
    assert exported(config) == exported(with_reward)
    names = {name for row in rows(config) for name in row}
    assert not {name for name in names if "reward" in name or "accuracy" in name} and "expert_nll" in names and "loss" in names
    (first, *_) = sorted(Path(config.output_dir, "samples").glob("*.jsonl"))
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert {line["reward"] for line in lines} == {None} and all(line["prefix"].endswith("$") for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("advantage.normalise=group_std", "advantage.normalise must be none with plan sft and objective sft.* got group_std"),
        ("advantage.baseline=unguided", "advantage.baseline must be all .* got unguided"),
        ("rollout.on_truncated=mask", "rollout.on_truncated must be keep .* got mask: nothing reads it. Leave it out"),
        ("rollout.temperature=0.5", "rollout.temperature must be 1.0 with plan sft .* got 0.5"),
    ],
)
def test_settings_of_sampled_responses_are_refused_where_there_are_none(configure, override, message):
    with pytest.raises(ValueError, match=message):
        Trainer(configure("run", *SFT, override))
    Trainer(configure("run", "plan.name=sft", override))  # the objective trapo samples for problems without a trace


def test_a_run_that_trained_on_prompts_is_evaluated_by_its_reward(configure, capsys):
    config = configure("run", *SFT[1:], *EVALUATED, "packing.train_on_prompt=true", "steps=1")
    train_to_end(config)
    assert cli.main(["eval", config.output_dir]) == 0, capsys.readouterr().err
    assert "held-out accuracy" in capsys.readouterr().out


def test_expert_traces_alone_gather_no_model_for_an_engine(configure, monkeypatch):
    entered = []
    inner = Trainer.ready_to_generate
    monkeypatch.setattr(Trainer, "ready_to_generate", lambda self: entered.append(self.step) or inner(self))
    for name, overrides, count in (("traces", SFT, 0), ("samples", ("plan.name=grpo", "objective.name=dr_grpo"), 2)):
        train_to_end(configure(name, *overrides, "steps=2"))
        assert len(entered) == count


def test_a_problem_without_a_trace_on_another_rank_has_this_one_gather_the_model_too(configure, monkeypatch):
    trainer, entered = Trainer(configure("run", *SFT)), []
    inner = trainer.ready_to_generate
    monkeypatch.setattr(trainer, "ready_to_generate", lambda: entered.append(1) or inner())
    for on_the_other, count in ((False, 0), (True, 1)):
        others = [(on_the_other, None)]
        monkeypatch.setattr(trainer.world, "gather", lambda mine, others=others: [mine] + others * (mine == (False, None)))
        trainer.train_step()
        assert len(entered) == count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.name=grpo", "objective.name=dr_grpo"], r"got null: plan grpo samples responses\. Set reward=math_verify"),
        (["objective.name=trapo"], "objective trapo trains on rollouts too, which plan sft draws for problems without a trace"),
        (["data.on_rejected_expert=drop"], r"asks it about traces.*, or data\.on_rejected_expert=keep"),
        ([*EVALUATED], r"evaluations sample responses.*, or evaluation\.sample=false to report the loss"),
    ],
)
def test_a_reward_is_asked_for_where_something_is_judged(overrides, message, configure):
    with pytest.raises(ValueError, match=f"reward must be set where responses are judged, .*{message}"):
        train_to_end(configure("run", *SFT, *overrides))


def test_a_dry_run_asks_for_a_reward_where_the_run_does(configure, tmp_path, capsys):
    configure("run")
    assert (
        cli.main(
            [
                "run",
                str(tmp_path / "run.yaml"),
                "output_dir=o",
                "reward=null",
                "plan.name=grpo",
                "objective.name=dr_grpo",
                "--dry-run",
            ]
        )
        == 2
    )
    assert "reward must be set" in capsys.readouterr().err


def test_commands_without_a_reward(configure, tmp_path, capsys):
    config = configure("run", *SFT, *EVALUATED, "evaluation.sample=false", "steps=2")
    train_to_end(config)
    capsys.readouterr()
    assert cli.main(["eval", config.output_dir]) == 0
    assert "expert_nll" in capsys.readouterr().out
    assert cli.main(["inspect", config.output_dir]) == 0
    shown = capsys.readouterr().out
    assert "micro-group 1" in shown and "reward" not in shown.replace(str(tmp_path), "")
    assert cli.main(["headroom", config.output_dir]) == 2
    assert "headroom: reward must be set" in capsys.readouterr().err
    assert cli.main(["eval", config.output_dir, "evaluation.sample=true"]) == 2
    assert "evaluations sample responses" in capsys.readouterr().err


def test_the_recipe_trains_on_chats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}${% endif %}{% endfor %}"
    tokenizer.save_pretrained("tokenizer")
    chats = [[{"role": "user", "content": f"ab?a{i}:"}, {"role": "assistant", "content": "#b"}] for i in (1, 2, 3, 4)]
    for name, part in (("chats", chats[:3]), ("held_out", chats[3:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in part))
    shape = "{hidden_size: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, intermediate_size: 24, max_position: 6200}"
    model = f"model={{scratch: {shape}, tokenizer: tokenizer}}"
    overrides = [model, "epochs=2", "prompts_per_step=3", "eval_data={path: held_out.jsonl, preset: messages}"]
    assert cli.main(["run", "sft", *overrides]) == 0
    metrics = read_metrics("runs/sft")
    assert [row["loss_tokens"] for row in metrics if row["kind"] == "train"] == [9, 9]  # of the answers alone
    assert [row["expert_traces"] for row in metrics if row["kind"] == "eval"] == [1, 1]


def test_the_recipe_is_plain_sft_and_needs_no_advice():
    config = load_config("sft").for_problems(1000)
    assert config.reward is None and (config.plan.name, config.objective.name) == ("sft", "sft")
    assert config.packing.aggregation == "token_mean"
    assert config.data.max_prompt_tokens + config.rollout.max_response_tokens <= config.packing.max_tokens
    assert advice(config, build_objective(config.objective), [1] * 1000, World.alone()) == []


def _several_traces(tmp_path):
    """Overrides for three problems with six expert traces between them."""
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    experts = (["a#a$"], ["b#b$", "bc#c$"], ["a#b$", "ab#c$", "abc#a$"])
    rows = [{"prompt": f"ab?a{i}:", "solution": "a", "expert": traces} for i, traces in enumerate(experts, start=1)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{{path: {tmp_path / 'train.jsonl'}}}"
    return f"data={data}", f"eval_data={data}", f"model.tokenizer={tmp_path / 'tokenizer'}", "evaluation.every=1"


def test_every_trace_of_a_problem_is_trained_and_the_loss_is_that_of_the_evaluation(configure, tmp_path):
    config = configure("run", *SFT, *_several_traces(tmp_path), "evaluation.sample=false", "steps=2", "optimizer.warmup_steps=0")
    summary = train_to_end(config)
    found = rows(config)
    evaluated = [row["expert_nll"] for row in read_metrics(config.output_dir) if row["kind"] == "eval"]
    assert [row["num_samples"] for row in found if row["kind"] == "train"] == [6, 6]
    assert [len(group) for group in sorted(summary.groups, key=len)] == [1, 2, 3]
    for row, before in zip((row for row in found if row["kind"] == "train"), evaluated, strict=False):
        assert row["loss"] == pytest.approx(before, rel=1e-5)


def test_a_step_on_unsolved_problems_takes_one_trace_of_each(configure, tmp_path):
    relift = ("plan={name: relift, num_samples: 2, buffer_size: 3}", "objective.name=relift", "reward=exact_match", "steps=2")
    summary = train_to_end(configure("run", *_several_traces(tmp_path)[::2], *relift))
    assert summary.metrics["num_samples"] == 3 and summary.metrics["guided_share"] == 1
    assert {sample.prefix_ids == sample.problem.experts[0].token_ids for group in summary.groups for sample in group} == {True}


def test_a_run_says_how_many_traces_its_plan_never_uses(configure, tmp_path):
    trainer = Trainer(configure("run", *_several_traces(tmp_path), "reward=exact_match", "steps=1"))
    assert any("plan paper never uses 1 of the 6 expert traces" in note for note in trainer.notes)


@pytest.mark.slow
def test_two_ranks_without_a_reward(tmp_path):
    ranks_train(2, tmp_path, "steps=2", *SFT, *EVALUATED, "evaluation.sample=false")
    found = read_metrics(tmp_path / "run")
    assert not [name for row in found for name in row if name.startswith("reward")]
    assert [row["num_samples"] for row in found if row["kind"] == "train"] == [3, 3]
