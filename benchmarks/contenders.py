"""Who competes: one small adapter each. A contender that cannot do a job says why; none is handed an easier job.

Every adapter is `prepare(problem) -> call`, and `call() -> Result` does the whole job: forward, loss, and the gradients of hidden
and weight. Peers that give per-token logprobs get the loss on top in plain PyTorch, as their users would write it.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.adapters import Call, Contender, finish, from_logprob, mean_or_each, nothing_wrong, without_entropy
from benchmarks.peers import PEERS
from benchmarks.problem import Case, Problem, Result
from trapo_kernels import dispatch, free_kept_memory, linear_logprob, linear_policy_loss, policy_loss

# The floor: bare GEMMs, nothing else


def _floor(gemms: int, new_gradients: bool = False) -> Contender:
    """`new_gradients`: in memory that the system hands out in every call, as everyone's but ours; nobody is measured by that."""

    def prepare(problem: Problem) -> Call:
        hidden, weight = problem.hidden.detach(), problem.weight.detach()
        rows = max(1, min(hidden.shape[0], 2**33 // weight.shape[0]))  # whole, unless the logits pass 2^33 elements
        logits = torch.empty(rows, weight.shape[0], dtype=hidden.dtype, device=hidden.device).normal_()
        kept = None if new_gradients else (torch.empty_like(hidden), torch.empty_like(weight))

        def call() -> Result:
            grad_hidden, grad_weight = kept or (torch.empty_like(hidden), torch.empty_like(weight))
            for start in range(0, hidden.shape[0], rows):
                part = hidden[start : start + rows]
                out = logits[: part.shape[0]]
                for _ in range(gemms - 2 if gemms > 1 else 1):
                    torch.mm(part, weight.t(), out=out)
                if gemms > 1:
                    torch.mm(out, weight, out=grad_hidden[start : start + rows])
                    torch.mm(out.t(), part, out=grad_weight)
            return Result(grad_hidden=grad_hidden, grad_weight=grad_weight)

        return call

    def cannot(case: Case) -> str | None:
        return None if (case.job == "score") == (gemms == 1) else "is the floor of another path."

    products = f"{gemms} bare GEMM{'s' if gemms > 1 else ''} of torch.mm into preallocated outputs"
    name, about = f"floor, {gemms} GEMM{'s' if gemms > 1 else ''}", f"the floor: {products}"
    if new_gradients:
        name, about = f"{name}, new gradients", f"{products} but for the gradients, whose memory is new in every call"
    return Contender(name, about, prepare, _torch_keeps if new_gradients else nothing_wrong, cannot, floor=True)


def _torch_keeps(device: torch.device) -> str | None:
    return "there torch keeps memory for the next call." if device.type == "cuda" else None


# PyTorch


def _eager_statistics(hidden: Tensor, weight: Tensor, target: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    logprob = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1) if with_entropy else None


def _eager(problem: Problem, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    return _eager_statistics(problem.hidden, problem.weight, problem.target, with_entropy)


def _compiled(problem: Problem) -> Call:
    torch.compiler.reset()  # a fresh compilation per case, not the ninth recompilation of the first
    statistics = torch.compile(_eager_statistics, dynamic=False)
    return from_logprob(lambda p, with_entropy: statistics(p.hidden, p.weight, p.target, with_entropy))(problem)


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return "torch.compile needs a C++ compiler on a CPU, and none of g++, c++, clang++ is on the path."
    return None


def _torch_absent(device: torch.device) -> str | None:
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy; it came with 2.13."


def _torch_lce(chunked: bool) -> Callable[[Problem], Call]:
    def loss(p: Problem, reduction: str) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return torch.nn.functional.linear_cross_entropy(p.hidden, p.weight, p.target, reduction=reduction, options=options)

    return mean_or_each(loss)


# Ours


@contextlib.contextmanager
def _chunk(case: Case):
    """The chunk set to `case.chunk_rows` for one call. There is no public switch: a chunk is a pure function of the shapes."""
    from trapo_kernels.backends import in_weight, sweep

    if not case.chunk_rows:
        yield
        return
    with patch.object(sweep, "chunk_rows", lambda *_, **__: case.chunk_rows), patch.object(in_weight, "applies", lambda *_: False):
        yield


def _ours(backend: str, single_pass: bool, fresh: bool = False) -> Callable[[Problem], Call]:
    """`fresh`: nothing is kept from the call before, as where its gradient is still alive."""

    def prepare(problem: Problem) -> Call:
        hidden, weight, batch, objective = problem.hidden, problem.weight, problem.batch, problem.job.objective
        settings = {"backend": backend, "logits_dtype": getattr(torch, problem.case.logits_dtype)}
        settings["batch_invariant"] = problem.case.setting == "batch_invariant"
        rows = batch.active_rows if problem.case.active < 1.0 else None  # of no use to the single pass, which has the batch
        score = functools.partial(linear_logprob, active_rows=rows, **settings)

        def call() -> Result:
            if fresh:
                free_kept_memory()
            with _chunk(problem.case):
                if objective is None:
                    with torch.no_grad():
                        out = score(hidden, weight, problem.target, with_entropy=True)
                    return Result(out.logprob, out.entropy)
                if single_pass:
                    out = linear_policy_loss(hidden, weight, batch, objective, **settings)
                    return finish(problem, out.loss, out.logprob, out.entropy)
                wanted = problem.job.entropy != "none"
                stats = score(hidden, weight, problem.target, with_entropy=wanted)
                out = policy_loss(stats.logprob, stats.entropy, batch, objective, backend=backend)
                return finish(problem, out.loss, stats.logprob, stats.entropy)

        return call

    return prepare


def _backend_absent(backend: str) -> Callable[[torch.device], str | None]:
    """absent(): why the backend cannot run; nothing is launched, since a kernel's fault would be nobody's."""

    def absent(device: torch.device) -> str | None:
        return dispatch.why_not(backend, device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    return absent


def _only_losses(case: Case) -> str | None:
    return "is the same as single-pass where there is no backward." if case.job == "score" else None


def _only_scoring(case: Case) -> str | None:
    return None if case.job == "score" else "only scores; its backward is that of the backend without _fused."


def _ours_fused(backend: str) -> Contender:
    about = f"trapo_kernels, backend {backend!r}: logits never leave the chip"
    return Contender(
        f"ours ({backend})", about, _ours(backend, single_pass=True), _backend_absent(backend), _only_scoring, ours=True
    )


def _ours_both(backend: str) -> list[Contender]:
    """Single pass and two-phase; the reference has one way only, full logits and autograd."""
    absent = _backend_absent(backend)
    about = f"trapo_kernels, backend {backend!r}"
    one, two = _ours(backend, single_pass=True), _ours(backend, single_pass=False)
    two_about = f"{about}: policy_loss after linear_logprob, logits recomputed in backward"
    first = Contender(f"ours ({backend})", f"{about}: single pass", one, absent, nothing_wrong, ours=True)
    if backend == "reference":
        return [first._replace(about=f"{about}: full logits, autograd")]
    return [
        first,
        Contender(f"ours, two-phase ({backend})", two_about, two, absent, _only_losses, ours=True),
    ]


_cross_entropy_only = without_entropy(("sft", "grpo"))
# name, about, prepare, absent, cannot
_TORCHS = [
    ("eager", "PyTorch: full logits in the head's dtype, fp32 softmax", from_logprob(_eager), nothing_wrong, nothing_wrong),
    ("torch.compile", "the same function, compiled", _compiled, _no_compiler, nothing_wrong),
    ("F.linear_cross_entropy", "torch's own, reference path", _torch_lce(False), _torch_absent, _cross_entropy_only),
    ("F.linear_cross_entropy, chunked", "torch's own, default options", _torch_lce(True), _torch_absent, _cross_entropy_only),
]
CONTENDERS: list[Contender] = [
    *(_floor(gemms) for gemms in (1, 3, 4)),
    _floor(3, new_gradients=True),
    *(Contender(*way) for way in _TORCHS),
    *PEERS,
    *(ours for backend in ("triton", "torch", "native", "reference") for ours in _ours_both(backend)),
    Contender(
        "ours, nothing kept (native)",
        "all of its memory is new, as everyone's is",
        _ours("native", single_pass=True, fresh=True),
        lambda device: _torch_keeps(device) or _backend_absent("native")(device),
        nothing_wrong,
        ours=True,
    ),
    *(_ours_fused(backend) for backend in ("triton_fused", "native_fused")),
]
BY_NAME = {contender.name: contender for contender in CONTENDERS}
