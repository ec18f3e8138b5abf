"""`python -m trapo_kernels.doctor`: what is installed, which backends run here and why the others do not, and a self-test."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from trapo_kernels import Role, TokenBatch, dispatch, linear_policy_loss, objectives
from trapo_kernels.backends import native

_PACKAGES = ("trapo", "torch", "triton", "transformers")
_TOLERANCE = 1e-5


def report() -> tuple[list[str], bool]:
    """The lines to print, and whether every backend that runs passed its self-test."""
    lines = [f"python   {platform.python_version()} on {platform.machine()}"]
    lines += [f"{name:<8} {_version(name)}" for name in _PACKAGES]
    lines.append(f"GPU      {_gpu()}")
    lines.append(f"threads  {torch.get_num_threads()}")
    if torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
        lines.append(
            "float32  GEMMs may run in TF32, so fp32 logits have its 11 bits: torch.set_float32_matmul_precision('highest')"
        )
    healthy = True
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        chosen = dispatch.choose("doctor", "auto", torch.device(device), torch.float32)
        lines.append(f"backends on {device} (auto: {chosen})")
        for backend in dispatch.BACKENDS[1:]:
            verdict, passed = _verdict(backend, torch.device(device))
            lines.append(f"  {backend:<13} {verdict}")
            healthy = healthy and passed
    return lines, healthy


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return (
            f"none (torch was built for CUDA {torch.version.cuda})" if torch.version.cuda else "none (torch was built without CUDA)"
        )
    gpu = torch.cuda.get_device_properties(0)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return f"{torch.cuda.device_count()} x {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}, CUDA {torch.version.cuda}"


def _verdict(backend: str, device: torch.device) -> tuple[str, bool]:
    """A line about a backend on a device, and False where it runs but gets the self-test wrong."""
    reason = dispatch.why_not(backend, device, torch.bfloat16 if backend in dispatch.FUSED else torch.float32)
    if reason:
        return f"missing: {reason}", True
    units = f", bf16 on {native.BF16_UNITS}" if native.BF16_UNITS else ""
    note = f" ({native.instruction_set()}{units})" if backend == "native" and device.type == "cpu" else ""
    if backend in dispatch.FUSED:
        note = _of_pipeline(device) if backend == "triton_fused" and device.type == "cuda" else ""
        return f"runs: linear_logprob alone, backward as without _fused; has no self-test{note}", True
    try:
        error = _self_test(backend, device)
    except Exception as error:  # of a kernel that does not even run: the other backends are still told of
        first_line = (str(error).splitlines() or [""])[0]
        return f"FAILED{note}: {type(error).__name__}: {first_line}. Please report this.", False
    if error <= _TOLERANCE:
        return f"runs{note}: self-test passed, largest error against fp64 {error:.1e}", True
    return f"WRONG{note}: largest error against fp64 {error:.1e}, at most {_TOLERANCE:.0e} is allowed. Please report this.", False


def _of_pipeline(device: torch.device) -> str:
    """What to say where Triton's fused kernel loads a tile only when the one before it is multiplied."""
    from trapo_kernels.backends.triton_ops.fused_scoring import tile_of

    if tile_of(torch.bfloat16, torch.cuda.get_device_properties(device).major)["num_stages"] > 1:
        return ""
    remedy = "Install a torch that brings triton 3.8 or newer"
    return f"; copies wait for products, because this triton lacks a fence between them. {remedy}"


def _self_test(backend: str, device: torch.device) -> float:
    """Largest error of a small mixed policy loss and its gradients against fp64; in fp32 GEMMs, whatever is allowed here."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return _largest_error(backend, device)
    finally:
        torch.set_float32_matmul_precision(precision)


def _largest_error(backend: str, device: torch.device) -> float:
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        generator = torch.Generator().manual_seed(0)
        shapes = ((37, 24), (1003, 24))
        drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
        hidden, weight = (x.to(device, dtype).requires_grad_() for x in drawn)
        role = torch.arange(37, device=device) % 3
        batch = TokenBatch(
            target=torch.arange(37, device=device) * 27,
            role=role.to(torch.uint8),
            advantage=torch.where(role == Role.ROLLOUT, -0.5, 1.0).to(dtype),
            weight=torch.full((37,), 1 / 37, dtype=dtype, device=device),
        )
        out = linear_policy_loss(hidden, weight, batch, objectives.trapo(), backend=name)
        results.append([out.loss, *torch.autograd.grad(out.loss, (hidden, weight))])
    return max((ours.double() - truth).abs().max().item() for truth, ours in zip(*results, strict=True))


def main() -> int:
    """Print the report; 1 when a backend failed its self-test."""
    lines, healthy = report()
    print("\n".join(lines))
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
