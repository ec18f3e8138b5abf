"""The token that ends a response: any of the vocabulary, the same for engine, traces, rewards and export; what is said of it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.trapo_train.test_train import build_config
from trapo_train.checkpoints.export import export_model
from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.dry_run import dry_config
from trapo_train.engines.configured import build_engine
from trapo_train.engines.engine import SamplingParams, stop_ids
from trapo_train.models.model import ModelConfig, load_model_and_tokenizer
from trapo_train.models.scratch import ScratchConfig
from trapo_train.models.tokenizer import end_ids, load_tokenizer, other_endings
from trapo_train.parallel.world import World
from trapo_train.schema import UserError
from trapo_train.train import Trainer

SCRATCH = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24, max_position=80)
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|> {% endfor %}"


@pytest.fixture
def directory(tmp_path):
    """A model as some are published: its chat template ends turns with <|end|>, a special token that takes a space with it; its
    tokenizer's end-of-sequence token is another, and its generation_config knows both."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False, special=True)])
    inner.add_tokens([AddedToken("<|user|>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template=TEMPLATE)
    model, _ = load_model_and_tokenizer(ModelConfig(scratch=SCRATCH), task_tokenizer=tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    return export_model(model, tokenizer, tmp_path / "published")


@pytest.mark.parametrize("token", ["<|end|>", "<|user|>", "!"])  # special, added, and of the vocabulary
def test_any_token_ends_a_response_and_is_none_of_its_text(directory, token):
    plain, tokenizer = (load_tokenizer(ModelConfig(str(directory), eos_token=name), None) for name in (None, token))
    assert (plain.eos_token, tokenizer.eos_token, len(tokenizer)) == ("</s>", token, len(plain))
    for text in ("a<|end|> b", "<|user|>a</s>", "a b"):
        assert tokenizer(text)["input_ids"] == plain(text)["input_ids"], text
    written = [*plain("a b")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(written, skip_special_tokens=True) == "a b"
    assert tokenizer.decode(written, skip_special_tokens=False) == f"a b{token}"


def test_engine_traces_and_export_agree(directory, tmp_path, own_cache):
    model, tokenizer = load_model_and_tokenizer(ModelConfig(str(directory), eos_token="<|user|>"))
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    assert stop_ids(SamplingParams(4), tokenizer) == (end,)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "solution": "b", "expert": ["b", "b<|user|>"]}))
    (problem,) = load_problems(DataConfig(path=str(tmp_path / "rows.jsonl")), tokenizer, None)
    assert [(trace.text, trace.token_ids[1:]) for trace in problem.experts] == [("b<|user|>", (end,))] * 2
    exported = export_model(model, tokenizer, tmp_path / "trained")
    assert AutoTokenizer.from_pretrained(exported).eos_token_id == end
    ends = AutoModelForCausalLM.from_pretrained(exported).generation_config.eos_token_id
    assert ends == [end, *AutoModelForCausalLM.from_pretrained(directory).generation_config.eos_token_id]


def test_a_token_that_is_none_is_refused(directory, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"eos_token must be one of the tokenizer's 259 tokens, or a list of these, got '<end>'.*'<\|end\|>'\? Name",
    ):
        load_tokenizer(ModelConfig(str(directory), eos_token="<end>"), None)
    config = build_config(tmp_path, "run", f"model={{name_or_path: '{directory}', eos_token: '<|end|>'}}")
    assert dry_config(config, str(tmp_path)).model.eos_token is None  # whose tokenizer is another


@pytest.mark.parametrize(("template", "turn"), [(TEMPLATE, "<|end|>"), (None, None)])
def test_a_tokenizer_without_an_end_is_refused_before_the_model_is_read_with_the_end_of_a_turn(directory, tmp_path, template, turn):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.eos_token, tokenizer.chat_template = None, template
    tokenizer.save_pretrained(tmp_path / "endless")
    config = ModelConfig(str(directory), tokenizer=str(tmp_path / "endless"))
    with pytest.raises(ValueError, match="must have an end-of-sequence token, or no response could end, got none") as error:
        load_model_and_tokenizer(replace(config, name_or_path=str(tmp_path / "endless")))  # where there is no model
    said = str(error.value).partition(". Set ")[2]
    if turn is None:
        assert said == "model.eos_token to the token that ends the model's turns."
        return
    (setting,) = shlex.split(said.partition(", with which")[0])  # as a shell hands it over
    chosen = build_config(tmp_path, "run", setting).model.eos_token
    assert chosen == turn and load_tokenizer(replace(config, eos_token=chosen), None).eos_token == turn


def test_what_the_generation_config_names_of_the_special_tokens_ends_a_response_too(directory):
    model, tokenizer = load_model_and_tokenizer(ModelConfig(str(directory)))
    plain, end, user = tokenizer.convert_tokens_to_ids(["</s>", "<|end|>", "<|user|>"])
    for named, expected in (([plain, end], (plain, end)), ([user, end, 999], (plain, end)), (plain, (plain,)), (None, (plain,))):
        model.generation_config.eos_token_id = named
        assert end_ids(None, model, tokenizer) == expected
    model.generation_config.eos_token_id = [plain, end]
    assert end_ids("<|user|>", model, tokenizer) == (user,) and end_ids(["<|end|>", "!"], model, tokenizer)[0] == end


def test_several_tokens_end_a_response_and_the_first_ends_traces(directory, tmp_path, own_cache):
    plain = load_tokenizer(ModelConfig(str(directory)), None)
    config = build_config(tmp_path, "run", f"model={{name_or_path: '{directory}'}}", "model.eos_token=[<|end|>, <|user|>, '!']")
    assert config.model.eos_token == ["<|end|>", "<|user|>", "!"]
    model, tokenizer = load_model_and_tokenizer(config.model)
    ends = tokenizer.convert_tokens_to_ids(config.model.eos_token)
    assert tokenizer.eos_token == "<|end|>" and len(tokenizer) == len(plain)
    for text in ("a<|end|> b", "<|user|>a</s>", "a! b"):
        assert tokenizer(text)["input_ids"] == plain(text)["input_ids"], text
    for token_id in ends:  # none of them is text that the reward sees
        assert tokenizer.decode([*plain("a b")["input_ids"], token_id], skip_special_tokens=True) == "a b"
    engine = build_engine(config, model, tokenizer, World.alone(), seed=0)
    for token_id in ends:
        with torch.no_grad():  # whatever came before, the model says this token
            bias = torch.zeros(model.get_output_embeddings().weight.shape[0])
            bias[token_id] = 1e4
            model.get_output_embeddings().bias = torch.nn.Parameter(bias)
        (completion,) = engine.generate([plain("ab")["input_ids"]], SamplingParams(5))
        assert (completion.token_ids, completion.finish_reason) == ((token_id,), "stop")
    model.get_output_embeddings().bias = None
    exported = export_model(model, tokenizer, tmp_path / "trained")
    named = AutoModelForCausalLM.from_pretrained(exported).generation_config.eos_token_id
    assert named == [*ends, plain.eos_token_id]  # which the model had
    assert AutoTokenizer.from_pretrained(exported).decode([*plain("a")["input_ids"], ends[2]], skip_special_tokens=True) == "a"
    with pytest.raises(ValueError, match="model: eos_token must be null, a token or a list of at least one, got"):
        build_config(tmp_path, "run", "model.eos_token=[]")


@pytest.mark.parametrize(
    ("own", "ends", "template", "words", "choice"),
    [
        (
            "</s>",
            [0],
            TEMPLATE,
            "expert traces end with </s>, the chat template ends turns with <|end|>, and a response goes on",
            ["<|end|>", "</s>"],
        ),
        (
            "</s>",
            [0, 257],
            TEMPLATE,
            "expert traces that are texts end with </s>, the chat template ends turns with <",
            ["<|end|>", "</s>"],
        ),
        ("</s>", [257, 258, 0], None, "goes on behind <|user|>, no special token", ["</s>", "<|end|>", "<|user|>"]),
        ("</s>", [0], TEMPLATE.replace("<|end|>", "[|endofturn|]"), "turns with [|endofturn|]", ["[|endofturn|]", "</s>"]),
        ("</s>", [0], TEMPLATE.replace("<|end|>", "it's"), "turns with it's", ["it's", "</s>"]),
        ("</s>", [257, 0], None, None, None),
        ("<|end|>", [0, 257], TEMPLATE, None, None),
        ("</s>", [0, 999], TEMPLATE.replace("<|end|>", ""), None, None),
        ("</s>", None, "{{ raise_exception('no') }}", None, None),
    ],
)
def test_an_end_that_the_template_or_the_model_has_otherwise_is_named(directory, tmp_path, own, ends, template, words, choice):
    tokenizer = load_tokenizer(ModelConfig(str(directory), eos_token=own), None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[|endofturn|]", "it's"]})
    tokenizer.chat_template = template
    said = other_endings(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends)), tokenizer)
    if words is None:
        assert said is None
    else:
        (setting,) = shlex.split(said.partition(", set ")[2])  # as a shell hands it over
        assert words in said and build_config(tmp_path, "run", setting).model.eos_token == choice


@pytest.mark.parametrize(("own", "count"), [("", 1), (", eos_token: '<|end|>'", 0)])
def test_a_run_says_so_unless_the_choice_was_made(directory, tmp_path, own_cache, own, count):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "solution": "b", "expert": "b<|end|>"}))
    model = f"model={{name_or_path: '{directory}'{own}}}"
    config = build_config(tmp_path, "run", model, "plan.name=grpo", "objective.name=dr_grpo", "reward=exact_match")
    data = DataConfig(path=str(tmp_path / "rows.jsonl"))
    trainer = Trainer(replace(config, data=data, eval_data=data))
    for problems in (trainer.problems, trainer.eval_sets[""].problems):
        assert problems[0].experts[0].text == "b<|end|>"  # which a response may end with either way
    assert sum("""set 'model.eos_token=["<|end|>", "</s>"]'""" in note for note in trainer.notes) == count


def test_a_tokenizer_that_is_not_there_is_named_by_its_setting(monkeypatch):
    def gone(*_, **__):
        raise OSError("no such repository")

    monkeypatch.setattr("trapo_train.models.tokenizer.get_tokenizer_config", gone)
    with pytest.raises(UserError, match=r"model\.tokenizer=owner/other cannot be loaded: .*no such repository"):
        load_tokenizer(ModelConfig(name_or_path="owner/name", tokenizer="owner/other"), None)
    with pytest.raises(OSError, match="no such repository"):  # told as the model that is missing
        load_tokenizer(ModelConfig(name_or_path="owner/name"), None)
