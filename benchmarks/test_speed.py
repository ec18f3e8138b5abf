"""The runner's timed cases for pytest-benchmark, so that regressions can be followed over time.

    python -m pytest benchmarks -k "trapo and native" --benchmark-autosave
    python -m pytest benchmarks -k "trapo and native" --benchmark-compare --benchmark-compare-fail=median:10%

As in the runner, a result is held to fp64 before it is timed. Contenders follow each other here instead of taking turns, so compare
a contender with itself; between contenders the runner's ratios count.
"""

import functools

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark, or the extra [bench]")

from benchmarks.cell import wrong
from benchmarks.problem import build, errors, truth


@functools.lru_cache(maxsize=1)
def inputs(case, device):
    """The problem of the case at hand and its fp64 truth."""
    problem = build(case, device)
    return problem, truth(problem)


def test_speed(benchmark, case, contender, device):
    reason = contender.absent(torch.device(device)) or contender.cannot(case)
    if reason:
        pytest.skip(reason)
    problem, exact = inputs(case, device)
    call = contender.prepare(problem)
    found = errors(call(), exact, problem.batch)
    assert not wrong(found), f"{contender.name} is not timed: {'; '.join(wrong(found))}"

    def run():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.question}: {case.title}"
    benchmark.extra_info.update(errors=found, flop_of_one_gemm=case.gemm_flop)
    benchmark.pedantic(run, rounds=3)
