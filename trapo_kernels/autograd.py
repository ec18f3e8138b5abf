"""One `torch.library` op per direction, with fakes for torch.compile and autograd formulas.

Objectives pass as plain numbers (`terms.encode`), streams as tensors; an absent gradient is returned as an empty tensor, because
an op cannot return None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trapo_kernels import dispatch, terms
from trapo_kernels.backends import sweep
from trapo_kernels.backends.logits import LogitTransform, RowStatistics, statistics_dtype


def _refuse_double_backward(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: double backward is not supported: its gradient is computed by a kernel that is not itself differentiable. "
            'Call backward without create_graph=True, or use backend="reference".'
        )


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream · grad, multiplied in fp32 and rounded to `dtype` in one pass; the upstream gradient stays on its device.

    Where the graph is not retained nobody reads `grad` again: it is handed out itself, untouched if a CPU sees that upstream is 1.
    """
    retained = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    if retained or grad.dtype != dtype:
        return torch.mul(grad, upstream.view([1] * grad.ndim), out=torch.empty_like(grad, dtype=dtype))
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return grad
    return grad.mul_(upstream)


def _or_empty(grads: sweep.Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


# linear_logprob: logits are recomputed in backward, 4 GEMMs


@torch.library.custom_op("trapo::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
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
    transform = LogitTransform(bias, softcap, temperature if row_temperature is None else row_temperature)
    rows = dispatch.rows(backend)
    if backend == "triton_fused":
        return tuple(rows.fused_scoring(hidden, weight, target, transform))
    mode = sweep.Mode(logits_dtype, batch_invariant, group_name)
    return tuple(sweep.score(rows, hidden, weight, target, transform, with_entropy, mode))


@linear_logprob.register_fake
def _(hidden, weight, target, *args):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden)) for _ in range(4))


@torch.library.custom_op("trapo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    statistics: list[Tensor],
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype,
    batch_invariant: bool,
    group_name: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_hidden, grad_weight, grad_bias) in the dtypes of hidden, weight and bias; empty where not needed."""
    grads = sweep.score_backward(
        dispatch.rows(backend),
        hidden,
        weight,
        target,
        LogitTransform(bias, softcap, temperature if row_temperature is None else row_temperature),
        RowStatistics(*statistics),
        grad_logprob,
        grad_entropy,
        sweep.Needs(*needs),
        sweep.Mode(logits_dtype, batch_invariant, group_name),
    )
    grad_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
    grad_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
    return _or_empty(sweep.Gradients(grads.hidden, grad_weight, grad_bias), hidden)


@linear_logprob_backward.register_fake
def _(grad_logprob, grad_entropy, hidden, weight, target, bias, row_temperature, statistics, t, s, d, i, g, needs, backend):
    return tuple(
        torch.empty_like(x) if need else hidden.new_empty(0) for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _linear_logprob_setup(ctx, inputs, output):
    hidden, weight, target, bias, row_temperature, *settings = inputs
    ctx.temperature, ctx.softcap, ctx.with_entropy, *ctx.mode, ctx.backend = settings
    ctx.save_for_backward(hidden, weight, target, bias, row_temperature, *output)
    ctx.set_materialize_grads(False)


def _linear_logprob_backward(ctx, grad_logprob, grad_entropy, *_):
    _refuse_double_backward("linear_logprob")
    hidden, weight, target, bias, row_temperature, *statistics = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if grad_logprob is None and grad_entropy is None:
        return (None,) * 12
    grads = linear_logprob_backward(
        grad_logprob,
        grad_entropy if ctx.with_entropy else None,
        hidden,
        weight,
        target,
        bias,
        row_temperature,
        statistics,
        ctx.temperature,
        ctx.softcap,
        *ctx.mode,
        needs,
        ctx.backend,
    )
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 8


linear_logprob.register_autograd(_linear_logprob_backward, setup_context=_linear_logprob_setup)


# linear_policy_loss: gradients come from the forward sweep, 3 GEMMs


@torch.library.custom_op("trapo::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    streams: list[Tensor],
    active_rows: Tensor | None,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprob, entropy, grad_hidden, grad_weight, grad_bias); the last two in fp32 (fp64), empty where not needed."""
    objective = terms.decode(codes, parameters)
    s = terms.unpack(streams)
    stats, grads = sweep.policy(
        dispatch.rows(backend),
        hidden,
        weight,
        target,
        s,
        active_rows,
        objective,
        LogitTransform(bias, softcap, temperature if row_temperature is None else row_temperature),
        with_entropy_gradient,
        sweep.Needs(*needs),
        sweep.Mode(logits_dtype, batch_invariant, group_name),
    )
    c = terms.coefficients(stats.logprob, s, objective)
    return terms.total_loss(c, s, stats.entropy), stats.logprob, stats.entropy, *_or_empty(grads, hidden)


@linear_policy_loss.register_fake
def _(hidden, weight, bias, target, streams, active_rows, r, t, s, codes, parameters, e, d, i, g, needs, backend):
    dtype = statistics_dtype(hidden)
    vector = hidden.new_empty(hidden.shape[0], dtype=dtype)
    grad_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=dtype) if needs[1] else hidden.new_empty(0)
    grad_bias = bias.new_empty(bias.shape, dtype=dtype) if needs[2] else hidden.new_empty(0)
    return hidden.new_empty((), dtype=dtype), vector, torch.empty_like(vector), grad_hidden, grad_weight, grad_bias


def _linear_policy_loss_setup(ctx, inputs, output):
    hidden, weight, bias = inputs[:3]
    ctx.needs, ctx.dtypes = inputs[-2], (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.save_for_backward(*output[3:])
    ctx.set_materialize_grads(False)


def _linear_policy_loss_backward(ctx, grad_loss, *_):
    _refuse_double_backward("linear_policy_loss")
    grads = [None, None, None]
    if grad_loss is not None:
        for i, (grad, need, dtype) in enumerate(zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)):
            grads[i] = _scaled(grad, grad_loss, dtype) if need else None
    return (*grads, None, [None] * terms.NUM_STREAMS, *(None,) * 12)


linear_policy_loss.register_autograd(_linear_policy_loss_backward, setup_context=_linear_policy_loss_setup)


# policy_loss: the same objective on logprobs at hand


@torch.library.custom_op("trapo::policy_loss", mutates_args=())
def policy_loss(
    logprob: Tensor, entropy: Tensor, streams: list[Tensor], codes: list[int], parameters: list[float], backend: str
) -> tuple[Tensor, Tensor]:
    """(loss, dL/dlogprob [N])."""
    s = terms.unpack(streams)
    objective = terms.decode(codes, parameters)
    c = terms.coefficients(logprob, s, objective)
    grad_logprob = c.grad_logprob if backend == "torch" else dispatch.rows(backend).coefficients(logprob, s, objective)
    return terms.total_loss(c, s, entropy), grad_logprob


@policy_loss.register_fake
def _(logprob, entropy, streams, codes, parameters, backend):
    return logprob.new_empty(()), torch.empty_like(logprob)


def _policy_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2][terms.GRAD_ENTROPY])
    ctx.entropy_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


def _policy_loss_backward(ctx, grad_loss, _):
    _refuse_double_backward("policy_loss")
    if grad_loss is None:
        return None, None, [None] * terms.NUM_STREAMS, None, None, None
    grad_logprob, grad_entropy = ctx.saved_tensors
    return (
        grad_logprob * grad_loss,
        (grad_entropy * grad_loss).to(ctx.entropy_dtype),
        [None] * terms.NUM_STREAMS,
        None,
        None,
        None,
    )


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
    transform = LogitTransform(None, softcap, temperature if row_temperature is None else row_temperature)
    return tuple(sweep.score_logits(dispatch.rows(backend), logits, target, transform, with_entropy))


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
    transform = LogitTransform(None, softcap, temperature if row_temperature is None else row_temperature)
    stats = RowStatistics(*statistics)
    return sweep.score_logits_backward(dispatch.rows(backend), logits, target, transform, stats, grad_logprob, grad_entropy)


@token_logprob_backward.register_fake
def _(grad_logprob, grad_entropy, logits, *args):
    return logits.new_empty(logits.shape)


def _token_logprob_setup(ctx, inputs, output):
    logits, target, row_temperature, ctx.temperature, ctx.softcap, ctx.with_entropy, ctx.backend = inputs
    ctx.save_for_backward(logits, target, row_temperature, *output)
    ctx.set_materialize_grads(False)


def _token_logprob_backward(ctx, grad_logprob, grad_entropy, *_):
    _refuse_double_backward("token_logprob")
    if grad_logprob is None and grad_entropy is None:
        return (None,) * 7
    logits, target, row_temperature, *statistics = ctx.saved_tensors
    grad_entropy = grad_entropy if ctx.with_entropy else None
    grad = token_logprob_backward(
        grad_logprob,
        grad_entropy,
        logits,
        target,
        row_temperature,
        statistics,
        ctx.temperature,
        ctx.softcap,
        ctx.backend,
    )
    return grad, None, None, None, None, None, None


token_logprob.register_autograd(_token_logprob_backward, setup_context=_token_logprob_setup)
