"""The CUDA ops without a GPU: an emulator runs their own source, under several interleavings, against fp64.

What asynchronous copies and products have not finished reads as NaN there, so a missing barrier or wait fails here.
"""

import shutil

import pytest
import torch

from tests.trapo_kernels import cases, cuda_checks, host_gpu
from tests.trapo_kernels.gate_cases import GATE_CASES, KL_CASES, check_coefficients
from tests.trapo_kernels.host_gpu import HostGpu
from trapo_kernels.backends.logits import LogitTransform

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
    cuda_checks.check_rows(HostGpu(library, major=8), vocab_size, dtype, grad_dtype, aligned, plain)
    assert library.last_cluster() == 0


def _with_clusters_of(blocks, library, vocab_size, dtype, seed=0):
    """A GPU whose shared memory holds such a row in clusters of this many blocks, two blocks to a multiprocessor."""
    of_block = -(-vocab_size * dtype.itemsize // blocks) + 2048
    return HostGpu(library, seed, shared_bytes=2 * of_block)


@pytest.mark.parametrize(("dtype", "grad_dtype"), cuda_checks.DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize(
    ("vocab_size", "cluster", "plain"), [(1, 1, True), (1000, 1, False), (9001, 2, True), (12_001, 4, False), (33_000, 8, True)]
)
def test_clusters_against_fp64(library, vocab_size, cluster, plain, dtype, grad_dtype):
    gpu = _with_clusters_of(cluster, library, vocab_size, dtype, seed=1)
    cuda_checks.check_rows(gpu, vocab_size, dtype, grad_dtype, True, plain)
    assert library.last_cluster() == cluster


def test_a_row_that_no_cluster_holds_is_read_again(library):
    cuda_checks.check_rows(HostGpu(library, shared_bytes=4096), 33_000, torch.float32, torch.bfloat16, True, True)
    assert library.last_cluster() == 0


@pytest.mark.parametrize("cluster", [0, 4])
def test_rows_have_the_same_bits_under_every_interleaving(library, cluster):
    given = cuda_checks.logits(9001, torch.float32, True)
    gpus = [
        _with_clusters_of(cluster, library, 9001, torch.float32, seed) if cluster else HostGpu(library, seed, major=8)
        for seed in SEEDS
    ]
    first, *others = (cuda_checks.policy_bits(gpu, 9001, given) for gpu in gpus)
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


def test_no_rows_launch_nothing(library):
    gpu, logits, target = HostGpu(library), torch.empty(0, 50), torch.empty(0, dtype=torch.int64)
    operands = torch.empty(0, 64, dtype=torch.bfloat16), torch.zeros(50, 64, dtype=torch.bfloat16)
    for stats in (gpu.statistics(logits, target, LogitTransform(), True), gpu.fused_scoring(*operands, target, LogitTransform())):
        assert all(part.shape == (0,) for part in stats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"major": 10}, "for sm_90, got sm_10x"),
        ({"bias": True}, "neither bias nor softcap"),
        ({"dtype": torch.float32}, "must be torch.bfloat16"),
        ({"hidden_size": 63}, "multiples of 16 bytes"),
    ],
)
def test_what_scoring_refuses(library, change, message):
    cuda_checks.check_refused_scoring(HostGpu(library, major=change.pop("major", 9)), message, **change)


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
    with pytest.raises((AssertionError, RuntimeError)):
        cuda_checks.check_rows(HostGpu(faulty, major=8), 4099, torch.float32, torch.bfloat16, True, False)
        two_blocks = _with_clusters_of(2, faulty, 9001, torch.float32)
        cuda_checks.check_rows(two_blocks, 9001, torch.float32, torch.bfloat16, True, False)
        cuda_checks.check_scoring([HostGpu(faulty, seed) for seed in SEEDS], (300, 200, 1500), 1.0)
