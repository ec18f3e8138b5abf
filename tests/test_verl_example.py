"""examples/verl_head.py gives verl's models the logprobs, entropies and gradients that they have with verl's own head.

Against verl where it is installed (its transformers is older than the trainer's), else against tests/verl_stand_in.py.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard

from tests import ranks, verl_stand_in
from tests.hf_models import small_model
from trapo_kernels import token_logprob

EXAMPLES = Path(__file__).parents[1] / "examples"
IDS = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(0))


def _verl():
    """verl's module of patches, and its class of heads, as this process has them."""
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return monkey_patch, FusedLinearForPPO


@pytest.fixture
def verl(monkeypatch):
    """verl's module of patches, with what verl and the example, once a test imports it, replace put back afterwards."""
    verl_stand_in.install()
    patches, head = _verl()
    monkeypatch.setattr(patches, "patch_forward_with_backends", patches.patch_forward_with_backends)
    monkeypatch.setattr(head, "forward", head.forward)
    for family in (transformers.Qwen2ForCausalLM, transformers.Gemma2ForCausalLM, transformers.PhiForCausalLM):
        monkeypatch.setattr(family, "forward", family.forward)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield patches
    sys.modules.pop("verl_head", None)
    verl_stand_in.uninstall()


def _result(model, ids=IDS):
    """logprobs, entropies and gradients of a model as verl's workers call it."""
    out = model(input_ids=ids, temperature=0.7, return_dict=True, shift_labels=ids.roll(-1, -1))
    (-(out.log_probs - 0.1 * out.entropy).mean()).backward()
    return out.log_probs.detach(), out.entropy.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_a_worker_s_logprobs_entropies_and_gradients_stay_what_they_are(verl, backend):
    results = []
    for ours in (False, True):
        if ours:
            importlib.import_module("verl_head")
        torch.manual_seed(0)
        model = small_model("Qwen2")
        verl.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
        results.append(_result(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_a_bf16_head_has_fp32_logits_and_entropies(verl):
    model = small_model("Qwen2").bfloat16()
    hidden = model.model(IDS).last_hidden_state
    exact = token_logprob(hidden.double() @ model.lm_head.weight.double().T, IDS.roll(-1, -1), temperature=0.7, with_entropy=True)
    errors = []
    for ours in (False, True):
        if ours:
            importlib.import_module("verl_head")
        verl.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
        logprob, entropy, _ = _result(model)
        errors.append(((logprob - exact.logprob).abs().max(), (entropy - exact.entropy).abs().max()))
    assert entropy.dtype == torch.float32
    for ours, theirs in zip(*reversed(errors), strict=True):
        assert ours < 1e-5 and ours < theirs / 10


@pytest.mark.parametrize(("name", "found"), [("Gemma2", "softcap"), ("Phi", "bias")])
def test_a_model_whose_logits_verl_would_change_is_refused(verl, name, found):
    importlib.import_module("verl_head")
    model, own = small_model(name), getattr(transformers, f"{name}ForCausalLM").forward
    with pytest.raises(ValueError, match=rf"lm_head\.weightᵀ alone, got {found} in {name}ForCausalLM, which verl leaves out\. Set"):
        verl.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    assert type(model).forward is own
    verl.patch_forward_with_backends(model, use_fused_kernels=False)


def _rank(rank, folder):
    verl_stand_in.install()
    sys.path.insert(0, folder)
    import verl_head

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = small_model("Qwen2")
    verl_head.patch_forward(model, use_fused_kernels=True, fused_kernels_backend="torch")
    *_, exact = _result(model)
    model.zero_grad()
    for unit in (model.model.embed_tokens, *model.model.layers, model.lm_head, model):  # as verl shards it
        fully_shard(unit)
    *_, found = _result(model, IDS[rank : rank + 1])
    torch.testing.assert_close([grad.full_tensor() for grad in found], exact, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()
    os._exit(0)  # while the wrapped model still lives: to free it here can wait forever for gloo's threads (torch 2.13)


@pytest.mark.slow
def test_a_head_that_fsdp2_has_in_a_unit_of_its_own_has_the_gradient_of_the_whole_batch():
    ranks.start(_rank, 2, str(EXAMPLES))
