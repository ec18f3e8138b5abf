"""What `make gpu-test` runs puts its tensors on one device, and gives cuBLAS what it takes: seen on a pretended GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trapo_kernels import cases

FILES = (
    "batch",
    "documentation",
    "linear_logprob",
    "linear_policy_loss",
    "lora",
    "metrics",
    "narrow_gradient",
    "padded",
    "presets",
    "row_selection",
    "sequence",
    "traps",
)
REFUSED = ("Expected all tensors to be on the same device", "cuBLASLt refuses")


@pytest.mark.slow
@pytest.mark.skipif(cases.DEVICE != "cpu", reason="the files run on this GPU themselves")
def test_the_tests_of_a_gpu_keep_to_it():
    """Only what a GPU refuses counts: kernels, compilers and addresses of memory are not pretended."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-m", "not slow"]
    command += ["-k", "not triton and not native and not compil and not sharded and not (any_split and not gspo)"]
    run = subprocess.run(
        [*command, *(str(folder / f"test_{name}.py") for name in FILES)],
        cwd=folder.parents[1],
        env=os.environ | {"TRAPO_TEST_ON": "a pretended GPU"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 300, run.stdout[-2000:]
    said = "\n".join(line for line in run.stdout.splitlines() if line.startswith(("E  ", "FAILED")))
    assert not any(refusal in said for refusal in REFUSED), said
