"""The CUDA kernels of csrc, compiled from their own source for the host and run there by an emulated GPU (machine.h, ptx.cuh).

Triton brings an interpreter; CUDA does not. `HostGpu` has the functions of `trapo_kernels.backends.native`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from trapo_kernels import terms
from trapo_kernels.backends.logits import LogitTransform, RowStatistics
from trapo_kernels.objective import Objective

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STREAMS = ("role", "anchor", "signal", "advantage", "kl_weight", "ref_logprob")
_POLICY, _GRADIENT, _CLUSTER = range(3)  # kinds of row kernel, as kernels.cpp numbers them


def build(directory: Path, change: tuple[str, str, str] | None = None) -> ctypes.CDLL:
    """The library of kernels.cpp, from a copy of csrc in `directory` whose PTX is exchanged for its emulation.

    `change`, a file of csrc/cuda and what to put there instead of what: a fault that the tests must find.
    """
    shutil.copytree(ROOT / "csrc", directory / "csrc")
    if change is not None:
        file, old, new = change
        source = (directory / "csrc" / "cuda" / file).read_text()
        assert source.count(old) == 1, f"{file} has {source.count(old)} times {old!r}"
        (directory / "csrc" / "cuda" / file).write_text(source.replace(old, new))
    for name in ("machine.h", "ptx.cuh"):
        shutil.copy(HERE / name, directory / "csrc" / "cuda")
    for name in ("cooperative_groups.h", "cuda.h", "cuda_bf16.h", "cuda_fp16.h"):  # machine.h has what the kernels use of them
        (directory / name).touch()
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-I."]
    command += ["-fno-extern-tls-init", "-fno-gnu-unique"]  # __shared__ is thread_local, and no two libraries share their globals
    if os.environ.get("TRAPO_SANITIZE"):  # make asan: every access to a tensor; the stacks are fibers', which confuse it
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "--param", "asan-stack=0"]
    command += [str(HERE / "kernels.cpp"), "-o", "kernels.so"]
    subprocess.run(command, check=True, cwd=directory)
    library = ctypes.CDLL(str(directory / "kernels.so"))
    assert ctypes.sizeof(_RowArguments) == library.row_arguments_size()
    return library


class _Gates(ctypes.Structure):
    _fields_ = [("codes", c_int * 3), ("scalars", c_float * 7)]


class _RowArguments(ctypes.Structure):
    """RowArguments of row_kernels.cuh."""

    _fields_ = [("logits", c_void_p), ("grad", c_void_p)]
    _fields_ += [(name, c_int64) for name in ("row_stride", "grad_stride", "vocab_size")]
    _fields_ += [(name, c_void_p) for name in ("target", "bias", "row_temperature")]
    _fields_ += [("temperature", c_float), ("softcap", c_float)]
    _fields_ += [(name, c_void_p) for name in (*RowStatistics._fields, "role", "anchor", "signal", "advantage", "kl_weight")]
    _fields_ += [(name, c_void_p) for name in ("ref_logprob", "grad_logprob", "grad_entropy")]
    _fields_ += [("gates", _Gates)]


class HostGpu:
    """One emulated GPU: `seed` picks the interleaving, `cluster` how many blocks keep a row (0: one block re-reads it)."""

    def __init__(self, library: ctypes.CDLL, seed: int = 0, cluster: int = 0, processors: int = 4):
        self.library, self.seed, self.cluster, self.processors = library, seed, cluster, processors

    def statistics(self, logits: Tensor, target: Tensor, transform: LogitTransform, with_entropy: bool) -> RowStatistics:
        stats = _new_statistics(logits)
        self._rows(_POLICY, logits, None, target, transform, stats._asdict())
        return stats

    def logprob_gradient(
        self,
        logits: Tensor,
        target: Tensor,
        transform: LogitTransform,
        stats: RowStatistics,
        grad_logprob: Tensor | None,
        grad_entropy: Tensor | None,
        grad_dtype: torch.dtype,
    ) -> Tensor:
        grad = _over(logits, grad_dtype)
        upstream = {"grad_logprob": grad_logprob, "grad_entropy": grad_entropy}
        self._rows(_GRADIENT, logits, grad, target, transform, stats._asdict() | upstream)
        return grad

    def policy(
        self,
        logits: Tensor,
        target: Tensor,
        transform: LogitTransform,
        streams: terms.Streams,
        objective: Objective,
        with_entropy_gradient: bool,
        grad_dtype: torch.dtype | None,
    ) -> tuple[RowStatistics, Tensor | None]:
        grad, stats = None if grad_dtype is None else _over(logits, grad_dtype), _new_statistics(logits)
        pointers = stats._asdict() | {name: getattr(streams, name) for name in _STREAMS}
        pointers["grad_entropy"] = streams.grad_entropy if with_entropy_gradient else None
        kind = _CLUSTER if self.cluster and grad is not None else _POLICY
        self._rows(kind, logits, grad, target, transform, pointers, terms.gate_scalars(objective))
        return stats, grad

    def fused_scoring(self, hidden: Tensor, weight: Tensor, target: Tensor, transform: LogitTransform) -> RowStatistics:
        assert transform.bias is None and transform.softcap is None and hidden.shape[1] % 8 == 0
        hidden, weight = hidden.contiguous(), weight.contiguous()
        (rows, hidden_size), out = hidden.shape, torch.full((4, hidden.shape[0]), float("nan"))
        row_temperature, temperature = _temperature(transform)
        sizes = c_int64(rows), c_int64(hidden_size), c_int64(weight.shape[0])
        arguments = (_pointer(hidden), _pointer(weight), *sizes, _pointer(target), _pointer(row_temperature), c_float(temperature))
        self._call(self.library.run_scoring, *arguments, c_int(self.processors), c_uint64(self.seed), _pointer(out))
        return RowStatistics(*out)

    def coefficients(self, logprob: Tensor, streams: terms.Streams, objective: Objective) -> Tensor:
        out = torch.full_like(logprob, float("nan"))
        pointers = {name: _pointer(getattr(streams, name)) for name in _STREAMS}
        a = _RowArguments(gates=_gates(terms.gate_scalars(objective)), **pointers)
        tokens = c_int64(len(logprob))
        self._call(self.library.run_coefficients, ctypes.byref(a), _pointer(logprob), _pointer(out), tokens, c_uint64(self.seed))
        return out

    def _rows(self, kind, logits, grad, target, transform, pointers, gates=((0, 0, 0), (0.0,) * 7)):
        vector = 16 // logits.element_size()
        aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % vector == 0
        row_temperature, temperature = _temperature(transform)
        a = _RowArguments(
            logits=_pointer(logits),
            grad=_pointer(grad),
            row_stride=logits.stride(0),
            grad_stride=0 if grad is None else grad.stride(0),
            vocab_size=logits.shape[1],
            target=_pointer(target),
            bias=_pointer(transform.bias),
            row_temperature=_pointer(row_temperature),
            temperature=temperature,
            softcap=transform.softcap or 0.0,
            gates=_gates(gates),
            **{name: _pointer(x) for name, x in pointers.items()},
        )
        dtypes = _DTYPES[logits.dtype], _DTYPES[logits.dtype if grad is None else grad.dtype]
        size = c_uint(logits.shape[0]), c_uint(max(1, self.cluster)), c_int(aligned)
        self._call(self.library.run_rows, kind, *dtypes, ctypes.byref(a), *size, c_uint64(self.seed))

    def _call(self, function, *arguments):
        error = ctypes.create_string_buffer(500)
        if function(*arguments, c_char_p(ctypes.addressof(error)), c_size_t(len(error))):
            raise AssertionError(f"seed {self.seed}: {error.value.decode()}")


def _gates(codes_and_scalars: tuple) -> _Gates:
    codes, scalars = codes_and_scalars
    return _Gates((c_int * 3)(*codes), (c_float * 7)(*scalars))


def _pointer(x: Tensor | None) -> c_void_p | None:
    return None if x is None else c_void_p(x.data_ptr())


def _new_statistics(logits: Tensor) -> RowStatistics:
    return RowStatistics(*torch.full((4, logits.shape[0]), float("nan")))


def _over(logits: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """The gradient lies in the memory of the logits, as on a GPU."""
    return logits.view(grad_dtype)[:, : logits.shape[1]]


def _temperature(transform: LogitTransform) -> tuple[Tensor | None, float]:
    per_row = isinstance(transform.temperature, Tensor)
    return (transform.temperature.float(), 1.0) if per_row else (None, float(transform.temperature))
