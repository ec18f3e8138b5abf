"""What every adapter is made of: the contender, its backward, the textbook loss on top of logprobs, and the reasons not to run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.problem import Case, Problem, Result, textbook_loss

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


def finish(problem: Problem, loss: Tensor, logprob: Tensor | None = None, entropy: Tensor | None = None) -> Result:
    """The backward of every contender."""
    trained = [x for x in (problem.hidden, problem.weight) if x.requires_grad]
    detached = (None if x is None else x.detach() for x in (logprob, entropy))
    return Result(*detached, loss.detach(), *torch.autograd.grad(loss, trained))


def from_logprob(function: Callable[[Problem, bool], tuple[Tensor, Tensor | None]]) -> Callable[[Problem], Call]:
    """An adapter from `function(problem, with_entropy) -> (logprob, entropy)`."""

    def prepare(problem: Problem) -> Call:
        def call() -> Result:
            with_entropy = problem.job.entropy != "none"
            if problem.job.objective is None:
                with torch.no_grad():
                    return Result(*function(problem, with_entropy))
            logprob, entropy = function(problem, with_entropy)
            loss = textbook_loss(problem.case.job, logprob, entropy, problem.batch)
            return finish(problem, loss, logprob, entropy)

        return call

    return prepare


def nothing_wrong(case_or_device: object) -> None:
    return None


def needs(*packages: str, gpu: bool) -> Callable[[torch.device], str | None]:
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


def without_entropy(jobs: tuple[str, ...], why: str = "") -> Callable[[Case], str | None]:
    """cannot(): no entropy, and of the other jobs those not in `jobs` for the reason `why`."""

    def cannot(case: Case) -> str | None:
        if case.job == "score":
            return "returns no entropy."
        if case.job == "trapo":
            return "has no entropy, so no entropy gradient."
        return None if case.job in jobs else why

    return cannot


def mean_or_each(loss: Callable[[Problem, str], Tensor]) -> Callable[[Problem], Call]:
    """A cross-entropy: its own mean for SFT, per-token losses under a policy loss otherwise."""

    def prepare(problem: Problem) -> Call:
        if problem.case.job == "sft":
            return lambda: finish(problem, loss(problem, "mean"))
        return from_logprob(lambda p, _: (-loss(p, "none"), None))(problem)

    return prepare
