"""The loop: it learns, it resumes to the same bits, and it refuses what it cannot train before any work."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from benchmarks.soak import soak
from trapo_kernels import objectives
from trapo_train import trainer
from trapo_train.config import RunConfig, load_config
from trapo_train.models.loading import name_model_in_hub_errors
from trapo_train.records import Sample
from trapo_train.reports.display import Reporter
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.schema import ConfigError, UserError
from trapo_train.tasks import build_tokenizer
from trapo_train.train import Trainer, run

MEASURED = ("tokens_per_s", "peak_memory_mib", "time/rollout_s", "time/update_s", "time/reward_s", "rollout/tokens_per_s")
TINY = {
    "steps": 6,
    "prompts_per_step": 3,
    "reward": "pointer_chasing",
    "data": {"task": "pointer_chasing", "num_problems": 8, "task_options": {"depths": [1, 2]}},
    "model": {
        "scratch": {
            "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24,
            "max_position": 80,
        }
    },
    "rollout": {"max_response_tokens": 16, "paragraph_break": "|"},
    "packing": {"max_tokens": 200},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "checkpoint": {"every": 2},
}  # fmt: skip
EVALUATED = (
    "eval_data={task: pointer_chasing, split: test, num_problems: 4, task_options: {depths: [1, 2]}}",
    "evaluation.every=3",
)


def build_config(directory: Path, name: str, *overrides: str) -> RunConfig:
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return load_config(file, [f"output_dir={directory / name}", *overrides])


@pytest.fixture
def configure(tmp_path):
    """A function that builds the tiny configuration with overrides, in its own output directory."""
    return partial(build_config, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunConfig:
    """The tiny run with evaluations, trained without interruption."""
    config = build_config(tmp_path_factory.mktemp("whole"), "run", *EVALUATED)
    train_to_end(config)
    return config


class StopAfter(Reporter):
    """Sends this process a signal, or raises, once a step has been reported."""

    def __init__(self, output_dir, step: int, error: BaseException | None = None, number=signal.SIGTERM) -> None:
        super().__init__(output_dir)
        self.stop_step, self.error, self.number = step, error, number

    def step(self, metrics):
        super().step(metrics)
        if metrics["step"] == self.stop_step:
            if self.error is not None:
                raise self.error
            os.kill(os.getpid(), self.number)


def train_to_end(config: RunConfig):
    return run(config, Reporter(config.output_dir))


def rows(config: RunConfig) -> list[dict]:
    """What was recorded, without the events and without what was measured."""
    recorded = [row for row in read_metrics(config.output_dir) if row["kind"] != "event"]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in recorded]


def exported(config: RunConfig) -> bytes:
    return (Path(config.output_dir) / "model" / "model.safetensors").read_bytes()


def test_a_run_says_what_auto_chose_and_why(configure):
    config = configure("run", "steps=1", "model.liger=auto")
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert any(text.startswith("model.attention=auto: sdpa_packed; flash_attention_2 cannot run: ") for text in told)
    assert any(text.startswith("model.liger=auto: not used, ") for text in told)


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_training_goes_on(configure, monkeypatch):
    delete = shutil.rmtree

    def busy(path, *arguments, **options):
        if Path(path).name == "step_00000001":
            raise OSError(16, "Device or resource busy", str(path))
        delete(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    config = configure("run", "steps=3", "checkpoint={every: 1, keep: 1}")
    assert train_to_end(config).steps == 3
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event" and "not be deleted" in row["text"]]
    assert len(told) == 2 and "step_00000001 could not be deleted" in told[0]
    assert [path.name for path in sorted((Path(config.output_dir) / "checkpoints").iterdir())] == ["step_00000001", "step_00000003"]


def test_a_run_leaves_metrics_config_checkpoints_and_a_model(configure):
    config = configure("whole", *EVALUATED)
    summary = train_to_end(config)
    assert (summary.steps, summary.interrupted) == (6, False)
    output_dir = Path(config.output_dir)
    assert load_config(output_dir / "config.yaml") == config
    assert sorted(path.name for path in (output_dir / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    AutoModelForCausalLM.from_pretrained(output_dir / "model")
    steps = [row for row in rows(config) if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(config) if row["kind"] == "eval"] == [0, 3, 6]
    expected = {
        "loss", "grad_norm", "learning_rate", "reward/mean", "reward/unguided", "reward/micro_group_1", "guided_share",
        "guided_share/micro_group_4", "entropy/rollout", "entropy/expert", "trsft/weight_mean",
        "trsft/share_below_alpha", "trsft/weight_histogram", "response_tokens", "answer_in_prefix",
    }  # fmt: skip
    assert expected <= set(steps[0])
    assert steps[0]["learning_rate"] == 0.0
    assert steps[2]["learning_rate"] == pytest.approx(1e-2)
    assert summary.evaluation[""].keys() >= {"accuracy"}
    assert len(summary.groups) == 3
    assert all(isinstance(sample, Sample) for group in summary.groups for sample in group)


def test_sft_learns_the_traces(configure):
    config = configure(
        "sft", "plan.name=sft", "objective.name=sft", "steps=30", "packing.aggregation=token_mean", "checkpoint.every=0"
    )
    summary = train_to_end(config)
    losses = [row["loss"] for row in rows(config)]
    assert losses[-1] < 0.75 * losses[0]
    assert "rollout/logprob" not in summary.metrics
    assert summary.metrics["guided_share"] == 1.0


SLOW_STOPS = [pytest.param(step, signal.SIGTERM, marks=pytest.mark.slow) for step in (1, 4)]


@pytest.mark.parametrize(("stop_step", "number"), [(3, signal.SIGINT), *SLOW_STOPS])
def test_a_signal_saves_and_the_resumed_run_is_bitwise_the_same(configure, whole, stop_step, number, capfd, default_sigint):
    stopped = configure("stopped", *EVALUATED)
    summary = run(stopped, StopAfter(stopped.output_dir, stop_step, number=number))
    assert (summary.steps, summary.interrupted, summary.stopped_by) == (stop_step, True, number.name)
    assert str(summary).startswith(f"Stopped by {number.name} after step {stop_step}")
    assert ("saves after this step and stops; Ctrl-C once more" in capfd.readouterr().err) == (number == signal.SIGINT)
    assert "checkpoint.resume=true" in str(summary)
    assert not (Path(stopped.output_dir) / "model").exists()
    resumed = configure("stopped", *EVALUATED, "checkpoint.resume=true")
    assert train_to_end(resumed).steps == 6
    assert exported(resumed) == exported(whole)
    assert rows(resumed) == rows(whole)


def test_a_second_ctrl_c_ends_a_run_at_once(configure, monkeypatch, default_sigint):

    def twice(trainer):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    monkeypatch.setattr(Trainer, "train_step", twice)
    config = configure("run", "checkpoint.every=0")
    with pytest.raises(KeyboardInterrupt):
        train_to_end(config)
    assert not (Path(config.output_dir) / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_that_dies_between_checkpoints_repeats_the_lost_step(configure, whole):
    broken = configure("broken", *EVALUATED)
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        run(broken, StopAfter(broken.output_dir, 5, KeyboardInterrupt("power cut")))
    resumed = configure("broken", *EVALUATED, "checkpoint.resume=true")
    train_to_end(resumed)
    assert exported(resumed) == exported(whole)
    assert rows(resumed) == rows(whole)


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_over(configure, whole):
    broken = configure("broken", *EVALUATED)
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        run(broken, StopAfter(broken.output_dir, 1, KeyboardInterrupt("power cut")))
    resumed = configure("broken", *EVALUATED, "checkpoint.resume=true")
    train_to_end(resumed)
    assert rows(resumed) == rows(whole)


@pytest.mark.slow
def test_a_finished_run_can_be_continued_with_more_steps_and_evaluating_changes_nothing(configure, whole):
    train_to_end(configure("long", "steps=4"))
    summary = train_to_end(configure("long", "steps=6", "checkpoint.resume=true"))
    assert summary.steps == 6
    assert exported(configure("long")) == exported(whole)


def test_resume_refuses_another_run(configure):
    train_to_end(configure("run", "steps=2"))
    other = configure("run", "checkpoint.resume=true", "optimizer.weight_decay=0.1", "data.num_problems=9")
    with pytest.raises(
        RuntimeError, match=r"num_problems was 8, is 9; config\.optimizer\.weight_decay was 0\.0, is 0\.1; data was"
    ):
        train_to_end(other)


def test_steps_belong_to_the_run_where_the_schedule_depends_on_them(configure):
    train_to_end(configure("run", "steps=2", "optimizer.schedule=linear"))
    with pytest.raises(RuntimeError, match=r"config\.steps was 2, is 3"):
        train_to_end(configure("run", "steps=3", "optimizer.schedule=linear", "checkpoint.resume=true"))


def test_an_output_dir_that_is_a_file_is_refused(configure, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("notes.txt", "notes.txt/run"):
        with pytest.raises(
            ValueError, match=r"output_dir must be a directory or a new name, got .*notes.txt is a file. Choose another"
        ):
            train_to_end(configure(name))


def test_used_output_dir_is_refused(configure):
    for every, remedy in ((0, "It has no checkpoint to continue from:"), (1, r"Continue it with checkpoint\.resume=true,")):
        train_to_end(configure(f"run{every}", "steps=1", f"checkpoint.every={every}"))
        with pytest.raises(ValueError, match=f"already holds a run. {remedy} delete it, or choose another"):
            train_to_end(configure(f"run{every}"))
        with pytest.raises(ConfigError, match=r"is the directory of a run. Continue it with .*config.yaml checkpoint.resume=true"):
            load_config(str(configure(f"run{every}").output_dir))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=sft", "plan.name=grpo"], "objective sft trains on expert tokens alone, and plan grpo has none"),
        (["objective.name=dr_grpo", "plan.name=sft"], "plan sft samples nothing, and objective dr_grpo does not train on expert"),
        (
            ["objective.name=dr_grpo", "plan={name: grpo, num_samples: 1}"],
            "plan must draw at least 2 samples of a problem",
        ),
        (
            ["objective.name=sft", "plan.name=sft", "updates.correction={name: tis}"],
            "updates.correction corrects rollout tokens .* got tis with objective sft, which trains on expert tokens alone",
        ),
        (["packing.train_on_prompt=true"], "needs an objective of expert tokens alone, .* got trapo, which trains on rollouts"),
        (["packing.train_on_prompt=true", "objective.name=luffy"], "got luffy, which weighs expert tokens by the advantage"),
        (["packing.train_on_prompt=true", "objective.name=sft"], "train_on_prompt needs a plan that samples nothing, got paper"),
        (["packing.max_tokens=20"], r"fit into packing\.max_tokens = 20, got 30 \+ 16 = 46 tokens"),
        (["model.scratch.max_position=32"], r"fit into the model's positions .*max_position\) = 32, got 30 \+ 16 = 46"),
        (["objective.name=sft", "plan.name=sft", "rollout.max_response_tokens=2"], "none of the 8 problems has an expert"),
        (["objective.name=exgrpo"], "objective exgrpo compares expert tokens with rollout_logprob"),
        (["plan.name=relift", "objective.name=dr_grpo"], "plan relift has steps on expert traces alone"),
        (["objective.chooser=no_such:thing"], "objective.chooser 'no_such:thing': importing the module 'no_such' failed"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(configure, monkeypatch, overrides, message):
    monkeypatch.setattr(trainer, "run_plans", lambda *arguments: pytest.fail("a rollout was started"))
    config = configure("refused", *overrides)
    with pytest.raises(ValueError, match=message):
        train_to_end(config)
    assert [path.name for path in Path(config.output_dir).iterdir()] == [".lock"]


def test_a_file_without_expert_traces_trains_by_a_plan_that_takes_none(configure, tmp_path):
    rows, chats, tokenizer = tmp_path / "rows.jsonl", tmp_path / "chats.jsonl", build_tokenizer()
    rows.write_text("".join(f'{{"prompt": "ab?a{i}:", "solution": "b"}}\n' for i in (1, 2, 3)))
    chats.write_text('{"messages": [{"role": "user", "content": "ab?a1:"}]}\n')
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = (f"data={{path: {rows}}}", f"model.tokenizer={tmp_path / 'tokenizer'}", "reward=exact_match", "steps=1")
    with pytest.raises(ValueError, match=r"takes expert traces, and none of the 3 problems has.*Set data\.expert_column"):
        train_to_end(configure("guided", *data))
    with pytest.raises(ValueError, match=r"of the 1 problems .* Have conversations end with what the assistant says, or raise"):
        train_to_end(configure("chats", *data, f"data={{path: {chats}, preset: messages}}"))
    assert train_to_end(configure("grpo", *data, "plan={name: grpo}", "objective={name: dr_grpo}")).steps == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model={}", "Give exactly one of name_or_path and scratch"),
        ("objective.options={alhpa: 1}", "Did you mean 'alpha'"),
        ("packing.agregation=constant", "Did you mean 'packing.aggregation'"),
        ("model.dtype=bf16", "model.dtype must be one of"),
        ("checkpoint={every: 2, keep_best: true}", "keep_best needs eval_data.* got no eval_data, 2 and 0"),
        (
            "rollout.correct_by=exact_match",
            r"correct_by must be null or one of the rewards, \['pointer_chasing'\], got 'exact_match'",
        ),
    ],
)
def test_bad_config_names_the_key(configure, override, message):
    with pytest.raises(ConfigError, match=message):
        configure("bad", override)


@pytest.mark.parametrize(("saved", "evaluated", "good"), [(2, 6, True), (2, 2, True), (6, 2, False), (2, 3, False), (0, 2, False)])
def test_keep_best_wants_evaluated_steps_to_be_saved(saved, evaluated, good, configure):
    settings = (f"checkpoint={{every: {saved}, keep_best: true}}", f"evaluation={{every: {evaluated}}}")
    if good:
        assert configure("run", *EVALUATED, *settings).checkpoint.keep_best
    else:
        with pytest.raises(ConfigError, match=f"the latter a multiple of the former.* got eval_data, {saved} and {evaluated}"):
            configure("run", *EVALUATED, *settings)


def test_expert_traces_that_are_too_long_are_left_out_and_said(configure):
    config = configure("long", "rollout.max_response_tokens=8", "steps=1")
    train_to_end(config)
    events = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert any("expert traces longer than rollout.max_response_tokens = 8" in text for text in events)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_term_compares_with_the_model_before_training(configure, dtype):
    options = "objective={name: grpo, options: {beta: 0.1, entropy_coef: 1.0}}"
    config = configure("kl", "plan.name=grpo", options, f"model.dtype={dtype}")
    train_to_end(config)
    divergence = [row["rollout/kl_ref"] for row in rows(config) if "rollout/kl_ref" in row]
    assert divergence[0] == pytest.approx(0.0, abs=1e-9)
    assert divergence[-1] > 0.0


def test_bfloat16_runs_end_to_end(configure):
    summary = train_to_end(configure("bf16", "model.dtype=bfloat16", "steps=2", "model.gradient_checkpointing=true"))
    assert summary.steps == 2
    assert summary.metrics["rollout/mismatch_kl"] == pytest.approx(0.0, abs=0.01)


def test_trainer_uses_the_configured_preset(configure):
    trainer = Trainer(configure("preset", "objective={name: trapo, options: {alpha: 0.3}}"))
    assert trainer.objective == objectives.trapo(alpha=0.3)


@pytest.mark.slow
def test_a_run_of_two_ranks_killed_at_a_random_moment_ends_with_the_same_bits(tmp_path):  # `python -m benchmarks.soak` does more
    result = soak(tmp_path, kills=1, ranks=2, seed=0, steps=8)
    assert result["kills"] == 1 and sum(result["by"].values()) == 1


def silent(prompts, completions, **columns):
    """A reward without an opinion."""
    return [None] * len(completions)


@pytest.mark.slow
def test_a_reward_without_an_opinion_is_said_once_and_a_start_without_a_checkpoint_too(configure):
    overrides = ("reward='tests.trapo_train.test_train:silent'", "plan.name=grpo", "steps=3", "checkpoint.every=0", *EVALUATED)
    config = configure("silent", *overrides)
    with Reporter(config.output_dir) as reporter:
        run(config, reporter)
    rows = read_metrics(config.output_dir)
    told = [row["text"] for row in rows if row["kind"] == "event" and "no opinion" in row["text"]]
    silence = "the reward had no opinion (None) on any sample, and each counts as 0"
    assert told == [f"eval_data: {silence}", f"step 1: {silence}"]
    assert all(row["reward/none_count"] == 4 for row in rows if row["kind"] == "eval")
    again = configure("silent", *overrides, "checkpoint.resume=true")
    with pytest.raises(UserError, match="must hold a checkpoint to continue from, it has none, and training anew would replace"):
        run(again, None)
    shutil.rmtree(Path(again.output_dir) / "model")
    with Reporter(again.output_dir) as reporter:
        run(again, reporter)
    texts = [row["text"] for row in read_metrics(again.output_dir) if row["kind"] == "event"]
    assert any("there is no checkpoint in" in text and "from the beginning" in text for text in texts)


def test_a_model_that_is_nowhere_is_named(configure, tmp_path):
    for place, missing in (("no/such-model", f", and there is no such directory in {Path.cwd()}"), (str(tmp_path), "")):
        config = replace(configure("nowhere").model, name_or_path=place, scratch=None)
        with (
            pytest.raises(OSError, match=rf"model.name_or_path must be .*got '{place}'{missing}\. no connection"),
            name_model_in_hub_errors(config),
        ):
            raise OSError("no connection")
