"""The runner: a dry run of every question with small shapes, checks before clocks, budgets, resuming."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import isolate, measure, provenance, questions, readme, regressions, runner, store
from benchmarks.cell import Bench
from benchmarks.contenders import BY_NAME
from benchmarks.journal import Journal
from benchmarks.problem import Case, Result, build, errors, textbook_loss, truth

ROOT = Path(__file__).parents[1]
SLOW = ("compile", "step")
LEFT_OUT = ("torch.compile", "ours (triton)", "ours, two-phase (triton)", "ours (reference)")
SMALL = Case("test", "trapo", 48, 32, 264, "float32")


def _results(out):
    return out / provenance.folder("cpu") / "results.jsonl"


def run(out, *questions, seconds=300.0):
    """The runner's worker on the CPU with tiny shapes; what is slow to compile, to interpret or to run twice is left out."""
    common = ["--small", "--device", "cpu", "--rounds", "2", "--out", str(out), "--worker-seconds", str(seconds)]
    return runner.main([*questions, *common, *(word for name in LEFT_OUT for word in ("--skip", name))])


def bench(rounds=2):
    """Measures on the CPU and keeps no journal."""
    return Bench("cpu", rounds, small=True, journal=Journal(None))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    names = [name for name in questions.NAMES if name not in SLOW]
    assert run(out, *names) == 0
    return _results(out)


@pytest.mark.slow
def test_every_question_answers_and_every_contender_is_checked_or_excused(small_run):
    rows = store.read(small_run)
    assert {row["case"]["question"] for row in rows} == set(questions.NAMES) - set(SLOW)
    for row in rows:
        assert row["status"] in ("ok", "absent", "cannot"), row
        if row["status"] != "ok":
            assert row["reason"].endswith("."), row
        elif row["case"]["measure"] == "longest":
            assert row["longest_tokens"] == 32
        elif not row["contender"].startswith("floor"):
            assert row["errors"], row["contender"]
            timed = row["case"]["measure"] == "time"
            assert ("ratio" in row) == timed and (not timed or row["ratio"] > 0)
        for name in ("device", "revision", "command", "versions", "threads"):
            assert row["environment"][name]


@pytest.mark.slow
def test_memory_was_measured_in_a_process_of_its_own(small_run):
    rows = [row for row in store.read(small_run) if row["case"]["question"] == "trapo" and row["status"] == "ok"]
    measured = {row["contender"] for row in rows if "peak_mib" in row}
    assert {"eager", "ours (torch)"} <= measured, [row.get("note") for row in rows]


@pytest.mark.slow
def test_a_second_run_measures_nothing_again(small_run, capsys):
    before = small_run.read_text()
    assert run(small_run.parents[1], "grpo") == 0
    assert small_run.read_text() == before
    assert "0 cases to measure" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_has_a_table_per_case_and_plots(small_run):
    text = (small_run.parent / "report.md").read_text()
    for name in set(questions.NAMES) - set(SLOW):
        assert f"\n## {name}\n" in text
    for heading in ("## In short", "## Where we lose", "## Memory", "## The data", "## Who competes", "## Not measured here"):
        assert heading in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"time_trapo.png", "memory_trapo.png", "accuracy_time.png"} <= set(pictures)
    assert all((small_run.parent / name).stat().st_size > 5000 for name in pictures)
    assert str(ROOT) not in text


@pytest.mark.slow
def test_the_readme_table_and_its_markers(small_run):
    table = readme.table(store.latest(store.read(small_run)))
    assert "| **ours (torch)** |" in table and "Not in the table: " in table
    text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n"
    assert readme.insert(text, "cpu", "new") == "before\n<!-- bench:cpu -->\nnew\n<!-- /bench:cpu -->\nafter\n"
    with pytest.raises(ValueError, match="add them where the table goes"):
        readme.insert("no markers", "cpu", table)


def test_a_spent_budget_ends_with_what_there_is(tmp_path, capsys):
    assert run(tmp_path, "trapo", seconds=0) == 0
    assert "1 cases are left" in capsys.readouterr().err
    assert not _results(tmp_path).exists()


def test_the_budget_interrupts_a_case_and_keeps_the_finished_ones(tmp_path, monkeypatch, capsys):
    first = Bench._time

    def endless(self, case, *rest):
        if case.peaked:
            return first(self, case, *rest)
        signal.setitimer(signal.ITIMER_REAL, 0.5)  # the budget's own alarm, early, however long a busy machine took to get here
        while True:
            try:
                sum(range(1000))
            except Exception:  # what a contender does with its own errors must not stop the alarm
                continue

    monkeypatch.setattr(Bench, "_time", endless)
    assert run(tmp_path, "accuracy") == 0
    assert "min is spent" in capsys.readouterr().err
    rows = store.read(_results(tmp_path))
    assert rows and all(row["case"]["peaked"] for row in rows)
    assert not (tmp_path / "cpu.running.json").exists(), "nobody crashed"


def test_figures_of_an_interrupted_case_are_kept_and_measured_again(tmp_path, monkeypatch):
    def spent(*_):
        raise runner.BudgetSpent

    monkeypatch.setattr(Bench, "_memory", spent)
    assert run(tmp_path, "trapo") == 0
    path = _results(tmp_path)
    rows = [row for row in store.read(path) if row["status"] == "ok"]
    assert rows and all(row["partial"] and row["ratio"] > 0 for row in rows)
    assert "before this case was whole" in (path.parent / "report.md").read_text()
    case = questions.load("trapo").cases("cpu", small=True)[0]
    assert store.whole(store.read(path), case, provenance.environment("cpu")) == {}


def test_rows_of_threads_that_wait_in_another_way_are_measured_again():
    environment = provenance.environment("cpu")
    row = {"contender": "eager", "case": SMALL.key, "environment": environment}
    assert store.whole([row], SMALL, environment) == {"eager": row}
    assert store.whole([row], SMALL, environment | {"wait_policy": "ACTIVE"}) == {}


def test_what_was_absent_is_measured_once_it_is_there_beside_a_floor_and_nothing_else(tmp_path, monkeypatch):
    names = ("floor, 3 GEMMs", "eager", "ours (torch)")
    case, path, gone = Case("trapo", "trapo", 48, 32, 264, "float32"), tmp_path / "results.jsonl", {"ours (torch)"}
    found = {name: BY_NAME[name]._replace(absent=lambda _, name=name: "is not here." if name in gone else None) for name in names}
    monkeypatch.setattr(runner, "BY_NAME", found)
    runner._one(case, bench(), list(found.values()), path, 1.0)
    environment, rows = "cpu", store.read(path)
    assert {row["contender"]: row["status"] for row in rows} == dict(zip(names, ("ok", "ok", "absent"), strict=True))
    assert runner._there(rows, case, environment).keys() == set(names)
    gone.clear()
    assert runner._there(rows, case, environment).keys() == set(names[:2])
    runner._one(case, bench(), list(found.values()), path, 1.0)
    again = store.read(path)[len(rows) :]
    assert {row["contender"] for row in again} == {"floor, 3 GEMMs", "ours (torch)"} and all(row["ratio"] > 0 for row in again)


def test_the_first_case_of_every_question_comes_before_the_second_of_any(tmp_path, monkeypatch):
    options = runner._parser().parse_args(["trapo", "scoring", "--device", "cuda", "--out", str(tmp_path)])
    monkeypatch.setattr(
        provenance, "environment", lambda device: {name: "" for name in ("device", "revision", "versions", "threads")}
    )
    work, _ = runner._pending(options, tmp_path / "results.jsonl")
    assert [case.question for case in work] == ["trapo", "scoring"] * 3 and work[0].num_rows == work[1].num_rows == 32768


def test_a_run_goes_on_in_the_midst_of_a_case_that_takes_contenders_one_by_one(tmp_path, monkeypatch):
    case = Case("longest", "trapo", 16, 32, 264, "float32", measure="longest")
    chosen, path = [BY_NAME["eager"], BY_NAME["ours (torch)"]], tmp_path / "results.jsonl"
    asked = []

    def longest(case, name, *rest, **more):
        asked.append(name)
        if len(asked) == 2:
            raise runner.BudgetSpent
        return {"longest_tokens": 32}

    monkeypatch.setattr(isolate, "longest", longest)
    with pytest.raises(runner.BudgetSpent):
        runner._one(case, bench(), chosen, path, 1.0)
    runner._one(case, bench(), chosen, path, 1.0)
    assert asked == ["eager", "ours (torch)", "ours (torch)"]
    assert store.whole(store.read(path), case, provenance.environment("cpu")).keys() == {"eager", "ours (torch)"}


@pytest.mark.slow
def test_the_longest_context_on_a_cpu_ends_at_the_limit():
    case = Case("test", "trapo", 16, 32, 4096, "float32", measure="longest")
    found = isolate.longest(case, "eager", range(8, 13), 48, seconds=60)
    assert found["longest_tokens"] in (256, 512, 1024) and "48 MiB" in found["stopped_by"]


def test_inputs_that_do_not_fit_are_a_row_and_no_crash(monkeypatch):
    def refuses(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr("benchmarks.cell.truth", refuses)
    rows = {}
    bench()._time(SMALL, [BY_NAME["eager"]], 1.0, rows)
    assert rows["eager"]["status"] == "out of memory" and "fp64 truth" in rows["eager"]["reason"]


def test_clocks_are_read_once_a_case_beside_the_floor(monkeypatch):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr("benchmarks.cell.build", lambda case, device: build(case, "cpu"))
    monkeypatch.setattr(measure, "clock", lambda device: measure.CpuClock())
    monkeypatch.setattr(measure, "cuda_counts", lambda call: {"launches": 1})
    monkeypatch.setattr(measure, "cuda_peak_mib", lambda call: 1.0)
    monkeypatch.setattr(provenance, "clocks", lambda call, median_ms: {"sm_clock": "1980 MHz"})
    rows, names = {}, ("floor, 3 GEMMs", "eager", "ours (torch)")
    Bench("cuda", 2, small=True, journal=Journal(None))._time(SMALL, [BY_NAME[name] for name in names], 1.0, rows)
    assert [("sm_clock" in rows[name], rows[name].get("launches"), rows[name]["ratio"] > 0) for name in names] == [
        (True, None, True),
        *[(False, 1, True)] * 2,
    ]


def test_time_is_shared_by_work_so_that_a_large_case_gets_more():
    small, large = Case("t", "score", 64, 64, 1024, "float32"), Case("t", "trapo", 2048, 896, 32768, "float32")
    options = runner._parser().parse_args(["--device", "cpu"])
    assert runner._cost(large, options) > 20 * runner._cost(small, options) > 0
    fewer = runner._parser().parse_args(["--device", "cpu", "--skip", "eager"])
    assert runner._cost(large, fewer) < runner._cost(large, options)


def test_the_command_of_a_worker_is_what_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["runner", "trapo", "--budget", "9", "--worker-seconds", "100.0"])
    assert provenance.command() == "python -m benchmarks trapo --budget 9"


def _without_entropy_gradient(problem):
    """Eager, which leaves out what the entropy bonus adds to the gradients."""

    def call():
        log_p = (problem.hidden @ problem.weight.T).log_softmax(-1)
        logprob, entropy = log_p.gather(1, problem.target.clamp(min=0)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1).detach()
        loss = textbook_loss(problem.case.job, logprob, entropy, problem.batch)
        return Result(logprob.detach(), entropy, loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight)))

    return call


def test_a_wrong_contender_is_named_and_not_timed():
    problem = build(SMALL, "cpu")
    eager = BY_NAME["eager"].prepare(problem)
    half = BY_NAME["eager"]._replace(prepare=lambda p: lambda: eager()._replace(grad_weight=eager().grad_weight / 2))
    broken = BY_NAME["eager"]._replace(name="broken", prepare=lambda p: lambda: 1 / 0)
    detached = BY_NAME["eager"]._replace(name="detached", prepare=_without_entropy_gradient)
    nan = BY_NAME["eager"]._replace(name="nan", prepare=lambda p: lambda: eager()._replace(logprob=torch.full((48,), torch.nan)))
    rows = {}
    calls = bench()._check(problem, truth(problem), [half, broken, detached, nan], rows)
    assert rows["eager"]["status"] == "wrong" and "grad_weight_relative 0.5" in rows["eager"]["reason"]
    assert rows["broken"]["status"] == "failed" and "ZeroDivisionError" in rows["broken"]["reason"]
    assert rows["nan"]["status"] == "wrong"
    assert rows["detached"]["status"] == "wrong" and "grad_hidden" in rows["detached"]["reason"]
    assert not calls


def test_rounds_that_are_whole_count_where_the_budget_ends_in_the_midst_of_one(monkeypatch):
    done = []

    def eager():
        done.append(1)
        if len(done) == 7:
            raise runner.BudgetSpent

    monkeypatch.setattr(measure, "clock", lambda device: measure.CpuClock())
    names, rows = ("floor, 3 GEMMs", "eager"), {}
    bench = Bench("cpu", 15, small=False, journal=Journal(None))
    monkeypatch.setattr(
        bench, "_checked", lambda case, able, rows: rows.update({n: {"status": "ok"} for n in names}) or (None, calls)
    )
    calls = dict(zip(names, (lambda: None, eager), strict=True))
    with pytest.raises(runner.BudgetSpent):
        bench._time(SMALL, [BY_NAME[name] for name in names], 1e9, rows)
    assert all(rows[name]["rounds"] == 6 and rows[name]["ratio"] > 0 for name in names)


@pytest.mark.slow
def test_regressions_between_two_result_sets_are_printed(small_run):
    old = store.latest(store.read(small_run))
    assert "No ratio" in regressions.compare(old, old)
    new = json.loads(json.dumps(old))
    row = next(row for group in new for row in group if row["contender"] == "ours (torch)" and "ratio" in row)
    row["ratio"] *= 2
    assert "No ratio" in regressions.compare(old, new), "within its spread"
    row |= dict.fromkeys(("ratio_min", "ratio_p20", "ratio_p80", "ratio_max"), 1e9)  # beyond any hiccup of the machine
    assert "+100% slower" in regressions.compare(old, new)


def test_a_partial_row_stands_until_there_is_a_whole_one_of_its_revision():
    def latest(*rows):
        rows = [{"case": {}, "contender": "x", "environment": {"revision": revision}} | more for revision, more in rows]
        return store.latest(rows)[0][0]

    whole, partial = {"ratio": 1.0}, {"partial": True}
    assert "ratio" in latest(("a", partial), ("a", whole)) and "ratio" in latest(("a", whole), ("a", partial))
    assert "ratio" not in latest(("a", whole), ("b", partial)) and "partial" in latest(("a", partial), ("a", partial))


def test_a_half_written_line_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    store.append(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": 2')
    assert store.read(path) == [{"a": 1}]
    store.append(path, [{"a": 3}])
    assert store.read(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.slow
def test_the_slow_questions_and_torch_compile(tmp_path):
    assert run(tmp_path, "compile", "step") == 0
    rows = store.read(_results(tmp_path))
    first = next(row for row in rows if row["case"]["question"] == "compile" and row["contender"] == "ours (torch)")
    assert first["status"] == "ok" and first["first_call_ms"] > 0
    shares = [row["head_share"] for row in rows if row["case"]["question"] == "step" and row["contender"].startswith("ours")]
    assert shares and all(share < 1 for share in shares)
    case = SMALL
    if (reason := BY_NAME["torch.compile"].absent(torch.device("cpu"))) is None:
        problem = build(case, "cpu")
        assert max(errors(BY_NAME["torch.compile"].prepare(problem)(), truth(problem), problem.batch).values()) < 1e-4
    else:
        assert "C++ compiler" in reason


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["tarpo"])
    assert "'tarpo' is not one of: trapo, scoring" in capsys.readouterr().err


@pytest.mark.slow
def test_python_m_benchmarks_starts():
    out = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "QUESTION" in out.stdout


@pytest.mark.slow
def test_pytest_times_the_same_cases_after_the_same_check():
    pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--small", "-q", "-k", "grpo and (eager or native or FLCE)"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}  # beside others nothing is timed
    out = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=ROOT, env=alone)
    assert out.returncode == 0, out.stdout
    assert "Name (time in" in out.stdout and "grpo, N=48 D=32 V=264, float32: eager" in out.stdout
    assert re.search(r"\d passed, \d skipped", out.stdout), "peers that cannot run here are skipped"
