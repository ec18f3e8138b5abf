"""The upstream gradient on a gradient: in its place, where a factor of 1 costs nothing, or rounded as it is scaled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trapo_kernels.backends.triton_ops.launch import OPTIONS

# 16 elements per thread. The speed of this tile awaits a GPU.
TILE = OPTIONS | {"BLOCK_N": 4096, "num_warps": 8}
# Eight for each of an H200's 132 multiprocessors: enough to fill it, few enough to start in no time where they return at once.
MAX_PROGRAMS = 1056


# A fixed number of programs that stride over the gradient:
#
#     factor ─▶ in place and 1? ─ yes ─▶ return
#                                └── no ──▶ grad [BLOCK_N] ─▶ out = grad · factor, the next one MAX_PROGRAMS tiles further on
#
# Work: 1 FLOP per element.
# Reads / writes: 4 bytes per program in place where the factor is 1, else every element once in and once out.
# Saved: nothing. On chip: one tile. Order: elementwise, bitwise repeatable. Edges: masked tail; offsets are int64.
@triton.jit
def scale_kernel(grad_ptr, factor_ptr, out_ptr, num_elements, IN_PLACE: tl.constexpr, BLOCK_N: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if (factor != 1.0) | (not IN_PLACE):
        first = tl.program_id(0).to(tl.int64) * BLOCK_N
        for start in range(first, num_elements, tl.num_programs(0) * BLOCK_N):
            element = start + tl.arange(0, BLOCK_N)
            grad = tl.load(grad_ptr + element, mask=element < num_elements).to(tl.float32)  # [BLOCK_N] fp32
            tl.store(out_ptr + element, (grad * factor).to(out_ptr.dtype.element_ty), mask=element < num_elements)


def scale_to(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = grad · factor of dense tensors and a 0-d `factor`, multiplied in fp32 and rounded once; `out` may be `grad`."""
    programs = min(triton.cdiv(max(1, grad.numel()), TILE["BLOCK_N"]), MAX_PROGRAMS)
    with torch.cuda.device_of(grad):  # where Triton launches; nothing on a CPU
        scale_kernel[(programs,)](grad, factor, out, grad.numel(), IN_PLACE=out is grad, **TILE)
