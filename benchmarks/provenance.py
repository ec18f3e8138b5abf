"""Where a number comes from: device, driver, clocks, revision, versions, command."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCES = (".py", ".pt", ".cpp", ".cu", ".cuh", ".h", ".inl")
WORKER_FLAG = "--worker-seconds"
CLOCKS = {  # name in a row: field of nvidia-smi
    "sm_clock": "clocks.sm",
    "sm_clock_max": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "power": "power.draw",
    "temperature_c": "temperature.gpu",
}
PEERS = ("liger-kernel", "cut-cross-entropy", "trl", "quack-kernels", "verl", "nvidia-cutlass-dsl")  # the last: their compiler
PACKAGES = ("torch", "triton", "transformers", *PEERS)


def folder(device: str) -> str:
    """The name of this device's folder under results/: the GPU's name in lower case with dashes, or "cpu-" and the processor's."""
    if device == "cuda":
        return _dashed(torch.cuda.get_device_name())
    return "cpu-" + _dashed(re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@", " ", _cpu_name()))


def _dashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def environment(device: str) -> dict[str, object]:
    """What every row carries besides its figures."""
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),  # whether idle threads spin; it moves ratios on a busy machine
        "driver": _nvidia_smi("--query-gpu=driver_version") if device == "cuda" else None,
        "revision": revision(),
        "command": command(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def command() -> str:
    """The runner's command line as it was typed; paths of this machine and what the supervisor adds for its worker left out."""
    typed = sys.argv[1:]
    if "--out" in typed and Path(typed[typed.index("--out") + 1]).is_absolute():
        typed = [word for i, word in enumerate(typed) if i - typed.index("--out") not in (0, 1)]
    typed = typed[: typed.index(WORKER_FLAG)] if WORKER_FLAG in typed else typed
    return shlex.join(["python", "-m", "benchmarks", *typed])


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def smi(field: str) -> str | None:
    """One field of nvidia-smi for the current GPU, or several with commas between; None where it is missing or refuses."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid  # nvidia-smi numbers GPUs that are not visible, too
    return _nvidia_smi("-i", f"GPU-{uuid}", f"--query-gpu={field}")


def _nvidia_smi(*arguments: str) -> str | None:
    """The first line of its answer; None where it is missing or refuses."""
    try:
        out = subprocess.run(["nvidia-smi", *arguments, "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(out.stdout.strip().splitlines()), None)


def clocks(call: Callable[[], object], median_ms: float) -> dict[str, str | None]:
    """Clocks, power and temperature while `call` runs: calls of 2 s are queued, for nvidia-smi takes about one to start."""
    for _ in range(min(2000, 2 + int(2000 / max(median_ms, 0.1)))):
        call()
    line = smi(",".join(CLOCKS.values()))
    torch.cuda.synchronize()
    return dict(zip(CLOCKS, line.split(", "), strict=True)) if line else dict.fromkeys(CLOCKS)


@functools.cache
def revision() -> str:
    """The commit, plus a hash of the kernels' and benchmarks' sources where they differ from it or there is no repository."""
    sources = sorted(
        path
        for folder in ("trapo_kernels", "benchmarks", "csrc")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in SOURCES
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    commit = _git("rev-parse", "--short=10", "HEAD")
    if commit is None:
        return f"no-repository+{digest}"
    changed = _git("status", "--porcelain", "--", "trapo_kernels", "benchmarks/*.py", "benchmarks/*.pt", "csrc")
    return f"{commit}+{digest}" if changed else commit


def _git(*arguments: str) -> str | None:
    try:
        out = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def versions() -> dict[str, str]:
    """Installed versions of everything that runs or competes here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "triton" not in found and importlib.util.find_spec("triton"):  # a nightly torch brings it under another name
        found["triton"] = importlib.import_module("triton").__version__
    return found
