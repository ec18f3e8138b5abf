"""One contender in a process of its own: its peak memory above the inputs, and what its first call costs.

A fork server that has imported torch and run nothing serves the CPU; a GPU needs fresh interpreters, because a CUDA context
does not survive a fork. Each child builds the same inputs from the same seed.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed blocks go back to the system at once
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def measure(case: object, contender: str, device: str, seconds: float, cold_caches: bool = False) -> dict[str, float]:
    """{"first_call_ms", "second_call_ms", "peak_mib"} of `contender` on `case` in a fresh process.

    `cold_caches`: kernel caches start empty, so the first call pays for every compilation. Raises RuntimeError with the child's
    error, or TimeoutError after `seconds`.
    """
    context = multiprocessing.get_context("forkserver" if device == "cpu" and not cold_caches else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(["benchmarks.contenders"])
    with tempfile.TemporaryDirectory() as caches:
        changes = dict(_MALLOC) | ({name: caches for name in _CACHES} if cold_caches else {})
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(sender, case, contender, device, torch.get_num_threads()), daemon=False)
        try:
            child.start()
            sender.close()
            return _receive(receiver, child, contender, seconds)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
            if child.is_alive():
                child.kill()
            child.join()


def _receive(receiver, child, contender: str, seconds: float) -> dict[str, float]:
    if not receiver.poll(seconds):
        raise TimeoutError(f"{contender}: no result after {seconds:.0f} s.")
    try:
        kind, value = receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"{contender}: its process ended with exit code {child.exitcode}.") from None
    if kind == "error":
        raise RuntimeError(value)
    return value


def _child(sender, case, contender: str, device: str, threads: int) -> None:
    from benchmarks.contenders import BY_NAME
    from benchmarks.measure import cuda_peak_mib
    from benchmarks.problem import build

    torch.set_num_threads(threads)
    try:
        problem = build(case, device)
        call = BY_NAME[contender].prepare(problem)
        milliseconds = []
        for _ in range(2):
            start = time.perf_counter()
            result = call()
            if device == "cuda":
                torch.cuda.synchronize()
            milliseconds.append((time.perf_counter() - start) * 1e3)
            del result
        peak = cuda_peak_mib(call) if device == "cuda" else _cpu_peak_mib(call)
        sender.send(("ok", {"first_call_ms": milliseconds[0], "second_call_ms": milliseconds[1], "peak_mib": peak}))
    except Exception as error:  # sent to the parent process, which records it
        sender.send(("error", f"{type(error).__name__}: {error}"))


def _cpu_peak_mib(call) -> float:
    """High-water mark of the resident set during one call, above the resident set before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present VmRSS
    before = _status_kib("VmRSS")
    result = call()
    peak = _status_kib("VmHWM") - before
    del result
    return peak / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory on a CPU is measured on Linux only.")
