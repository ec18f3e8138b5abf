"""dL/dlogp for logprobs at hand: the coefficient of the row kernel, alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trapo_kernels import terms
from trapo_kernels.backends.triton_ops.gates import coefficient, gate_arguments
from trapo_kernels.backends.triton_ops.launch import OPTIONS
from trapo_kernels.objective import Objective

TILE = OPTIONS | {"BLOCK_N": 256}


# One program per BLOCK_N tokens:
#
#     logprob, role, anchor, signal, advantage (, kl_weight, ref) [BLOCK_N] ─▶ c = dL/dlogp [BLOCK_N]
#
# Work: some 20 FLOP per token. Reads / writes: 17 (25 with KL) bytes in, 4 out per token. Saved: nothing.
# On chip: registers only. Order: elementwise, bitwise repeatable. Edges: masked tail; IGNORED tokens give exactly 0.
@triton.jit(do_not_specialize=["num_tokens"])  # which varies from call to call
def token_coefficient_kernel(
    logprob_ptr, coefficient_ptr, num_tokens,
    role_ptr, anchor_ptr, signal_ptr, advantage_ptr, kl_weight_ptr, ref_logprob_ptr,
    e0, e1, e2, r0, r1, r2, k0, k1,
    EXPERT_GATE: tl.constexpr, ROLLOUT_GATE: tl.constexpr, KL_CODE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < num_tokens
    role = tl.load(role_ptr + token, mask=inside, other=0)
    counted = inside & (role != 0)
    kl_weight, ref_logprob = 0.0, 0.0
    if KL_CODE > 0:
        kl_weight = tl.load(kl_weight_ptr + token, mask=counted, other=0.0)
        ref_logprob = tl.load(ref_logprob_ptr + token, mask=counted, other=0.0)
    c = coefficient(
        tl.load(logprob_ptr + token, mask=counted, other=0.0), role,
        tl.load(anchor_ptr + token, mask=counted, other=0.0), tl.load(signal_ptr + token, mask=counted, other=0.0),
        tl.load(advantage_ptr + token, mask=counted, other=0.0), kl_weight, ref_logprob,
        e0, e1, e2, r0, r1, r2, k0, k1, EXPERT_GATE, ROLLOUT_GATE, KL_CODE,
    )  # fmt: skip
    tl.store(coefficient_ptr + token, tl.where(counted, c, 0.0), mask=inside)


def coefficients(logprob: Tensor, streams: terms.Streams, objective: Objective) -> Tensor:
    """dL/dlogp [N] fp32 of every token; exact zeros for IGNORED ones."""
    out = torch.empty_like(logprob)
    unused = streams.anchor
    with torch.cuda.device_of(logprob):  # where Triton launches; nothing on a CPU
        token_coefficient_kernel[(triton.cdiv(max(1, logprob.shape[0]), TILE["BLOCK_N"]),)](
            logprob.contiguous(), out, logprob.shape[0],
            streams.role, streams.anchor, streams.signal, streams.advantage,
            unused if streams.kl_weight is None else streams.kl_weight,
            unused if streams.ref_logprob is None else streams.ref_logprob,
            **gate_arguments(objective), **TILE,
        )  # fmt: skip
    return out
