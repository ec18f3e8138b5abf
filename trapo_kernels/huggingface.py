"""A causal LM of transformers that computes its loss from hidden states, whoever trains it; transformers is imported where used."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trapo_kernels import checks
from trapo_kernels.api import linear_policy_loss, policy_loss, token_logprob
from trapo_kernels.batch import TokenBatch
from trapo_kernels.dispatch import Backend
from trapo_kernels.fsdp import unsharded
from trapo_kernels.heads import head_options
from trapo_kernels.objective import Objective
from trapo_kernels.roles import IGNORE_INDEX, Role
from trapo_kernels.weights import LossTotals, aggregate

_PROBED_TOKENS = 8
_KEPT = ("past_key_values", "cache", "hidden_states", "attentions")  # of a body's outputs; the second since transformers 5.24


def fuse_loss(model: nn.Module, objective: Objective, *, backend: Backend = "auto") -> None:
    """Let a causal LM of transformers compute its loss without logits, under any objective that learns from labels, in place.

    From then on `model(input_ids, labels=labels)`, as Hugging Face's Trainer, Accelerate or your own loop call it, has `.loss` and
    no `.logits`, in training and in evaluation; every label but -100 is an expert token. Without labels, and so in `generate`, the
    model is what it was. `model.loss_metrics` has the metrics of its last loss. Where a trainer passes num_items_in_batch (else
    these are the labels of the batch), the loss is that of

        target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        role = torch.where(target == -100, Role.IGNORED, Role.EXPERT).to(torch.uint8)
        weight = aggregate(role, mode="token_mean", totals=LossTotals(expert_tokens=num_items_in_batch))
        hidden = model.base_model(input_ids).last_hidden_state.flatten(0, 1)
        batch = TokenBatch(target, role, None, weight)
        loss = linear_policy_loss(hidden, model.lm_head.weight, batch, objective, **head_options(model)).loss

    which with `sft()` is the model's own. It is computed inside the model's forward, as DDP and FSDP need it: call this before
    torch.compile, before they or Accelerate wrap the model and before a Trainer trains, but after one of TRL's is made, whose own
    head would come between. Eight tokens go through the model, unless its weights are meta tensors, to compare the loss with its
    own and with that of its logits. Another call replaces the objective, `del model.forward` (of PEFT's model, that of its
    `get_base_model()`) undoes it; a copy of the model keeps it, a saved one does not.

    Args:
        model: a causal LM of `from_pretrained` or `from_config`, or PEFT's model of one.
        objective: `objectives.sft()`, `trsft(alpha=0.1)`, `dft()` or another whose expert tokens need neither an advantage nor a
            logprob of before, and no whole sequences. backend: as in `linear_policy_loss`.

    Returns: None. Raises: TypeError or ValueError for a model or an objective that cannot be used so, such as one whose own loss is
        not that of its head's logits and next tokens; at a call, for what this loss cannot do, such as a router's auxiliary loss.
    Memory: `head_memory`. On a GPU the host waits once per call, to learn which labels are -100: those rows reach no GEMM.
    Determinism: that of `linear_policy_loss`. Source: the forward and loss of the causal LMs in transformers 5.24.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    _check_arguments(model, objective)
    own = getattr(model.forward, "replaced", None) or _unbound(model.forward)
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(type(model).forward)
    def forward(self, *args, **given):
        if len(args) > len(names) or any(name in given for name in names[: len(args)]):
            return own(self, *args, **given)  # which says what is wrong with them
        given |= dict(zip(names, args, strict=False))
        if given.get("labels") is None and given.get("shift_labels") is None:
            _check_no_loss_is_due(self, given)
            return own(self, **given)
        return _with_loss(self, objective, backend, **given)

    forward.__signature__ = inspect.signature(type(model).forward)  # transformers reads it: `generate`, and a Trainer its columns
    del forward.__wrapped__  # down which Accelerate unwraps
    forward.replaced = own  # for another call of this, with another objective
    before = vars(model).get("forward")
    model.forward = forward.__get__(model)
    model._replicate_for_data_parallel = _replicate.__get__(model)
    try:
        _compare(model, own, objective)
    except BaseException:  # Ctrl-C as well: the model stays what it was
        del model.forward
        if before is not None:
            model.forward = before
        raise


def _unbound(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward as a function of the model, so that a copy of the model calls its own; what somebody put there as a plain
    function takes no model."""
    return getattr(forward, "__func__", lambda _, *args, **given: forward(*args, **given))


def _replicate(model: nn.Module) -> nn.Module:
    """What torch.nn.DataParallel asks of a module: a replica would run the forward, and so the weights, of the first GPU."""
    if hasattr(model.forward, "replaced"):
        raise ValueError(
            f"{type(model).__name__}: a model after fuse_loss must have a process per GPU, got torch.nn.DataParallel, which a "
            "Trainer takes where one process sees several. Launch it with torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    return type(model)._replicate_for_data_parallel(model)


def _with_loss(
    model: nn.Module,
    objective: Objective,
    backend: Backend,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    return_dict: bool | None = None,
    **given,
):
    """The fused forward: the backbone of `model` on what was given, and the loss of `labels` [B, T], or of shifted ones."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    _check_call(model, logits_to_keep, given)
    backbone = model.model if model.base_model is model else model.base_model  # which Llama4ForCausalLM names wrongly
    outputs = backbone(**{"use_cache": False} | given, return_dict=True)
    weight, options = unsharded(model.get_output_embeddings().weight), head_options(model)
    hidden = outputs.last_hidden_state.flatten(0, 1).to(weight.device)  # which `device_map` may have put elsewhere
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shift_labels is None else shift_labels
    batch = _batch(target.flatten().to(weight.device), num_items_in_batch)
    out = linear_policy_loss(hidden, weight, batch, objective, backend=backend, **options)
    model.loss_metrics = out.metrics
    kept = {name: value for name, value in outputs.items() if name in _KEPT}
    answer = CausalLMOutputWithPast(loss=out.loss, **kept)
    return answer.to_tuple() if return_dict is False else answer


def _batch(target: Tensor, num_items: int | Tensor | None) -> TokenBatch:
    """Expert tokens wherever target [N] is not -100; `num_items`: how many the optimizer step has, None for those here."""
    role = torch.where(target == IGNORE_INDEX, Role.IGNORED, Role.EXPERT).to(torch.uint8)
    totals = None if num_items is None else LossTotals(expert_tokens=num_items)
    batch = TokenBatch(target, role, None, aggregate(role, mode="token_mean", totals=totals))
    if batch.active_rows is not None or torch.compiler.is_compiling():  # whose shapes are fixed
        return batch
    return batch.with_active_rows(batch.active.nonzero().squeeze(1))


def _check_arguments(model: nn.Module, objective: Objective) -> None:
    where = "fuse_loss"
    checks.is_a(where, "objective", objective, Objective, "objectives.sft()")
    head_options(model)
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "base_model"):
        raise TypeError(
            f"{where}: model must be a causal LM of transformers, got {type(model).__name__}. Call linear_policy_loss on "
            "the hidden states of another model yourself."
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError(f"{where}: model must not be compiled yet, got what torch.compile returns. Compile it after this call.")
    if hasattr(model, "_original_forward"):
        raise ValueError(
            f"{where}: model must not be prepared by Accelerate, whose autocast the loss would miss, got a {type(model).__name__} "
            "that is. Call this before accelerator.prepare and before a Trainer trains."
        )
    needed = sorted(objective.reads() & {"advantage", "old_logprob", "ref_logprob", "rollout_logprob"})
    found = "one that pools over sequences" if objective.pools else f"one that reads {' and '.join(needed)}" if needed else ""
    if found or not objective.expert_terms:
        raise ValueError(
            f"{where}: objective must be one that learns from labels alone, token by token, got {objective.name!r}, "
            f"{found or 'which has no loss on expert tokens'}. Pass objectives.sft() or trsft(alpha=0.1), or call "
            "linear_policy_loss with a TokenBatch that has what it needs."
        )


def _check_no_loss_is_due(model: nn.Module, given: dict) -> None:
    """A Trainer that computes the loss itself takes the labels out, and leaves their number."""
    if given.get("num_items_in_batch") is not None:
        raise ValueError(
            f"{type(model).__name__}: labels must be there after fuse_loss, got num_items_in_batch alone, as from a Trainer with "
            "label_smoothing_factor or compute_loss_func: its loss would take the place of the objective. Leave both out."
        )


def _check_call(model: nn.Module, logits_to_keep: int | Tensor, given: dict) -> None:
    where = type(model).__name__
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError(
            f"{where}: logits_to_keep must be absent beside labels, got {logits_to_keep}. Set the other labels to -100: rows "
            "without a label cost nothing."
        )
    wanted = given.get("output_router_logits")
    if wanted or (wanted is None and getattr(model.config.get_text_config(), "output_router_logits", False)):
        raise ValueError(
            f"{where}: output_router_logits must be off under fuse_loss, which adds no auxiliary loss of a router, got True. Set "
            "model.config.output_router_logits = False, or del model.forward to have the model's own loss back."
        )
    if "fused_lm_head" in given:
        raise TypeError(
            f"{where}: fused_lm_head is TRL's, whose trainers compute their own loss, got it under fuse_loss. Use a Trainer of "
            "transformers, or override compute_loss by `return model(**inputs).loss`."
        )
    weight = model.get_output_embeddings().weight
    partitioned = hasattr(weight, "ds_id") and weight.numel() == 0
    if partitioned or weight.is_meta:
        found = "DeepSpeed ZeRO-3 has partitioned" if partitioned else "Accelerate has offloaded"
        raise ValueError(
            f"{where}: the head must be whole where the loss is computed, got a weight that {found}. "
            f"{'Use FSDP2 or ZeRO-2.' if partitioned else 'Keep lm_head on a device in device_map.'}"
        )


def _compare(model: nn.Module, own: Callable[..., Any], objective: Objective) -> None:
    """Raise where the fused loss of a few tokens is not that of the model's logits, as with a layer that `head_options` misses, or
    the model's own loss is none of next tokens, as where its labels are shifted already."""
    weight = model.get_output_embeddings().weight
    if weight.is_meta:
        return
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(_PROBED_TOKENS, device=device).remainder(model.config.get_text_config().vocab_size)[None]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            theirs = own(model, input_ids=ids, labels=ids, use_cache=False)
            fused = model(input_ids=ids, labels=ids, use_cache=False).loss
            batch = _batch(F.pad(ids[0, 1:], (0, 1), value=IGNORE_INDEX).to(theirs.logits.device), None)
            logprob, entropy, _ = token_logprob(theirs.logits[0], batch.target, with_entropy=True)
            expected = policy_loss(logprob, entropy, batch, objective).loss
            of_next_tokens = -(batch.weight * logprob).sum()
    finally:
        for module, training in modes:
            module.training = training
        vars(model).pop("loss_metrics", None)
    if not expected.isfinite():
        raise ValueError(
            f"fuse_loss: the model must have finite logits, got a loss of {float(expected)} for {_PROBED_TOKENS} tokens. Look at "
            "its weights, or at their dtype."
        )
    close = 1e-3 + 2 * torch.finfo(weight.dtype).eps * float(theirs.logits.abs().max())
    if not abs(theirs.loss - of_next_tokens) <= close:
        raise ValueError(
            f"fuse_loss: the model's own loss of {_PROBED_TOKENS} tokens must be the cross-entropy of next tokens, "
            f"{float(of_next_tokens):.6g} ± {close:.2g}, got {float(theirs.loss):.6g} of {type(model).__name__}. Call "
            "linear_policy_loss with the targets that its labels are."
        )
    if not abs(fused - expected) <= close:
        raise ValueError(
            f"fuse_loss: the loss of {_PROBED_TOKENS} tokens must be that of the model's logits, {float(expected):.6g} ± "
            f"{close:.2g}, got {float(fused):.6g}: {type(model).__name__} does something to its logits that head_options does not "
            "know. Call linear_policy_loss with options of your own."
        )
