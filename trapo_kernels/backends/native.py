"""Row operations of the compiled extension (csrc): the same functions as `rows_torch`, a few calls into torch.ops.trapo_native.

On a CPU a chunk of logits becomes its own gradient in two sweeps over each row, without temporaries; on a GPU built with CUDA the
row stays on the chip between them. Statistics are fp32; gradients have the dtype of the next GEMM.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trapo_kernels import terms
from trapo_kernels.backends.logits import LogitTransform, RowStatistics, split_temperature
from trapo_kernels.objective import Objective

_LIBRARY = Path(__file__).parents[1] / "_native.abi3.so"
_REASON = Path(__file__).parents[1] / "_native_build.txt"
_OPS = torch.ops.trapo_native
TAKES_PARTS = True  # on a CPU: logits may be a list of tensors [C, V₁], [C, V₂], … that hold their columns
_OLDER = "the native extension is older than this package. Install trapo again."


def _load() -> str | None:
    """Load the extension; None, or a sentence with the reason why not."""
    if not _LIBRARY.exists():
        reason = (
            _REASON.read_text(encoding="utf-8").strip() if _REASON.exists() else "it was not compiled when trapo was installed."
        )
        return f"there is no native extension: {reason}"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        reason = error.__cause__ or error  # torch puts a sentence without it before the loader's own
        return f"the native extension does not load: {reason}. Install trapo again under this version of torch."
    if not hasattr(_OPS, "num_scalars") or _OPS.num_scalars() != terms.NUM_SCALARS:
        return _OLDER
    if len(_OPS.scoring.default._schema.arguments) != 5:  # the newest change of a schema
        return _OLDER
    return None


def _missing_kernels(device_type: str) -> str | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key("trapo_native::row_policy", device_type.upper()):
        return None
    why = "the native extension was built without kernels for"
    if device_type == "cuda" and _REASON.exists():  # of a later attempt, which left the extension as it was
        return f"{why} {device_type}: {_REASON.read_text(encoding='utf-8').strip()}"
    return f"{why} {device_type}.{' Install trapo with TRAPO_CUDA=1 and nvcc.' if device_type == 'cuda' else ''}"


_NOT_LOADED = _load()
# Found out at import, so that choosing a backend inside torch.compile reads a constant.
_WHY_NOT = {device_type: _NOT_LOADED or _missing_kernels(device_type) for device_type in ("cpu", "cuda")}
# What the CUDA part was compiled for, as TRAPO_CUDA_ARCHS names it; () where there is none.
_CUDA_ARCHS: tuple[str, ...] = () if _WHY_NOT["cuda"] else tuple(_OPS.cuda_archs().split("_"))
# What multiplies bf16 operands on this CPU: "AMX", "AVX512_BF16", or "" where nothing does.
BF16_UNITS: str = "" if _NOT_LOADED else _OPS.bf16_units()


def why_not(device_type: str) -> str | None:
    """None when the extension is there and has kernels for `device_type`, else a sentence with the reason."""
    return _WHY_NOT.get(device_type, f"the native extension has no kernels for {device_type}.")


def why_no_code(gpu: torch.device) -> str | None:
    """None where this GPU is one that the extension was compiled for, else a sentence with the reason."""
    properties = torch.cuda.get_device_properties(gpu)  # a constant to torch.compile
    major, minor = properties.major, properties.minor
    for arch in _CUDA_ARCHS:
        number = arch.removesuffix("+PTX")
        built = divmod(int(number.removesuffix("a")), 10)
        if (major, minor) == built:
            return None
        if (major, minor) > built and not number.endswith("a") and (major == built[0] or number != arch):
            return None
    needed = f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"
    return (
        f"the native extension was compiled for {', '.join(f'sm_{arch}' for arch in _CUDA_ARCHS)} and this GPU is "
        f"sm_{major}{minor}. Install trapo with TRAPO_CUDA=1 TRAPO_CUDA_ARCHS={needed}."
    )


def instruction_set() -> str:
    """The instruction set that the CPU rows run on: avx512, avx2 or portable."""
    return _OPS.instruction_set()


def gemm(a: Tensor, b: Tensor, out: Tensor, beta: int) -> None:
    """out [M, N] fp32 = beta · out + a [M, K] · b [K, N] of bf16 or fp32, each with unit stride in a row or a column."""
    _OPS.gemm(a, b, out, beta)


def statistics_overwrite(logits: Tensor) -> bool:
    """Whether `statistics` destroys these logits: on a CPU, which keeps what it has computed of them there."""
    return not _on_gpu(logits)


def statistics(logits: Tensor, target: Tensor, transform: LogitTransform, with_entropy: bool) -> RowStatistics:
    """logprob, entropy, row_max and log_sum of every row; destroys `logits` where `statistics_overwrite` says so."""
    logits = _operand(logits)
    stats = RowStatistics(*_OPS.row_statistics(logits, target.contiguous(), *_transform(transform)))
    return stats if with_entropy else stats._replace(entropy=torch.zeros_like(stats.entropy))


def logprob_gradient(
    logits: Tensor | list[Tensor],
    target: Tensor,
    transform: LogitTransform,
    stats: RowStatistics,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """dL/dlogits [C, V] from the gradients of logprob and entropy [C], in as many parts as `logits`, which are destroyed. On a GPU
    it may go to `out`; they stay then."""
    parts = _parts(logits)
    grads = [_gradient_buffer(part, grad_dtype) for part in parts] if out is None else [out]
    _OPS.row_gradient(
        parts,
        target.contiguous(),
        *_transform(transform),
        *(part.contiguous() for part in stats),
        None if grad_logprob is None else grad_logprob.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        grads,
    )
    return _as_given(logits, grads, grad_dtype)


def policy(
    logits: Tensor | list[Tensor],
    target: Tensor,
    transform: LogitTransform,
    streams: terms.Streams,
    objective: Objective,
    with_entropy_gradient: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[RowStatistics, Tensor | list[Tensor] | None]:
    """Statistics and, unless `grad_dtype` is None, dL/dlogits [C, V] of a policy loss in one go; destroys `logits`. The gradient
    comes in parts where they do."""
    parts = _parts(logits)
    grads = [] if grad_dtype is None else [_gradient_buffer(part, grad_dtype) for part in parts]
    stats = _OPS.row_policy(
        parts,
        target.contiguous(),
        *_transform(transform),
        *_streams(streams),
        streams.grad_entropy if with_entropy_gradient else None,
        *terms.gate_scalars(objective),
        grads,
    )
    return RowStatistics(*stats), None if grad_dtype is None else _as_given(logits, grads, grad_dtype)


def fused_scoring(hidden: Tensor, weight: Tensor, target: Tensor, transform: LogitTransform) -> RowStatistics:
    """Statistics [N] of bf16 hidden [N, D] and weight [V, D] from a kernel that writes no logits; sm_90, no bias, no softcap."""
    _, row_temperature, temperature, _ = _transform(transform)
    return RowStatistics(*_OPS.scoring(_for_tma(hidden), _for_tma(weight), target.contiguous(), row_temperature, temperature))


def coefficients(logprob: Tensor, streams: terms.Streams, objective: Objective) -> Tensor:
    """dL/dlogp [N] fp32 of every token; exact zeros for IGNORED ones."""
    return _OPS.token_coefficient(logprob.contiguous(), *_streams(streams), *terms.gate_scalars(objective))


def scale_to(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = grad · factor of dense tensors on a GPU and a 0-d `factor`, multiplied in fp32 and rounded once. `out` may be `grad`;
    where the factor is 1, nothing is read or written then."""
    _OPS.scale(grad, factor.float(), out)


def _for_tma(operand: Tensor) -> Tensor:
    """The matrix itself, or a copy of one that is not dense or begins at no multiple of 16 bytes, as a view may."""
    dense = operand.contiguous()
    return dense.clone() if dense.data_ptr() % 16 else dense


def _on_gpu(logits: Tensor) -> bool:
    """Whether the rows run on the CUDA kernels: on 16-bit logits as they are, with gradients of 16 bits over logits of 32."""
    return logits.device.type == "cuda"


def _operand(logits: Tensor) -> Tensor:
    """The logits in a dtype that the rows run on: fp32 on a CPU; bf16 and fp16 as they are on a GPU."""
    return logits if _on_gpu(logits) else logits.float()


def _parts(logits: Tensor | list[Tensor]) -> list[Tensor]:
    return [_operand(part) for part in (logits if isinstance(logits, list) else [logits])]


def _as_given(logits: Tensor | list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    """The gradient in as many parts as the logits came in."""
    grads = [grad.to(dtype) for grad in grads]
    return grads if isinstance(logits, list) else grads[0]


def _gradient_buffer(logits: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """Where the gradient goes: the memory of the logits, which are at least as wide. The CPU rows write fp32 and bf16."""
    return logits.view(grad_dtype)[:, : logits.shape[1]] if _on_gpu(logits) or grad_dtype == torch.bfloat16 else logits


def _transform(transform: LogitTransform) -> tuple[Tensor | None, Tensor | None, float, float]:
    row_temperature, temperature = split_temperature(transform.temperature)
    return (
        None if transform.bias is None else transform.bias.float().contiguous(),
        None if row_temperature is None else row_temperature.float().contiguous(),
        temperature,
        0.0 if transform.softcap is None else float(transform.softcap),
    )


def _streams(streams: terms.Streams) -> tuple[Tensor | None, ...]:
    s = streams
    return s.role, s.anchor, s.signal, s.advantage, s.kl_weight, s.ref_logprob
