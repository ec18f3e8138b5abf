"""One case from inputs to rows: every contender checked against fp64, then timed, then weighed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import torch

from benchmarks import isolate, measure, provenance, questions
from benchmarks.account import memory_formula
from benchmarks.contenders import Contender
from benchmarks.journal import Journal
from benchmarks.problem import Case, Problem, Result, build, errors, statistics, truth

WRONG = {"logprob_max_nats": 0.25, "entropy_max_nats": 0.25, "grad_hidden_relative": 0.05, "grad_weight_relative": 0.05}
DEVICE_LOST = 3  # exit code of a worker whose CUDA context an error has broken: every later call in it would fail too
TIMED_SHARE = 0.2  # of a case's time goes to rounds beyond the first ones; inputs, truth, checks and memory take the rest
LONGEST_LIMIT_MIB = 512  # on a CPU, which swaps instead of refusing, the longest context is asked within a limit
LONGEST_POWERS = {"cpu": range(8, 14), "cuda": range(12, 20)}  # beyond these building the inputs is what takes long


def wrong(found: dict[str, float]) -> list[str]:
    """What is too far from fp64 to be timed; [] where nothing is."""
    return [
        f"{name} {error:.2g}, at most {WRONG[name]:g}"
        for name, error in found.items()
        if name in WRONG and not error <= WRONG[name]
    ]


Rows = dict[str, dict]  # by contender; None for one that still has to be measured


class Bench:
    """How to measure on one device: at most `rounds` rounds, tiny shapes if `small`; `journal` is told who runs; `counts`: on a GPU
    launches and host syncs are counted, too."""

    def __init__(self, device: str, rounds: int, small: bool, journal: Journal, counts: bool = True):
        self.device, self.rounds, self.small, self.journal = device, rounds, small, journal
        self.counts = counts and device == "cuda"

    def run(self, case: Case, able: list[Contender], seconds: float, rows: Rows) -> None:
        """Fill `rows` with the figures of `able`, in about `seconds`; what is there stays there when it is interrupted."""
        measures = {"first_call": self._first_call, "longest": self._longest, "step": self._step}
        measures.get(case.measure, self._time)(case, able, seconds, rows)

    def _time(self, case: Case, able: list[Contender], seconds: float, rows: Rows) -> None:
        """Check all, then time those that passed, interleaved with the floor, then their memory."""
        _, calls = self._checked(case, able, rows)
        if case.measure == "error" or not calls:
            return
        floor = next((c.name for c in able if c.floor and c.name in calls), None)
        rounds = min(2, self.rounds) if self.small else self.rounds
        timings: dict[str, measure.Timing] = {}
        try:
            given = (calls, measure.clock(self.device), seconds * TIMED_SHARE, rounds, self.journal.enter, timings)
            _, failed = measure.interleave(*given)
        finally:  # whole rounds count where the budget ends in the midst of one
            whole = measure.whole_rounds(timings)
            for name, timing in whole.items():
                rows[name] |= measure.summary(timing, whole.get(floor))
        self.journal.leave()
        for name, error in failed.items():
            rows[name] |= self._failure(name, error)
            rows[name]["reason"] += " (while it was timed, beside the floor's buffers)"
        if self.device == "cuda" and floor in timings:  # clocks once per case: to start nvidia-smi takes about a second
            failed, found = self._attempt(floor, lambda: provenance.clocks(calls[floor], rows[floor]["median_ms"]))
            rows[floor] |= found if failed is None else {"note": f"clocks: {failed['reason']}"}
        weighed = [c.name for c in able if c.name in timings and not c.floor] if case.with_memory or self.device == "cuda" else []
        for name in weighed:
            rows[name] |= self._memory(case, name, calls[name])
        for name in weighed if self.counts else ():  # last: where the profiler hangs, all else is known by then
            failed, found = self._attempt(name, lambda name=name: measure.cuda_counts(calls[name]))
            rows[name] |= found if failed is None else {"note": f"counts: {failed['reason']}"}

    def _checked(self, case: Case, able: list[Contender], rows: Rows) -> tuple[Problem | None, dict[str, Callable]]:
        """The case's inputs and the calls that agree with fp64; `rows` gets every contender's errors, or why it does not run."""
        try:
            problem = build(case, self.device)
            exact = truth(problem)
        except Exception as error:  # too large for this machine, say: the next case may not be
            failure = self._failure("the inputs", error)
            failure["reason"] = f"the inputs and their fp64 truth: {failure['reason']}"
            rows |= {contender.name: dict(failure) for contender in able}
            return None, {}
        return problem, self._check(problem, exact, able, rows)

    def _check(self, problem: Problem, exact: Result, able: list[Contender], rows: Rows) -> dict[str, Callable]:
        """Fill `rows` with status and errors of each contender; the calls of those that agree with fp64."""
        calls, data = {}, statistics(exact, problem.batch)
        for contender in able:
            row, call = self._attempt(contender.name, lambda contender=contender: contender.prepare(problem))
            if row is None:
                row, result = self._attempt(contender.name, call)  # the warm-up too
            if row is None and contender.floor:
                row, calls[contender.name] = {"status": "ok"}, call
            elif row is None:
                row = {"status": "ok", "errors": errors(result, exact, problem.batch), "data": data}
                if bad := wrong(row["errors"]):
                    row |= {"status": "wrong", "reason": "; ".join(bad)}
                else:
                    calls[contender.name] = call
            result = None
            rows[contender.name] = row
            self._free()
        return calls

    def _attempt(self, name: str, call: Callable[[], object]) -> tuple[dict | None, object]:
        """(None, result), or (row that says what went wrong, None)."""
        self.journal.enter(name)
        try:
            result = call()
            if self.device == "cuda":
                torch.cuda.synchronize()  # or a kernel's error would be the next contender's
        except Exception as error:  # recorded as this contender's failure; the others are still measured
            row, result = self._failure(name, error), None
        else:
            row = None
        self.journal.leave()
        return row, result

    def _failure(self, name: str, error: Exception) -> dict:
        """The row of an error; a CUDA context that it has broken ends this process, and the supervisor goes on in a new one."""
        reason = (str(error).strip().splitlines() or [""])[0]
        if measure.out_of_memory(error):
            return {"status": "out of memory", "reason": reason}
        reason = f"{type(error).__name__}: {reason}"
        if self.device == "cuda" and measure.context_is_lost():
            self.journal.enter(name, reason)
            sys.exit(DEVICE_LOST)
        return {"status": "failed", "reason": reason}

    def _free(self) -> None:
        """Give a GPU's memory back before the next contender asks for it."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _memory(self, case: Case, name: str, call: Callable) -> dict[str, object]:
        formula = memory_formula(name, case, self.device)
        found = {} if formula is None else {"formula_mib": sum(formula.values()) / 2**20}
        if self.device == "cuda":
            row, peak = self._attempt(name, lambda: measure.cuda_peak_mib(call))
        else:
            row, peak = self._attempt(name, lambda: isolate.measure(case, name, self.device, seconds=300)["peak_mib"])
        return found | ({"peak_mib": peak} if row is None else {"note": f"peak memory: {row['reason']}"})

    def _first_call(self, case: Case, able: list[Contender], seconds: float, rows: Rows) -> None:
        for name in (c.name for c in able):
            row, found = self._attempt(name, lambda name=name: isolate.measure(case, name, self.device, 600, cold_caches=True))
            rows[name] = row or {"status": "ok", **found}

    def _longest(self, case: Case, able: list[Contender], seconds: float, rows: Rows) -> None:
        """Double N until it does not fit."""
        powers = range(4, 6) if self.small else LONGEST_POWERS[self.device]
        for contender in able:
            if self.device == "cpu":
                row, found = self._attempt(
                    contender.name, lambda c=contender: isolate.longest(case, c.name, powers, LONGEST_LIMIT_MIB, seconds=300)
                )
                rows[contender.name] = row or {"status": "ok", **found}
            else:
                rows[contender.name] = {"status": "ok", **self._longest_here(case, contender, powers)}

    def _longest_here(self, case: Case, contender: Contender, powers: range) -> dict[str, object]:
        tokens = 0
        for k in powers:
            larger = Case(**case.key | {"num_rows": 2**k})
            failed, result = self._attempt(contender.name, lambda c=larger: contender.prepare(build(c, self.device))())
            del result
            self._free()
            if failed is not None:
                return {"longest_tokens": tokens, "stopped_by": f"{failed['status']}: {failed['reason']}"}
            tokens = 2**k
        return {"longest_tokens": tokens}

    def _step(self, case: Case, able: list[Contender], seconds: float, rows: Rows) -> None:
        problem, calls = self._checked(case, able, rows)
        if not calls:
            return
        step = questions.load(case.question)
        found, failed = step.run(problem, calls, self.device, seconds, self.journal.enter)
        self.journal.leave()
        for name, figures in found.items():
            rows[name] = rows.get(name, {"status": "ok"}) | figures
        for name, error in failed.items():
            rows[name] = self._failure(name, error)
