"""The benchmarks: a dry run of every code path with small shapes, checks before clocks, the report and the README's table."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import account, gpu_test, measure, provenance, questions, report, runner, store
from benchmarks.contenders import BY_NAME, CONTENDERS, _chunk
from benchmarks.problem import JOBS, Case, Result, build, errors, truth
from trapo_kernels import Role
from trapo_kernels.backends import gemm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SLOW = ("compile", "step", "longest")
LEFT_OUT = ("torch.compile", "ours (triton)", "ours, two-phase (triton)", "ours (reference)")
SMALL = Case("test", "trapo", 48, 32, 264, "float32")


def run(out, *arguments):
    """The runner on the CPU with tiny shapes; what is slow to compile, to interpret or to run twice is left out."""
    common = ["--small", "--device", "cpu", "--rounds", "2", "--out", str(out)]
    return runner.main([*arguments, *common, *(word for name in LEFT_OUT for word in ("--skip", name))])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    names = [name for name in questions.NAMES if name not in SLOW]
    assert run(out, *names, "--budget", "5") == 0
    return out / "cpu" / "results.jsonl"


def test_every_question_answers_and_every_contender_is_checked_or_excused(small_run):
    rows = store.read(small_run)
    assert {row["case"]["question"] for row in rows} == set(questions.NAMES) - set(SLOW)
    for row in rows:
        assert row["status"] in ("ok", "absent", "cannot"), row
        if row["status"] != "ok":
            assert row["reason"].endswith("."), row
        elif not row["contender"].startswith("floor"):
            assert row["errors"], row["contender"]
            timed = row["case"]["measure"] == "time"
            assert ("ratio" in row) == timed and (not timed or row["ratio"] > 0)
        for name in ("device", "revision", "command", "versions", "threads"):
            assert row["environment"][name]


def test_memory_was_measured_in_a_process_of_its_own(small_run):
    rows = [row for row in store.read(small_run) if row["case"]["question"] == "trapo" and row["status"] == "ok"]
    measured = {row["contender"] for row in rows if "peak_mib" in row}
    assert {"eager", "ours (torch)"} <= measured, [row.get("note") for row in rows]


def test_a_second_run_measures_nothing_again(small_run, capsys):
    before = small_run.read_text()
    assert run(small_run.parents[1], "grpo", "--budget", "1") == 0
    assert small_run.read_text() == before
    assert "0 cases to measure" in capsys.readouterr().err


def test_the_report_has_a_table_per_case_and_plots(small_run):
    text = (small_run.parent / "report.md").read_text()
    for name in set(questions.NAMES) - set(SLOW):
        assert f"\n## {name}\n" in text
    for heading in ("## Where we lose", "## Who competes", "## Not measured here"):
        assert heading in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert "time_trapo.png" in pictures and all((small_run.parent / name).stat().st_size > 5000 for name in pictures)
    assert str(ROOT) not in text


def test_the_readme_table_and_its_markers(small_run):
    table = report.readme_table(store.latest(store.read(small_run)))
    assert "| ours (torch) |" in table and "Cannot do this job: " in table
    text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n"
    assert report.insert(text, "cpu", "new") == "before\n<!-- bench:cpu -->\nnew\n<!-- /bench:cpu -->\nafter\n"
    with pytest.raises(ValueError, match="add them where the table goes"):
        report.insert("no markers", "cpu", table)


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob("*/results.jsonl")) or ["cpu"])
def test_readme_agrees_with_the_results(folder):
    readme, results = ROOT / "README.md", RESULTS / folder / "results.jsonl"
    marker = f"<!-- bench:{folder} -->"
    if not readme.exists() or marker not in readme.read_text():
        pytest.skip(f"README.md has no {marker} marker yet")
    if not results.exists():
        between = readme.read_text().partition(marker)[2].partition("<!-- /bench")[0]
        assert "|" not in between, f"README.md shows a table for {folder}, and benchmarks/results/{folder} has no results"
        return
    table = report.readme_table(store.latest(store.read(results)))
    remedy = f"run python -m benchmarks.report benchmarks/results/{folder}/results.jsonl --readme README.md"
    assert report.insert(readme.read_text(), folder, table) == readme.read_text(), remedy


def test_the_todo_is_what_the_account_says():
    remedy = "run python -m benchmarks.account > benchmarks/results/TODO.md"
    assert (RESULTS / "TODO.md").read_text() == account.todo(), remedy


def test_a_spent_budget_ends_with_what_there_is(tmp_path, capsys):
    assert run(tmp_path, "trapo", "--budget", "0") == 0
    assert "1 cases are left" in capsys.readouterr().err
    assert not (tmp_path / "cpu" / "results.jsonl").exists()


def test_the_budget_interrupts_a_case_and_keeps_the_finished_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESERVE_SECONDS", 0)
    first = runner._MEASURES["error"]

    def endless(case, *rest):
        if case.peaked:
            return first(case, *rest)
        while True:
            try:
                sum(range(1000))
            except Exception:  # what a contender does with its own errors must not stop the alarm
                continue

    monkeypatch.setitem(runner._MEASURES, "error", endless)
    assert run(tmp_path, "accuracy", "--budget", "0.04") == 0
    assert "min is spent" in capsys.readouterr().err
    assert all(row["case"]["peaked"] for row in store.read(tmp_path / "cpu" / "results.jsonl"))


def test_figures_of_an_interrupted_case_are_kept_and_measured_again(tmp_path, monkeypatch):
    def spent(*_):
        raise runner.BudgetSpent

    monkeypatch.setattr(runner, "_memory", spent)
    assert run(tmp_path, "trapo", "--budget", "1") == 0
    path = tmp_path / "cpu" / "results.jsonl"
    assert all(row["partial"] and row["ratio"] > 0 for row in store.read(path)) and store.read(path)
    assert "before this case was whole" in (path.parent / "report.md").read_text()
    case = questions.load("trapo").cases("cpu", small=True)[0]
    names = [row["contender"] for row in store.read(path)]
    assert not store.finished(store.read(path), case, names, provenance.environment("cpu"))


def test_a_wrong_contender_is_named_and_not_timed():
    problem = build(SMALL, "cpu")
    eager = BY_NAME["eager"].prepare(problem)
    half = BY_NAME["eager"]._replace(prepare=lambda p: lambda: eager()._replace(grad_weight=eager().grad_weight / 2))
    broken = BY_NAME["eager"]._replace(name="broken", prepare=lambda p: lambda: 1 / 0)
    nan = BY_NAME["eager"]._replace(name="nan", prepare=lambda p: lambda: eager()._replace(logprob=torch.full((48,), torch.nan)))
    rows, calls = runner._check(problem, [half, broken, nan])
    assert rows["eager"]["status"] == "wrong" and "grad_weight_relative 0.5" in rows["eager"]["reason"]
    assert rows["broken"]["status"] == "failed" and "ZeroDivisionError" in rows["broken"]["reason"]
    assert rows["nan"]["status"] == "wrong"
    assert not calls


def test_a_call_that_runs_out_of_memory_leaves_the_rounds():
    def fails():
        raise torch.OutOfMemoryError("no room")

    timings = measure.interleave({"good": lambda: None, "bad": fails}, measure.CpuClock(), 0.01, 3)
    assert set(timings) == {"good"} and len(timings["good"].hot_ms) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the interpreter stands in for a GPU")
def test_the_triton_adapters_run_under_the_interpreter():
    problem = build(Case("test", "trapo", 8, 16, 72, "float32"), "cpu")
    exact = truth(problem)
    for name in ("ours (triton)", "ours, two-phase (triton)"):
        assert BY_NAME[name].absent(torch.device("cpu")) is None
        assert max(errors(BY_NAME[name].prepare(problem)(), exact, problem.batch).values()) < 1e-4


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("active", [1.0, 0.5])
def test_eager_and_ours_agree_with_fp64(job, active):
    problem = build(Case("test", job, 48, 32, 264, "float64", active=active), "cpu")
    exact = truth(problem)
    for name, tolerance in (("eager", 1e-4), ("ours (torch)", 1e-9), ("ours (reference)", 1e-9)):  # eager's softmax is fp32
        found = errors(BY_NAME[name].prepare(problem)(), exact, problem.batch)
        assert found and all(value < tolerance for value in found.values()), (name, found)


def test_the_data_look_like_a_language_model():
    case = Case("test", "trapo", 2048, 512, 4096, "float32")
    problem = build(case, "cpu")
    exact = truth(
        problem._replace(case=Case(**case.key | {"job": "score"}), hidden=problem.hidden.detach(), weight=problem.weight.detach())
    )
    rollout = problem.batch.role == Role.ROLLOUT
    assert 0.9 < exact.logprob.exp().median() < 1.0
    assert -1.2 < exact.logprob[rollout].mean() < -0.1 and 0.1 < exact.entropy.mean() < 1.0
    assert exact.logprob[~rollout].mean() < exact.logprob[rollout].mean()
    assert 0.2 < (~rollout).float().mean() < 0.3
    ratio = (exact.logprob - problem.batch.old_logprob).exp()
    assert 0.02 < ratio.std() < 0.1
    assert problem.batch.advantage.abs().max() <= 1 and problem.batch.advantage.unique().numel() >= 2
    again = build(case, "cpu")
    assert torch.equal(again.hidden, problem.hidden) and torch.equal(again.batch.old_logprob, problem.batch.old_logprob)


def test_active_rows_are_as_many_as_asked_and_weigh_one():
    batch = build(Case("test", "trapo", 64, 16, 100, "float32", active=0.25), "cpu").batch
    assert int(batch.active.sum()) == 16 and batch.weight.sum().item() == pytest.approx(1.0)


def test_the_chunk_is_the_one_that_was_asked_for_or_an_error():
    case = Case("test", "trapo", 512, 16, 1000, "float32", chunk_rows=128)
    with _chunk(case, "cpu"):
        assert gemm.chunk_rows(512, 1000, "cpu") == 128
    assert gemm.chunk_rows(512, 1000, "cpu") == 512
    with pytest.raises(ValueError, match="multiple of 128"), _chunk(Case(**case.key | {"chunk_rows": 100}), "cpu"):
        pass


def test_no_contender_gets_an_easier_job():
    trapo, score = Case("test", "trapo", 64, 128, 1024, "bfloat16"), Case("test", "score", 64, 128, 1024, "bfloat16")
    without_entropy = ("F.linear_cross_entropy", "Liger FLCE", "Liger fused GRPO", "cut-cross-entropy", "quack")
    for name in without_entropy:
        assert BY_NAME[name].cannot(trapo) and BY_NAME[name].cannot(score)
    for name in ("eager", "TRL chunked logprob", "verl", "ours (triton)"):
        assert BY_NAME[name].cannot(trapo) is None
    floors = [c.name for c in CONTENDERS if c.floor and c.cannot(trapo) is None]
    assert floors == ["floor, 3 GEMMs", "floor, 4 GEMMs"]


def test_every_gpu_case_is_well_formed():
    cases = [case for name in questions.NAMES for case in questions.load(name).cases("cuda", small=False)]
    assert cases[0].shape == "N=32768 D=3584 V=152064" and cases[0].job == "trapo"
    assert len({json.dumps(case.key) for case in cases}) == len(cases)
    assert all(set(case.contenders) <= set(BY_NAME) and case.measure in runner._MEASURES for case in cases)


def test_the_account_predicts_what_the_arithmetic_says():
    p = account.predict(Case("test", "trapo", 32768, 3584, 152064, "bfloat16"))
    assert p.gemm_ms == pytest.approx(2 * 32768 * 3584 * 152064 / 790e12 * 1e3) and p.chunks == 8
    assert p.row_kernel_ms == pytest.approx(10 * 32768 * 152064 / 4.3e12 * 1e3)
    assert 1.0 < p.hidden < p.exposed


def test_regressions_between_two_result_sets_are_printed(small_run):
    old = store.latest(store.read(small_run))
    assert "No ratio" in report.compare(old, old)
    new = json.loads(json.dumps(old))
    row = next(row for group in new for row in group if row["contender"] == "ours (torch)" and "ratio" in row)
    row["ratio"] *= 2
    assert "+100% slower" in report.compare(old, new)


def test_a_half_written_line_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    store.append(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": 2')
    assert store.read(path) == [{"a": 1}]
    store.append(path, [{"a": 3}])
    assert store.read(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_gpu_commands_say_so(capsys):
    assert gpu_test.main() == 2
    assert runner.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("needs a CUDA device") == 2


def test_the_record_of_a_gpu_run_counts_what_was_not_reached():
    recorder = gpu_test.Recorder(0.0)
    recorder.collected = 3
    recorder.counts.update(passed=1, failed=1)
    recorder.failures.append(("tests/x.py::test_y", "assert 1 == 2"))
    text = gpu_test.record(recorder, provenance.environment("cpu") | {"driver": "1.2"}, 3.0)
    assert "3 collected: 1 failed, 1 passed, **1 not reached**" in text and "assert 1 == 2" in text


@pytest.mark.slow
def test_the_slow_questions_and_torch_compile(tmp_path):
    assert run(tmp_path, "compile", "step", "longest", "--budget", "5") == 0
    rows = store.read(tmp_path / "cpu" / "results.jsonl")
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
    assert "'tarpo' is not one of: trapo, sft" in capsys.readouterr().err


def test_errors_see_a_nan():
    problem = build(SMALL, "cpu")
    exact = truth(problem)
    found = errors(Result(grad_hidden=torch.full_like(exact.grad_hidden, torch.nan)), exact, problem.batch)
    assert found["grad_hidden_relative"] != found["grad_hidden_relative"]


def test_benchmark_files_and_functions_stay_small():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path.relative_to(ROOT)}: split it by job"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, f"{path.name}:{node.name}"


def test_python_m_benchmarks_starts():
    out = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "QUESTION" in out.stdout
