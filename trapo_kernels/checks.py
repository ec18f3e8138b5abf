"""Input rules and error sentences of the kernels, each once: rule, actual value, remedy. A batch's are in `batch_checks`."""

from __future__ import annotations

import math
import numbers
import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trapo_kernels.fsdp import is_dtensor
from trapo_kernels.roles import IGNORE_INDEX, Role

if TYPE_CHECKING:
    from trapo_kernels.batch import TokenBatch
    from trapo_kernels.weights import LossTotals

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # what the softmax computes in


def one_of(where: str, name: str, value: object, allowed: tuple) -> None:
    """`value` must be one of `allowed`."""
    if isinstance(value, Tensor) or value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.{_as_number(value)}")


def finite(where: str, name: str, value: float) -> None:
    """`value` must be a number that is finite in float32."""
    if not (_is_number(value) and -_MOST <= value <= _MOST):  # math.isfinite would stop torch.compile
        raise ValueError(f"{where}: {name} must be a finite number in float32, got {value!r}.{_as_number(value)}")


def _is_number(value: object) -> bool:
    """Whether `value` is an int or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_number(value: object) -> str:
    """The remedy for a number of another library, such as numpy's float32 or a tensor of one."""
    foreign = isinstance(value, numbers.Real) and not isinstance(value, int | float)
    return " Pass float(...) of it." if foreign or (isinstance(value, Tensor) and value.numel() == 1) else ""


def in_range(
    where: str, name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """`value` must lie in [low, high], without an end that is open; never NaN. In float32 what is finite must stay so, and what is
    above an open 0 must have a finite reciprocal."""
    inside = _is_number(value) and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside or _MOST < value < math.inf or (open_low and low == 0 and value < _LEAST):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}{' in float32' if inside else ''}"
        raise ValueError(f"{where}: {name} must lie in {interval}, got {value!r}.{_as_number(value)}")


def may_look(x: Tensor) -> bool:
    """Whether the values of `x` can be looked at without waiting for a GPU: not while compiling, and not of a fake tensor."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


NO_COUNT = "A normaliser n that is no such count goes into the weight: TokenBatch(..., weight=mask / n)."
_WHOLE_HEAD = (
    "Call inside the forward of the FSDP unit that has it; or pass trapo_kernels.unsharded(...) of it, whose gradient averages as "
    "FSDP does; or .to_local() of vocabulary shards, with process_group=mesh.get_group(), where all its ranks pass the same rows "
    "(tensor parallel, not FSDP)."
)
_WHOLE_HIDDEN = "Pass hidden.full_tensor()."


def whole(where: str, name: str, value: object, remedy: str = "Pass .full_tensor() of it.") -> None:
    """`value` must not be a shard of a distributed tensor."""
    if is_dtensor(value):
        raise TypeError(f"{where}: {name} must be a plain tensor, got a DTensor. {remedy}")


def finite_tensor(where: str, name: str, value: Tensor, remedy: str) -> None:
    """`value` [N] must hold finite numbers; looked at on the CPU only, where it costs no sync."""
    if not may_look(value) or bool((finite := value.isfinite()).all()):
        return
    row = int((~finite).nonzero()[0])
    raise ValueError(f"{where}: {name} must be finite, got {float(value[row])} at row {row}. {remedy}")


def vector(where: str, name: str, value: Tensor, length: int, device: torch.device, dtypes: tuple) -> None:
    """`value` must be a tensor of shape [N] on `device` with one of `dtypes`."""
    if not isinstance(value, Tensor):
        remedy = "Pass one value per token." if value is None else "Pass torch.as_tensor(...) of it."
        raise TypeError(f"{where}: {name} must be a tensor of shape [N] = [{length}], got {type(value).__name__}. {remedy}")
    whole(where, name, value)
    if tuple(value.shape) != (length,):
        raise ValueError(
            f"{where}: {name} must have shape [N] = [{length}], got {list(value.shape)}. "
            f"Flatten a [batch, sequence] tensor with {name}.reshape(-1); repeat what is one per sequence for each of its tokens."
        )
    if value.dtype not in dtypes:
        names, remedy = " or ".join(str(dtype) for dtype in dtypes), f"Convert it with {name}.to({dtypes[0]})."
        if where == "TokenBatch" and value.dtype in (torch.bfloat16, torch.float16):  # and rounded already
            remedy = (
                "If FSDP's mixed precision cast it, set cast_forward_inputs=False in MixedPrecisionPolicy; otherwise pass "
                f"{name}.float()."
            )
        if name == "role" and value.dtype == torch.bool:
            remedy = "Say what its tokens are: torch.where(role, Role.EXPERT, Role.IGNORED).to(torch.uint8), or Role.ROLLOUT."
        raise TypeError(f"{where}: {name} must be {names}, got {value.dtype}. {remedy}")
    if value.device != device:
        raise ValueError(f"{where}: {name} must be on {device}, got {value.device}. Move it with {name}.to({str(device)!r}).")


def roles(where: str, role: Tensor) -> None:
    """role [N] uint8, `Role` values where they can be looked at."""
    is_a(where, "role", role, Tensor, "the roles of N tokens")
    vector(where, "role", role, role.numel(), role.device, (torch.uint8,))
    role_values(where, role)


def role_values(where: str, role: Tensor) -> None:
    """A uint8 `role` must hold `Role` values; looked at on the CPU only."""
    if may_look(role) and role.numel() and int(role.max()) > Role.EXPERT:
        raise ValueError(
            f"{where}: role must be Role.IGNORED, ROLLOUT or EXPERT (0, 1, 2), got {int(role.max())}. "
            "Map labels of your own to these."
        )


def label(where: str, name: str, value: Tensor, role: Tensor) -> None:
    """`value` [N] int64, one label per token of role [N]."""
    vector(where, name, value, len(role), role.device, (torch.int64,))


def aggregation(
    role: Tensor,
    labels: dict[str, Tensor | None],
    mode: str,
    divisors: tuple[str, ...],
    max_tokens: object,
    share: Tensor | None,
) -> None:
    """What `aggregate` takes: tensors of one length, and what its mode needs; `labels` are the ids of what is counted."""
    where = "aggregate"
    roles(where, role)
    for count, value in labels.items():
        what = count.removesuffix("s")
        if value is not None:
            label(where, f"{what}_id", value, role)
        elif count in divisors:
            raise ValueError(f'{where}: mode "{mode}" needs {what}_id [N] int64, got None. Pass the {what} of every token.')
    if share is not None:
        vector(where, "share", share, len(role), role.device, (torch.float32, torch.float64))
    if mode in ("constant", "length") and (whole_number(max_tokens) or 0) <= 0:
        raise ValueError(f'{where}: mode "{mode}" needs an integer max_tokens > 0, got {max_tokens!r}. Pass the longest response.')


def totals(value: object, here: LossTotals, divisors: tuple[str, ...]) -> None:
    """The totals of an optimizer step, which contain those `here`, of one call; `divisors` are the counts that matter."""
    where = "aggregate"
    is_a(where, "totals", value, type(here), "sum(parts, LossTotals()) of the loss_totals(...) of all micro-batches and ranks")
    for name in divisors:
        if getattr(value, name) < getattr(here, name):
            raise ValueError(
                f"{where}: totals must count all micro-batches and ranks, this call included, got {name} = "
                f"{getattr(value, name)} where this call has {getattr(here, name)}. Add up their loss_totals(role, sequence_id, "
                f"prompt_id). {NO_COUNT}"
            )


def whole_number(value: object) -> int | None:
    """A whole number of any kind, numpy's and 0-d tensors among them, as an int; None for anything else."""
    try:
        return value if value is None or isinstance(value, int) else operator.index(value)  # of which Dynamo makes a constant
    except TypeError:
        return None


def size(where: str, name: str, value: object) -> None:
    """A number of rows or columns: a whole number of any kind, ≥ 1."""
    if (whole_number(value) or 0) < 1:
        remedy = " Round up to whole rows." if isinstance(value, float) else ""
        raise ValueError(f"{where}: {name} must be an integer ≥ 1, got {value!r}.{remedy}")


def head(where: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden [N, D], weight [V, D], bias [V]: floating point, one dtype, one device."""
    for name, value in (("hidden", hidden), ("lm_head_weight", weight)):
        shape = "[N, D]" if name == "hidden" else "[V, D]"
        if not isinstance(value, Tensor):
            remedy = "Pass its .weight." if isinstance(value, torch.nn.Module) else "Pass torch.as_tensor(...) of it."
            raise TypeError(f"{where}: {name} must be a tensor of shape {shape}, got {type(value).__name__}. {remedy}")
        whole(where, name, value, _WHOLE_HIDDEN if name == "hidden" else _WHOLE_HEAD)
        if value.ndim != 2:
            flatten = "Flatten batch and sequence with hidden.reshape(-1, hidden.shape[-1])."
            gather = "Pass torch.nn.Linear(D, V).weight; one that ZeRO-3 or FSDP1 has partitioned must be gathered around the call "
            remedy = flatten if name == "hidden" else f"{gather}and its backward."
            raise ValueError(f"{where}: {name} must have shape {shape}, got {list(value.shape)}. {remedy}")
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{where}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}. Dequantise what is quantised."
            )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{where}: hidden [N, D] and lm_head_weight [V, D] must agree in D, got {hidden.shape[1]} and {weight.shape[1]}. "
            "The weight holds one row per token id, as in torch.nn.Linear(D, V).weight."
        )
    if not _stands_beside(weight, hidden):
        raise TypeError(
            f"{where}: lm_head_weight must have the dtype of hidden, or be float32 (master weights) beside bfloat16 or float16 "
            f"hidden states, got hidden {hidden.dtype} and lm_head_weight {weight.dtype}. Cast one of them."
        )
    if hidden.device != weight.device:
        remedy = "Move one of them with .to(...)."
        if weight.device.type == "meta":  # as accelerate leaves it
            remedy = "It is offloaded: call inside the forward whose hook loads it, or keep lm_head out of the offload."
        raise ValueError(
            f"{where}: hidden and lm_head_weight must be on one device, got {hidden.device} and {weight.device}. {remedy}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"{where}: lm_head_weight [V, D] must not be empty, got {list(weight.shape)}. "
            "Call where the weight is whole: ZeRO-3 and FSDP leave an empty one elsewhere."
        )
    if bias is not None:
        whole(where, "bias", bias, _WHOLE_HEAD)
        if not isinstance(bias, Tensor) or tuple(bias.shape) != (weight.shape[0],):
            actual = list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
            raise ValueError(
                f"{where}: bias must have shape [V] = [{weight.shape[0]}], one value per row of lm_head_weight, got {actual}. "
                "Pass torch.nn.Linear.bias of the same head."
            )
        vector(where, "bias", bias, weight.shape[0], hidden.device, FLOAT_DTYPES)


def _stands_beside(weight: Tensor, hidden: Tensor) -> bool:
    return weight.dtype == hidden.dtype or (weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16))


def lora_factors(a: object, b: object, scaling: object) -> None:
    """a [R, D] and b [V, R] of one LoRA."""
    where = "LoraHead"
    for name, value, shape in (("a", a, "[R, D]"), ("b", b, "[V, R]")):
        whole(where, name, value, _WHOLE_HEAD)
        if not isinstance(value, Tensor) or value.ndim != 2:
            actual = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{where}: {name} must be a tensor of shape {shape}, got {actual}. Pass PEFT's lora_{name.upper()}.weight."
            )
    if a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{where}: a [R, D] and b [V, R] must agree in R, got {a.shape[0]} and {b.shape[1]}. Pass one adapter's pair."
        )
    finite(where, "scaling", scaling)


def lora_fits(where: str, a: Tensor, b: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """The LoRA must have the D, V, dtype and device of the head; float32 factors may stand beside 16-bit hidden states."""
    if a.shape[1] != hidden.shape[1] or b.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{where}: lora.a [R, D] and lora.b [V, R] must have D = {hidden.shape[1]} and V = {weight.shape[0]} of the head, got "
            f"{list(a.shape)} and {list(b.shape)}. Pass the adapter of the same head."
        )
    for name, value in (("lora.a", a), ("lora.b", b)):
        if not _stands_beside(value, hidden) or value.device != hidden.device:
            raise TypeError(
                f"{where}: {name} must be {hidden.dtype} on {hidden.device} as hidden is, or float32 beside 16-bit hidden states, "
                f"got {value.dtype} on {value.device}. Convert it with {name}.to(hidden)."
            )


def target(where: str, value: Tensor, num_rows: int, vocab_size: int | None, device: torch.device) -> None:
    """target [N] int64 in [0, V), or -100 for a row to ignore. The range is checked on the CPU only (no sync): on a GPU a target
    outside it gives that row a NaN logprob. Where V is the sum over the ranks of a process group (None here),
    `rank_checks.shared_target` has it."""
    vector(where, "target", value, num_rows, device, (torch.int64,))
    if vocab_size is None or not may_look(value) or value.numel() == 0:
        return
    low, high = int(value.min()), int(value.max())
    bad = (value < 0) & (value != IGNORE_INDEX) | (value >= vocab_size)
    if (low < 0 or high >= vocab_size) and bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}: target must lie in [0, V) = [0, {vocab_size}), or be -100 to ignore a row, got {int(value[row])} at row "
            f"{row}. Check that the tokenizer and the head have the same vocabulary."
        )


def described(rows: object) -> str:
    """What `rows` is, which should have been indices."""
    return f"{rows.dtype} {list(rows.shape)} on {rows.device}" if isinstance(rows, Tensor) else type(rows).__name__


def active_rows(where: str, rows: Tensor, target: Tensor) -> None:
    """rows [K] int64, ascending, each with a target; what they hold is looked at on the CPU only."""
    remedy = "Pass (target != -100).nonzero().squeeze(1), found while the targets are on the CPU."
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype != torch.int64 or rows.device != target.device:
        raise ValueError(f"{where}: active_rows must be int64 of shape [K] on {target.device}, got {described(rows)}. {remedy}")
    if not may_look(rows) or len(rows) == 0:
        return
    if int(rows.min()) < 0 or int(rows.max()) >= len(target) or bool((rows.diff() <= 0).any()):
        some = f"{rows[:8].tolist()}{'…' if len(rows) > 8 else ''}"
        raise ValueError(f"{where}: active_rows must ascend in [0, N) = [0, {len(target)}), got {some}. {remedy}")
    if bool((without := target[rows] == IGNORE_INDEX).any()):
        raise ValueError(f"{where}: active_rows must have targets, got -100 at row {int(rows[without][0])}. {remedy}")


def temperature(where: str, value: float | Tensor, target: Tensor) -> None:
    """A positive float, or a positive [N] fp32 tensor that needs no gradient, whatever it holds where target [N] is -100."""
    num_rows, device = target.shape[0], target.device
    if isinstance(value, Tensor):
        vector(where, "temperature", value, num_rows, device, (torch.float32, torch.float64))
        if value.requires_grad:
            raise ValueError(
                f"{where}: temperature carries no gradient, got a tensor that requires one. Pass temperature.detach()."
            )
        if may_look(value) and bool((wrong := ~((value >= _LEAST) & (value <= _MOST) | (target == IGNORE_INDEX))).any()):
            actual = float(value[wrong][0])
            raise ValueError(
                f"{where}: temperature must be finite and > 0 in float32, got {actual}. For greedy sampling score at 1.0."
            )
    elif not _is_number(value) or not _LEAST <= value <= _MOST:
        remedy = _as_number(value) or " For greedy sampling score at 1.0."
        raise ValueError(f"{where}: temperature must be a finite number > 0 in float32, got {value!r}.{remedy}")


def softcap(where: str, value: float | None) -> None:
    """None, or a finite positive number."""
    if value is not None and not (_is_number(value) and _LEAST <= value <= _MOST):
        remedy = _as_number(value) or " Pass None for no cap."
        raise ValueError(f"{where}: softcap must be None or a finite number > 0 in float32, got {value!r}.{remedy}")


def logits_dtype(where: str, value: torch.dtype, hidden: Tensor) -> None:
    """The dtype that logits are rounded to: float32, or that of the hidden states."""
    if value not in (torch.float32, hidden.dtype):
        raise TypeError(
            f"{where}: logits_dtype must be torch.float32 or the dtype of hidden ({hidden.dtype}), got {value}. "
            "Pass the dtype that the sampler has its logits in, or leave it out."
        )


def yes_or_no(where: str, name: str, value: object) -> None:
    """`value` must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {value!r}. Pass bool(...) of it.")


def mode(where: str, process_group: object, batch_invariant: object, backend: str) -> None:
    """process_group: None or a torch.distributed group; batch_invariant: a bool; both need a chunked backend."""
    if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{where}: process_group must be a torch.distributed.ProcessGroup whose ranks hold the shards of the vocabulary, or "
            f"None, got {type(process_group).__name__}. Pass torch.distributed.group.WORLD, new_group(...) or mesh.get_group()."
        )
    yes_or_no(where, "batch_invariant", batch_invariant)
    if backend == "reference" and (process_group is not None or batch_invariant):
        raise ValueError(
            f'{where}: backend "reference" has the whole head and one GEMM, got process_group={process_group}, batch_invariant='
            f'{batch_invariant}. Use backend="auto".'
        )


def reverse_mode(where: str, backend: str, *inputs: object, batch: TokenBatch | None = None) -> None:
    """The kernels have gradients and no tangents, which a custom op would leave out without a word, and none for torch.func."""
    if backend == "reference" or torch.compiler.is_compiling():
        return
    inputs += () if batch is None else tuple(vars(batch).values())
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f'{where}: forward-mode differentiation is not supported by backend "{backend}", got an input with a tangent. '
            'Use backward, or backend="reference".'
        )
    transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
    if transformed and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f'{where}: gradients inside of torch.func are not supported by backend "{backend}", got an input that requires grad '
            'under one of its transforms. Use backward or torch.autograd.grad, or backend="reference".'
        )
    if batch is not None and any(torch._C._functorch.is_batchedtensor(x) for x in tensors):
        raise RuntimeError(  # torch loops over a custom op under vmap, but for those with a list of tensors
            f'{where}: torch.func.vmap is not supported by backend "{backend}", got an input under it. Call it once for each, or '
            'use backend="reference".'
        )


def is_a(where: str, name: str, value: object, expected: type, example: str) -> None:
    """`value` must be an instance of `expected`."""
    if not isinstance(value, expected):
        article = "an" if expected.__name__[0] in "AEIO" else "a"
        example = f"what it returns, {value.__name__}()" if type(value).__name__ == "function" else example
        raise TypeError(f"{where}: {name} must be {article} {expected.__name__}, got {type(value).__name__}. Pass {example}.")
