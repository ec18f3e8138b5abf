"""What a model draws at random in training: switched off, as sampler, old policy and update are separate passes of one policy."""

from __future__ import annotations

import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from trapo_train.models.attention import plain_attention
from trapo_train.schema import UserError

# Names of attributes. PhiMoE's router_jitter_noise is none of them: by it its router chooses in an evaluation, too.
_SHARES = ("dropout", "layerdrop", "pdrop")
_NOISES = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
_PROBE_TOKENS = 16  # so that a router that draws where two experts are close meets a few such places


def switch_off_dropout(model: PreTrainedModel) -> bool:
    """Set every dropout of the model, dropped layers and noise before routers to 0; returns whether there was any.

    Sampler, old policy and update are separate passes: with other masks each, ratios and the sampler's mismatch are noise.
    """
    found: set[str] = set()
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            module.p = 0.0
            found.add("p")
        found |= _set_to_zero(module)  # such as attention_dropout, which transformers hands to attention functions
    config = model.config.get_text_config()
    found |= _set_to_zero(config)  # which Persimmon reads in every pass
    if "jitter_noise" in found:
        config.router_jitter_noise = 0.0  # its name where the modules have it from (Mixtral, MiniMax)
    return bool(found)


def _set_to_zero(holder: object) -> set[str]:
    names = {
        name
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and (name in _NOISES or any(share in name for share in _SHARES))
    }
    for name in names:
        setattr(holder, name, 0.0)
    return names


@torch.no_grad()
def check_one_policy(model: PreTrainedModel) -> None:
    """Raise UserError for a model that computes something else in training than in evaluation, as PhiMoE, whose router draws."""
    weight, training, hidden = model.get_input_embeddings().weight, model.training, {}
    token_ids = torch.arange(_PROBE_TOKENS, device=weight.device)[None] % len(weight)
    with plain_attention(model):
        for mode in (False, True):
            hidden[mode] = model.train(mode).base_model(input_ids=token_ids, use_cache=False).last_hidden_state.float()
    model.train(training)
    error = (hidden[True] - hidden[False]).abs().max() / hidden[False].abs().max().clamp(min=1e-6)
    if not error < 1e-3:
        raise UserError(
            "model: a training pass must compute what an evaluation computes, or sampler, old policy and update are several "
            f"policies; that of {type(model).__name__} is off by {float(error):.2g} of the largest hidden state. Choose another "
            "model."
        )
