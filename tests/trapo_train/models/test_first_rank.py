"""The first rank alone reads a model; the others get its values, unit by unit."""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from tests import ranks
from tests.trapo_train.models.test_loading import SMALL, gemma, publish, set_generation
from tests.trapo_train.test_train import build_config
from trapo_train.extras import is_installed
from trapo_train.memory.trace import weigh
from trapo_train.models.lora import LoraConfig
from trapo_train.models.model import ModelConfig, load_model_and_tokenizer
from trapo_train.models.placement import place_model
from trapo_train.models.scratch import ScratchConfig
from trapo_train.parallel.world import ParallelConfig, World
from trapo_train.schema import UserError
from trapo_train.tasks import build_tokenizer
from trapo_train.trainer import Trainer

VOCABULARY = len(build_tokenizer())
SHAPE = SMALL | {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
BY_CONFIGURATION = "tied by the configuration alone"
PUBLISHED = {
    "a head of its own": LlamaConfig(**SHAPE),
    "tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    BY_CONFIGURATION: Qwen2Config(**SHAPE, tie_word_embeddings=False),  # as its files are; the fixture writes that it is tied
    "buffers": Gemma3TextConfig(**SHAPE, head_dim=8),
    "multimodal": gemma(),
}


@pytest.fixture
def published(tmp_path):
    """A directory for each of PUBLISHED."""
    for name, config in PUBLISHED.items():
        publish(tmp_path / name, config)
    PUBLISHED["tied"].save_pretrained(tmp_path / BY_CONFIGURATION)
    (tmp_path / "buffers" / "generation_config.json").unlink()
    set_generation(tmp_path / "tied", eos_token_id=[3, 4], do_sample=True, temperature=0.6)
    return tmp_path


def _compare(config, world, vocab_parallel_head=False):
    """That a model which two ranks place is on the second what one process loads."""
    options = {"task_tokenizer": build_tokenizer(), "seed": 5}
    model, _ = load_model_and_tokenizer(config, **options, weights=world.first)
    assert world.first or all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    world.vocab_parallel_head = vocab_parallel_head
    place_model(model, world)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    found = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in held.items()}
    if world.first:  # which has loaded it as one process does
        return
    expected, _ = load_model_and_tokenizer(config, **options)
    wanted = dict(expected.named_parameters()) | dict(expected.named_buffers())
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) and held[name].dtype == value.dtype, name
        assert held[name].requires_grad == value.requires_grad, name
    assert model.training == expected.training
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.config.to_dict() == expected.config.to_dict()


def _place(rank, directory):
    world = World(ParallelConfig(timeout_s=60))
    for name in PUBLISHED:
        _compare(ModelConfig(str(directory / name)), world)
    _compare(ModelConfig(str(directory / "a head of its own")), world, vocab_parallel_head=True)
    _compare(ModelConfig(scratch=ScratchConfig(hidden_size=16)), world)
    if is_installed("peft"):
        lora = LoraConfig(rank=2)
        _compare(ModelConfig(str(directory / "tied"), dtype="bfloat16", lora=lora, gradient_checkpointing=True), world)
        _compare(ModelConfig(str(directory / "multimodal"), dtype="bfloat16", lora=lora), world)
    world.close()
    os._exit(0)


@pytest.mark.slow
def test_every_rank_gets_the_model_that_the_first_has_read(published):
    ranks.start(_place, 2, published)


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]
"""


def test_a_model_that_brings_its_code_has_a_shell_and_a_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    directory = publish(tmp_path / "mine", PUBLISHED["a head of its own"])
    (directory / "modeling_mine.py").write_text(CODE)
    settings = json.loads((directory / "config.json").read_text())
    places = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    settings |= {"model_type": "mine", "auto_map": places}
    (directory / "config.json").write_text(json.dumps(settings))
    config = ModelConfig(str(directory), trust_remote_code=True)
    model, _ = load_model_and_tokenizer(config, weights=False)
    assert type(model).__name__ == "Mine" and model.rates == [0.0, 0.25, 0.5] and model.device.type == "meta"
    assert weigh(config, model.config).total == sum(parameter.numel() for parameter in model.parameters())


def _refuse(rank):
    """Ranks with other layers or another width than the first: all are told of it."""
    world, tokenizer = World(ParallelConfig(timeout_s=60)), build_tokenizer()
    scratch = ScratchConfig(hidden_size=16, num_layers=2)
    cases = {r"model\.layers\.1\.input_layernorm\.weight": {"num_layers": 1}, r"lm_head\.weight": {"hidden_size": 32}}
    for named, changed in cases.items():
        mine = ModelConfig(scratch=replace(scratch, **changed) if rank else scratch)
        model, _ = load_model_and_tokenizer(mine, task_tokenizer=tokenizer, weights=world.first)
        with pytest.raises(UserError, match=rf"the first has loaded, rank 1 has another {named}, or none\. Use the same"):
            place_model(model, world)
    world.close()
    os._exit(0)


@pytest.mark.slow
def test_ranks_that_would_make_another_model_are_refused():
    ranks.start(_refuse, 2)


def _load_what_is_not_there(rank, config):
    """The first rank alone misses the weights: the other does not wait for them."""
    with pytest.raises(OSError, match=r"must be a model on the hub or a directory with its files, got .*no file named model"):
        Trainer(config)
    os._exit(0)


@pytest.mark.slow
def test_what_keeps_the_first_rank_from_loading_ends_all(published, tmp_path):
    directory = tmp_path / "tied"
    (directory / "model.safetensors").unlink()
    ranks.start(_load_what_is_not_there, 2, build_config(tmp_path, "run", f"model={{name_or_path: {directory}}}"))


def _grown():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(rank, directory):
    world, before = World(ParallelConfig(timeout_s=60)), _grown()
    scratch = ScratchConfig(hidden_size=768, intermediate_size=2304, num_layers=8)
    model, _ = load_model_and_tokenizer(ModelConfig(scratch=scratch), task_tokenizer=build_tokenizer(), weights=world.first)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    place_model(model, world)
    torch.save((_grown() - before, size), directory / f"{rank}.pt")
    world.close()
    os._exit(0)


@pytest.mark.slow
def test_a_rank_that_is_not_the_first_never_holds_the_whole_model(tmp_path):
    ranks.start(_measure, 4, tmp_path)
    (first, size), *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(4))
    assert first > 0.9 * size
    assert all(grown < 0.7 * size for grown, _ in others), (size, first, others)  # a quarter of it, and one of its 8 layers
