"""The same cases for pytest-benchmark, so that regressions can be followed over time: `pytest benchmarks --benchmark-autosave`."""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark, or the extra [bench]")

from benchmarks.contenders import CONTENDERS
from benchmarks.problem import Case, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (8192, 3584, 152064, "bfloat16") if DEVICE == "cuda" else (128, 256, 32768, "float32")
CASES = [Case("pytest", job, *SHAPE) for job in ("score", "sft", "trapo", "grpo")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.job)
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_speed(benchmark, case, contender):
    reason = contender.absent(torch.device(DEVICE)) or contender.cannot(case)
    if reason:
        pytest.skip(reason)
    call = contender.prepare(build(case, DEVICE))

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
