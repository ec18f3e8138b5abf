"""Who competes: one small adapter each. A contender that cannot do a job says why; none is handed an easier job.

Every adapter is `prepare(problem) -> call`, and `call() -> Result` does the whole job: forward, loss, and the gradients of hidden
and weight. Peers that give per-token logprobs get the loss on top in plain PyTorch, as their users would write it.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.problem import EPSILON, Case, Problem, Result, textbook_loss
from trapo_kernels import dispatch, free_kept_memory, linear_logprob, linear_policy_loss, policy_loss

Call = Callable[[], Result]


class Contender(NamedTuple):
    """`absent(device)` and `cannot(case)` give a sentence, or None when it runs; `ours` and `floor` say which kind it is."""

    name: str
    about: str
    prepare: Callable[[Problem], Call]
    absent: Callable[[torch.device], str | None]
    cannot: Callable[[Case], str | None]
    ours: bool = False
    floor: bool = False


def _finish(problem: Problem, loss: Tensor, logprob: Tensor | None = None, entropy: Tensor | None = None) -> Result:
    """The backward of every contender."""
    trained = [x for x in (problem.hidden, problem.weight) if x.requires_grad]
    detached = (None if x is None else x.detach() for x in (logprob, entropy))
    return Result(*detached, loss.detach(), *torch.autograd.grad(loss, trained))


def _from_logprob(function: Callable[[Problem, bool], tuple[Tensor, Tensor | None]]) -> Callable[[Problem], Call]:
    """An adapter from `function(problem, with_entropy) -> (logprob, entropy)`."""

    def prepare(problem: Problem) -> Call:
        def call() -> Result:
            with_entropy = problem.job.entropy != "none"
            if problem.job.objective is None:
                with torch.no_grad():
                    return Result(*function(problem, with_entropy))
            logprob, entropy = function(problem, with_entropy)
            loss = textbook_loss(problem.case.job, logprob, entropy, problem.batch)
            return _finish(problem, loss, logprob, entropy)

        return call

    return prepare


def _nothing_wrong(case_or_device: object) -> None:
    return None


def _needs(*packages: str, gpu: bool) -> Callable[[torch.device], str | None]:
    """absent(): the packages must import, and the device must be a GPU where `gpu` says so."""

    def absent(device: torch.device) -> str | None:
        for package in packages:
            try:
                importlib.import_module(package)
            except ModuleNotFoundError as error:
                return f"{package} does not import: {error}. Install it to have it measured."
            except Exception as error:  # whatever a broken package raises on import is its reason, not our crash
                return f"{package} fails on import: {type(error).__name__}: {str(error).splitlines()[0]}"
        return "its kernels need a CUDA device." if gpu and device.type != "cuda" else None

    return absent


def _without_entropy(jobs: tuple[str, ...], why: str = "") -> Callable[[Case], str | None]:
    """cannot(): no entropy, and of the other jobs those not in `jobs` for the reason `why`."""

    def cannot(case: Case) -> str | None:
        if case.job == "score":
            return "returns no entropy."
        if case.job == "trapo":
            return "has no entropy, so no entropy gradient."
        return None if case.job in jobs else why

    return cannot


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
    return Contender(name, about, prepare, _torch_keeps if new_gradients else _nothing_wrong, cannot, floor=True)


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
    return _from_logprob(lambda p, with_entropy: statistics(p.hidden, p.weight, p.target, with_entropy))(problem)


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

    return _mean_or_each(loss)


def _mean_or_each(loss: Callable[[Problem, str], Tensor]) -> Callable[[Problem], Call]:
    """A cross-entropy: its own mean for SFT, per-token losses under a policy loss otherwise."""

    def prepare(problem: Problem) -> Call:
        if problem.case.job == "sft":
            return lambda: _finish(problem, loss(problem, "mean"))
        return _from_logprob(lambda p, _: (-loss(p, "none"), None))(problem)

    return prepare


# Peers


def _liger(accum_dtype: torch.dtype | None) -> Callable[[Problem], Call]:
    def loss(p: Problem, reduction: str) -> Tensor:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=accum_dtype)(p.weight, p.hidden, p.target)

    return _mean_or_each(loss)


def _liger_grpo(problem: Problem) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    length = problem.sequence_length
    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=problem.hidden.is_cuda, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="bnpo"
    )
    batch, shape = problem.batch, (-1, length)

    def call() -> Result:
        loss = fused(
            problem.hidden.view(*shape, problem.hidden.shape[1]),
            problem.weight,
            batch.target.view(shape),
            batch.active.view(shape).float(),
            batch.advantage.view(shape)[:, 0],
            old_per_token_logps=batch.old_logprob.view(shape),
        )[0]
        return _finish(problem, loss)

    return call


def _grpo_only(case: Case) -> str | None:
    if case.job == "trapo":
        return "has one loss for all tokens and no entropy gradient."
    if case.job != "grpo":
        return "computes the GRPO loss only."
    length = case.sequence_length or max(1, case.num_rows // 8)
    return f"needs sequences of one length; {case.num_rows} rows are no multiple of {length}." if case.num_rows % length else None


def _cut_cross_entropy(p: Problem, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.hidden, p.weight, p.target, reduction=reduction)


def _cce_cannot(case: Case) -> str | None:
    if case.dtype == "float32":
        return "its backward needs bfloat16 or float16."
    return _without_entropy(("sft", "grpo"))(case)


def _trl(problem: Problem, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("entropy",) if with_entropy else ()
    target = problem.target.clamp(min=0)
    # 32768 columns per tile is TRL's own setting, _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py (1.16.0)
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, target, 1.0, 32768, None, 1.0, outputs
    )
    return logprob, entropy


def _quack(problem: Problem) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: _finish(problem, chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.target))


def _quack_cannot(case: Case) -> str | None:
    if case.num_rows % 8 or case.vocab_size % 8:
        return "needs N and V divisible by 8."
    return _without_entropy(("sft",), "gives one summed loss: a per-token policy loss cannot follow it.")(case)


def _verl(problem: Problem, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(problem.hidden, problem.weight, problem.target.clamp(min=0), 1.0, "none")


def _verl_cannot(case: Case) -> str | None:
    return f"needs D divisible by 128, got {case.hidden_size}." if case.hidden_size % 128 else None


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

        def call() -> Result:
            if fresh:
                free_kept_memory()
            with _chunk(problem.case):
                if objective is None:
                    with torch.no_grad():
                        out = linear_logprob(hidden, weight, problem.target, with_entropy=True, **settings)
                    return Result(out.logprob, out.entropy)
                if single_pass:
                    out = linear_policy_loss(hidden, weight, batch, objective, **settings)
                    return _finish(problem, out.loss, out.logprob, out.entropy)
                wanted = problem.job.entropy != "none"
                stats = linear_logprob(hidden, weight, problem.target, with_entropy=wanted, **settings)
                out = policy_loss(stats.logprob, stats.entropy, batch, objective, backend=backend)
                return _finish(problem, out.loss, stats.logprob, stats.entropy)

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
    first = Contender(f"ours ({backend})", f"{about}: single pass", one, absent, _nothing_wrong, ours=True)
    if backend == "reference":
        return [first._replace(about=f"{about}: full logits, autograd")]
    return [
        first,
        Contender(f"ours, two-phase ({backend})", two_about, two, absent, _only_losses, ours=True),
    ]


_cross_entropy_only = _without_entropy(("sft", "grpo"))
_liger_flce, _liger_chunked = _needs("liger_kernel.transformers", gpu=True), _needs("liger_kernel.chunked_loss", gpu=False)
_cce, _trl_kernels = _needs("cut_cross_entropy", gpu=True), _needs("trl.kernels", "trl.trainer.utils", gpu=False)
_quack_lce, _verl_lce = (
    _needs(name, gpu=True) for name in ("quack.linear_cross_entropy", "verl.utils.kernel.linear_cross_entropy")
)
# name, about, prepare, absent, cannot
_THEIRS = [
    ("eager", "PyTorch: full logits in the head's dtype, fp32 softmax", _from_logprob(_eager), _nothing_wrong, _nothing_wrong),
    ("torch.compile", "the same function, compiled", _compiled, _no_compiler, _nothing_wrong),
    ("F.linear_cross_entropy", "torch's own, reference path", _torch_lce(False), _torch_absent, _cross_entropy_only),
    ("F.linear_cross_entropy, chunked", "torch's own, default options", _torch_lce(True), _torch_absent, _cross_entropy_only),
    ("Liger FLCE", "liger-kernel, defaults", _liger(None), _liger_flce, _cross_entropy_only),
    ("Liger FLCE, fp32 dWeight", "accum_dtype=float32", _liger(torch.float32), _liger_flce, _cross_entropy_only),
    ("Liger fused GRPO", "liger-kernel, LigerFusedLinearGRPOLoss, bnpo", _liger_grpo, _liger_chunked, _grpo_only),
    ("cut-cross-entropy", "Apple's, default gradient filter", _mean_or_each(_cut_cross_entropy), _cce, _cce_cannot),
    ("TRL chunked logprob", "trl.kernels.ChunkedLogProbFunction", _from_logprob(_trl), _trl_kernels, _nothing_wrong),
    ("quack", "quack-kernels, chunks of 4096 rows", _quack, _quack_lce, _quack_cannot),
    ("verl", "verl.utils.kernel.linear_cross_entropy", _from_logprob(_verl), _verl_lce, _verl_cannot),
]
CONTENDERS: list[Contender] = [
    *(_floor(gemms) for gemms in (1, 3, 4)),
    _floor(3, new_gradients=True),
    *(Contender(*peer) for peer in _THEIRS),
    *(ours for backend in ("triton", "torch", "native", "reference") for ours in _ours_both(backend)),
    Contender(
        "ours, nothing kept (native)",
        "all of its memory is new, as everyone's is",
        _ours("native", single_pass=True, fresh=True),
        lambda device: _torch_keeps(device) or _backend_absent("native")(device),
        _nothing_wrong,
        ours=True,
    ),
    *(_ours_fused(backend) for backend in ("triton_fused", "native_fused")),
]
BY_NAME = {contender.name: contender for contender in CONTENDERS}
