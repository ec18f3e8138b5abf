"""Liger's kernels: only those of the body, only where they run, and the refusal says why."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4Config
from transformers.models.glm4 import modeling_glm4
from transformers.models.qwen2 import modeling_qwen2

from tests.trapo_train.step.test_optimizer_step import make_samples
from trapo_kernels import objectives
from trapo_train.models.liger import apply_liger
from trapo_train.models.model import ModelConfig, PolicyHead, load_model_and_tokenizer, policy_forward, policy_head
from trapo_train.models.placement import place_model
from trapo_train.models.scratch import ScratchConfig
from trapo_train.parallel.world import World
from trapo_train.step.packing import PackingConfig, pack
from trapo_train.tasks import build_tokenizer

SCRATCH = ScratchConfig("qwen2", hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48)
CUDA = torch.device("cuda")


def build(device="cpu", check_logits=True, **fields):
    config = ModelConfig(scratch=SCRATCH, **fields)
    return load_model_and_tokenizer(config, task_tokenizer=build_tokenizer(), device=device, check_logits=check_logits)[0]


@pytest.fixture
def restored(monkeypatch):
    """The module of the model as it was: Liger replaces names in it."""
    for name in ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP"):
        monkeypatch.setattr(modeling_qwen2, name, getattr(modeling_qwen2, name))


@pytest.fixture
def stand_in(monkeypatch):
    """A package with Liger's interface that records what it was asked for."""
    package, public, calls = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers"), []

    def apply_liger_kernel_to_qwen2(
        rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, rms_norm: bool = True,
        swiglu: bool = True, model=None,
    ) -> None:  # fmt: skip
        calls.append({name: value for name, value in locals().items() if name != "calls"})

    public.apply_liger_kernel_to_qwen2 = apply_liger_kernel_to_qwen2
    public.__all__ = ["LigerRMSNorm", "apply_liger_kernel_to_qwen2"]
    package.transformers = public
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", public)
    return calls


def test_the_body_is_patched_and_the_losses_are_not(stand_in):
    model = build()
    assert apply_liger(model, True, CUDA) is True
    (call,) = stand_in
    assert call.pop("model") is model
    assert call == {
        "rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False,
    }  # fmt: skip


@pytest.mark.parametrize("wanted", [True, "auto"])
@pytest.mark.parametrize(
    ("device", "model_type", "message"),
    [
        (torch.device("cpu"), "qwen2", "its kernels need a CUDA device, got cpu"),
        (CUDA, "olmo", r"must be one that liger-kernel has kernels for \(qwen2\), got olmo"),
    ],
)
def test_where_it_cannot_run_it_is_refused_or_left(wanted, device, model_type, message, stand_in):
    model = build()
    model.config.model_type = model_type
    if wanted == "auto":
        told = []
        assert apply_liger(model, wanted, device, told.append) is False
        assert len(told) == 1 and re.match(f"model.liger=auto: not used, .*{message}", told[0])
    else:
        with pytest.raises(ValueError, match=message):
            apply_liger(model, wanted, device)
    assert stand_in == []


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match=r"trapo\[liger\]"):
        build(liger=True)
    assert apply_liger(build(liger="auto"), "auto", CUDA) is False


def test_what_auto_uses_is_told(stand_in):
    told = []
    assert apply_liger(build(), "auto", CUDA, told.append) is True
    assert told == ["model.liger=auto: rms_norm, rope, swiglu"]


def test_what_liger_leaves_off_by_itself_stays_off(monkeypatch):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (extra [liger])")
    for name in ("Glm4RMSNorm", "Glm4MLP"):
        monkeypatch.setattr(modeling_glm4, name, getattr(modeling_glm4, name))
    told, shape = [], {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = Glm4Config(vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1, **shape)
    assert apply_liger(AutoModelForCausalLM.from_config(config), "auto", CUDA, told.append) is True
    assert told == ["model.liger=auto: rms_norm, swiglu"]  # it refuses rope=True


def test_a_wrong_value_is_refused():
    with pytest.raises(ValueError, match="liger must be true or false or one of auto, got 'always'"):
        ModelConfig(scratch=SCRATCH, liger="always")


def test_the_installed_package_patches_this_model_and_leaves_its_head(restored):
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed (extra [liger])")
    model = build()
    forward = model.forward
    assert apply_liger(model, True, CUDA)
    layer = model.model.layers[0]
    assert layer.mlp.forward.__func__ is liger.LigerSwiGLUMLP.forward
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        assert norm.forward.__func__ is liger.LigerRMSNorm.forward
    assert modeling_qwen2.apply_rotary_pos_emb is liger.liger_rotary_pos_emb
    assert model.forward == forward and isinstance(policy_head(model), PolicyHead)


def test_a_second_model_has_its_layers_and_is_not_run_in_host_memory(restored):
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed (extra [liger])")
    build(CUDA, liger=True)
    reference = build(CUDA, liger=True, check_logits=False)
    assert isinstance(reference.model.norm, liger.LigerRMSNorm) and isinstance(policy_head(reference), PolicyHead)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_and_gradients_are_those_without_liger(dtype, restored):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (extra [liger])")
    objective = objectives.trapo(entropy_coef=0.01)
    (micro_batch,) = pack(make_samples(), PackingConfig(max_tokens=1000), objective, max_response_tokens=16)
    results = []
    for liger in (False, True):
        model = build("cuda", dtype=dtype, liger=liger)
        place_model(model, World.alone())
        loss = policy_forward(model, micro_batch.to("cuda"), objective).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, patched in zip(*results, strict=True):
        assert (plain - patched).norm() <= (1e-4 if dtype == "float32" else 5e-2) * plain.norm()
