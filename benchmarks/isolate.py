"""One contender in a process of its own: its peak memory above the inputs, what its first call costs, the longest N that fits.

A fork server that has imported torch and run nothing serves the CPU; a GPU needs fresh interpreters, because a CUDA context
does not survive a fork. Each child builds the same inputs from the same seed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trapo_kernels import free_kept_memory

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed blocks go back to the system at once
# into the fork server; the peers take seconds to import, and are left out where they are missing
_PRELOAD = ("benchmarks.contenders", "trl.kernels.chunked_logprob", "liger_kernel.chunked_loss", "liger_kernel.ops")
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def measure(case: object, contender: str, device: str, seconds: float, cold_caches: bool = False) -> dict[str, float]:
    """{"first_call_ms", "second_call_ms", "peak_mib"} of `contender` on `case` in a fresh process.

    `cold_caches`: kernel caches start empty, so the first call pays for every compilation. Raises RuntimeError with the child's
    error, or TimeoutError after `seconds`.
    """
    with tempfile.TemporaryDirectory() as caches:
        changes = dict.fromkeys(_CACHES, caches) if cold_caches else {}
        method = "spawn" if cold_caches or device == "cuda" else "forkserver"
        arguments = (case, contender, device, torch.get_num_threads())
        return _last_message(_first_calls, arguments, contender, method, changes, seconds)


def longest(case: object, contender: str, powers: range, limit_mib: int, seconds: float) -> dict[str, object]:
    """{"longest_tokens", and "stopped_by" unless the last power fitted}: the largest N = 2^k that fits into `limit_mib` above its
    inputs, on a CPU, whose allocator refuses beyond a limit of the address space. Errors as for `measure`."""
    arguments = (case, contender, powers, limit_mib, torch.get_num_threads())
    return _last_message(_longest, arguments, contender, "forkserver", {}, seconds)


def _last_message(target: Callable, arguments: tuple, contender: str, method: str, changes: dict[str, str], seconds: float) -> dict:
    """Run `target(send, *arguments)` in a process and return the last dict that it sent."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(_PRELOAD))
    changes = MALLOC | changes
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, target, arguments), daemon=False)
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


def _receive(receiver, child, contender: str, seconds: float) -> dict:
    found, end = None, time.monotonic() + seconds
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            kind, value = receiver.recv()
        except EOFError:
            child.join()
            if child.exitcode == 0 and found is not None:
                return found
            reason = f"its process ended with exit code {child.exitcode}"
            if found is None:
                raise RuntimeError(f"{contender}: {reason}.") from None
            return found | {"stopped_by": reason}
        if kind == "error":
            raise RuntimeError(value)
        found = value
    raise TimeoutError(f"{contender}: no result after {seconds:.0f} s.")


def _child(sender, target: Callable, arguments: tuple) -> None:
    try:
        target(lambda found: sender.send(("ok", found)), *arguments)
    except Exception as error:  # sent to the parent process, which records it
        sender.send(("error", f"{type(error).__name__}: {error}"))


def _first_calls(send: Callable, case, contender: str, device: str, threads: int) -> None:
    """The first call, then the second, whose peak is the measurement: the first also makes what a library makes once."""
    from benchmarks.contenders import BY_NAME
    from benchmarks.measure import cuda_peak_mib
    from benchmarks.problem import build

    torch.set_num_threads(threads)
    call, milliseconds = BY_NAME[contender].prepare(build(case, device)), []

    def timed():
        start = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - start) * 1e3)
        return result

    timed()
    peak = cuda_peak_mib(timed) if device == "cuda" else _cpu_peak_mib(timed)
    send({"first_call_ms": milliseconds[0], "second_call_ms": milliseconds[1], "peak_mib": peak})


def _longest(send: Callable, case, contender: str, powers: range, limit_mib: int, threads: int) -> None:
    from dataclasses import replace

    from benchmarks.contenders import BY_NAME
    from benchmarks.measure import out_of_memory
    from benchmarks.problem import build

    torch.set_num_threads(threads)
    call = BY_NAME[contender].prepare
    call(build(replace(case, num_rows=8), "cpu"))()  # makes the threads and whatever else is made once
    for k in powers:
        problem = build(replace(case, num_rows=2**k), "cpu")
        _give_back()
        with _address_space(limit_mib):
            try:
                call(problem)()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                send({"longest_tokens": 2 ** (k - 1) if k > powers[0] else 0, "stopped_by": f"the limit of {limit_mib} MiB"})
                return
        send({"longest_tokens": 2**k})


@contextlib.contextmanager
def _address_space(limit_mib: int):
    """No more than `limit_mib` beyond what this process has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status_kib("VmSize") * 1024 + limit_mib * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _cpu_peak_mib(call) -> float:
    """High-water mark of the resident set during one call, above the resident set before it."""
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present VmRSS
    before = status_kib("VmRSS")
    result = call()
    peak = status_kib("VmHWM") - before
    del result
    return peak / 1024


def _give_back() -> None:
    """What is not in use goes to the system, so that a call has to ask for all that it needs."""
    gc.collect()
    free_kept_memory()
    ctypes.CDLL(None).malloc_trim(0)


def status_kib(field: str) -> int:
    """A field of /proc/self/status in KiB; RuntimeError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: memory on a CPU is measured on Linux only.")
