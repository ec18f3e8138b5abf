"""Picks a backend, once per call; the only reader of the environment."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from trapo_kernels import checks
from trapo_kernels.backends import native
from trapo_kernels.backends.fences import has_fences

ScoringBackend = Literal["auto", "reference", "torch", "triton", "triton_fused", "native", "native_fused"]
BACKENDS = get_args(ScoringBackend)
DEVICES = ("cpu", "cuda", "meta")  # "meta": shapes alone
FUSED = ("triton_fused", "native_fused")  # scoring whose logits stay on the chip; all else as the backend before the underscore
Backend = Literal["auto", "reference", "torch", "triton", "native"]  # of what is no scoring
_log = logging.getLogger("trapo_kernels")
# Measured times of scoring, by GPU, dtype and shape; `python -m benchmarks.scoring_table` writes them. Read once, at import.
_MEASURED = json.loads((Path(__file__).parent / "scoring.json").read_text(encoding="utf-8"))["entries"]


def _load_triton() -> str | None:
    """Import triton; None, or a sentence with the reason why not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "the package triton is not installed; pip install triton."
        return f"the package triton does not load: {error}. Install one that runs on this system, or use another backend."
    return None


# Found out at import, so that choosing a backend inside torch.compile reads constants; triton reads the variable then, too.
_WHY_NO_TRITON = _load_triton()
_FENCES = _WHY_NO_TRITON is None and has_fences(importlib.import_module("triton").__version__)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Scoring(NamedTuple):
    """A scoring call: its shape, and what of it a kernel whose logits stay on the chip may not have."""

    num_rows: int
    hidden_size: int
    vocab_size: int
    bias: bool = False
    softcap: float | None = None
    lora_rank: int = 0  # 0: no LoRA
    logits_dtype: torch.dtype = torch.float32
    sharded: bool = False  # whether ranks share the vocabulary
    batch_invariant: bool = False


def choose(where: str, backend: str, device: torch.device, dtype: torch.dtype, scoring: Scoring | None = None) -> str:
    """The backend that runs: the named one or an error with the reason.

    "auto" is Triton on a GPU and the native rows on a CPU; chunked PyTorch where those cannot run. For `scoring` on a GPU it is the
    backend that was fastest there at about this shape, if any was measured.
    """
    check_name(where, backend)
    if backend != "reference" and device.type not in DEVICES:
        raise RuntimeError(
            f'{where}: backend="{backend}" runs on the CPU and on CUDA devices, got tensors on {device.type}. Move them '
            'with .to("cpu"), or try backend="reference", plain PyTorch, which holds all logits at once and is not tested there.'
        )
    if backend == "auto":
        preferred = "triton" if device.type == "cuda" else "native"
        chosen = "torch" if why_not(preferred, device, dtype) else preferred
        if scoring is not None and chosen == "triton" and _MEASURED:
            chosen = _fastest(scoring, device, dtype)
        if not torch.compiler.is_compiling():  # which a logging call would stop
            _say_once(where, chosen, device.type, str(dtype))
        return chosen
    reason = why_not(backend, device, dtype, scoring)
    if reason:
        raise RuntimeError(f'{where}: backend="{backend}" cannot run: {reason} Use backend="auto" to have one chosen.')
    return backend


def check_name(where: str, backend: str) -> None:
    """`backend` must be one that the function `where` has; scoring alone has fused ones."""
    checks.one_of(where, "backend", backend, BACKENDS if where == "linear_logprob" else get_args(Backend))


def why_not(backend: str, device: torch.device, dtype: torch.dtype, scoring: Scoring | None = None) -> str | None:
    """None when `backend` runs on `device` with `dtype`, and does `scoring` where it is given; else a sentence with the reason."""
    if backend in ("reference", "torch"):
        return None
    if dtype == torch.float64:
        return 'its statistics are fp32 and the inputs are float64; backend="torch" and "reference" compute in fp64.'
    if backend == "native_fused":
        return _why_no_wgmma(device, dtype) or _why_not_native(device) or _why_not_fused(backend, scoring)
    if backend == "native":
        return _why_not_native(device)
    if _WHY_NO_TRITON:
        return _WHY_NO_TRITON
    if device.type == "cpu" and not _INTERPRETED:
        return "the tensors are on the CPU; set TRITON_INTERPRET=1 before importing trapo_kernels to interpret the kernels there."
    return (_why_no_tensor_cores(device, dtype) if backend == "triton_fused" else None) or _why_not_fused(backend, scoring)


def _why_not_native(device: torch.device) -> str | None:
    """None where the native extension runs on `device`, else a sentence with the reason."""
    return native.why_not(device.type) or (native.why_no_code(device) if device.type == "cuda" else None)


def _why_no_tensor_cores(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where Triton multiplies `dtype` on tensor cores, or needs none for it, else a sentence with the reason."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    gpu = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    if gpu.major >= 8:
        return None
    name, sm = str(dtype).removeprefix("torch."), f"sm_{gpu.major}{gpu.minor}"
    remedy = 'backend="triton" does without.' if dtype == torch.float16 else "so do all GEMMs of bfloat16 here; take float16."
    return f"its kernel multiplies {name} on tensor cores from sm_80 on and this GPU is {sm}; {remedy}"


def _why_no_wgmma(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the native scoring kernel has its dtype and its GPU, else a sentence with the reason."""
    if device.type != "cuda":
        return f"its kernel is for sm_90 GPUs and the tensors are on the {device.type}."
    if dtype != torch.bfloat16:
        return f'its kernel takes bfloat16 and the inputs are {str(dtype).removeprefix("torch.")}; backend="triton_fused" does.'
    gpu = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    return None if gpu.major == 9 else f"its kernel is for sm_90 GPUs and this one is sm_{gpu.major}{gpu.minor}."


def _why_not_fused(backend: str, scoring: Scoring | None) -> str | None:
    """None unless `backend` is fused and its kernel lacks what `scoring` asks for; then a sentence with the reason."""
    if backend not in FUSED or scoring is None:
        return None
    s = scoring
    if s.lora_rank:
        return f"its kernel has no LoRA, got lora of rank {s.lora_rank}."
    if s.logits_dtype != torch.float32 or s.sharded or s.batch_invariant:
        return (
            "its kernel has fp32 logits of a whole head: logits_dtype must be torch.float32, process_group None and "
            f"batch_invariant False, got {s.logits_dtype}, {'a group' if s.sharded else None} and {s.batch_invariant}."
        )
    if backend == "native_fused" and (s.bias or s.softcap is not None):
        return (
            f"its kernel has neither bias nor softcap, got {'a' if s.bias else 'no'} bias and softcap {s.softcap}; "
            'backend="triton_fused" has both.'
        )
    if backend == "native_fused" and s.hidden_size % 8:
        return f'its kernel needs a hidden size that is a multiple of 8, got {s.hidden_size}; backend="triton_fused" takes any.'
    return None


def _fastest(scoring: Scoring, device: torch.device, dtype: torch.dtype) -> str:
    """The fastest scoring backend at the nearest shape measured; "triton" where none lies within a factor of two in N, D and V.

    Loops, because torch.compile traces it and knows no `min` with a key: compiled code must choose what eager code does.
    """
    gpu, name = _gpu_name(device), str(dtype).removeprefix("torch.")
    nearest, distance = None, 2.0  # the entry, and the largest of its three factors
    for entry in _MEASURED:
        if entry["device"] == gpu and entry["dtype"] == name:
            factors = [max(1, mine) / measured for mine, measured in zip(scoring[:3], entry["shape"], strict=True)]
            apart = max([max(factor, 1 / factor) for factor in factors])
            if apart < distance or (apart == distance and nearest is None):
                nearest, distance = entry, apart
    if nearest is None:
        return "triton"
    fastest, measured = "triton", nearest["median_ms"]
    for backend, median_ms in measured.items():
        # the time of a kernel that Triton pipelined says nothing of one that it does not, nor the other way round
        comparable = backend != "triton_fused" or nearest["fences"] == _FENCES
        if comparable and median_ms < measured[fastest] and why_not(backend, device, dtype, scoring) is None:
            fastest = backend
    return fastest


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).name  # a constant to torch.compile


def rows(backend: str) -> ModuleType:
    """The row operations of a chunked backend."""
    if backend in ("triton", "triton_fused"):
        from trapo_kernels.backends import triton_ops

        return triton_ops
    if backend in ("native", "native_fused"):
        return native
    from trapo_kernels.backends import rows_torch

    return rows_torch


def scale_to(grad: Tensor, factor: Tensor, out: Tensor, backend: str) -> None:
    """out = grad · factor, 0-d on the same device, multiplied in fp32 and rounded once; `out` may be `grad`. The GPU kernels of
    "triton" and "native" then compare the factor with 1 and return early where it is, so that the host never waits to know."""
    if out is grad and grad.device.type == "cpu" and factor.item() == 1.0:
        return
    if grad.device.type == "cuda" and backend in ("triton", "native"):
        rows(backend).scale_to(grad, factor, out)
    else:
        torch.mul(grad, factor.view([1] * grad.ndim), out=out)


@functools.cache
def _say_once(where: str, chosen: str, device_type: str, dtype: str) -> None:
    _log.info('%s: backend="auto" chose "%s" on %s for %s', where, chosen, device_type, dtype)
