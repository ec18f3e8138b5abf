"""What lies between the head's GEMM and the softmax, and what is kept of a row of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What softmax statistics of `x` are computed and returned in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def savable(x: Tensor | float | None) -> Tensor | float | None:
    """`x`, copied where it was made under torch.inference_mode(), as samplers do: autograd refuses to save such a tensor. While
    compiling it is not seen, and torch.compile raises for it."""
    return x.clone() if isinstance(x, Tensor) and not torch.compiler.is_compiling() and x.is_inference() else x


class LogitTransform(NamedTuple):
    """z = softcap · tanh((x + bias) / softcap) / temperature, for raw logits x [N, V]; every part may be absent."""

    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    temperature: float | Tensor = 1.0  # scalar, or [N] fp32

    def rows(self, index: Tensor | slice) -> LogitTransform:
        """The transform of some rows."""
        return self._replace(temperature=self.temperature[index]) if isinstance(self.temperature, Tensor) else self

    def column(self, like: Tensor) -> float | Tensor:
        """The temperature, broadcastable against [N, V], in the dtype of `like`."""
        return self.temperature.to(like.dtype)[:, None] if isinstance(self.temperature, Tensor) else self.temperature


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """(per-row temperature or None, scalar): the two forms that an op's schema can carry."""
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))


def joined_transform(
    bias: Tensor | None, softcap: float | None, row_temperature: Tensor | None, temperature: float
) -> LogitTransform:
    """The transform with what `split_temperature` took apart."""
    return LogitTransform(bias, softcap, temperature if row_temperature is None else row_temperature)


class RowStatistics(NamedTuple):
    """Per-row results [N] fp32 (fp64 for fp64 logits), nats; zeros on ignored rows.

    logsumexp = row_max + log_sum is kept in two parts: their fp32 sum would lose log_sum's digits on large logits.
    """

    logprob: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor
