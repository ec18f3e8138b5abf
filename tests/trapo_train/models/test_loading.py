"""Models as they are published: what of them would show only at the end of a run shows, or is mended, when they are loaded."""

from __future__ import annotations

import json
import re
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

from tests.trapo_train.engines.fake_vllm import FakeServer
from tests.trapo_train.parallel.test_parallel import ranks_train
from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train.checkpoints.export import export_model
from trapo_train.memory.trace import weigh
from trapo_train.models.attention import longrope_limit, segment_arguments
from trapo_train.models.loading import tell_of_untrained_balance
from trapo_train.models.lora import LoraConfig
from trapo_train.models.model import ModelConfig, load_model_and_tokenizer
from trapo_train.models.tokenizer import load_tokenizer
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.tasks import build_tokenizer
from trapo_train.trainer import Trainer

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 80,
}  # fmt: skip
EXPERTS = SMALL | {"moe_intermediate_size": 16, "num_experts_per_tok": 1}
END = "?"  # a token of the generated task that no trace has


def publish(directory, config, tokenizer=None):
    """A model with random weights, with the tokenizer of the generated task or another, as a directory of files."""
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    (tokenizer or build_tokenizer()).save_pretrained(directory)
    return directory


@pytest.fixture
def published(tmp_path):
    return publish(tmp_path / "published", LlamaConfig(vocab_size=len(build_tokenizer()), **SMALL))


def set_generation(directory, **values):
    (directory / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("settings", [{"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"top_p": 0.6}])
def test_sampling_settings_that_transformers_does_not_save_are_mended_when_the_model_is_loaded(settings, published, tmp_path):
    set_generation(published, **settings)
    model = f"model={{name_or_path: '{published}', eos_token: '{END}'}}"
    config = build_config(tmp_path, "run", model, "steps=1", "checkpoint.every=0")
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert sum("the trained model gets do_sample: true" in text for text in told) == 1
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved.items() >= (settings | {"do_sample": True}).items() and saved["eos_token_id"]


@pytest.mark.parametrize("settings", [{"temperature": 0.0, "top_p": 0.9}, {"do_sample": False, "temperature": 0.6, "min_p": 0.1}])
def test_a_model_that_is_greedy_stays_greedy(settings, published, tmp_path):
    set_generation(published, **settings, top_k=20)
    told = []
    model, tokenizer = load_model_and_tokenizer(ModelConfig(name_or_path=str(published), eos_token=END), tell=told.append)
    assert sum("has settings of sampling and is greedy, which" in text for text in told) == 1
    exported = AutoModelForCausalLM.from_pretrained(export_model(model, tokenizer, tmp_path / "exported"))
    assert not exported.generation_config.do_sample and exported.generation_config.temperature is None
    written = [exported.generate(torch.tensor([[2, 3]]), max_new_tokens=8, min_new_tokens=8).tolist() for _ in range(3)]
    assert written[0] == written[1] == written[2]


def test_sampling_settings_that_can_be_saved_stay_as_they_are(published):
    set_generation(published, do_sample=True, temperature=0.7)
    told = []
    model, _ = load_model_and_tokenizer(ModelConfig(name_or_path=str(published), eos_token=END), tell=told.append)
    assert model.generation_config.do_sample and not any("do_sample" in text for text in told)


def test_a_configuration_that_cannot_be_saved_is_refused_when_the_model_is_loaded(published):
    set_generation(published, num_beams=1, length_penalty=0.5)
    told = []
    with pytest.raises(ValueError, match=r"(?s)able to save the configuration.*generation_config\.json in a copy.*length_penalty"):
        load_model_and_tokenizer(ModelConfig(name_or_path=str(published), eos_token=END), tell=told.append)
    assert not any("sampl" in text for text in told)


def test_experts_that_no_loss_balances_are_noted(tmp_path):
    config = Qwen3MoeConfig(vocab_size=len(build_tokenizer()), **EXPERTS, num_experts=4, router_aux_loss_coef=0.5)
    told = []
    load_model_and_tokenizer(ModelConfig(name_or_path=str(publish(tmp_path / "it", config))), tell=told.append)
    assert (
        sum("no loss balances the 4 experts of the model: that of its router_aux_loss_coef = 0.5 is left" in s for s in told) == 1
    )
    mixtral, without = MixtralConfig(**EXPERTS, num_local_experts=2), Qwen3MoeConfig(**EXPERTS, router_aux_loss_coef=0.0)
    dense = GraniteMoeHybridConfig(**SMALL, num_local_experts=0, layer_types=["attention"], mamba_n_heads=2)  # the class has both
    assert dense.router_aux_loss_coef > 0
    for config, said in ((mixtral, ["the 2 experts"]), (without, []), (dense, []), (LlamaConfig(**SMALL), [])):
        told.clear()
        tell_of_untrained_balance(SimpleNamespace(config=config), told.append)
        assert re.findall(r"the \d experts", "".join(told)) == said


def test_layers_for_further_tokens_are_noted_and_no_longer_counted_by_the_exported_configuration(tmp_path):
    """transformers has no place for them."""
    options = {
        "n_routed_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    }
    config = AutoConfig.for_model("glm4_moe", vocab_size=len(build_tokenizer()), **EXPERTS, **options, num_nextn_predict_layers=1)
    directory = publish(tmp_path / "it", config)
    weights = load_file(directory / "model.safetensors")
    assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 1
    save_file(weights | {"model.layers.1.eh_proj.weight": torch.ones(16, 32)}, directory / "model.safetensors", {"format": "pt"})
    told = []
    model, tokenizer = load_model_and_tokenizer(ModelConfig(name_or_path=str(directory)), tell=told.append)
    assert sum("1 tensors that transformers has no place for, such as model.layers.1.eh_proj.weight: they" in s for s in told) == 1
    assert sum("(num_nextn_predict_layers = 1) are not loaded: the trained model has none" in text for text in told) == 1
    exported = export_model(model, tokenizer, tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["num_nextn_predict_layers"] == 0
    told.clear()
    load_model_and_tokenizer(ModelConfig(name_or_path=str(exported)), tell=told.append)
    assert not any("not loaded" in text or "no place" in text for text in told)


@pytest.mark.parametrize("name", ["falcon", "bloom"])
def test_an_architecture_that_cannot_be_packed_is_refused_before_it_is_built(name, tmp_path):
    shape = {"vocab_size": len(build_tokenizer()), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    directory = publish(tmp_path / "it", AutoConfig.for_model(name, **shape))
    with pytest.raises(
        ValueError, match=r"needs a model that uses transformers' attention interface, .*ForCausalLM does not\. Use"
    ):
        load_model_and_tokenizer(ModelConfig(name_or_path=str(directory)))


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 8.0, 15.0, 22.0],
    "original_max_position_embeddings": 48,
}  # fmt: skip


@pytest.fixture
def phi(tmp_path):
    """A Phi 3, which has short factors up to 48 tokens."""
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "original_max_position_embeddings": 48}
    config = Phi3Config(vocab_size=len(build_tokenizer()), **SMALL | ends, rope_parameters=LONGROPE)
    return publish(tmp_path / "phi", config)


def test_sequences_that_would_change_the_rope_of_those_beside_them_are_refused(phi, tmp_path):
    def build(*settings):
        return Trainer(build_config(tmp_path, "run", "model.scratch=null", f"model.name_or_path={phi}", *settings))

    room = 48 - build("rollout.max_response_tokens=8").problems.longest_prompt_tokens
    build(f"rollout.max_response_tokens={room}")
    with pytest.raises(ValueError, match=r"short factors of the model's LongRoPE.* = 48, got .* = 49 tok.*data\.max_prompt_tok"):
        build(f"rollout.max_response_tokens={room + 1}")
    for given in ("null", "49"):
        vllm = ("rollout.max_response_tokens=8", "rollout.engine=vllm", f"rollout.vllm.max_model_len={given}")
        with pytest.raises(ValueError, match=rf"max_model_len must be at most 48 for this model, got {given}: beyond that vLLM"):
            build(*vllm)
    server = FakeServer()
    address = f"rollout.vllm_server={{base_url: '{server.url}', model: {server.card['id']}}}"
    said = r"vLLM server's --max-model-len must be at most 48 for this model, got 2048: beyond that vLLM"
    with closing(server), pytest.raises(ValueError, match=said):
        build("rollout.max_response_tokens=8", "rollout.engine=vllm_server", address)


def test_up_to_the_limit_a_row_with_longrope_is_one_sequence_at_a_time_and_beyond_it_is_not(phi):
    model, _ = load_model_and_tokenizer(ModelConfig(name_or_path=str(phi)))
    for parameter in model.parameters():
        parameter.data.mul_(8)
    limit, ids = longrope_limit(model.config), torch.arange(24) % 20
    for other, same in ((limit, True), (limit + 1, False)):
        hidden = []
        for lengths in ((24,), (other, 24)):
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            packed = segment_arguments(model, lengths, torch.device("cpu"))
            row = torch.cat([torch.zeros(sum(lengths) - 24, dtype=torch.int64), ids])[None]
            hidden.append(
                model.base_model(input_ids=row, position_ids=positions, use_cache=False, **packed).last_hidden_state[0, -24:]
            )
        assert torch.allclose(*hidden, rtol=1e-4, atol=1e-4) == same


def test_other_models_have_no_such_limit():
    assert longrope_limit(LlamaConfig(**SMALL)) is None
    assert longrope_limit(Gemma3TextConfig(**SMALL)) is None  # with parameters for each type of layer
    assert longrope_limit(LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})) is None


VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
PROCESSOR = '{"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}'


def gemma(**options):
    text = SMALL | {"head_dim": 8, "sliding_window": 4, "vocab_size": len(build_tokenizer()), "pad_token_id": 0} | options
    return Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)


@pytest.fixture
def multimodal(tmp_path):
    """A Gemma 3 that sees."""
    directory = publish(tmp_path / "gemma", gemma())
    (directory / "preprocessor_config.json").write_text(PROCESSOR)
    return directory


def of_vision(weights):
    return {name: value for name, value in weights.items() if "vision_tower" in name or "projector" in name}


def test_of_a_multimodal_model_the_text_is_trained_and_the_rest_exported_as_it_was(multimodal, tmp_path):
    model = f"model={{name_or_path: {multimodal}}}"
    config = build_config(tmp_path, "run", model, "steps=2", "checkpoint.every=1", "optimizer.warmup_steps=0")
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert "the model is trained on text alone: model.multi_modal_projector, model.vision_tower stay as they are" in told
    mismatches = [row["rollout/mismatch_p95"] for row in read_metrics(config.output_dir) if row["kind"] == "train"]
    assert max(mismatches) < 1e-5
    exported = tmp_path / "run" / "model"
    assert (exported / "preprocessor_config.json").read_text() == PROCESSOR
    before, after = (load_file(directory / "model.safetensors") for directory in (multimodal, exported))
    assert before.keys() == after.keys() and of_vision(before)
    assert {name for name in before if torch.equal(before[name], after[name])} == of_vision(before).keys()
    build = build_config(tmp_path, "run", model, "steps=3", "checkpoint={every: 1, resume: true}", "optimizer.warmup_steps=0")
    assert train_to_end(build).steps == 3


def test_what_no_text_reaches_has_no_adapter(multimodal):
    pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
    for targets in ("all-linear", ["q_proj", "fc1"]):
        lora = LoraConfig(rank=2, target_modules=targets)
        model, _ = load_model_and_tokenizer(ModelConfig(name_or_path=str(multimodal), lora=lora))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained and all(name.startswith("model.language_model.layers") for name in trained)


def test_the_memory_of_a_multimodal_model_is_planned_and_a_decoder_without_layers_refused():
    config = ModelConfig(name_or_path="none")
    whole, text = weigh(config, gemma()), weigh(config, gemma().text_config)
    assert whole.trained == text.trained == text.total < whole.total
    assert whole.outside_layers - text.outside_layers == whole.total - text.total
    learned = GPT2Config(vocab_size=20, n_embd=16, n_head=2, n_layer=2, n_positions=16)
    with pytest.raises(ValueError, match=r"need a decoder with its blocks in `layers`, that of GPT2LMHeadModel has none\. Train"):
        weigh(config, learned)


@pytest.mark.slow
def test_two_ranks_train_a_multimodal_model(multimodal, tmp_path):
    ranks_train(2, tmp_path, f"model={{name_or_path: {multimodal}}}", "steps=1", "optimizer.warmup_steps=0")
    before, after = (load_file(directory / "model.safetensors") for directory in (multimodal, tmp_path / "run" / "model"))
    assert {name for name in before if torch.equal(before[name], after[name])} == of_vision(before).keys()


@pytest.mark.parametrize(("where", "what"), [("prompt", "prompt"), ("expert", "expert trace"), (None, None)])
def test_a_token_that_the_model_has_no_embedding_for_is_refused_where_data_has_it(where, what, tmp_path, own_cache):
    tokenizer = build_tokenizer()
    small = LlamaConfig(vocab_size=len(tokenizer), **SMALL)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    directory = publish(tmp_path / "published", small, tokenizer)
    rows = [{"prompt": "ab?", "solution": "b", "expert": "b"} for _ in range(3)]
    if where is not None:
        rows[1][where] += "<image>"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"data={{path: {tmp_path / 'rows.jsonl'}, expert_column: expert}}"
    config = build_config(tmp_path, "run", f"model={{name_or_path: {directory}}}", data, "reward=exact_match")
    if where is None:
        notes = Trainer(config).notes
        assert sum("the model has no embedding for <image> (1 of the tokenizer): it samples none" in note for note in notes) == 1
        return
    message = rf"data: .* embedding for every token, it has {len(tokenizer) - 1}; the {what} of problem 1 has '<image>', token"
    with pytest.raises(ValueError, match=message):
        Trainer(config)


def test_a_token_that_ends_responses_and_has_no_embedding_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    small = LlamaConfig(vocab_size=len(tokenizer), **SMALL)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    directory = str(publish(tmp_path / "published", small, tokenizer))
    message = rf"has {len(tokenizer) - 1}; '<\|im_end\|>' is token {len(tokenizer) - 1}\. Set model\.eos_token .*model\.tokenizer"
    for eos_token in (None, ["$", "<|im_end|>"]):
        with pytest.raises(ValueError, match=message):
            load_model_and_tokenizer(ModelConfig(name_or_path=directory, eos_token=eos_token))
    load_model_and_tokenizer(ModelConfig(name_or_path=directory, eos_token="$"))


LLAMA_3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SENTENCE = "so x = 12345 and y = 98765, it's one\n\ntwo"


def tokenizer_files(directory, model_type, *, cut=False, **settings):
    """A directory with a tokenizer.json that splits numbers by three digits, beside the configuration of a `model_type`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([SENTENCE] * 50, trainer)
    expected = inner.encode(SENTENCE).ids
    if cut:
        inner.enable_truncation(3)
        inner.enable_padding(length=50)
    directory.mkdir()
    inner.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ messages }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": "{{ messages }}"} | settings))
    return str(directory), expected


def load_and_note(directory):
    told = []
    return load_tokenizer(ModelConfig(name_or_path=directory), None, told.append), told


def test_tokens_are_those_of_the_published_file_whatever_class_transformers_makes_of_it(tmp_path):
    directory, expected = tokenizer_files(tmp_path / "files", "qwen2")
    tokenizer, (note,) = load_and_note(directory)
    assert tokenizer(SENTENCE)["input_ids"] == expected and tokenizer.decode(expected) == SENTENCE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", "{{ messages }}")
    assert "is what its tokenizer.json says" in note and "as a Qwen2Tokenizer" in note and "'so x = 12345" in note
    tokenizer.save_pretrained(tmp_path / "exported")  # which is read again as it is
    again, told = load_and_note(str(tmp_path / "exported"))
    assert again(SENTENCE)["input_ids"] == expected and not told
    theirs = AutoTokenizer.from_pretrained(directory)  # what the note names for those who want it
    assert theirs(SENTENCE)["input_ids"] != expected
    theirs.save_pretrained(tmp_path / "theirs")
    again, told = load_and_note(str(tmp_path / "theirs"))
    assert again(SENTENCE)["input_ids"] == theirs(SENTENCE)["input_ids"] and not told


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("mistral", {}), ("mistral", {"cut": True}), ("llama", {"add_prefix_space": True}), ("qwen2", {"model_max_length": 8})],
)
def test_a_tokenizer_that_transformers_reads_as_it_was_published_is_left_alone(model_type, settings, tmp_path):
    directory, _ = tokenizer_files(tmp_path / "files", model_type, **settings)
    if model_type == "qwen2":
        AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    tokenizer, told = load_and_note(directory)
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(directory)) and not told
