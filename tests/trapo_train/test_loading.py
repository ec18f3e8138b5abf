"""Models as they are published: what of them would show only at the end of a run shows, or is mended, when they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config

from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train.attention import longrope_limit, segment_arguments
from trapo_train.display import read_metrics
from trapo_train.model import ModelConfig, load_model_and_tokenizer
from trapo_train.tasks import build_tokenizer
from trapo_train.trainer import Trainer

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 80,
}  # fmt: skip
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


@pytest.mark.parametrize("settings", [{"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"do_sample": False, "top_p": 0.6}])
def test_sampling_settings_that_transformers_does_not_save_are_mended_when_the_model_is_loaded(settings, published, tmp_path):
    set_generation(published, **settings)
    model = f"model={{name_or_path: '{published}', eos_token: '{END}'}}"
    config = build_config(tmp_path, "run", model, "steps=1", "checkpoint.every=0")
    train_to_end(config)
    told = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert sum("the trained model gets do_sample: true" in text for text in told) == 1
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved.items() >= (settings | {"do_sample": True}).items() and saved["eos_token_id"]


def test_sampling_settings_that_can_be_saved_stay_as_they_are(published):
    set_generation(published, do_sample=True, temperature=0.7)
    told = []
    model, _ = load_model_and_tokenizer(ModelConfig(name_or_path=str(published), eos_token=END), tell=told.append)
    assert model.generation_config.do_sample and not any("do_sample" in text for text in told)


def test_a_configuration_that_cannot_be_saved_is_refused_when_the_model_is_loaded(published):
    set_generation(published, num_beams=1, length_penalty=0.5)
    with pytest.raises(ValueError, match=r"(?s)able to save the configuration.*generation_config\.json in a copy.*length_penalty"):
        load_model_and_tokenizer(ModelConfig(name_or_path=str(published), eos_token=END))


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
