"""The runner: question by question, case by case, in a worker process that a contender may crash or hang without ending the run.

The supervisor starts the worker again as long as there is time; the contender that ran when the worker died is recorded as crashed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import measure, provenance, questions, report, store
from benchmarks.cell import Bench, Rows
from benchmarks.contenders import BY_NAME, CONTENDERS, Contender
from benchmarks.journal import Journal
from benchmarks.problem import JOBS, Case

RESERVE_SECONDS = 12  # for the report
HUNG_SECONDS = 30.0  # for one call of ours on a GPU; a few kernels of Triton compile in seconds
HUNG_PEER_SECONDS = 120.0  # for one of theirs, which may try dozens of settings first
LONGEST_CALL_SECONDS = 700.0  # for any other; processes that measure memory and first calls have limits of their own
POLL_SECONDS = 2.0
MOST_DEATHS = 2  # of a backend's contenders, before they are left out of the cases to come; a single one in a short run:
SHORT_SECONDS = 360.0
GRACE_SECONDS = 45  # after the budget, for a call that does not return to Python; then the worker is killed
ONE_BY_ONE = ("first_call", "longest")  # measures that take a contender at a time, so that a run goes on in the midst of a case


# What compiles for minutes or runs out of memory, and what nobody would choose on a GPU.
_BRIEFLY_LEFT_OUT = ("torch.compile", "ours (reference)", "ours (torch)", "ours, two-phase (torch)", "floor, 4 GEMMs")


class BudgetSpent(BaseException):
    """The budget is over: the case at hand is given up, the finished ones are kept. No `except Exception` may swallow it."""


def main(arguments: list[str] | None = None) -> int:
    """`python -m benchmarks`."""
    typed = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(typed)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda needs a CUDA device, and torch sees none. Use --device cpu.", file=sys.stderr)
        return 2
    if options.worker_seconds is not None:
        return work(options)
    return supervise([sys.executable, "-m", "benchmarks", *typed], _journal(options), options.budget * 60)


def supervise(worker: list[str], journal: Journal, seconds: float) -> int:
    """Run `worker` until it ends well or `seconds` are over; returns an exit status."""
    end = time.monotonic() + seconds
    journal.leave()  # a run that was stopped by hand is nobody's fault
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the worker goes too
    deaths: Counter[str] = Counter()  # by backend
    most = MOST_DEATHS if seconds >= SHORT_SECONDS else 1
    while True:
        left = max(0.0, end - time.monotonic())
        skipped = [word for name in BY_NAME if deaths[_backend(name)] >= most for word in ("--skip", name)]
        process = subprocess.Popen([*worker, provenance.WORKER_FLAG, f"{left:.1f}", *skipped])
        try:
            code, death = _watch(process, journal, end + GRACE_SECONDS)
        finally:
            process.kill()
            process.wait()
        if code in (0, 2):
            return code
        blamed = journal.blame(death)
        if blamed is None:
            print(f"benchmarks: the worker ended while no contender ran: {death}", file=sys.stderr)
            return 1
        path, row = blamed
        deaths[_backend(row["contender"])] += row["status"] == "crashed"
        _say(f"    {row['contender']}: {'crashed' if row['status'] == 'crashed' else 'after it was timed'}: {row['reason']}")
        if end - time.monotonic() < RESERVE_SECONDS:
            _say(f"the budget is spent. The same command goes on. Report: {report.write(path)}")
            return 0


def _watch(process: subprocess.Popen, journal: Journal, end: float) -> tuple[int | None, str]:
    """(exit code, how it ended) of the worker; the code is None for one that hangs, in a kernel that no alarm can interrupt."""
    while time.monotonic() < end:
        try:
            code = process.wait(POLL_SECONDS)
            return code, _death(code)
        except subprocess.TimeoutExpired:
            found = journal.running()
        if found is not None and found[1] > (limit := _patience(found[0])):
            return None, f"hung: one call did not return within {limit:g} s."
    return None, f"did not return until {GRACE_SECONDS} s after the end of the budget."


def _backend(contender: str) -> str:
    """What the ways of a contender share: "native" of "ours, two-phase (native)"; the name itself where there is one way."""
    return contender.rpartition("(")[2].rstrip(")")


def _patience(row: store.Row) -> float:
    """Seconds that one call may take: on a GPU a kernel's, or a compiler's; elsewhere that of the processes that measure memory."""
    on_gpu, measure = row.get("environment", {}).get("driver") is not None, row.get("case", {}).get("measure")
    if not on_gpu or row["contender"] == "torch.compile" or measure in ("first_call", "step"):
        return LONGEST_CALL_SECONDS
    ours = row["contender"].startswith(("ours", "floor"))
    return HUNG_SECONDS if ours and measure != "longest" else HUNG_PEER_SECONDS  # whose inputs are built in the call


def _death(code: int) -> str:
    return f"ended its process with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}."


def _journal(options: argparse.Namespace) -> Journal:
    return Journal(Path(options.out) / f"{options.device}.running.json")


def work(options: argparse.Namespace) -> int:
    """Measure what is missing, in this process, for `options.worker_seconds`."""
    started, seconds = time.monotonic(), options.worker_seconds
    path = Path(options.out) / provenance.folder(options.device) / "results.jsonl"
    work, done = _pending(options, path)
    _say(f"{len(work)} cases to measure, {done} of this revision are there already: {path}")
    budget, journal = Budget(seconds - RESERVE_SECONDS), _journal(options)
    bench = Bench(options.device, options.rounds, options.small, journal, counts=not options.brief)
    left = len(work)
    try:
        with budget:
            costs = [_cost(case, options) for case in work]
            for index, case in enumerate(work):
                minutes = f"{(time.monotonic() - started) / 60:.1f} of {seconds / 60:.1f} min"
                _say(f"[{index + 1}/{len(work)} {case.question}, {minutes}] {case.title}")
                _one(case, bench, _chosen(case, options), path, budget.remaining() * costs[index] / sum(costs[index:]))
                left -= 1
    except BudgetSpent:
        journal.leave()
        _say(f"the budget of {options.budget:g} min is spent: {left} cases are left. The same command goes on with them.")
    else:
        _say("nothing is left to measure.")
    if path.exists() and options.report:
        _say(f"report: {report.write(path)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
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
    parser.add_argument("--brief", action="store_true", help=f"count no launches, leave out {', '.join(_BRIEFLY_LEFT_OUT)}")
    parser.add_argument("--rounds", type=int, default=measure.MAX_ROUNDS, help="at most this many timed rounds per case")
    parser.add_argument("--no-report", dest="report", action="store_false", help="leave it to python -m benchmarks.report")
    parser.add_argument(provenance.WORKER_FLAG, type=float, help=argparse.SUPPRESS)
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
    each = [questions.load(name).cases(options.device, options.small) for name in names]
    cases = [case for level in itertools.zip_longest(*each) for case in level if case is not None]  # the most telling of each first
    rows = store.read(path)
    work = [case for case in cases if not {x.name for x in _chosen(case, options)} <= _there(rows, case, options.device).keys()]
    return work, len(cases) - len(work)


def _there(rows: list[store.Row], case: Case, device: str) -> dict[str, store.Row]:
    """By contender, the whole rows of a case; not of one that was absent then and is there now."""
    found = store.whole(rows, case, provenance.environment(device))
    return {
        name: row
        for name, row in found.items()
        if name in BY_NAME and not (row["status"] == "absent" and BY_NAME[name].absent(torch.device(device)) is None)
    }


def _chosen(case: Case, options: argparse.Namespace) -> list[Contender]:
    left_out = {*options.skip, *(_BRIEFLY_LEFT_OUT if options.brief else ())}
    return [c for c in CONTENDERS if c.name not in left_out and (not case.contenders or c.name in case.contenders)]


def _cost(case: Case, options: argparse.Namespace) -> float:
    """What share of the remaining time a case gets: its GEMMs for each contender that runs, and something for its inputs."""
    able = sum(_excused(contender, case, options.device) is None for contender in _chosen(case, options))
    return 1e10 + case.gemm_flop * JOBS[case.job].gemms * able


def _one(case: Case, bench: Bench, chosen: list[Contender], path: Path, seconds: float) -> None:
    """Measure one case within about `seconds` and append its rows; those with figures also when the budget ends in its midst."""
    environment = provenance.environment(bench.device)
    there = _there(store.read(path), case, bench.device)
    kept = {name for name in there if case.measure in ONE_BY_ONE or not BY_NAME[name].floor}  # others are timed beside a floor
    rows: Rows = {c.name: _excused(c, case, bench.device) for c in chosen if c.name not in kept}
    shared = {"case": case.key, "title": case.title, "environment": environment}
    partial = {} if case.measure in ONE_BY_ONE else {"partial": True}
    bench.journal.begin(path, shared, rows, partial)
    try:
        bench.run(case, [c for c in chosen if c.name in rows and rows[c.name] is None], seconds, rows)
    except SystemExit:  # of a lost device: what is known stands in the journal, from which the supervisor writes it
        raise
    except BaseException:  # the end of the budget; what is known is worth keeping
        _write(path, {name: row | partial for name, row in store.ran(rows).items()}, shared)
        raise
    _write(path, rows, shared)


def _write(path: Path, rows: Rows, shared: dict) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    store.append(path, [{"contender": name, "note": "", **row, **shared, "measured_at": now} for name, row in rows.items()])
    for name, row in store.ran(rows).items():
        _say(f"    {name}: {_brief(row)}")


def _excused(contender: Contender, case: Case, device: str) -> dict | None:
    """A row that says why a contender does not run here, or None."""
    reason = contender.absent(torch.device(device))
    if reason is not None:
        return {"status": "absent", "reason": reason}
    reason = contender.cannot(case) or (_NO_FLOOR.get(case.measure) if contender.floor else None)
    return None if reason is None else {"status": "cannot", "reason": reason}


_NO_FLOOR = {
    "error": "computes nothing that has an error.",
    "first_call": "has nothing to compile.",
    "longest": "keeps all logits by design.",
}


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
