"""verl's FSDP workers with the logprobs and entropies of trapo_kernels: verl's losses and metrics; what is not computed is refused.

    PYTHONPATH=examples python -m verl.trainer.main_ppo ... actor_rollout_ref.model.external_lib=verl_head \\
        actor_rollout_ref.model.use_fused_kernels=true actor_rollout_ref.model.fused_kernel_options.impl_backend=torch

verl 0.9 imports `external_lib` in every worker, and the forwards that it gives its models, of text and of images, have one function
for their head. Importing this file replaces it. What else changes beside memory and time:

- Logits of a bf16 head, and entropies, are fp32, where verl's "torch" rounds both to bf16.
- An untied head under FSDP2 works: verl wraps it separately and multiplies by its shard, which ends in "mixed torch.Tensor and
  DTensor".
- A model that does more to its logits than multiply by its head's weight, such as Gemma 2 or Granite, is refused: verl's fused
  forward leaves cap, scale and bias out, and trains on other logprobs than the model has.

An adapter on the head, where `target_modules` names lm_head, is left out as in verl's own: it comes after the model is looked at.
"""

import torch
from torch import Tensor, nn
from verl.models.transformers import monkey_patch
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from trapo_kernels import head_options, linear_logprob, unsharded

PLAIN = {"bias": None, "softcap": None, "temperature": 1.0, "lora": None}
BACKENDS = ("torch", "liger")  # of verl, whose forwards call FusedLinearForPPO; its "triton" stays its own


def forward(
    self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """In place of `FusedLinearForPPO.forward`: logprob and entropy, of the shape of `input_ids`, the next token at every place."""
    options = {"temperature": temperature, "with_entropy": True}
    target = input_ids.to(torch.int64).flatten()
    logprob, entropy, _ = linear_logprob(hidden_states.flatten(0, -2), unsharded(vocab_weights), target, **options)
    return logprob.view(input_ids.shape).clone(), entropy.view(input_ids.shape).clone()  # FSDP2 warns where a view leaves a module


def patch_forward(model: nn.Module, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None) -> None:
    """verl's `patch_forward_with_backends`, for models alone whose logits are what its fused forwards compute."""
    if use_fused_kernels and fused_kernels_backend in BACKENDS:
        more = [name for name, value in head_options(model).items() if value != PLAIN[name]]
        if more:
            raise ValueError(
                f"use_fused_kernels: the logits must be hidden · lm_head.weightᵀ alone, got {', '.join(more)} in "
                f"{type(model).__name__}, which verl leaves out. Set actor_rollout_ref.model.use_fused_kernels=false."
            )
    verl_patch(model, use_fused_kernels=use_fused_kernels, fused_kernels_backend=fused_kernels_backend)


verl_patch = monkey_patch.patch_forward_with_backends
monkey_patch.patch_forward_with_backends = patch_forward
FusedLinearForPPO.forward = forward
