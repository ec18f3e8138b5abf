"""A head's inputs, checked and in the autocast dtype, and the settings of a call, as the public functions take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor

from trapo_kernels import checks, dispatch
from trapo_kernels.backends.gemm import grad_weight_dtype, operand_dtype
from trapo_kernels.backends.logits import split_temperature, statistics_dtype
from trapo_kernels.dispatch import ScoringBackend
from trapo_kernels.lora import LoraHead

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LogitOptions(TypedDict, total=False):
    """Options of every public function that takes or computes logits."""

    temperature: float | Tensor
    softcap: float | None


class HeadOptions(LogitOptions, total=False):
    """What the public functions on hidden states have in common."""

    bias: Tensor | None
    lora: LoraHead | None
    logits_dtype: torch.dtype
    process_group: ProcessGroup | None
    batch_invariant: bool


class ScoringOptions(HeadOptions, total=False):
    """Further options of `linear_logprob`; `with_entropy`, which decides what it returns, is its overloads'."""

    active_rows: Tensor | None
    backend: ScoringBackend


class Inputs(NamedTuple):
    """A head's checked inputs, in the autocast dtype where autocast is on; lora_a with its scaling, in fp32 (fp64)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class Settings(NamedTuple):
    """How a head is evaluated, as the public functions take it."""

    temperature: float | Tensor
    softcap: float | None
    logits_dtype: torch.dtype
    process_group: ProcessGroup | None
    batch_invariant: bool
    backend: str

    def check(self, where: str, hidden: Tensor, target: Tensor) -> None:
        """Raise for a setting that breaks a rule; `target` [N] is -100 on rows that are not read."""
        checks.temperature(where, self.temperature, target)
        checks.softcap(where, self.softcap)
        checks.logits_dtype(where, self.logits_dtype, hidden)
        checks.mode(where, self.process_group, self.batch_invariant, self.backend)

    def choose(self, where: str, inputs: Inputs, *rows: Tensor | None) -> str:
        """The backend that scores: all rows, or those in the first of `rows` and, where there are any, in the others."""
        num_rows = inputs.hidden.shape[0] if rows[0] is None else sum(len(index) for index in rows if index is not None)
        rank = 0 if inputs.lora_a is None else inputs.lora_a.shape[0]
        kernel = (inputs.bias is not None, self.softcap, rank, self.logits_dtype)
        mode = (self.process_group is not None, self.batch_invariant)
        scoring = dispatch.Scoring(num_rows, *inputs.weight.shape[::-1], *kernel, *mode)
        return dispatch.choose(where, self.backend, inputs.hidden.device, inputs.hidden.dtype, scoring)

    def grad_weight_dtype(self, num_rows: int, inputs: Inputs) -> torch.dtype:
        """What the single pass over so many rows holds dWeight in, from forward until backward."""
        weight, device_type = inputs.weight, inputs.hidden.device.type
        what = (*weight.shape[::-1], weight.dtype, operand_dtype(inputs.hidden.dtype, device_type), device_type)
        return grad_weight_dtype(num_rows, *what, self.batch_invariant, self.process_group is not None)

    def of_op(self) -> dict[str, object]:
        """What the ops of a head take of these by name: plain values and tensors."""
        row_temperature, temperature = split_temperature(self.temperature)
        return {
            "row_temperature": row_temperature,
            "temperature": temperature,
            "softcap": self.softcap,
            "logits_dtype": self.logits_dtype,
            "batch_invariant": self.batch_invariant,
            "group_name": "" if self.process_group is None else self.process_group.group_name,
        }


def per_row(temperature: float | Tensor, num_rows: int) -> float | Tensor:
    """A 0-d tensor stands for all rows."""
    zero_d = isinstance(temperature, Tensor) and temperature.ndim == 0
    return temperature.expand(num_rows).contiguous() if zero_d else temperature


def prepared(where: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraHead | None, backend: str) -> Inputs:
    """The inputs as the op takes them; raises for what breaks a rule."""
    dispatch.check_name(where, backend)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    checks.head(where, hidden, weight, bias)
    if lora is None:
        return Inputs(hidden, weight, bias, None, None)
    checks.is_a(where, "lora", lora, LoraHead, "LoraHead(a, b, scaling)")
    lora = lora.autocast(hidden.dtype) if _autocasts(hidden.device.type) else lora
    checks.lora_fits(where, lora.a, lora.b, hidden, weight)
    return Inputs(hidden, weight, bias, lora.scaled_a(statistics_dtype(hidden)), lora.b)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to the autocast dtype where autocast is on, as torch.nn.functional.linear does.

    A float32 weight is left to the op, which computes in the dtype of hidden and returns the weight's gradient in float32.
    """
    device_type = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if not _autocasts(device_type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(x: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype in dtypes else x

    low = (torch.bfloat16, torch.float16)
    return cast(hidden, torch.float32, *low), cast(weight, *low), cast(bias, torch.float32, *low)


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
