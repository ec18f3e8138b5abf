"""Configuration files, overrides and recipes, and what a mistake in them says."""

from dataclasses import replace

import pytest
import yaml

from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train.config import RunConfig, load_config, to_yaml
from trapo_train.data.dataset import DataConfig
from trapo_train.dry_run import dry_config
from trapo_train.rollouts.plans import PlanConfig, Rung
from trapo_train.schema import ConfigError
from trapo_train.trainer import Trainer

TEXT = """
output_dir: runs/x
steps: 10
prompts_per_step: 4
reward: pointer_chasing
model: {scratch: {}}
data:
  task: pointer_chasing
  task_options: {depths: [3, 6], expert_noise: 0.15}
plan: {name: release}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def load(path, *overrides):
    return load_config(path, list(overrides))


def test_a_file_becomes_nested_dataclasses(file):
    config = load(file)
    assert (config.seed, config.steps, config.eval_data) == (0, 10, None)
    assert config.data.task_options.depths == (3, 6)
    assert config.plan == PlanConfig("release")


def test_overrides_replace_create_and_are_yaml(file):
    config = load(
        file,
        "seed=3",
        "plan.name=ladder",
        "plan.rungs=[{samples: 4}, {samples: 4, prefix_ratio: 0.5, threshold: 1e-1}]",
        "eval_data.task=pointer_chasing",
        "eval_data.split=test",
        "data.task_options.expert_noise=1e-3",
        "data.system_prompt=null",
    )
    assert config.seed == 3
    assert config.plan.rungs == (Rung(4), Rung(4, 0.5, 0.1))
    assert config.eval_data == DataConfig(task="pointer_chasing", split="test")
    assert config.data.task_options.expert_noise == 0.001
    assert config.data.task_options.depths == (3, 6)


def test_evaluation_sets_by_name(file, tmp_path):
    config = load(file, "eval_data={aime: {path: a.parquet}, math: {path: m}}", "evaluation.samples_per_prompt={aime: 32, math: 1}")
    assert config.eval_data == {"aime": DataConfig(path="a.parquet"), "math": DataConfig(path="m")}
    config = load(file, "eval_data={aime: {path: a.parquet}, math: {path: m}}", "eval_data.math=null")
    assert config.eval_data == {"aime": DataConfig(path="a.parquet")}
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    "text",
    [
        "Answer behind ####.",
        "#### first",
        "End with # and the answer",
        "&all of it",
        "Put it in \\boxed{}, then stop ",
        "<think>\n",
        "# A title\nand more",
        "2024-05-01",
        "1:30",
    ],
)
def test_a_text_without_quotes_in_an_override_is_taken_as_it_stands(file, text):
    assert load(file, f"data.system_prompt={text}").data.system_prompt == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'a ####'  # a note", "a ####"),
        ('"<think>\\n"', "<think>\n"),
        ("'a \\neq b'", "a \\neq b"),
        ("!!str 5", "5"),
        ("null", None),
        ("", None),
    ],
)
def test_quotes_and_null_in_an_override_are_those_of_yaml(file, text, value):
    assert load(file, f"data.system_prompt={text}").data.system_prompt == value


def test_a_line_break_in_an_override_needs_quotes(file):
    with pytest.raises(ConfigError) as error:
        load(file, "data.response_start=<think>\\n")
    assert "data.response_start must have quotes around a text with \\n in it, without them a" in str(error.value)
    assert "got <think>\\n. For a line break write 'data.response_start=\"…\\n\"', where" in str(error.value)


@pytest.mark.parametrize("text", ["010", "-017", "1:30", "0o17"])
def test_what_yaml_once_read_as_other_numbers_is_refused(file, text):
    for overrides, content in (([f"steps={text}"], TEXT), ([], TEXT.replace("10", text, 1))):
        file.write_text(content)
        with pytest.raises(ConfigError, match=f"steps must be int, got '{text}' "):
            load(file, *overrides)
    with pytest.raises(ConfigError, match=f"data.task_options.expert_noise must be float, got '{text}.?5?' "):
        load(file, "steps=1", f"data.task_options.expert_noise={text}{'.5' if ':' in text else ''}")


@pytest.mark.parametrize(("text", "steps"), [("1_000", 1000), ("0x10", 16), ("0b11", 3), ("+7", 7)])
def test_other_ways_to_write_a_whole_number_stay(file, text, steps):
    assert load(file, f"steps={text}").steps == steps


@pytest.mark.parametrize("text", ["1e-6", "1.5e-6", "-2e3", ".5E+1", "0.1", "3", "1.", ".5", "-.5", "1_0.5e-1", "+1e5"])
def test_numbers_with_exponents_are_numbers(file, text):
    config = load(file, f"plan={{name: ladder, rungs: [{{samples: 1}}, {{samples: 1, threshold: {text}}}]}}")
    assert config.plan.rungs[1].threshold == float(text)


PATHS = ["output_dir", "data.path", "eval_data.path", "model.name_or_path", "model.tokenizer", "rollout.vllm_server.sync_dir"]


def _with_path(file, key, path):
    section = {"data.path": ["data={}"], "model.name_or_path": ["model={}"]}
    return load(file, *section.get(key, []), f"{key}={path}")


@pytest.mark.parametrize("key", PATHS)
def test_the_home_directory_takes_the_place_of_a_tilde_and_no_directory_is_called_like_a_variable(file, key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for path, expanded in (("~/a/b", "/home/me/a/b"), ("a~/~b", "a~/~b"), ("a$/b", "a$/b")):
        found = _with_path(file, key, path)
        for name in key.split("."):
            found = getattr(found, name)
        assert found == expanded
    for path in ("$HOME/a", "a/${oc.env:HOME}/b", "~nobody_of_this_name/a"):
        with pytest.raises(ConfigError) as error:
            _with_path(file, key, path)
        assert f"{key.split('.')[-1]} must be a path without a $VARIABLE, and with no ~ but" in str(error.value)
        assert f"got {path!r}. Write it out" in str(error.value)


QUOTES = """Put quotes around a text with characters or words that mean something in YAML: 'data.system_prompt="…"' on the"""


def test_to_yaml_and_back(tmp_path, file):
    config = load(file, "plan={name: ladder, rungs: [{samples: 2}, {samples: 1, threshold: 1e-7}]}", "eval_data.path=ä.jsonl")
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "resolved.yaml") == config
    assert set(yaml.safe_load(to_yaml(config))) == set(RunConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["plan.nmae=grpo"], "override 'plan.nmae=grpo': unknown key 'plan.nmae'. Did you mean 'plan.name'?"),
        (["optimizer.lr=1e-4"], "unknown key 'optimizer.lr'. Did you mean 'optimizer.learning_rate'?"),
        (["step=3"], "override 'step=3': unknown key 'step'. Did you mean 'steps'?"),
        (["learning_rate=1e-4"], "unknown key 'learning_rate'. Did you mean 'optimizer.learning_rate'?"),
        (["num_generations=8"], "unknown key 'num_generations'. Did you mean 'plan.num_samples'?"),
        (["batch_size=8"], "unknown key 'batch_size'. Did you mean 'prompts_per_step'?"),
        (["lr=1e-4"], "unknown key 'lr'. Did you mean 'optimizer.learning_rate'?"),
        (["max_tokens=1024"], "Did you mean 'packing.max_tokens' or 'rollout.max_response_tokens'?"),
        (["rollout.max_new_tokens=8"], "unknown key 'rollout.max_new_tokens'. Did you mean 'rollout.max_response_tokens'?"),
        (["plan.num_generations=8"], "unknown key 'plan.num_generations'. Did you mean 'plan.num_samples'?"),
        (["data={path:"], "A shell splits words at spaces: quote the whole override, 'data={path: …'."),
        (["reward=[exact_match]"], "got 'exact_match' (text). Did you mean {name: exact_match}?"),
        (["plan.name=ladder"], "with the plan 'ladder'. Give its micro-groups, plan.rungs=[{samples: 4}, …]."),
        (["steps=many"], "override 'steps=many': steps must be int, got 'many' (text)."),
        (["steps=0"], "with override 'steps=0': steps must be at least 1, got 0."),
        (['output_dir="a\\0b"'], "output_dir must be a name that a directory can have, without NUL, got 'a\\x00b'."),
        (["seed=-1"], "seed must be at least 0, got -1."),
        (["seed=99999999999999999999"], "seed must be below 2^63, got 99999999999999999999."),
        (
            ["plan={name: relift, buffer_size: 1}", "objective.name=relift", "updates.mini_batches=3"],
            "updates.mini_batches must be at most plan.buffer_size, 1, the problems of a step on traces, got 3",
        ),
        (["reward=''"], "reward must be a name, a list of at least one reward, or null, got ''"),
        (["plan.name=gropo"], "plan.name must be one of paper, release, grpo"),
        (["plan.name=trapo"], "got 'trapo'. Did you mean 'paper'?"),
        (["plan.num_samples=3"], "run.yaml with override 'plan.num_samples=3': plan: num_samples is fixed by the plan"),
        (["plan.num_samples=3", "plan={name: grpo, num_samples: 0}"], "override 'plan={name: grpo, num_samples: 0}': plan:"),
        (["data.path=x"], "run.yaml with override 'data.path=x': data: Give either task or path"),
        (["data.task_options.depths=[9]"], "data.task_options: depths must be a non-empty list of steps in [1, 8]"),
        (["data.max_prompt_tokens=1.5"], "data.max_prompt_tokens must be int, got 1.5 (float)."),
        (["eval_data={}"], "eval_data: Give either task or path"),
        (["eval_data={a/b: {path: x}}"], "eval_data must name its sets with letters, digits, '_', '.' and '-', got ['a/b']"),
        (["eval_data={a: {path: x}}", "evaluation.samples_per_prompt={b: 2}"], "must name the sets of eval_data, a, got b."),
        (["eval_data={path: x}", "evaluation.samples_per_prompt={b: 2}"], "eval_data, which has no names, got b."),
        (["updates={mini_batches: 5}"], "updates.mini_batches must be at most prompts_per_step, 4, got 5"),
        (["steps"], "override 'steps': must have the form section.key=value."),
        (["=3"], "override '=3': must have the form"),
        (["plan..name=3"], "must have the form"),
        (["steps.a=3"], "override 'steps.a=3': steps is no section, its value is 10."),
        (["steps=[1"], "override 'steps=[1': not valid YAML"),
        (["data.system_prompt=[think] first"], QUOTES),
        (["data.system_prompt=*Think*"], QUOTES),
        (["data.system_prompt=Answer: in a box"], f"must be text, got {{'Answer': 'in a box'}} (a mapping). {QUOTES}"),
        (["data.system_prompt=&abc"], f"data.system_prompt would be null. {QUOTES}"),
        (["data.system_prompt=---"], f"data.system_prompt would be null. {QUOTES}"),
        (["data.system_prompt=on"], f"data.system_prompt must be text, got True (true or false). {QUOTES}"),
        (["model.eos_token=5"], "must be text or a list of text or null, got 5 (int). Put quotes around a text"),
        (["seed=0x_"], "seed must be int, got '0x_' (text)."),
        (["seed=0b__"], "seed must be int, got '0b__' (text)."),
        (["plan=grpo"], "got 'grpo' (text). Did you mean plan.name=grpo?"),
        (["objective=dapo"], "Did you mean objective.name=dapo?"),
        (["data=train.jsonl"], "Did you mean data.path=train.jsonl?"),
        (["eval_data=test.jsonl"], "Did you mean eval_data.path=test.jsonl?"),
        (["model=Qwen/Qwen2.5-0.5B"], "Did you mean model.name_or_path=Qwen/Qwen2.5-0.5B?"),
        (["data=null"], "override 'data=null': data must be a section with the keys task, path"),
    ],
)
def test_mistakes_in_overrides(file, overrides, words):
    with pytest.raises(ConfigError) as error:
        load(file, *overrides)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a configuration must be a mapping of keys to values, got NoneType"),
        ("- 1", "got list"),
        ("a: [", "run.yaml: not valid YAML"),
        (TEXT + "steps: 20", "the key steps is given twice"),
        (TEXT + "stepps: 20", "run.yaml: unknown key 'stepps'. Did you mean 'steps'?"),
        (
            TEXT.replace("steps: 10", "").replace("reward", "# reward"),
            "run.yaml: steps must be set, or epochs in its place, got neither.",
        ),
        (TEXT.replace("data:", "eval_data:"), "run.yaml: data: Give either task or path"),
    ],
)
def test_mistakes_in_files(tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "run.yaml")
    assert words in str(error.value)


def test_a_path_may_name_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(TEXT)
    monkeypatch.setattr("trapo_train.config_file.resources.files", lambda package: tmp_path)
    assert load("small", "steps=5").steps == 5
    with pytest.raises(ConfigError, match="recipe small with override 'steps=0': steps must be at least 1"):
        load("small", "steps=0")
    with pytest.raises(ConfigError, match=r"no file 'smal' and no recipe of that name\. The recipes are: small\."):
        load("smal")


def test_a_run_config_can_be_made_in_python(file):
    config = load(file)
    again = RunConfig(
        output_dir="runs/x",
        steps=10,
        prompts_per_step=4,
        reward="pointer_chasing",
        model=config.model,
        data=config.data,
        plan=PlanConfig("release"),
    )
    assert again == config
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        replace(config, steps=0)


def test_schedules_survive_the_way_to_yaml_and_back(file, tmp_path):
    cosine = "{schedule: cosine, start: 0.9, end: 1e-1, steps: 20}"
    config = load(file, "plan={name: uft, guidance: " + cosine + "}", "objective={name: trapo, options: {alpha: " + cosine + "}}")
    assert config.plan.guidance == config.objective.options["alpha"]
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load(again) == config
    assert load(file, "plan={name: uft, guidance: 1}").plan.guidance == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan={name: uft, guidance: {schedule: cosin}}", "plan: schedule must be one of constant"),
        ("objective.options={alpha: {schedule: linear, start: 0.1, end: 2, steps: 5}}", "objective.*alpha must lie in"),
        ("advantage.center=leave_one", "advantage.center must be one of"),
    ],
)
def test_a_bad_schedule_names_its_section(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load(file, override)


def test_epochs_in_place_of_steps_are_passes_over_the_problems(tmp_path):
    config = build_config(tmp_path, "run", "steps=null", "epochs=1.5", "prompts_per_step=5")
    trainer = Trainer(config)  # on 8 problems
    assert (trainer.config.steps, trainer.config.epochs) == (3, None) and trainer.scheduler is not None
    assert dry_config(config, "d").steps == 1
    for epochs, steps in ((1.1, 11), (1.11, 12), (0.7, 7), (1e-12, 1)):
        assert replace(config, epochs=epochs, prompts_per_step=1).for_problems(10).steps == steps
    assert config.for_problems(20).steps == 6 and trainer.config.for_problems(20).steps == 3
    summary = train_to_end(config)
    assert summary.steps == 3 and load_config(tmp_path / "run" / "config.yaml").steps == 3
    for overrides in (["epochs=2", "steps=3"], ["steps=null"], ["steps=null", "epochs=0"]):
        with pytest.raises(ConfigError, match=r"or epochs in its place, got (both|neither)|epochs must be a finite"):
            build_config(tmp_path, "run", *overrides)


def test_a_run_of_epochs_saves_and_ends(tmp_path):
    config = build_config(tmp_path, "run", "steps=null", "epochs=1", "checkpoint.every=2")
    assert train_to_end(config).steps == 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["steps=500"], (500, None)),
        (["epochs=2"], (None, 2)),
        (["epochs=null", "steps=500"], (500, None)),
        (["steps=null"], (None, 3)),
    ],
)
def test_steps_or_epochs_of_the_command_line_take_the_place_of_the_other_in_a_recipe(overrides, expected):
    config = load_config("sft", overrides)
    assert (config.steps, config.epochs) == expected


def test_steps_and_epochs_are_refused_together(file):
    assert (load(file, "epochs=2").steps, load(file, "epochs=2").epochs) == (None, 2)
    file.write_text(TEXT + "epochs: 3\n")
    for overrides in ((), ("epochs=2", "steps=3")):
        with pytest.raises(ConfigError, match=r"got both, .* Set steps=null or epochs=null"):
            load(file, *overrides)
    with pytest.raises(ConfigError, match="got neither"):
        load(file, "steps=null", "epochs=null")


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("output_dir: r\u00e9s\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml: a configuration must be text in UTF-8: .* byte 0xe9 .* Save it in that"):
        load_config(tmp_path / "latin.yaml")
