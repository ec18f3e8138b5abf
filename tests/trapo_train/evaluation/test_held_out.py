"""The loss of held-out expert traces: against logits and log_softmax, on any number of ranks, without a draw."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import Qwen2Config

from tests.trapo_train.evaluation.test_evaluate import TOKENIZER, ids
from tests.trapo_train.parallel.test_parallel import TINY, ranks_train
from tests.trapo_train.test_train import EVALUATED, build_config, exported, rows, train_to_end
from trapo_train import cli, train
from trapo_train.checkpoints.export import export_model
from trapo_train.checks.preflight import check_lengths
from trapo_train.data.dataset import DataReport
from trapo_train.evaluation import held_out
from trapo_train.evaluation.eval_sets import EvalConfig, EvalSet
from trapo_train.evaluation.held_out import expert_nll, model_label
from trapo_train.models.lora import LoraConfig
from trapo_train.models.model import ModelConfig, load_model_and_tokenizer
from trapo_train.models.scratch import ScratchConfig
from trapo_train.records import ExpertTrace, Problem
from trapo_train.reports.display import evaluation_line
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.rollouts.rollout import RolloutConfig
from trapo_train.step.packing import PackingConfig
from trapo_train.trainer import Trainer

SHAPE = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16, max_position=64)
ROLLOUT = RolloutConfig(max_response_tokens=8, temperature=0.7)


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def entry(index, prompt, *traces):
    return Problem(index, prompt, ids(prompt), "x", tuple(ExpertTrace(text, ids(text)) for text in traces))


PROBLEMS = [
    entry(0, "ab?a1:", "#de$", "#d|e$"),
    entry(1, "ab?a1:", "#de$"),  # as above, counted once
    entry(2, "cd?c2:", "#" * 9),  # too long
    entry(3, "cd?c3:"),
    entry(4, "ef?e1:", "e$"),
]


def by_hand(model, pairs):
    total, tokens = 0.0, 0
    for prompt, trace in pairs:
        row = torch.tensor([[*ids(prompt), *ids(trace)]])
        logprob = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        found = logprob.gather(1, row[0, 1:, None])[-len(ids(trace)) :]
        total, tokens = total - found.sum().item(), tokens + len(found)
    return total / tokens


@pytest.mark.parametrize(("max_tokens", "chunk"), [(64, 1024), (15, 1024), (64, 2)])
def test_nll_is_the_mean_over_all_tokens_of_the_traces(max_tokens, chunk, monkeypatch):
    monkeypatch.setattr(held_out, "_CHUNK", chunk)
    model, _ = load_model_and_tokenizer(ModelConfig(scratch=SHAPE), task_tokenizer=TOKENIZER)
    model.train()
    eval_set = EvalSet.of(PROBLEMS, EvalConfig())
    found = expert_nll(model, eval_set, PackingConfig(max_tokens=max_tokens, train_on_prompt=True), ROLLOUT)
    pairs = [("ab?a1:", "#de$"), ("ab?a1:", "#d|e$"), ("ef?e1:", "e$")]
    assert found["expert_traces"] == 3 and model.training
    with torch.no_grad():
        assert found["expert_nll"] == pytest.approx(by_hand(model, pairs), rel=1e-5)  # of the model itself


def test_a_set_without_traces_reports_nothing_and_num_problems_holds():
    model, _ = load_model_and_tokenizer(ModelConfig(scratch=SHAPE), task_tokenizer=TOKENIZER)
    assert expert_nll(model, EvalSet.of([PROBLEMS[3]], EvalConfig()), PackingConfig(), ROLLOUT) == {}
    first = EvalSet.of(PROBLEMS, EvalConfig(num_problems=1))
    assert first.members == (0, 1) and expert_nll(model, first, PackingConfig(), ROLLOUT)["expert_traces"] == 2


def test_dropout_of_adapters_stays_out():
    pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    config = ModelConfig(scratch=SHAPE, lora=LoraConfig(rank=2, dropout=0.9))
    model, _ = load_model_and_tokenizer(config, task_tokenizer=TOKENIZER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    state = torch.get_rng_state()
    first, second = (expert_nll(model, EvalSet.of(PROBLEMS, EvalConfig()), PackingConfig(), ROLLOUT) for _ in range(2))
    assert first == second and torch.equal(state, torch.get_rng_state())


def test_a_run_may_evaluate_without_sampling_and_trains_as_before(configure, capsys):
    sft = ("plan.name=sft", "objective.name=sft", "packing.aggregation=token_mean")
    config, plain = configure("run", *sft, *EVALUATED, "evaluation.sample=false"), configure("plain", *sft)
    train_to_end(config)
    train_to_end(plain)
    assert exported(config) == exported(plain)
    found = [row for row in rows(config) if row["kind"] == "eval"]
    assert [row["step"] for row in found] == [0, 3, 6] and set(found[0]) == {"kind", "step", "expert_nll", "expert_traces"}
    assert found[-1]["expert_nll"] < found[0]["expert_nll"]
    assert evaluation_line(found[0]) == f"expert nll {found[0]['expert_nll']:.4f}"
    capsys.readouterr()
    assert cli.main(["eval", config.output_dir, "evaluation={sample: false, pass_at: [8], group_by: none, top_p: 0.9}"]) == 0
    shown = capsys.readouterr().out
    assert f"expert_nll {found[-1]['expert_nll']:.4g}" in shown and "accuracy" not in shown


def test_what_was_trained_is_written_before_the_last_evaluation_where_nothing_else_holds_it(configure, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings = (*EVALUATED, "evaluation.every=0", "checkpoint.every=0", "steps=2")
    config, written = configure("run", *settings), []
    monkeypatch.setattr(train, "export_model", lambda *given: written.append(given[2]) or export_model(*given))
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Trainer, "evaluate", fail)
        train_to_end(config)
    assert (Path(config.output_dir) / "model" / "model.safetensors").exists() and len(written) == 1
    train_to_end(configure("other", *settings))
    assert len(written) == 2  # once


def test_what_loading_a_set_left_out_is_noted_and_counted(configure, tmp_path, capsys):
    path = tmp_path / "held_out.jsonl"
    prompts = ("ab?a1:", "ab?a1:", "bc?b1:", "cd?c1:", "ab|bc|cd|de|ef?a1:")
    path.write_text("".join(f'{{"prompt": "{prompt}", "solution": "b"}}\n' for prompt in prompts))
    sets = f"eval_data={{short: {{path: {path}, max_prompt_tokens: 8, on_long_prompt: drop}}}}"
    config = configure("run", "steps=1", *EVALUATED, sets)
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert (
        "eval_data.short: 4 problems (4 without expert; 1 more dropped for a long prompt), 0 expert traces; 3 different ones in 4 "
        "rows: equal rows are one problem, with as many times the samples"
    ) in told
    assert {row["dropped_prompts"] for row in rows(config) if row["kind"] == "eval"} == {1.0}
    capsys.readouterr()
    assert cli.main(["eval", config.output_dir]) == 0
    shown = capsys.readouterr().out
    assert "dropped_prompts 1" in shown and "1.3 " in shown and "1.33" not in shown  # samples of a problem, 4 of 3


@pytest.mark.parametrize(("trained", "held"), [(0, 0), (2, 3), (2, 0), (0, 3)])
def test_texts_beside_chats_are_noted_whichever_of_the_two_is_held_out(trained, held):
    report = DataReport(problems=3, without_expert=3, experts=0, dropped_experts=0, dropped_prompts=0, plain_prompts=held)
    some = SimpleNamespace(without_long_experts=lambda longest: (None, 0))
    problems = SimpleNamespace(report=report, section="eval_data.a", at=lambda members: some)
    entry = SimpleNamespace(problems=problems, rows=[0], members=[0])
    _, *noted = held_out.loading_notes({"a": entry}, 9, replace(report, plain_prompts=trained))
    assert len(held_out.loading_notes({"a": entry}, 9, None)) == 1  # an evaluation by itself
    chats, texts = ("eval_data.a", "data") if trained else ("data", "eval_data.a")
    said = f"prompts of {chats} are rendered with the chat template, those of {texts} are not all: the model is evaluated on other"
    assert [sentence.startswith(said) for sentence in noted] == [True] * ((trained > 0) != (held > 0))


def test_held_out_problems_that_are_trained_too_are_counted(configure, tmp_path):
    def write(name, *prompts):
        lines = [{"prompt": prompt, "solution": "b", "expert": expert} for prompt, expert in prompts]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"{{path: {tmp_path / name}}}"

    one, two, three, four = "ab?a1:", "bc?b1:", "cd?c1:", "de?d1:"
    trained = write("trained.jsonl", (one, "#b"), (two, "#c"), (three, None))
    held = write("held.jsonl", (one, "#b"), (one, "#c"), (three, "#d"), (four, "#e"))
    sets = f"eval_data={{both: {held}, other: {write('other.jsonl', (four, '#e'))}, all: {trained}}}"
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    data = (f"data={trained}", f"model.tokenizer={tmp_path / 'tokenizer'}", "steps=1", "prompts_per_step=1", *EVALUATED, sets)
    trainer = Trainer(configure("grpo", *data, "plan.name=grpo", "objective.name=dr_grpo"))
    assert [note for note in trainer.notes if "training problems, too" in note] == [
        "2 of the 3 problems of eval_data.both are training problems, too (equal prompts)",
        "3 of the 3 problems of eval_data.all are training problems, too (equal prompts)",
    ]
    config = configure("run", *data, "plan.name=sft", "objective.name=sft", "packing.aggregation=token_mean")
    train_to_end(config)  # not on the problem without a trace
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert [text.split(" are ")[0] for text in told if "training problems, too" in text] == [
        "1 of the 3 problems of eval_data.both",
        "2 of the 3 problems of eval_data.all",
    ]
    evaluates = Trainer(config, trains=False)  # as `trapo-train eval`, whose problems are held-out ones
    assert not any("training problems, too" in note for note in evaluates.notes)


def test_held_out_traces_that_are_too_long_are_noted(configure, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": "ab?a1:", "expert": "#" * n, "solution": "b"}) + "\n" for n in (2, 15, 16, 40))
    )
    sets = f"{{all: {{path: {tmp_path}/a.jsonl}}, first: {{path: {tmp_path}/a.jsonl, split: 'train[:2]'}}}}"
    notes = Trainer(configure("run", f"eval_data={sets}")).notes
    assert "eval_data.all: left out 2 expert traces longer than rollout.max_response_tokens = 16" in notes
    assert not any("first: left out" in note for note in notes)


def test_held_out_prompts_longer_than_those_of_training_are_evaluated_with_shorter_responses(configure, tmp_path, capsys):
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"prompt": "|".join(["ab"] * 24), "solution": "b"}))  # 71 tokens of the model's 80
    config = configure("run", "steps=1", f"eval_data={{path: {path}}}", "evaluation.max_response_tokens=8")
    assert config.rollout.max_response_tokens == 16
    assert train_to_end(config).evaluation[""]["num_problems"] == 1
    assert cli.main(["eval", config.output_dir]) == 0, capsys.readouterr().err


def test_an_evaluation_may_be_longer_than_the_rollouts_where_engine_and_model_hold_it(configure):
    longer = configure("run", "steps=1", *EVALUATED, "packing.max_tokens=46", "evaluation={max_response_tokens: 50, every: 1}")
    lengths = [row["completion_tokens_mean"] for row in train_to_end(longer).evaluation.values()]
    assert lengths[0] > longer.rollout.max_response_tokens
    with pytest.raises(
        ValueError, match=r"evaluation\.max_response_tokens must fit into the model's positions .* = 80, got .* \+ 79"
    ):
        Trainer(configure("refused", *EVALUATED, "evaluation.max_response_tokens=79"))
    with pytest.raises(ValueError, match=r"evaluation\.max_response_tokens must fit into rollout\.max_batch_tokens = 50, got"):
        Trainer(configure("refused", *EVALUATED, "evaluation.max_response_tokens=50", "rollout.max_batch_tokens=50"))


def test_a_set_that_has_nothing_to_report_is_refused(configure, tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "ab?a1:", "solution": "b"}\n')
    with pytest.raises(
        ValueError, match=r"evaluation\.sample=false reports .* alone, and eval_data\.second has none\. Set its expert_column"
    ):
        sets = f"eval_data={{first: {{task: pointer_chasing, split: test}}, second: {{path: {path}}}}}"
        train_to_end(configure("run", *EVALUATED, sets, "evaluation.sample=false"))


@pytest.mark.parametrize(
    ("settings", "trace", "message"),
    [  # for prompts of 2000 tokens, in training 500
        ([], 0, r"held-out prompt and rollout\.max_response_tokens must fit into the model's .* = 4096, got 2000 \+ 3000 = 5000"),
        (
            ["evaluation.max_response_tokens=2097"],
            0,
            r"and evaluation\.max_response_tokens must fit .* 4096, got 2000 \+ 2097",
        ),
        (["evaluation.max_response_tokens=64"], 2096, None),
        (
            ["evaluation.max_response_tokens=64"],
            2097,
            r"trace .* into packing\.max_tokens = 4096, got 2000 \+ 2097 = 4097",
        ),
        (
            ["evaluation.max_response_tokens=64", "packing.max_tokens=9999"],
            2097,
            r"trace .* into the model's .* = 4096, got",
        ),
        (["evaluation.sample=false"], 2096, None),
    ],
)
def test_a_held_out_prompt_needs_room_for_what_an_evaluation_makes_of_it(settings, trace, message, configure):
    model = SimpleNamespace(config=Qwen2Config(max_position_embeddings=4096))
    lengths = ["rollout.max_response_tokens=3000", "packing.max_tokens=4096"]
    config = configure("run", *EVALUATED, *lengths, *settings)
    problems, entry = (
        SimpleNamespace(longest_prompt_tokens=prompt, longest_with_expert=lambda longest: (2000, trace), section=section)
        for prompt, section in ((500, "data"), (2000, "eval_data.aime"))
    )
    told = rf"train: the longest .*{message}.*, or drop long prompts with eval_data\.aime\.max_prompt_tokens and"
    with nullcontext() if message is None else pytest.raises(ValueError, match=told):
        check_lengths(config, model, problems, [entry])


def graded(prompts, completions, level, **columns):
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["eval_data={path: DATA, solution_column: answer}"], "Set eval_data.solution_column to one of them"),
        (["eval_data={path: DATA}", f"reward='{__name__}:graded'"], "needs level as well; for eval_data it is called with"),
    ],
)
def test_what_eval_misses_is_a_setting_of_the_held_out_problems(settings, words, configure, tmp_path, capsys):
    configure("run")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "ab?a1:", "solution": "de"}) + "\n")
    settings = [setting.replace("DATA", str(tmp_path / "test.jsonl")) for setting in settings]
    places = [f"output_dir={tmp_path / 'run'}", f"model.tokenizer={tmp_path / 'tokenizer'}"]
    assert cli.main(["eval", str(tmp_path / "run.yaml"), *places, *settings]) == 2
    assert words in capsys.readouterr().err


def test_where_nothing_is_sampled_the_longest_trace_counts_not_the_longest_response(configure):
    model = SimpleNamespace(config=Qwen2Config(max_position_embeddings=512))
    problems = SimpleNamespace(
        longest_prompt_tokens=400, longest_with_expert=lambda longest: (47, 465), traces=[1, 2], section="data"
    )
    lengths = ["rollout.max_response_tokens=4096", "packing.max_tokens=16384"]
    sft = configure("run", *lengths, "plan.name=sft", "objective.name=sft", "reward=null", "packing.aggregation=token_mean")
    check_lengths(sft, model, problems, [])
    problems.longest_with_expert = lambda longest: (47, 466)
    with pytest.raises(ValueError, match=r"prompt and its expert trace of at most .* model's .* = 512, got 47 \+ 466 = 513"):
        check_lengths(sft, model, problems, [])
    with pytest.raises(ValueError, match=r"longest prompt and rollout\.max_response_tokens .* model's .* = 512, got 400 \+ 4096"):
        check_lengths(configure("run", *lengths), model, problems, [])
    problems.traces = [1, 0]  # one without is sampled, whatever the plan
    with pytest.raises(ValueError, match=r"longest prompt and rollout\.max_response_tokens"):
        check_lengths(sft, model, problems, [])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("parallel.vocab_parallel_head=true",), ("model.lora={rank: 2, dropout: 0.5}",)])
def test_ranks_find_what_one_process_does(settings, tmp_path):
    if settings and "lora" in settings[0]:
        pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    found = {}
    for size in (1, 2):
        directory = tmp_path / str(size)
        directory.mkdir()
        sft = ("plan.name=sft", "objective.name=sft", "evaluation={every: 1, sample: false}")
        overrides = ("steps=2", *EVALUATED, *sft, *settings)
        if size == 1:
            (directory / "run.yaml").write_text(yaml.safe_dump(TINY))
            assert cli.main(["run", str(directory / "run.yaml"), f"output_dir={directory / 'run'}", *overrides]) == 0
        else:
            ranks_train(size, directory, *overrides)
        metrics = read_metrics(Path(directory, "run"))
        found[size] = [row["expert_nll"] for row in metrics if row["kind"] == "eval"]
    assert len(found[1]) == 3 and all(math.isfinite(value) for value in found[1])
    same = 1 if settings and "dropout" in settings[0] else 3  # masks differ from rank to rank, so training does
    assert found[2][:same] == pytest.approx(found[1][:same], rel=1e-5)


def test_no_two_models_have_one_label(tmp_path, monkeypatch):
    places = [tmp_path / "a" / "run" / "model", tmp_path / "b" / "run" / "model", tmp_path / "a" / "run" / "model_step_3"]
    for place in places:
        place.mkdir(parents=True)
    labels = [model_label(str(place)) for place in places]
    assert [label[:-6] for label in labels] == ["run--model--", "run--model--", "run--model_step_3--"] and len(set(labels)) == 3
    monkeypatch.chdir(tmp_path / "a")
    assert model_label("run/model") == labels[0]
    assert model_label("Qwen/Qwen2.5-0.5B") == "Qwen--Qwen2.5-0.5B" and model_label(None) == "scratch"
