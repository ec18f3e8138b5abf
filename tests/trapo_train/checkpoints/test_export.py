"""An exported model: whole, or what was there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trapo_train.checkpoints.checkpoint import CheckpointError
from trapo_train.checkpoints.export import export_model, other_tokenizer
from trapo_train.models.model import ModelConfig, load_model_and_tokenizer
from trapo_train.models.scratch import ScratchConfig
from trapo_train.tasks import build_tokenizer


def test_export_is_loaded_by_transformers_and_replaced_as_a_whole(tmp_path):
    scratch = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24)
    model, tokenizer = load_model_and_tokenizer(ModelConfig(scratch=scratch), task_tokenizer=build_tokenizer())
    export_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "stale.txt").touch()
    with torch.no_grad():
        model.lm_head.weight += 1.0
    export_model(model, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model" / "stale.txt").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    token_ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again.eval()(token_ids).logits, model.eval()(token_ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("ab|")["input_ids"] == tokenizer("ab|")["input_ids"]
    assert not list((tmp_path / "model").glob("*.bin"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shards_are_rounded_before_they_travel(tmp_path, monkeypatch, dtype):
    scratch = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24)
    model, tokenizer = load_model_and_tokenizer(ModelConfig(scratch=scratch), task_tokenizer=build_tokenizer())
    expected = {name: value.to(dtype) for name, value in model.state_dict().items()}
    gather, travelled = DTensor.full_tensor, []
    monkeypatch.setattr(DTensor, "full_tensor", lambda shard: travelled.append(shard.dtype) or gather(shard))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        directory = export_model(model, tokenizer, tmp_path / "model", SimpleNamespace(size=2, first=True), dtype)
        assert export_model(model, tokenizer, tmp_path / "other", SimpleNamespace(size=2, first=False), dtype) == tmp_path / "other"
    finally:
        torch.distributed.destroy_process_group()
    assert travelled == [dtype] * 2 * len(expected) and not (tmp_path / "other").exists()
    exported = load_file(directory / "model.safetensors")
    assert exported.keys() == expected.keys() and all(torch.equal(exported[name], value) for name, value in expected.items())


def test_an_export_replaces_nothing_but_an_export_and_follows_a_link(tmp_path):
    scratch = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24)
    model, tokenizer = load_model_and_tokenizer(ModelConfig(scratch=scratch), task_tokenizer=build_tokenizer())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="mine must be empty or an export of trapo-train"):
        export_model(model, tokenizer, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large_disk")
    for _ in range(2):
        export_model(model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "large_disk" / "model.safetensors").is_file()


def test_an_export_that_cannot_take_its_place_stays_complete(tmp_path, monkeypatch):
    scratch = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24)
    model, tokenizer = load_model_and_tokenizer(ModelConfig(scratch=scratch), task_tokenizer=build_tokenizer())
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("Device or resource busy")))
    with pytest.raises(CheckpointError, match="unfinished_model must take the place of .*busy. It is complete: move it there"):
        export_model(model, tokenizer, tmp_path / "model")
    monkeypatch.undo()
    AutoModelForCausalLM.from_pretrained(tmp_path / ".unfinished_model")


def test_a_tokenizer_that_autotokenizer_reads_otherwise_is_named(tmp_path):
    """Beside a qwen2 model transformers makes a plain tokenizer a Qwen2Tokenizer; beside a llama it stays what it is."""
    for architecture, expected in (("qwen2", "reads the exported tokenizer as a Qwen2Tokenizer"), ("llama", None)):
        scratch = ScratchConfig(
            architecture=architecture,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=24,
            max_position=32,
        )
        model, tokenizer = load_model_and_tokenizer(ModelConfig(scratch=scratch), task_tokenizer=build_tokenizer())
        export_model(model, tokenizer, tmp_path / architecture)
        said = other_tokenizer(tmp_path / architecture, tokenizer)
        assert said is None if expected is None else expected in said
