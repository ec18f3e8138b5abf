"""The benchmarks' data, contenders and arithmetic, and what is committed beside them."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    account,
    cell,
    gpu_test,
    isolate,
    memory_plan,
    offline_compile,
    offline_native,
    questions,
    readme,
    report,
    runner,
    store,
    summary,
    todo,
    trained,
    trsft_modes,
)
from benchmarks.contenders import BY_NAME, CONTENDERS, _chunk
from benchmarks.memory_plan import allocated_peak
from benchmarks.problem import JOBS, Case, Result, build, errors, statistics, truth
from trapo_kernels import Role
from trapo_kernels.backends import in_weight, sweep

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMALL = Case("test", "trapo", 48, 32, 264, "float32")


@pytest.mark.parametrize("folder", re.findall(r"<!-- bench:(\S+) -->", (ROOT / "README.md").read_text()))
def test_readme_agrees_with_the_results(folder):
    text, results = (ROOT / "README.md").read_text(), RESULTS / folder / "results.jsonl"
    table = readme.table(store.latest(store.read(results)))
    remedy = f"run python -m benchmarks.report benchmarks/results/{folder}/results.jsonl --readme README.md"
    assert readme.insert(text, folder, table) == text, remedy


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob("*/report.md")))
def test_a_report_is_what_its_results_give(folder):
    text = (RESULTS / folder / "report.md").read_text()
    rendered = report.render(store.latest(store.read(RESULTS / folder / "results.jsonl")), [])
    without_pictures = [line for line in text.splitlines() if line and not re.match(r"!\[|\*[^*].*\*$", line)]  # and their captions
    remedy = f"run python -m benchmarks.report benchmarks/results/{folder}/results.jsonl"
    assert without_pictures == [line for line in rendered.splitlines() if line], remedy


def test_the_todo_is_what_the_account_says():
    remedy = "run python -m benchmarks.account > benchmarks/results/TODO.md"
    assert (RESULTS / "TODO.md").read_text() == todo.todo(), remedy


@pytest.mark.parametrize(("module", "works"), [(trsft_modes, "figure"), (offline_native, "table")])
def test_help_is_given_and_what_is_unknown_refused_before_anything_runs(module, works, monkeypatch, capsys):
    monkeypatch.setattr(module, works, lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(module, "RESULT" if module is trsft_modes else "RESULTS", None)
    for arguments, code in ((["--help"], 0), (["--unknown"], 2)):
        with pytest.raises(SystemExit, match=str(code)):
            module.main(arguments)
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_a_fused_gemm_needs_a_fence_between_copies_and_asynchronous_tensor_cores():
    row = {"kernel": "fused_scoring (bf16)", "sm": 90, "shared_bytes": 98304, "vector_loads": 0, "tensor_core": "wgmma.mma_async"}
    row |= {"stack_bytes": 0, "spill_instructions": 0, "async_copies": 24, "fences": 0}
    assert not offline_compile._is_sound(row)
    assert not offline_compile._is_sound(row | {"sm": 100, "tensor_core": "tcgen05.mma"})
    for change in ({"fences": 1}, {"async_copies": 0}, {"sm": 80, "tensor_core": "mma.sync"}):
        assert offline_compile._is_sound(row | change)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("active", [1.0, 0.5])
def test_eager_and_ours_agree_with_fp64(job, active):
    problem = build(Case("test", job, 48, 32, 264, "float64", active=active), "cpu")
    exact = truth(problem)
    for name, tolerance in (("eager", 1e-4), ("ours (torch)", 1e-9), ("ours (reference)", 1e-9)):  # eager's softmax is fp32
        found = errors(BY_NAME[name].prepare(problem)(), exact, problem.batch)
        assert found and all(value < tolerance for value in found.values()), (name, found)


def test_the_data_look_like_a_language_model():
    case = Case("test", "trapo", 2048, 128, 4096, "float32")
    problem = build(case, "cpu")
    scored = problem._replace(
        case=Case(**case.key | {"job": "score"}), hidden=problem.hidden.detach(), weight=problem.weight.detach()
    )
    exact = truth(scored)
    found = statistics(exact, problem.batch)
    assert -0.6 < found["mean_logprob"] < -0.1 and 0.1 < found["mean_entropy"] < 0.8
    assert 0.6 < found["sure_share"] < 0.95 and 0.01 < found["below_alpha_share"] < 0.1
    expert = problem.batch.role == Role.EXPERT
    assert 0.02 < (exact.logprob[expert].exp() < 0.1).double().mean() < 0.1, "TrSFT has something to attenuate"
    assert exact.logprob.exp().max() > 0.999
    assert 0.2 < expert.float().mean() < 0.3
    ratio = (exact.logprob - problem.batch.old_logprob).exp()
    assert 0.02 < ratio.std() < 0.1
    assert problem.batch.advantage.abs().max() <= 1 and problem.batch.advantage.unique().numel() >= 2
    counts = problem.target.bincount().sort(descending=True).values
    assert counts[0] > 20 * counts[200] > 0, "labels are a text's: a few tokens are common, many are rare"
    again = build(case, "cpu")
    assert torch.equal(again.hidden, problem.hidden) and torch.equal(again.batch.old_logprob, problem.batch.old_logprob)


def test_rows_beyond_the_trained_ones_differ_and_a_large_vocabulary_keeps_the_models_mass():
    generator = torch.Generator().manual_seed(0)
    small, large = torch.empty(2048, 128), torch.empty(60000, 128)
    rows, more = (trained.lift(4096, weight, generator) for weight in (small, large))
    assert torch.equal(rows.text[:2048], rows.text[2048:]) and not torch.equal(rows.hidden[:2048], rows.hidden[2048:])
    entropies = []
    for hidden, weight in ((rows.hidden[:256], small), (more.hidden[:256], large)):
        log_p = (hidden @ weight.T).log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1).mean())
    assert entropies[0] < entropies[1] < 1.3 * entropies[0]


def test_active_rows_are_as_many_as_asked_and_weigh_one():
    batch = build(Case("test", "trapo", 64, 16, 100, "float32", active=0.25), "cpu").batch
    assert int(batch.active.sum()) == 16 and batch.weight.sum().item() == pytest.approx(1.0)


def test_the_chunk_is_the_one_that_was_asked_for():
    case = Case("test", "trapo", 512, 16, 1000, "float32", chunk_rows=128)
    own = sweep.chunk_rows(512, 16, 1000, "cpu")
    applies = in_weight.applies
    with _chunk(case):
        assert sweep.chunk_rows(512, 16, 1000, "cpu") == 128 != own
        assert not in_weight.applies(None, None, None, 1)
    with _chunk(Case(**case.key | {"chunk_rows": 0})):
        assert sweep.chunk_rows(512, 16, 1000, "cpu") == own
    assert sweep.chunk_rows(512, 16, 1000, "cpu") == own and in_weight.applies is applies


def test_no_contender_gets_an_easier_job():
    trapo, score = Case("test", "trapo", 64, 128, 1024, "bfloat16"), Case("test", "score", 64, 128, 1024, "bfloat16")
    without_entropy = ("F.linear_cross_entropy", "Liger FLCE", "Liger fused GRPO", "cut-cross-entropy", "quack")
    for name in without_entropy:
        assert BY_NAME[name].cannot(trapo) and BY_NAME[name].cannot(score)
    for name in ("eager", "TRL chunked logprob", "verl", "ours (triton)"):
        assert BY_NAME[name].cannot(trapo) is None
    floors = [c.name for c in CONTENDERS if c.floor and c.cannot(trapo) is None]
    assert floors == ["floor, 3 GEMMs", "floor, 4 GEMMs", summary.NEW_GRADIENTS]  # all others are measured by the first
    assert BY_NAME[floors[2]].absent(torch.device("cuda")) and not BY_NAME[floors[2]].absent(torch.device("cpu"))


def test_every_gpu_case_is_well_formed():
    cases = [case for name in questions.NAMES for case in questions.load(name).cases("cuda", small=False)]
    assert cases[0].shape == "N=32768 D=3584 V=152064" and cases[0].job == "trapo"
    assert len({json.dumps(case.key) for case in cases}) == len(cases)
    assert all(set(case.contenders) <= set(BY_NAME) for case in cases)


def test_the_account_predicts_what_the_arithmetic_says():
    case = Case("test", "trapo", 32768, 3584, 152064, "bfloat16")
    p = account.predict(case)
    assert p.floor_ms == pytest.approx(3 * 2 * 32768 * 3584 * 152064 / 790e12 * 1e3) and p.chunks == 8
    assert p.row_kernels_ms == pytest.approx(10 * 32768 * 152064 / 4.3e12 * 1e3)
    assert 1.0 < p.hidden < p.exposed
    plans = {plan.name: account.predict(case, plan, account.H100) for plan in account.PLANS}
    assert 2 / 3 < plans["single pass, frozen head"].hidden < 0.85 and plans["single pass, half of the rows active"].hidden < 0.6
    two_passes = plans["two passes, `triton`"]  # statistics read the logits, the entropy gradient's two sweeps read them and write
    assert two_passes.row_kernels_ms == pytest.approx((4 + 10) * 32768 * 152064 / 3.0e12 * 1e3) and two_passes.hidden > 4 / 3


@pytest.mark.parametrize(
    ("name", "job", "active"),
    [
        ("ours (native)", "trapo", 0.3),
        ("ours (native)", "trapo", 0.15),  # fewer rows than D
        ("ours (native)", "score", 0.15),
        ("ours, two-phase (torch)", "trapo", 1.0),
        ("ours (torch)", "score", 0.3),
    ],
)
def test_the_memory_formula_is_what_is_allocated(name, job, active):
    if (reason := BY_NAME[name].absent(torch.device("cpu"))) is not None:
        pytest.skip(reason)  # a contender that cannot run here says why
    case = Case("test", job, 600, 96, 32801, "bfloat16", peaked=False, active=active)
    call = BY_NAME[name].prepare(build(case, "cpu"))
    call()
    assert sum(account.memory_formula(name, case, "cpu").values()) == pytest.approx(allocated_peak(call), rel=0.02)


@pytest.mark.parametrize("name", ["ours (triton)", "ours, two-phase (triton)"])
def test_on_a_gpu_too_only_rows_with_a_target_have_logits(name):
    case = Case("test", "trapo", 2048, 896, 151936, "bfloat16")
    whole, half = (account.memory_formula(name, replace(case, active=active), "cuda")["logits"] for active in (1.0, 0.5))
    assert half == whole / 2


def test_there_is_no_memory_formula_for_what_head_memory_does_not_state():
    case = Case("test", "trapo", 600, 96, 16001, "bfloat16")
    for other in (replace(case, chunk_rows=64), replace(case, logits_dtype="bfloat16")):
        assert account.memory_formula("ours (native)", other, "cpu") is None
    assert all(account.memory_formula(name, case, "cpu") is None for name in ("eager", "ours (reference)", "ours (native_fused)"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_gpu_commands_say_so(capsys):
    assert gpu_test.main([]) == 2
    assert runner.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("needs a CUDA device") == 2


def test_what_is_too_far_from_fp64_is_named():
    assert cell.wrong({"logprob_max_nats": 0.25, "loss_relative": 9.0}) == []
    said = cell.wrong({"logprob_max_nats": float("nan"), "grad_weight_relative": 0.06, "grad_hidden_relative": 0.01})
    assert said == ["logprob_max_nats nan, at most 0.25", "grad_weight_relative 0.06, at most 0.05"]


def test_the_resident_set_is_read_in_one_place():
    assert memory_plan.isolate is isolate and isolate.status_kib("VmHWM") >= isolate.status_kib("VmRSS") > 0
    with pytest.raises(RuntimeError, match="has no Vm: memory on a CPU is measured on Linux only"):
        isolate.status_kib("Vm")


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
                assert node.end_lineno - node.lineno <= 60, f"{path.name}:{node.name}"
