"""One `torch.library` op per direction, with fakes for torch.compile and autograd formulas.

Objectives pass as plain numbers (`terms.encode`), streams as tensors; an absent gradient is returned as an empty tensor, because
an op cannot return None.
"""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import Tensor

from trapo_kernels import dispatch, terms
from trapo_kernels.backends import sweep
from trapo_kernels.backends.gemm import Head
from trapo_kernels.backends.gradients import Gradients, Needs
from trapo_kernels.backends.logits import RowStatistics, joined_transform, savable, statistics_dtype


def _refuse_double_backward(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: double backward is not supported: its gradient is computed by a kernel that is not itself differentiable. "
            'Call backward without create_graph=True, or use backend="reference".'
        )


def _refuse_batched(op: str, *grads: Tensor | None) -> None:
    batched = (
        torch._C._functorch.is_batchedtensor,
        torch._C._functorch.is_legacy_batchedtensor,
    )  # torch.func's, is_grads_batched's
    if any(grad is not None and is_it(grad) for grad in grads for is_it in batched):
        raise RuntimeError(
            f"{op}: backward of a batch of gradients is not supported: its kernel takes one at a time, got one under vmap. "
            'Call it once for each, without is_grads_batched=True or vectorize=True, or use backend="reference".'
        )


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype, backend: str, hooked: bool) -> Tensor:
    """upstream · grad, multiplied in fp32, then rounded to `dtype`; the upstream gradient stays on its device.

    Where the graph is not retained, nor `grad` a hook's own (`hooked`), nobody reads it again: it is scaled in its place, or not at
    all where upstream is 1. To another dtype a GPU multiplies and rounds in one pass instead, which a CPU has not.
    """
    grad = grad.detach()  # an output of the op, which would take its graph along
    if type(grad) is not Tensor:  # torch.compile: what a tensor holds is not known, and the graph may run again
        return torch.mul(grad, upstream.view([1] * grad.ndim), out=torch.empty_like(grad, dtype=dtype))
    one_pass = grad.dtype != dtype and grad.device.type != "cpu"
    retained = hooked or torch._C._autograd._get_current_graph_task_keep_graph()
    out = torch.empty_like(grad, dtype=dtype) if retained or one_pass else grad
    dispatch.scale_to(grad, upstream, out, backend)
    return out.to(dtype)


def _or_empty(grads: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _head(given: tuple) -> tuple:
    return given.hidden, given.weight, given.bias, given.lora_a, given.lora_b


def _arguments(op: torch.library.CustomOpDef) -> type[tuple]:
    """The arguments of `op` as a tuple with their names, all None by default."""
    names = [argument.name for argument in op._opoverload._schema.arguments]
    return namedtuple("Arguments", names, defaults=[None] * len(names))


# linear_logprob: logits are recomputed in backward, 4 GEMMs


@torch.library.custom_op("trapo::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    active_rows: Tensor | None,
    scored_rows: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    logits_dtype: torch.dtype,
    batch_invariant: bool,
    group_name: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, row_max, log_sum) [N]."""
    transform = joined_transform(bias, softcap, row_temperature, temperature)
    rows = dispatch.rows(backend)
    if backend in dispatch.FUSED:
        weight = weight.to(hidden.dtype)
        return tuple(sweep.score_on_chip(rows, hidden, weight, target, active_rows, scored_rows, transform))
    mode = sweep.Mode(logits_dtype, batch_invariant, group_name)
    head = Head(hidden, weight, lora_a, lora_b)
    return tuple(sweep.score(rows, head, target, active_rows, scored_rows, transform, with_entropy, mode))


LinearLogprob = _arguments(linear_logprob)


@linear_logprob.register_fake
def _(hidden, *args):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden)) for _ in range(4))


@torch.library.custom_op("trapo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    active_rows: Tensor | None,
    row_temperature: Tensor | None,
    statistics: list[Tensor],
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype,
    batch_invariant: bool,
    group_name: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, lora_a and lora_b in their dtypes; empty where not needed."""
    grads = sweep.score_backward(
        dispatch.rows(backend),
        Head(hidden, weight, lora_a, lora_b),
        target,
        active_rows,
        joined_transform(bias, softcap, row_temperature, temperature),
        RowStatistics(*statistics),
        grad_logprob,
        grad_entropy,
        Needs(*needs),
        sweep.Mode(logits_dtype, batch_invariant, group_name),
    )
    inputs = (hidden, weight, bias, lora_a, lora_b)
    rounded = (None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
    return _or_empty(Gradients(*rounded), hidden)


LinearLogprobBackward = _arguments(linear_logprob_backward)


@linear_logprob_backward.register_fake
def _(*args):
    given = LinearLogprobBackward(*args)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else given.hidden.new_empty(0)
        for x, need in zip(_head(given), given.needs, strict=True)
    )


def _linear_logprob_setup(ctx, inputs, output):
    given = LinearLogprob(*inputs)
    of_rows = (given.target, given.active_rows, given.row_temperature)
    ctx.save_for_backward(*_head(given), *map(savable, of_rows), *output)
    ctx.transform = (given.temperature, given.softcap)
    ctx.with_entropy, ctx.backend = given.with_entropy, given.backend
    ctx.mode = (given.logits_dtype, given.batch_invariant, given.group_name)
    ctx.set_materialize_grads(False)


def _linear_logprob_backward(ctx, grad_logprob, grad_entropy, *_):
    _refuse_double_backward("linear_logprob")
    _refuse_batched("linear_logprob", grad_logprob, grad_entropy)
    if grad_logprob is None and grad_entropy is None and not ctx.mode[-1]:
        return tuple(LinearLogprob())
    *tensors, logprob, entropy, row_max, log_sum = ctx.saved_tensors
    if ctx.mode[-1]:  # a process group, whose ranks meet once per chunk where the entropy has a gradient: then on all of them
        grad_logprob, grad_entropy = (torch.zeros_like(logprob) if x is None else x for x in (grad_logprob, grad_entropy))
    needs = list(_head(LinearLogprob(*ctx.needs_input_grad)))
    grads = linear_logprob_backward(
        grad_logprob,
        grad_entropy if ctx.with_entropy else None,
        *tensors,
        [logprob, entropy, row_max, log_sum],
        *ctx.transform,
        *ctx.mode,
        needs,
        ctx.backend,
    )
    hidden, weight, bias, lora_a, lora_b = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return tuple(LinearLogprob(hidden, weight, bias, lora_a, lora_b))


linear_logprob.register_autograd(_linear_logprob_backward, setup_context=_linear_logprob_setup)


# linear_policy_loss: gradients come from the forward sweep, 3 GEMMs


@torch.library.custom_op("trapo::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    streams: list[Tensor],
    active_rows: Tensor | None,
    scored_rows: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    codes: list[int],
    parameters: list[float],
    with_entropy_gradient: bool,
    logits_dtype: torch.dtype,
    batch_invariant: bool,
    group_name: str,
    needs: list[bool],
    grad_weight_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprob, entropy, and the gradients in the order and dtypes of `Gradients`, empty where not needed; that of the weight
    in `grad_weight_dtype`, which the caller had from the function of that name."""
    objective = terms.decode(codes, parameters)
    s = terms.unpack(streams)
    stats, grads = sweep.policy(
        dispatch.rows(backend),
        Head(hidden, weight, lora_a, lora_b),
        target,
        s,
        active_rows,
        scored_rows,
        objective,
        joined_transform(bias, softcap, row_temperature, temperature),
        with_entropy_gradient,
        Needs(*needs),
        grad_weight_dtype,
        sweep.Mode(logits_dtype, batch_invariant, group_name),
    )
    return terms.total_loss(stats.logprob, stats.entropy, s, objective), stats.logprob, stats.entropy, *_or_empty(grads, hidden)


LinearPolicyLoss = _arguments(linear_policy_loss)


@linear_policy_loss.register_fake
def _(*args):
    given = LinearPolicyLoss(*args)
    hidden, dtype = given.hidden, statistics_dtype(given.hidden)
    vector = hidden.new_empty(hidden.shape[0], dtype=dtype)
    dtypes = Gradients(hidden.dtype, given.grad_weight_dtype, dtype, dtype, dtype)
    grads = (
        x.new_empty(x.shape, dtype=to) if need else hidden.new_empty(0)
        for x, to, need in zip(_head(given), dtypes, given.needs, strict=True)
    )
    return hidden.new_empty((), dtype=dtype), vector, torch.empty_like(vector), *grads


def _linear_policy_loss_setup(ctx, inputs, output):
    given = LinearPolicyLoss(*inputs)
    ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ctx.needs, ctx.backend = given.needs, given.backend
    ctx.dtypes = [None if x is None else x.dtype for x in _head(given)]
    ctx.save_for_backward(*output[3:])
    ctx.set_materialize_grads(False)


def _linear_policy_loss_backward(ctx, grad_loss, *_):
    _refuse_double_backward("linear_policy_loss")
    _refuse_batched("linear_policy_loss", grad_loss)
    none = LinearPolicyLoss(streams=[None] * terms.NUM_STREAMS)
    if grad_loss is None:
        return tuple(none)
    hidden, weight, bias, lora_a, lora_b = (
        _scaled(grad, grad_loss, dtype, ctx.backend, ctx.hooked) if need else None
        for grad, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    )
    return tuple(none._replace(hidden=hidden, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b))


linear_policy_loss.register_autograd(_linear_policy_loss_backward, setup_context=_linear_policy_loss_setup)


# policy_loss: the same objective on logprobs at hand


@torch.library.custom_op("trapo::policy_loss", mutates_args=())
def policy_loss(
    logprob: Tensor, entropy: Tensor, streams: list[Tensor], codes: list[int], parameters: list[float], backend: str
) -> tuple[Tensor, Tensor]:
    """(loss, dL/dlogprob [N])."""
    s = terms.unpack(streams)
    objective = terms.decode(codes, parameters)
    coefficients = terms.coefficients if backend == "torch" else dispatch.rows(backend).coefficients
    return terms.total_loss(logprob, entropy, s, objective), coefficients(logprob, s, objective)


PolicyLoss = _arguments(policy_loss)


@policy_loss.register_fake
def _(logprob, *args):
    return logprob.new_empty(()), torch.empty_like(logprob)


def _policy_loss_setup(ctx, inputs, output):
    given = PolicyLoss(*inputs)
    ctx.save_for_backward(output[1], given.streams[terms.GRAD_ENTROPY])
    ctx.entropy_dtype = given.entropy.dtype
    ctx.set_materialize_grads(False)


def _policy_loss_backward(ctx, grad_loss, _):
    _refuse_double_backward("policy_loss")
    none = PolicyLoss(streams=[None] * terms.NUM_STREAMS)
    if grad_loss is None:
        return tuple(none)
    grad_logprob, grad_entropy = ctx.saved_tensors
    entropy = (grad_entropy * grad_loss).to(ctx.entropy_dtype)
    return tuple(none._replace(logprob=grad_logprob * grad_loss, entropy=entropy))


policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_setup)


# token_logprob: logits at hand


@torch.library.custom_op("trapo::token_logprob", mutates_args=())
def token_logprob(
    logits: Tensor,
    target: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, row_max, log_sum) [N]; `logits` is left as it is."""
    transform = joined_transform(None, softcap, row_temperature, temperature)
    return tuple(sweep.score_logits(dispatch.rows(backend), logits, target, transform, with_entropy))


TokenLogprob = _arguments(token_logprob)


@token_logprob.register_fake
def _(logits, target, *args):
    return tuple(logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits)) for _ in range(4))


@torch.library.custom_op("trapo::token_logprob_backward", mutates_args=())
def token_logprob_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    row_temperature: Tensor | None,
    statistics: list[Tensor],
    temperature: float,
    softcap: float | None,
    backend: str,
) -> Tensor:
    """dL/dlogits [N, V] in the dtype of logits."""
    transform = joined_transform(None, softcap, row_temperature, temperature)
    stats = RowStatistics(*statistics)
    return sweep.score_logits_backward(dispatch.rows(backend), logits, target, transform, stats, grad_logprob, grad_entropy)


@token_logprob_backward.register_fake
def _(grad_logprob, grad_entropy, logits, *args):
    return logits.new_empty(logits.shape)


def _token_logprob_setup(ctx, inputs, output):
    given = TokenLogprob(*inputs)
    ctx.save_for_backward(given.logits, savable(given.target), savable(given.row_temperature), *output)
    ctx.transform = (given.temperature, given.softcap)
    ctx.with_entropy, ctx.backend = given.with_entropy, given.backend
    ctx.set_materialize_grads(False)


def _token_logprob_backward(ctx, grad_logprob, grad_entropy, *_):
    _refuse_double_backward("token_logprob")
    _refuse_batched("token_logprob", grad_logprob, grad_entropy)
    if grad_logprob is None and grad_entropy is None:
        return tuple(TokenLogprob())
    logits, target, row_temperature, *statistics = ctx.saved_tensors
    grad_entropy = grad_entropy if ctx.with_entropy else None
    grad = token_logprob_backward(
        grad_logprob, grad_entropy, logits, target, row_temperature, statistics, *ctx.transform, ctx.backend
    )
    return tuple(TokenLogprob(logits=grad))


token_logprob.register_autograd(_token_logprob_backward, setup_context=_token_logprob_setup)
