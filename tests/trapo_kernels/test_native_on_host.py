"""The CUDA kernels without a GPU: an emulator runs their own source, under several interleavings, against fp64.

What asynchronous copies and products have not finished reads as NaN there, so a missing barrier or wait fails here.
"""

import shutil

import pytest
import torch

from tests.trapo_kernels import cases, cuda_checks, host_gpu
from tests.trapo_kernels.gate_cases import GATE_CASES, KL_CASES, check_coefficients
from tests.trapo_kernels.host_gpu import HostGpu

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine"),
    pytest.mark.skipif(cases.DEVICE != "cpu", reason="the kernels run on the GPU itself: test_native_gpu.py"),
]
SEEDS = range(3)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return host_gpu.build(tmp_path_factory.mktemp("host_gpu"))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "bias, softcap, temperatures"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd stride"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), cuda_checks.DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("vocab_size", [1, 7, 4099])
def test_rows_against_fp64(library, vocab_size, dtype, grad_dtype, aligned, plain):
    cuda_checks.check_rows(HostGpu(library), vocab_size, dtype, grad_dtype, aligned, plain)


@pytest.mark.parametrize(("dtype", "grad_dtype"), cuda_checks.DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize(
    ("vocab_size", "cluster", "plain"), [(1, 1, True), (1000, 1, False), (9001, 2, True), (12_001, 4, False), (33_000, 8, True)]
)
def test_clusters_against_fp64(library, vocab_size, cluster, plain, dtype, grad_dtype):
    cuda_checks.check_rows(HostGpu(library, seed=1, cluster=cluster), vocab_size, dtype, grad_dtype, True, plain)


@pytest.mark.parametrize("cluster", [0, 4])
def test_rows_have_the_same_bits_under_every_interleaving(library, cluster):
    given = cuda_checks.logits(9001, torch.float32, True)
    first, *others = (cuda_checks.policy_bits(HostGpu(library, seed, cluster), 9001, given) for seed in SEEDS)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("kl", KL_CASES, ids=str)
@pytest.mark.parametrize("gate", GATE_CASES, ids=str)
def test_coefficients_equal_the_slopes_of_every_gate_and_kl(library, gate, kl):
    check_coefficients(HostGpu(library).coefficients, gate, kl)


@pytest.mark.parametrize("scale", [1.0, 12.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    ("shape", "processors"),
    [((1, 8, 1), 4), ((64, 64, 256), 4), ((128, 320, 700), 2), ((129, 72, 257), 1), ((300, 200, 1500), 6), ((1537, 128, 300), 4)],
    ids=str,
)
def test_scoring_against_fp64(library, shape, processors, scale):
    cuda_checks.check_scoring([HostGpu(library, seed, processors=processors) for seed in SEEDS], shape, scale)


def test_scoring_of_a_target_outside_the_vocabulary_is_nan(library):
    cuda_checks.check_targets_outside(HostGpu(library))


FAULTS = {
    "gradients over logits still to be read": (
        "row_kernels.cuh",
        "    __syncthreads();\n    store_gradient<G",
        "    store_gradient<G",
    ),
    "gradients over another block's slice": ("row_kernels.cuh", "cluster.sync();  // all slices", "// all slices"),
    "half a slice summed too early": ("row_kernels.cuh", "  wait_copies<1>();\n", ""),
    "a stage filled while it is read": ("hopper_scoring.cuh", "        wgmma_wait<1>();", "        wgmma_wait<2>();"),
    "a block leaves that is loaded into": ("hopper_scoring.cuh", "cluster.sync();  // no block leaves", "// no block leaves"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_sees_a_missing_barrier(tmp_path, fault):
    faulty = host_gpu.build(tmp_path, FAULTS[fault])
    with pytest.raises(AssertionError):
        cuda_checks.check_rows(HostGpu(faulty), 4099, torch.float32, torch.bfloat16, True, False)
        cuda_checks.check_rows(HostGpu(faulty, cluster=2), 9001, torch.float32, torch.bfloat16, True, False)
        cuda_checks.check_scoring([HostGpu(faulty, seed) for seed in SEEDS], (300, 200, 1500), 1.0)
