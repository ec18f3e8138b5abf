"""Models as they are published: what of them would show only at the end of a run shows, or is mended, when they are loaded."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.trapo_train.test_train import build_config, train_to_end
from trapo_train.display import read_metrics
from trapo_train.model import ModelConfig, load_model_and_tokenizer
from trapo_train.tasks import build_tokenizer

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
