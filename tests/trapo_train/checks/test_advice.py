"""Legal settings that are probably not what was meant: the run says so, with the setting that changes it."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.trapo_train.test_train import EVALUATED, build_config
from trapo_kernels.objective import KL_ESTIMATORS
from trapo_kernels.objectives import PRESETS, PUBLISHED
from trapo_train.checks.advice import advice
from trapo_train.config import load_config
from trapo_train.step.objective import KLConfig, ObjectiveConfig, build_objective
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer, build_scheduler

ROOT = Path(__file__).parents[3]
ALONE = SimpleNamespace(size=1, device=torch.device("cpu"))


@pytest.fixture
def advised(tmp_path):
    def said(*overrides, num_problems=8, traces=None, world=ALONE):
        config = build_config(tmp_path, "run", *overrides)
        return advice(config, build_objective(config.objective, 0), traces or [1] * num_problems, world)

    return said


def test_nothing_is_said_of_usual_settings(advised):
    assert advised() == []
    assert advised("objective.name=sft", "plan.name=sft", "packing.aggregation=token_mean") == []


@pytest.mark.parametrize("plan", ["paper", "luffy"])
def test_samples_that_no_loss_reads_are_named(advised, plan):
    said = [s for s in advised("objective.name=trsft", f"plan.name={plan}", "packing.aggregation=token_mean") if "samples" in s]
    assert len(said) == 1 and f"of what plan {plan} samples" in said[0] and "plan.name=sft" in said[0]
    assert not any("samples at most" in s for s in advised("objective.name=trapo", f"plan.name={plan}"))


@pytest.mark.parametrize("name", [name for name, method in PUBLISHED.items() if not method.critic])
def test_a_method_as_published_is_silent_and_any_other_is_named(advised, name):
    method = PUBLISHED[name]
    wanted = {"packing.aggregation": method.aggregation} | {
        f"advantage.{name}": getattr(method, name) for name in ("normalise", "center", "baseline")
    }
    other = {"packing.aggregation": "length", "advantage.normalise": "batch_std", "advantage.center": "mean"}
    other["advantage.baseline"] = "all"
    wanted = {setting: value for setting, value in wanted.items() if value is not None}
    assert advised("plan.name=grpo", f"objective.name={name}", *(f"{setting}={value}" for setting, value in wanted.items())) == []
    (sentence,) = advised("plan.name=grpo", f"objective.name={name}", *(f"{setting}={value}" for setting, value in other.items()))
    assert sentence.startswith(f"{name} as published has ")
    for setting, value in wanted.items():
        assert (f"{setting}={value}" in sentence) == (value != other[setting])


@pytest.mark.parametrize("name", ["chord_mu", "chord_phi", "uft"])
def test_a_mean_over_the_tokens_of_each_role_is_advised_where_the_method_has_one(advised, name):
    (sentence,) = advised(f"objective.name={name}", "advantage={normalise: group_std, baseline: unguided}")
    assert sentence == f"{name} as published has packing.aggregation=role_mean; this run has constant"


def test_a_method_with_a_critic_is_said_to_have_none(advised):
    said = [advised("plan.name=grpo", f"objective.name={name}") for name, method in PUBLISHED.items() if method.critic]
    assert len(said) == 2
    assert all(any("a critic's advantages (GAE); there is none here" in sentence for sentence in found) for found in said)


def test_grpo_with_the_defaults_of_dr_grpo(advised):
    (sentence,) = advised("plan.name=grpo", "objective.name=grpo")
    assert sentence == (
        "grpo as published has advantage.normalise=group_std packing.aggregation=sequence_mean; this run has none, constant"
    )


def test_a_loss_that_is_no_mean_over_tokens(advised):
    (sentence,) = advised("objective.name=sft", "plan.name=sft")
    assert "divides the loss by max_response_tokens = 16" in sentence and "packing.aggregation=token_mean" in sentence


def test_traces_alone_with_an_objective_for_rollouts(advised):
    (sentence,) = advised("plan.name=sft")
    assert "objective trapo trains on rollouts too" in sentence


def test_a_warmup_that_no_step_follows(advised):
    assert advised("steps=3", "optimizer.warmup_steps=2") == []
    assert advised("steps=1", "optimizer.warmup_steps=2", "objective.name=dr_grpo", "plan.name=grpo", "updates.epochs=3") == []
    for overrides in (("steps=3", "optimizer.warmup_steps=3"), ("steps=1", "optimizer.warmup_steps=3")):
        (sentence,) = advised(*overrides)
        assert sentence.startswith(f"optimizer.warmup_steps = 3 is not below the {overrides[0][-1]} optimizer steps of the run")


def test_a_warmup_that_no_step_follows_is_refused_where_the_schedule_divides_by_those_steps():
    config = OptimizerConfig(schedule="polynomial", warmup_steps=2)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    with pytest.raises(ValueError, match=r"optimizer\.warmup_steps must be below the optimizer steps .*, got 2 and 2\. Lower it"):
        build_scheduler(optimizer, config, steps=2)


UNCLIPPED = {"trapo", "luffy", "srft", "relift", "hpt", "rloo"}


@pytest.mark.parametrize("name", sorted(name for name in PRESETS if build_objective(ObjectiveConfig(name)).rollout is not None))
def test_several_updates_with_a_loss_that_does_not_clip(advised, name):
    said = [s for s in advised(f"objective.name={name}", "updates={mini_batches: 3, epochs: 2}") if "does not clip" in s]
    assert len(said) == (name in UNCLIPPED)
    assert all(sentence.startswith(f"6 updates per rollout step, and the rollout loss of {name}") for sentence in said)
    assert not any("does not clip" in sentence for sentence in advised(f"objective.name={name}"))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_a_kl_whose_gradient_holds_nothing(advised, estimator):
    grpo = ("objective.name=grpo", "advantage.normalise=group_std", "packing.aggregation=sequence_mean")
    for name in ("objective.kl={beta: 0.1, estimator: %s}", "objective.options={beta: 0.1, kl: %s}"):
        said = advised("plan.name=grpo", *grpo, name % estimator)
        assert ["KL estimator k1" in sentence and "k2, or k3_corrected" in sentence for sentence in said] == [True] * (
            estimator == "k1"
        )


def test_options_of_a_kl_that_has_no_weight_at_any_step(advised):
    grpo = ("plan.name=grpo", "objective.name=grpo", "advantage.normalise=group_std", "packing.aggregation=sequence_mean")
    ramp = "{schedule: linear, start: 0.0, end: %s, steps: 5}"
    for beta in ("", "beta: 0, ", f"beta: {ramp % 0.0}, "):
        (sentence,) = advised(*grpo, f"objective.options={{{beta}kl: k3, kl_clamp: 3.0, kl_cap: 2.0}}")
        given = "objective.options has kl=k3 kl_clamp=3.0 kl_cap=2.0, and no KL at any step, because beta is 0. Set beta"
        assert sentence.startswith(given)
    for options in ("{}", "{beta: 0}", "{beta: 0.1, kl: k2}", "{beta: %s, kl: k2}" % (ramp % 0.1)):
        assert advised(*grpo, f"objective.options={options}") == []


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_a_correction_with_logprobs_over_the_tokens_that_were_kept(advised, engine):
    sampled, corrected = f"rollout.engine={engine}", "updates.correction={name: mis}"
    for cut, named in (
        (("top_p=0.9",), "top_p=0.9"),
        (("top_k=20",), "top_k=20"),
        (("top_p=0.9", "top_k=20"), "top_p=0.9 and top_k=20"),
    ):
        cut = [f"rollout.{setting}" for setting in cut]
        (sentence,) = advised(sampled, corrected, *cut)
        assert f"over the tokens that {named} leave" in sentence and "updates.correction=mis is lower" in sentence
        assert sentence.endswith("Set rollout.top_p=1 rollout.top_k=0, or updates.correction=null")
        uncorrected, sentence = advised(sampled, *cut)
        assert uncorrected.startswith(f"rollout.engine={engine} computes logprobs in another arithmetic than the trainer")
        assert f"over the tokens that {named} leave" in sentence and "rollout/mismatch_kl holds the share" in sentence
        assert sentence.endswith("Set rollout.top_p=1 rollout.top_k=0")
        assert advised(corrected, *cut) == []  # logprobs over all tokens
    assert advised(sampled, corrected) == []


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_samples_of_another_arithmetic_that_nothing_corrects(advised, engine):
    (sentence,) = advised(f"rollout.engine={engine}")
    assert "(rollout/mismatch_kl says how far they are). Set updates.correction={name: tis}" in sentence
    traces = ("plan.name=sft", "objective.name=sft", "packing.aggregation=token_mean")
    assert advised(f"rollout.engine={engine}", "rollout.top_p=0.9", *traces) == []  # no sample is in the loss
    assert advised(f"rollout.engine={engine}", "updates.correction={name: tis}") == []


@pytest.mark.parametrize("page", ["README.md", "trapo_train/README.md"])
def test_the_example_of_a_page_needs_no_advice(page, tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.S)
    (tmp_path / "my.yaml").write_text(example)
    config = load_config(tmp_path / "my.yaml")
    assert config.updates.per_step > 1 or page == "README.md"
    assert advice(config, build_objective(config.objective, 0), [1] * 1000, ALONE) == []


def test_the_kl_that_the_page_writes_is_read_as_it_says():
    sentence = r"`'objective={name: (\w+), kl: {beta: ([\d.]+)}}'`, or the option `beta` of"
    (name, beta) = re.search(sentence, " ".join((ROOT / "trapo_train" / "README.md").read_text().split())).groups()
    assert build_objective(ObjectiveConfig(name, kl=KLConfig(float(beta)))).kl.beta == float(beta)
    takes_beta = {name for name, preset in PRESETS.items() if "beta" in inspect.signature(preset).parameters}
    assert takes_beta == {"grpo", "reinforce_pp", "uft"}  # which the trainer's page names


def test_sections_that_nothing_reads(advised):
    server = "rollout.vllm_server={timeout_s: 5, max_retries: 1}"
    (sentence,) = advised("rollout.vllm={sleep: false}")
    assert sentence == "nothing reads rollout.vllm.sleep: rollout.engine is transformers"
    (sentence,) = advised(server)
    assert "rollout.vllm_server.timeout_s, rollout.vllm_server.max_retries: rollout" in sentence
    assert not any("nothing reads" in sentence for sentence in advised(server, "rollout.engine=vllm_server"))
    (sentence,) = advised("evaluation={every: 5, group_by: depth, temperature: 0.6}", "eval_data=null")
    assert sentence == "nothing reads evaluation.temperature: eval_data is null"
    held_out = "eval_data={task: pointer_chasing, split: test, num_problems: 2}"
    assert advised("evaluation={every: 5, group_by: depth, temperature: 0.6}", held_out) == []


def test_more_prompts_in_a_step_than_there_are(advised):
    (sentence,) = advised(num_problems=2)
    assert "prompts_per_step = 3 is more than the 2 problems" in sentence


def test_many_passes_over_the_same_traces(advised):
    traces = ("objective.name=sft", "plan.name=sft", "packing.aggregation=token_mean", "prompts_per_step=2")
    (sentence,) = advised(*traces, "steps=50")
    assert sentence == (
        "the run makes 12 passes over the traces of 8 problems (steps · prompts_per_step / problems). For three set epochs=3"
    )
    assert advised(*traces, "steps=40") == advised("steps=50") == []
    assert advised(*traces, "steps=null", "epochs=25") == []  # as many as were asked for


def test_expert_traces_that_the_plan_never_uses(advised):
    several = {"traces": [1, 3, 0, 2]}
    (sentence,) = advised("plan.name=paper", **several)
    assert sentence.startswith("plan paper never uses 1 of the 6 expert traces: it takes at most 2 of a problem. Plan sft")
    (sentence,) = advised("plan.name=hpt", **several)
    assert "plan hpt never uses 3 of the 6 expert traces: it takes at most 1 of a problem" in sentence
    sft = ("plan.name=sft", "objective.name=sft", "packing.aggregation=token_mean")
    assert advised("plan.name=paper", traces=[1, 2, 0]) == advised(*sft, **several) == []
    assert advised("plan.name=grpo", "objective.name=dr_grpo", **several) == []  # unguided by its name


def test_adapters_at_the_learning_rate_of_whole_weights(advised):
    (sentence,) = advised("model.lora={rank: 2}", "optimizer={}")
    assert sentence.startswith("optimizer.learning_rate = 1e-06 is the default") and "optimizer.learning_rate=1e-4" in sentence
    assert advised("optimizer={}") == advised("model.lora={rank: 2}") == []


def test_several_rewards_and_none_that_says_what_is_correct(advised):
    both = "reward=[{name: pointer_chasing}, {name: overlong, weight: 0.5, options: {max_tokens: 16, buffer: 4}}]"
    (sentence,) = advised(both, "plan.name=luffy")
    assert "a weighted sum of 2 rewards of at least rollout.correct_at = 1. Set rollout.correct_by" in sentence
    rungs = "plan={name: ladder, rungs: [{samples: 2}, {samples: 1, prefix_ratio: 0.5, threshold: 0.5}]}"
    for plan, name in (("plan.name=paper", "paper"), ("plan.name=hpt", "hpt"), ("plan.name=relift", "relift"), (rungs, "ladder")):
        (sentence,) = advised(both, plan)
        assert f"correct_at = 1, and plan {name} compares it with its thresholds. Set rollout.correct_by" in sentence
    (sentence,) = advised(both, "plan={name: luffy, refill: 2}")
    assert "and plan.refill keeps problems with wrong answers alone where it tells these apart. Set rollout.correct_by" in sentence
    assert advised(both, "rollout.correct_by=pointer_chasing") == advised("reward=[{name: pointer_chasing}]") == []


def test_settings_of_responses_where_an_evaluation_samples_none(advised):
    leftover = ["evaluation={sample: false, temperature: 0.6, pass_at: [4], samples_per_prompt: 4, every: 3, num_problems: 2}"]
    (sentence,) = advised(*EVALUATED, *leftover)
    assert sentence == (
        "evaluation.sample=false samples no responses, and nothing reads evaluation.samples_per_prompt, evaluation.pass_at, "
        "evaluation.temperature. Set evaluation.sample=true for accuracy"
    )
    assert advised(*EVALUATED, "evaluation.sample=false") == []


def test_held_out_chats_that_are_rendered_otherwise(advised):
    think = "chat_template_kwargs: {think: false}"
    trained = "data.chat_template_kwargs={think: false}"
    (sentence,) = advised(trained, f"eval_data={{same: {{path: a.jsonl, {think}}}, other: {{path: b.jsonl}}}}")
    assert sentence.startswith("data.chat_template_kwargs is {'think': False}, that of eval_data.other {}: the model is evaluated")
    (sentence,) = advised("eval_data={path: a.jsonl, chat_template_kwargs: {think: true}}")
    assert "is {}, that of eval_data {'think': True}" in sentence
    assert advised(trained, f"eval_data={{path: a.jsonl, {think}}}") == advised(trained) == []


def test_held_out_prompts_that_are_made_otherwise(advised):
    """Each of these changes what the model sees."""
    trained = ("data.system_prompt=Think.", "data.response_start='<think>'")
    found = advised(*trained, "eval_data={path: a.jsonl}")
    assert [sentence.split(", that of")[0] for sentence in found] == [
        "data.system_prompt is 'Think.'",
        "data.response_start is '<think>'",
    ]
    same = "eval_data={path: a.jsonl, system_prompt: Think., response_start: '<think>'}"
    assert advised(*trained, same) == []


def test_a_pretrained_model_without_checkpoints(advised, tmp_path):
    pretrained = ("model={name_or_path: some/model}", "checkpoint.every=0")
    assert ["checkpoints are saved only where a signal or an error" in sentence for sentence in advised(*pretrained)] == [True]
    on_gpu = SimpleNamespace(size=1, device=torch.device("cuda"))
    assert any("samples in plain PyTorch" in sentence for sentence in advised(*pretrained, world=on_gpu))
    assert not any("samples in plain PyTorch" in sentence for sentence in advised(*pretrained, "rollout.engine=vllm", world=on_gpu))
    assert advised("checkpoint.every=0") == []  # a model from scratch


def test_full_float32_on_a_gpu(advised):
    on_gpu = SimpleNamespace(size=1, device=torch.device("cuda"))
    pretrained = ("model={name_or_path: some/model}", "rollout.engine=vllm", "updates.correction={name: tis}")
    (sentence,) = advised(*pretrained, world=on_gpu)
    assert sentence.startswith("model.dtype=float32 computes") and "Set model.dtype=bfloat16" in sentence
    assert advised(*pretrained, "model.dtype=bfloat16", world=on_gpu) == advised(*pretrained) == advised(world=on_gpu) == []


def test_the_patience_of_torchrun(advised, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    (sentence,) = advised(world=SimpleNamespace(size=2, device=torch.device("cpu")))
    assert "--shutdown-timeout" in sentence
    assert advised() == []
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "900")
    assert advised(world=SimpleNamespace(size=2, device=torch.device("cpu"))) == []
