"""csrc's CUDA code, compiled from its own source for the host and run there by an emulated GPU.

Triton brings an interpreter; CUDA does not. Kernels and launches run on the machine of machine.h, with the instructions of ptx.cuh
and the runtime of cuda_runtime.h.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from csrc.build import CUDA_ARCHS, OLDEST_TORCH, torch_directory
from trapo_kernels.backends import native

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
_numbers = itertools.count()


class Library(NamedTuple):
    """The compiled code: its ops, and the other functions of kernels.cpp."""

    ops: Any
    functions: ctypes.CDLL


def _compiler() -> list[str]:
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    if os.environ.get("TRAPO_SANITIZE"):  # make asan: every access to a tensor; the stacks are fibers', which confuse it
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "--param", "asan-stack=0"]
    return command


def build_arithmetic(directory: Path) -> ctypes.CDLL:
    """The functions of arithmetic.cpp."""
    command = [*_compiler(), "-I", str(ROOT), str(HERE / "arithmetic.cpp"), "-o", "arithmetic.so"]
    subprocess.run(command, check=True, cwd=directory)
    return ctypes.CDLL(str(directory / "arithmetic.so"))


def build(directory: Path, changes: Sequence[tuple[str, str, str]] = ()) -> Library:
    """The library of kernels.cpp, from a copy of csrc in `directory` whose PTX is exchanged for its emulation.

    `changes`, each a header of csrc/cuda and what to put there instead of what: faults that the tests must find. FAULT in it is
    whether this one, of which the first is number 1, is made: `set_fault` says which.
    """
    shutil.copytree(ROOT / "csrc", directory / "csrc")
    for number, (file, old, new) in enumerate(changes, 1):
        path = directory / "csrc" / "cuda" / file
        source = path.read_text()
        assert source.count(old) == 1, f"{file} has {source.count(old)} times {old!r}"
        path.write_text(source.replace(old, new.replace("FAULT", f"(host_gpu::fault == {number})")))
    shutil.copy(HERE / "ptx.cuh", directory / "csrc" / "cuda")
    for source in (*HERE.glob("*.h"), HERE / "kernels.cpp"):
        shutil.copy(source, directory)
    for name in ("cuda.h", "cuda_bf16.h", "cuda_fp16.h"):  # language.h has what the kernels use of them
        (directory / name).touch()
    namespace = f"trapo_host_gpu_{next(_numbers)}"
    command = [
        *_compiler(),
        *("-fno-extern-tls-init", "-fno-gnu-unique"),  # __shared__ is thread_local, and no two libraries share their globals
        "-I.",
        f"-Dtrapo_native={namespace}",
        f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        f"-DTRAPO_CUDA_ARCHS={CUDA_ARCHS.replace(' ', '_')}",
        "-isystem",
        str(torch_directory() / "include"),
    ]
    command += ["kernels.cpp", "-o", "kernels.so", "-L", str(torch_directory() / "lib"), "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(command, check=True, cwd=directory)
    torch.ops.load_library(directory / "kernels.so")
    return Library(getattr(torch.ops, namespace), ctypes.CDLL(str(directory / "kernels.so")))


class HostGpu:
    """An emulated GPU, a Hopper of few multiprocessors unless told otherwise. `seed` picks the interleaving of its threads.

    `room_for_clusters`: blocks of the largest cluster that it can place; a part of a GPU (MIG) has less room than the whole.
    Its attributes are the functions of `trapo_kernels.backends.native`, on tensors of the CPU that count as a GPU's.
    """

    def __init__(
        self,
        library: Library,
        seed: int = 0,
        *,
        major: int = 9,
        shared_bytes: int = 228 << 10,
        multiprocessors: int = 4,
        room_for_clusters: int = 8,
    ):
        self._library = library
        sizes = shared_bytes, min(shared_bytes, 227 << 10), multiprocessors, room_for_clusters
        self._properties = (ctypes.c_uint64(seed), major, *sizes)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self._library.functions.set_properties(*self._properties)
            with patch.object(native, "_OPS", self._library.ops), patch.object(native, "_on_gpu", lambda logits: True):
                return getattr(native, name)(*arguments, **named)

        return call

    @property
    def largest_cluster(self) -> int:
        """Blocks of the largest cluster that the last op launched; 0 without clusters."""
        return self._library.functions.largest_cluster()
