"""Triton row operations of the chunked path, one kernel per file; the same functions as `rows_torch`."""

from trapo_kernels.backends.triton_ops.fused_scoring import fused_scoring
from trapo_kernels.backends.triton_ops.row_gradient import logprob_gradient
from trapo_kernels.backends.triton_ops.row_policy import policy
from trapo_kernels.backends.triton_ops.row_statistics import statistics, statistics_overwrite
from trapo_kernels.backends.triton_ops.scale import scale_to
from trapo_kernels.backends.triton_ops.token_coefficient import coefficients

__all__ = ["coefficients", "fused_scoring", "logprob_gradient", "policy", "scale_to", "statistics", "statistics_overwrite"]
