"""The family in the trainer: every preset and plan trains, deferral, choosers and schedules resume to the same bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.trapo_train.test_train import StopAfter, build_config, exported, rows, train_to_end
from trapo_kernels import objectives
from trapo_train import trainer
from trapo_train.step.chooser import ChooserError
from trapo_train.train import Trainer, run

COSINE = "{schedule: cosine, start: 0.8, end: 0.2, steps: 6}"
PATHS = ("sft", "trapo", "gspo", "srft", "prefix_rft", "iw_sft", "uft")  # each takes another way through the trainer
RUNS = {
    "prefix_rft": ["plan={name: prefix_rft, num_samples: 3, guidance: " + COSINE + "}", "objective.name=prefix_rft"],
    "hpt": ["plan={name: hpt, num_samples: 3}", "objective.name=hpt"],
    "relift": ["plan={name: relift, num_samples: 2, buffer_size: 4}", "objective.name=relift"],
    "schedule": ["objective={name: chord_mu, options: {mu: " + COSINE + "}}", "packing.aggregation=role_mean"],
    "chooser": ["objective={name: trapo, chooser: 'tests.trapo_train.test_family:Drift'}"],
}


class Drift:
    """A chooser whose answers change where its state or the metrics of the last step get lost."""

    def __init__(self):
        self.position = 0.0

    def __call__(self, step, metrics):
        self.position += 0.6 if metrics.get("step") == step > 0 else 0.1
        return "expert" if int(self.position) % 2 == 0 else "rollout"

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Named:
    """A chooser that answers with the class's name."""

    def __call__(self, step, metrics):
        return type(self).__name__


names = ("iw_sft", "exgrpo", "uft", "dr_grpo", "trapo", "rollout")
iw_sft, exgrpo, uft, dr_grpo, trapo, rollout = (type(name, (Named,), {}) for name in names)


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(objectives.PRESETS) - {"exgrpo", *PATHS})]


@pytest.mark.parametrize("name", [*PATHS, *OTHERS])
def test_every_preset_trains_from_start_to_end(configure, name):
    trainer = Trainer(configure(name, "plan={name: luffy, num_samples: 3}", f"objective.name={name}", "steps=2"))
    for _ in range(2):
        metrics = trainer.train_step()
        assert metrics["skipped_step"] == 0


@pytest.mark.parametrize(
    "name", ["prefix_rft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("relift", "chooser", "schedule"))]
)
def test_a_stopped_run_continues_to_the_same_bits(configure, name):
    whole = configure("whole", *RUNS[name])
    train_to_end(whole)
    stopped = configure("stopped", *RUNS[name])
    run(stopped, StopAfter(stopped.output_dir, 3))
    resumed = configure("stopped", *RUNS[name], "checkpoint.resume=true")
    train_to_end(resumed)
    assert exported(resumed) == exported(whole)
    assert rows(resumed) == rows(whole)


def test_relift_trains_on_traces_when_enough_problems_wait(configure):
    trainer = Trainer(configure("relift", *RUNS["relift"], "model.attention=sdpa_packed"))
    assert not trainer.notes
    history = [trainer.train_step() for _ in range(5)]
    traces = [metrics["guided_share"] == 1.0 for metrics in history]
    assert any(traces) and not traces[0]
    for before, metrics, on_traces in zip(history, history[1:], traces[1:], strict=False):
        assert on_traces == (before["deferred"] >= 4)
        if on_traces:
            assert metrics["deferred"] == before["deferred"] - 4
            assert "entropy/rollout" not in metrics
    step = traces.index(True)
    assert history[step]["entropy/expert"] > 0


def test_relift_says_so_where_too_few_problems_can_wait(configure):
    plan = ("plan={name: relift, num_samples: 2, buffer_size: 9}", "objective.name=relift")
    trainer = Trainer(configure("relift", *plan, "model.attention=sdpa_packed"))
    assert trainer.notes == [
        "no step will train on expert traces: it waits for 9 unsolved problems (buffer_size of plan relift), and 8 have a trace"
    ]


def test_hpt_trains_on_rollouts_or_on_the_trace_of_each_problem(configure):
    trainer = Trainer(configure("hpt", *RUNS["hpt"]))
    for _ in range(4):
        trainer.train_step()
        for group in trainer.last_groups:
            assert len(group) == 3 or [sample.prefix_ratio for sample in group] == [1.0]


def test_schedules_reach_the_objective_of_each_step(configure):
    trainer = Trainer(configure("mu", *RUNS["schedule"]))
    history = [trainer.train_step()["objective/mu"] for _ in range(3)]
    assert history == [trainer.config.objective.options["mu"]["start"], pytest.approx(0.76, abs=0.01), pytest.approx(0.65)]
    assert trainer.objective.expert.scale == pytest.approx(0.5)


def test_schedules_reach_the_plan_of_each_step(configure):
    guidance = "{schedule: linear, start: 1, end: 0, steps: 1}"
    trainer = Trainer(configure("uft", "plan={name: uft, num_samples: 2, guidance: " + guidance + "}", "objective.name=uft"))
    assert [trainer.train_step()["guided_share"] for _ in range(3)] == [1.0, 0.0, 0.0]


def test_the_reference_is_the_same_model_and_is_loaded_when_the_first_is_sharded(configure, monkeypatch):
    done, checked = [], []
    for name in ("load_model_and_tokenizer", "place_model"):
        inner = getattr(trainer, name)

        def call(*arguments, name=name, inner=inner, **options):
            done.append(name)
            checked.append(options.get("check_logits", True))
            return inner(*arguments, **options)

        monkeypatch.setattr(trainer, name, call)
    built = Trainer(configure("kl", "plan.name=grpo", "objective={name: grpo, options: {beta: 0.1}}"))
    assert done == ["load_model_and_tokenizer", "place_model"] * 2  # no rank holds two whole models
    assert checked[0] and not checked[2]  # once is enough, and Liger's layers would not run where the second one is loaded
    trained, kept = built.model.state_dict(), built.reference.state_dict()
    assert trained.keys() == kept.keys() and all(torch.equal(trained[name], value) for name, value in kept.items())
    assert not any(parameter.requires_grad for parameter in built.reference.parameters()) and not built.reference.training
    assert sum(note.startswith("model.attention=auto") for note in built.notes) == 1


def test_a_reference_is_kept_for_a_kl_that_a_schedule_turns_on(configure):
    beta = "{schedule: linear, start: 0, end: 0.1, steps: 1}"
    trainer = Trainer(configure("kl", "plan.name=grpo", "objective={name: grpo, options: {beta: " + beta + "}}"))
    assert "rollout/kl_ref" not in trainer.train_step()
    trainer.train_step()
    assert "ref_logprob" in trainer.objective.reads()


def _chosen_by(name, objective="trapo"):
    return f"objective={{name: {objective}, chooser: 'tests.trapo_train.test_family:{name}'}}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([_chosen_by("iw_sft")], "chose iw_sft, which reads the logprobs of the model before training"),
        ([_chosen_by("uft")], "chose uft, which reads the logprobs of the model before training"),
        ([_chosen_by("exgrpo")], "objective exgrpo compares expert tokens with rollout_logprob"),
        (
            [_chosen_by("dr_grpo", "sft"), "plan.name=sft", "packing.train_on_prompt=true"],
            "needs an objective of expert tokens alone, .* got dr_grpo, which trains on rollouts",
        ),
        ([_chosen_by("dr_grpo"), "plan.name=sft"], "plan sft samples nothing, and objective dr_grpo does not train on expert"),
        (
            [_chosen_by("rollout"), "plan.name=sft"],
            "plan sft samples nothing, and objective trapo/rollout does not train on",
        ),
        (
            [_chosen_by("trapo", "sft"), "plan.name=sft", "reward=null"],
            "reward must be set where responses are judged, got null: objective trapo trains on rollouts too",
        ),
    ],
)
def test_a_choice_that_the_run_cannot_train_is_an_error_of_the_chooser_before_anything_is_sampled(
    configure, monkeypatch, settings, message
):
    chosen = Trainer(configure("chosen", *settings))
    monkeypatch.setattr(trainer, "run_plans", lambda *arguments: pytest.fail("a rollout was started"))
    before = chosen.order.state_dict()
    with pytest.raises(ChooserError, match=message):
        chosen.train_step()
    assert chosen.order.state_dict() == before  # so that a checkpoint is saved


@pytest.mark.parametrize("settings", [[_chosen_by("uft", "uft")], [_chosen_by("exgrpo", "dr_grpo"), "plan.name=grpo"]])
def test_a_choice_that_the_run_can_train_is_trained(configure, settings):
    assert Trainer(configure("chosen", *settings)).train_step()["skipped_step"] == 0
