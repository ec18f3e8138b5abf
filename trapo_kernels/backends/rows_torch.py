"""Row operations of the chunked path in plain PyTorch, for any device: what one launch of the Triton kernels does.

A chunk of logits [C, V] is overwritten in place. Rows with target -100 or role IGNORED give zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trapo_kernels import terms
from trapo_kernels.backends.logits import LogitTransform, RowStatistics
from trapo_kernels.objective import Objective
from trapo_kernels.roles import IGNORE_INDEX, Role

_FLOOR = -1e30  # stands for -inf after the row maximum is subtracted: exp is exactly 0, and 0 · _FLOOR is 0 instead of NaN


def statistics_overwrite(logits: Tensor) -> bool:
    """Whether `statistics` destroys these logits."""
    return True


def statistics(logits: Tensor, target: Tensor, transform: LogitTransform, with_entropy: bool) -> RowStatistics:
    """logprob, entropy, row_max and log_sum of every row; destroys `logits`."""
    return _statistics(*_centre(logits, transform)[:2], target, with_entropy)[0]


def logprob_gradient(
    logits: Tensor,
    target: Tensor,
    transform: LogitTransform,
    stats: RowStatistics,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_dtype: torch.dtype,
) -> Tensor:
    """dL/dlogits [C, V] from the gradients of logprob and entropy [C]; destroys `logits`."""
    centred, _, slope = _centre(logits, transform, stats.row_max)
    probability = torch.exp(centred - stats.log_sum[:, None])
    c = torch.zeros_like(stats.logprob) if grad_logprob is None else grad_logprob
    grad = _gradient(centred, probability, target, stats, c, grad_entropy)
    return _undo_transform(grad, transform, slope, target != IGNORE_INDEX).to(grad_dtype)


def policy(
    logits: Tensor,
    target: Tensor,
    transform: LogitTransform,
    streams: terms.Streams,
    objective: Objective,
    with_entropy_gradient: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[RowStatistics, Tensor | None]:
    """Statistics and, unless `grad_dtype` is None, dL/dlogits [C, V] of a policy loss in one go; destroys `logits`."""
    centred, row_max, slope = _centre(logits, transform)
    stats, exponential, total = _statistics(centred, row_max, target, with_entropy=True)
    if grad_dtype is None:
        return stats, None
    c = terms.coefficients(stats.logprob, streams, objective)
    probability = exponential.div_(total[:, None])
    grad = _gradient(centred, probability, target, stats, c, streams.grad_entropy if with_entropy_gradient else None)
    return stats, _undo_transform(grad, transform, slope, streams.role != Role.IGNORED).to(grad_dtype)


def _centre(logits: Tensor, transform: LogitTransform, row_max: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """z - row_max in fp32 or fp64 (in place where `logits` has that dtype), row_max, and dz/dx of the softcap."""
    z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    slope = None
    if transform.bias is not None:
        z.add_(transform.bias)
    if transform.softcap is not None:
        z.div_(transform.softcap).tanh_()
        slope = 1.0 - z * z
        z.mul_(transform.softcap)
    z.div_(transform.column(z))
    row_max = z.amax(-1).clamp(min=_FLOOR) if row_max is None else row_max
    return z.sub_(row_max[:, None]).clamp_(min=_FLOOR), row_max, slope


def _statistics(centred: Tensor, row_max: Tensor, target: Tensor, with_entropy: bool) -> tuple[RowStatistics, Tensor, Tensor]:
    """The statistics, exp(centred) [C, V] and its row sums [C]."""
    ignored = target == IGNORE_INDEX
    index = torch.where(ignored, 0, target).clamp(0, centred.shape[1] - 1)[:, None]
    # A target outside the vocabulary reaches this line on a GPU only (see checks.target); it makes its row NaN.
    shifted_target = centred.gather(1, index)[:, 0]
    shifted_target = torch.where(ignored | (target == index[:, 0]), shifted_target, float("nan"))
    shifted_target = torch.where(shifted_target == _FLOOR, float("-inf"), shifted_target)
    exponential = centred.exp()
    total = exponential.sum(-1)
    others = total - exponential.gather(1, index)[:, 0]
    if _some_peaked(total):  # chosen row by row, so that a row's bits do not depend on its neighbours
        others = torch.where(total < 1.5, exponential.scatter(1, index, 0.0).sum(-1), others)
    # p → 1: log(1 + others) keeps the digits of `others` that 1 + others has lost.
    log_sum = torch.where(shifted_target == 0, torch.log1p(others), total.log())
    logprob = shifted_target - log_sum
    entropy = torch.zeros_like(logprob)
    if with_entropy:
        entropy = log_sum - (exponential * centred).sum(-1) / total
    stats = RowStatistics(logprob, entropy, row_max, log_sum)
    return RowStatistics(*(torch.where(ignored, 0.0, value) for value in stats)), exponential, total


def _some_peaked(total: Tensor) -> bool:
    """Whether some row needs its mass outside the target summed apart; on a GPU always, to keep the host out of it."""
    return total.device.type != "cpu" or bool((total < 1.5).any())


def _gradient(centred: Tensor, probability: Tensor, target: Tensor, stats: RowStatistics, c: Tensor, e: Tensor | None) -> Tensor:
    """dL/dz = c (1[v = target] - p) - e p (log p + H), written over `probability`; `centred` is overwritten too."""
    at_target = -c * torch.expm1(stats.logprob)  # c (1 - p) without cancellation at p → 1
    if e is None:
        grad = probability.mul_(-c[:, None])
    else:
        bracket = centred.mul_(e[:, None]).add_((c + e * (stats.entropy - stats.log_sum))[:, None])
        grad = probability.mul_(bracket).neg_()
        probability_target = stats.logprob.exp()
        tail = probability_target * e * (stats.logprob + stats.entropy)
        at_target = at_target - torch.where(probability_target == 0, 0.0, tail)
    index = target.clamp(0, grad.shape[1] - 1)[:, None]
    # A target of -1 lies on another rank's shard of the vocabulary: no column of this one is special.
    at_target = torch.where(target < 0, grad.gather(1, index)[:, 0], at_target)
    return grad.scatter_(1, index, at_target[:, None])


def _undo_transform(grad: Tensor, transform: LogitTransform, slope: Tensor | None, counted: Tensor) -> Tensor:
    """Through temperature and softcap back to the raw logits; ignored rows become zero whatever they hold."""
    grad.div_(transform.column(grad))
    if slope is not None:
        grad.mul_(slope)
    if grad.device.type != "cpu" or not bool(counted.all()):
        grad.masked_fill_(~counted[:, None], 0.0)
    return grad
