"""What torch.utils.flop_counter counts of our ops: the GEMMs with the weight, all rows taking part."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from trapo_kernels.autograd import LinearLogprobBackward, LinearPolicyLoss


def _gemm_flop(hidden: torch.Size, weight: torch.Size) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


# Tensors arrive as their shapes.


@register_flop_formula(torch.ops.trapo.linear_logprob)
def _(hidden, weight, *args, **kwargs) -> int:
    return _gemm_flop(hidden, weight)


@register_flop_formula(torch.ops.trapo.linear_logprob_backward)
def _(*args, out_shape) -> int:
    given = LinearLogprobBackward(*args)
    return _gemm_flop(given.hidden, given.weight) * (1 + sum(given.needs[:2]))  # logits, and what hidden and weight need


@register_flop_formula(torch.ops.trapo.linear_policy_loss)
def _(*args, out_shape) -> int:
    given = LinearPolicyLoss(*args)
    return _gemm_flop(given.hidden, given.weight) * (1 + sum(given.needs[:2]))
