"""csrc's CUDA code, compiled from its own source for the host and run there by an emulated GPU.

Triton brings an interpreter; CUDA does not. Kernels and launches run on the machine of machine.h, with the instructions of ptx.cuh
and the runtime of cuda_runtime.h. `HostGpu` has the functions of `trapo_kernels.backends.native`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csrc.build import OLDEST_TORCH, torch_directory
from trapo_kernels import terms
from trapo_kernels.backends import native
from trapo_kernels.backends.logits import LogitTransform, RowStatistics
from trapo_kernels.objective import Objective

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
_numbers = itertools.count()


class Library(NamedTuple):
    """The compiled code: its ops, what sets the properties of the GPU, and the cluster size of the last launch."""

    ops: Any
    set_properties: Any
    last_cluster: Any


def build(directory: Path, change: tuple[str, str, str] | None = None) -> Library:
    """The library of kernels.cpp, from a copy of csrc in `directory` whose PTX is exchanged for its emulation.

    `change`, a file of csrc/cuda and what to put there instead of what: a fault that the tests must find.
    """
    shutil.copytree(ROOT / "csrc", directory / "csrc")
    if change is not None:
        file, old, new = change
        source = (directory / "csrc" / "cuda" / file).read_text()
        assert source.count(old) == 1, f"{file} has {source.count(old)} times {old!r}"
        (directory / "csrc" / "cuda" / file).write_text(source.replace(old, new))
    shutil.copy(HERE / "ptx.cuh", directory / "csrc" / "cuda")
    for name in ("machine.h", "cuda_runtime.h", "kernels.cpp"):
        shutil.copy(HERE / name, directory)
    for name in ("cooperative_groups.h", "cuda.h", "cuda_bf16.h", "cuda_fp16.h"):  # machine.h has what the kernels use of them
        (directory / name).touch()
    namespace = f"trapo_host_gpu_{next(_numbers)}"
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-I."]
    command += ["-fno-extern-tls-init", "-fno-gnu-unique"]  # __shared__ is thread_local, and no two libraries share their globals
    if os.environ.get("TRAPO_SANITIZE"):  # make asan: every access to a tensor; the stacks are fibers', which confuse it
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "--param", "asan-stack=0"]
    command += [
        f"-Dtrapo_native={namespace}",
        f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        "-isystem",
        str(torch_directory() / "include"),
    ]
    command += ["kernels.cpp", "-o", "kernels.so", "-L", str(torch_directory() / "lib"), "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(command, check=True, cwd=directory)
    torch.ops.load_library(directory / "kernels.so")
    library = ctypes.CDLL(str(directory / "kernels.so"))
    return Library(getattr(torch.ops, namespace), library.set_properties, library.last_cluster)


class HostGpu:
    """An emulated GPU, a Hopper of few multiprocessors unless told otherwise. `seed` picks the interleaving of its threads."""

    def __init__(self, library: Library, seed: int = 0, *, major: int = 9, shared_bytes: int = 228 << 10, processors: int = 4):
        self.library = library
        self.properties = (ctypes.c_uint64(seed), major, shared_bytes, min(shared_bytes, 227 << 10), processors)

    def statistics(self, logits: Tensor, target: Tensor, transform: LogitTransform, with_entropy: bool) -> RowStatistics:
        return RowStatistics(*self._ops().row_statistics(logits, target, *native._transform(transform), with_entropy))

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
        self._ops().row_gradient(logits, target, *native._transform(transform), *stats, grad_logprob, grad_entropy, grad)
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
        grad = None if grad_dtype is None else _over(logits, grad_dtype)
        given = (logits, target, *native._transform(transform), *native._streams(streams))
        entropy = streams.grad_entropy if with_entropy_gradient else None
        return RowStatistics(*self._ops().row_policy(*given, entropy, *terms.gate_scalars(objective), grad)), grad

    def fused_scoring(self, hidden: Tensor, weight: Tensor, target: Tensor, transform: LogitTransform) -> RowStatistics:
        return RowStatistics(*self._ops().scoring(hidden, weight, target, *native._transform(transform)))

    def coefficients(self, logprob: Tensor, streams: terms.Streams, objective: Objective) -> Tensor:
        return self._ops().token_coefficient(logprob, *native._streams(streams), *terms.gate_scalars(objective))

    def _ops(self) -> Any:
        self.library.set_properties(*self.properties)
        return self.library.ops


def _over(logits: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """The gradient lies in the memory of the logits, as on a GPU."""
    return logits.view(grad_dtype)[:, : logits.shape[1]]
