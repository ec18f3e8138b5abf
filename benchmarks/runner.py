"""The runner: question by question, case by case, every contender checked against fp64 before it is timed."""

from __future__ import annotations

import argparse
import datetime
import gc
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import isolate, measure, provenance, questions, report, store
from benchmarks.account import memory_formula
from benchmarks.contenders import BY_NAME, CONTENDERS, Contender
from benchmarks.problem import Case, Problem, build, errors, truth

RESERVE_SECONDS = 12  # for the report
WRONG = {"logprob_max_nats": 0.25, "entropy_max_nats": 0.25, "grad_hidden_relative": 0.05, "grad_weight_relative": 0.05}


class BudgetSpent(BaseException):
    """The budget is over: the case at hand is given up, the finished ones are kept. No `except Exception` may swallow it."""


def main(arguments: list[str] | None = None) -> int:
    """`python -m benchmarks`."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda needs a CUDA device, and torch sees none. Use --device cpu.", file=sys.stderr)
        return 2
    started = time.monotonic()
    path = Path(options.out) / provenance.folder(options.device) / "results.jsonl"
    work, done = _pending(options, path)
    _say(f"{len(work)} cases to measure, {done} of this revision are there already: {path}")
    budget = Budget(options.budget * 60 - RESERVE_SECONDS)
    left = len(work)
    try:
        with budget:
            for index, case in enumerate(work):
                minutes = f"{(time.monotonic() - started) / 60:.1f} of {options.budget:g} min"
                _say(f"[{index + 1}/{len(work)} {case.question}, {minutes}] {case.title}")
                _one(case, options, path, budget.remaining() / (len(work) - index))
                left -= 1
    except BudgetSpent:
        _say(f"the budget of {options.budget:g} min is spent: {left} cases are left. The same command goes on with them.")
    else:
        _say("nothing is left to measure.")
    if path.exists():
        _say(f"report: {report.write(path)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "questions",
        nargs="*",
        metavar="QUESTION",
        type=_one_of(questions.NAMES),
        help=f"of {', '.join(questions.NAMES)}; none means all",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=15.0, metavar="MINUTES", help="ends by then with what it has")
    parser.add_argument("--out", default="benchmarks/results", metavar="DIR")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a dry run of every code path, no figures to quote")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="CONTENDER", type=_one_of(list(BY_NAME)), help="leave one out; repeatable"
    )
    parser.add_argument("--rounds", type=int, default=measure.MAX_ROUNDS, help="at most this many timed rounds per case")
    return parser


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"{value!r} is not one of: {', '.join(names)}")
        return value

    return check


class Budget:
    """Raises BudgetSpent from an alarm, wherever the program is, after `seconds`."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def __enter__(self) -> Budget:
        self._before = signal.signal(signal.SIGALRM, self._ring)
        if self.remaining() == 0.0:
            raise BudgetSpent
        signal.setitimer(signal.ITIMER_REAL, self.remaining())
        return self

    def __exit__(self, *_) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    @staticmethod
    def _ring(*_) -> None:
        raise BudgetSpent


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _pending(options: argparse.Namespace, path: Path) -> tuple[list[Case], int]:
    """The cases that the results file lacks, and how many it has."""
    names = options.questions or questions.NAMES
    cases = [case for name in names for case in questions.load(name).cases(options.device, options.small)]
    rows, environment = store.read(path), provenance.environment(options.device)
    work = [c for c in cases if not store.finished(rows, c, [x.name for x in _chosen(c, options)], environment)]
    return work, len(cases) - len(work)


def _chosen(case: Case, options: argparse.Namespace) -> list[Contender]:
    return [c for c in CONTENDERS if c.name not in options.skip and (not case.contenders or c.name in case.contenders)]


def _one(case: Case, options: argparse.Namespace, path: Path, seconds: float) -> None:
    """Measure one case within about `seconds` and append its rows; those with figures also when the budget ends in its midst."""
    chosen, environment = _chosen(case, options), provenance.environment(options.device)
    rows = {c.name: _excused(c, case, options.device) for c in chosen}
    able = [c for c in chosen if rows[c.name] is None]
    try:
        _MEASURES[case.measure](case, able, options, seconds, rows)
    except BudgetSpent:
        _write(case, path, {name: row | {"partial": True} for name, row in rows.items() if _has_figures(row)}, environment)
        raise
    _write(case, path, rows, environment)


def _has_figures(row: dict | None) -> bool:
    return row is not None and ("ratio" in row or "first_call_ms" in row or "longest_tokens" in row)


def _write(case: Case, path: Path, rows: dict[str, dict], environment: dict) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for row in rows.values():
        row["note"] = row.get("note") or ""
    shared = {"case": case.key, "title": case.title, "measured_at": now, "environment": environment}
    store.append(path, [{"contender": name} | row | shared for name, row in rows.items()])
    for name, row in rows.items():
        if row["status"] not in ("absent", "cannot"):
            _say(f"    {name}: {_brief(row)}")


def _excused(contender: Contender, case: Case, device: str) -> dict | None:
    """A row that says why a contender does not run here, or None."""
    reason = contender.absent(torch.device(device))
    if reason is not None:
        return {"status": "absent", "reason": reason}
    reason = contender.cannot(case)
    return None if reason is None else {"status": "cannot", "reason": reason}


def _brief(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row.get('reason', '')}"
    parts = [f"{row['median_ms']:.2f} ms" if "median_ms" in row else "", f"{row['ratio']:.2f} × floor" if "ratio" in row else ""]
    parts += [
        f"{row['peak_mib']:.0f} MiB" if "peak_mib" in row else "",
        f"first {row['first_call_ms']:.0f} ms" if "first_call_ms" in row else "",
    ]
    parts += [f"{row['longest_tokens']} tokens" if "longest_tokens" in row else ""]
    return ", ".join(part for part in parts if part) or "checked"


Rows = dict[str, dict]  # by contender; None for one that still has to be measured


def _time(case: Case, able: list[Contender], options: argparse.Namespace, seconds: float, rows: Rows) -> None:
    """Check all, then time those that passed, interleaved with the floor, then their memory."""
    problem = build(case, options.device)
    checked, calls = _check(problem, able)
    rows |= checked
    if case.measure == "error" or not calls:
        return
    floor = next((c.name for c in able if c.floor and c.name in calls), None)
    timings = measure.interleave(calls, measure.clock(options.device), seconds / 2, 2 if options.small else options.rounds)
    for name in calls.keys() - timings.keys():
        rows[name] |= {"status": "out of memory", "reason": "beside the inputs and the floor's buffers, while it was timed"}
    for name, timing in timings.items():
        rows[name] |= measure.summary(timing, timings.get(floor))
        if options.device == "cuda":
            rows[name] |= {"sm_clock": provenance.smi("clocks.sm")} | measure.cuda_counts(calls[name])
    if case.with_memory or options.device == "cuda":
        for contender in able:
            if contender.name in timings and not contender.floor:
                rows[contender.name] |= _memory(case, contender.name, options.device, calls[contender.name])


def _check(problem: Problem, able: list[Contender]) -> tuple[dict[str, dict], dict[str, Callable]]:
    """(row with status and errors, call) of each contender; only those that agree with fp64 keep their call."""
    exact = truth(problem)
    rows, calls = {}, {}
    active = exact.logprob[problem.batch.active]
    data = {"mean_logprob": active.mean().item(), "mean_entropy": exact.entropy[problem.batch.active].mean().item()}
    for contender in able:
        row, call = _attempt(lambda contender=contender: contender.prepare(problem))
        if call is not None and contender.floor:
            rows[contender.name], calls[contender.name] = {"status": "ok"}, call
            continue
        if call is not None:
            row, result = _attempt(call)
        if row is None:
            row = {"status": "ok", "errors": errors(result, exact, problem.batch), "data": data}
            bad = [f"{k} {v:.2g}, at most {WRONG[k]:g}" for k, v in row["errors"].items() if k in WRONG and not v <= WRONG[k]]
            if bad:
                row |= {"status": "wrong", "reason": "; ".join(bad)}
            else:
                calls[contender.name] = call
            del result
        rows[contender.name] = row
        _free(problem)
    return rows, calls


def _attempt(call: Callable[[], object]) -> tuple[dict | None, object]:
    """(None, result), or (row that says what went wrong, None)."""
    try:
        return None, call()
    except measure.OUT_OF_MEMORY as error:
        return {"status": "out of memory", "reason": str(error).splitlines()[0]}, None
    except Exception as error:  # recorded as this contender's failure; the others are still measured
        return {"status": "failed", "reason": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}, None


def _free(problem: Problem) -> None:
    """Give a GPU's memory back before the next contender asks for it."""
    if problem.hidden.is_cuda:
        gc.collect()
        torch.cuda.empty_cache()


def _memory(case: Case, name: str, device: str, call: Callable) -> dict[str, object]:
    formula = memory_formula(name, case, device)
    found = {} if formula is None else {"formula_mib": formula[0], "formula": formula[1]}
    if device == "cuda":
        row, peak = _attempt(lambda: measure.cuda_peak_mib(call))
    else:
        row, peak = _attempt(lambda: isolate.measure(case, name, device, seconds=300)["peak_mib"])
    return found | ({"peak_mib": peak} if row is None else {"note": f"peak memory: {row['reason']}"})


def _first_call(case: Case, able: list[Contender], options: argparse.Namespace, seconds: float, rows: Rows) -> None:
    for contender in able:
        if contender.floor:
            rows[contender.name] = {"status": "cannot", "reason": "has nothing to compile."}
            continue
        row, found = _attempt(lambda c=contender: isolate.measure(case, c.name, options.device, 600, cold_caches=True))
        rows[contender.name] = row or {"status": "ok", **found}


def _longest(case: Case, able: list[Contender], options: argparse.Namespace, seconds: float, rows: Rows) -> None:
    """Double N until it does not fit; powers of two only, at most 2^19 tokens, beyond which building the inputs is the limit."""
    for contender in able:
        if contender.floor:
            rows[contender.name] = {"status": "cannot", "reason": "keeps all logits by design."}
            continue
        tokens, row = 0, {"status": "ok"}
        for k in range(12, 20):
            problem = build(Case(**case.key | {"num_rows": 2**k}), options.device)
            failed, result = _attempt(lambda c=contender, p=problem: c.prepare(p)())
            _free(problem)
            del problem, result
            if failed is not None:
                row["stopped_by"] = f"{failed['status']}: {failed['reason']}"
                break
            tokens = 2**k
        rows[contender.name] = row | {"longest_tokens": tokens}


def _step(case: Case, able: list[Contender], options: argparse.Namespace, seconds: float, rows: Rows) -> None:
    step = questions.load(case.question)
    names = [c.name for c in able]
    failed, found = _attempt(lambda: step.run(case, options.device, names, seconds))
    if failed is None:
        rows |= {name: {"status": "ok", **figures} for name, figures in found.items()}
    else:
        rows |= {name: dict(failed) for name in names}


_MEASURES = {"time": _time, "error": _time, "first_call": _first_call, "longest": _longest, "step": _step}
