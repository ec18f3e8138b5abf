"""The CUDA ops without a GPU: an emulator runs their own source, under several interleavings, against fp64.

What asynchronous copies and products have not finished reads as NaN there, so a missing barrier or wait fails here.
"""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from csrc.build import CUDA_ARCHS
from tests.trapo_kernels import cases, cuda_checks, host_gpu
from tests.trapo_kernels.gate_cases import GATE_CASES, KL_CASES, check_coefficients
from tests.trapo_kernels.host_gpu import HostGpu
from trapo_kernels import dispatch, terms
from trapo_kernels.backends import rows_torch, sweep
from trapo_kernels.backends.logits import LogitTransform

pytestmark = [
    pytest.mark.slow,  # to compile
    pytest.mark.skipif(cases.DEVICE != "cpu", reason="the kernels run on the GPU itself: test_native_gpu.py"),
]
SEEDS = range(3)


@pytest.fixture
def library(host_gpu_library):
    return host_gpu_library


def test_the_cuda_part_tells_what_it_was_compiled_for(library):
    assert library.ops.cuda_archs().split("_") == CUDA_ARCHS.split()


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "bias, softcap, temperatures"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd stride"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), cuda_checks.DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("vocab_size", [1, 7, 4099])
def test_rows_against_fp64(library, vocab_size, dtype, grad_dtype, aligned, plain):
    gpu = HostGpu(library, major=8)
    cuda_checks.check_rows(gpu, vocab_size, dtype, grad_dtype, aligned, plain)
    assert gpu.largest_cluster == 0


def _with_clusters_of(blocks, library, vocab_size, dtype, seed=0, room=8):
    """A GPU whose shared memory holds such a row in clusters of this many blocks, two blocks to a multiprocessor."""
    of_block = -(-vocab_size * dtype.itemsize // blocks) + 2048
    return HostGpu(library, seed, shared_bytes=2 * of_block, room_for_clusters=room)


@pytest.mark.parametrize(("dtype", "grad_dtype"), cuda_checks.DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize(
    ("vocab_size", "cluster", "plain"), [(1, 1, True), (1000, 1, False), (9001, 2, True), (12_001, 4, False), (33_000, 8, True)]
)
def test_clusters_against_fp64(library, vocab_size, cluster, plain, dtype, grad_dtype):
    gpu = _with_clusters_of(cluster, library, vocab_size, dtype, seed=1)
    cuda_checks.check_rows(gpu, vocab_size, dtype, grad_dtype, True, plain)
    assert gpu.largest_cluster == cluster


@pytest.mark.parametrize(("room", "cluster"), [(8, 8), (4, 4), (2, 0)])
def test_a_gpu_without_room_for_a_cluster_gets_a_smaller_one_or_none(library, room, cluster):
    gpu = _with_clusters_of(8, library, 33_000, torch.float32, room=room)
    cuda_checks.check_rows(gpu, 33_000, torch.float32, torch.bfloat16, True, True)
    assert gpu.largest_cluster == cluster


def test_a_row_that_no_cluster_holds_is_read_again(library):
    gpu = HostGpu(library, shared_bytes=4096)
    cuda_checks.check_rows(gpu, 33_000, torch.float32, torch.bfloat16, True, True)
    assert gpu.largest_cluster == 0


@pytest.mark.parametrize("cluster", [0, 4])
def test_rows_have_the_same_bits_under_every_interleaving(library, cluster):
    given = cuda_checks.logits(9001, torch.float32, True)
    gpus = [
        _with_clusters_of(cluster, library, 9001, torch.float32, seed) if cluster else HostGpu(library, seed, major=8)
        for seed in SEEDS
    ]
    first, *others = (cuda_checks.policy_bits(gpu, 9001, given) for gpu in gpus)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "cluster"), [(100, 0), (4099, 0), (100, 1), (9001, 2)])
def test_rows_more_than_two_to_the_31_elements_apart(library, vocab_size, cluster, grad_dtype, tmp_path):
    gpu = _with_clusters_of(cluster, library, vocab_size, torch.float32) if cluster else HostGpu(library, major=8)
    cuda_checks.check_far_rows(gpu, vocab_size, grad_dtype, tmp_path)
    assert gpu.largest_cluster == cluster


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_through_a_softcap(library, temperature):
    cuda_checks.check_softcap(HostGpu(library), temperature)


def test_a_softcap_or_temperature_near_the_largest_number(library):
    cuda_checks.check_huge_divisors(HostGpu(library))


@pytest.mark.parametrize("cluster", [0, 2])
def test_a_nan_logit_makes_its_row_nan_and_no_other(library, cluster):
    given = cuda_checks.logits(9001, torch.float32, True)
    given[3, 700] = float("nan")
    gpu = _with_clusters_of(cluster, library, 9001, torch.float32) if cluster else HostGpu(library, major=8)
    logprob, entropy, *_, grad = cuda_checks.policy_bits(gpu, 9001, given)
    for result in (logprob, entropy, grad.sum(-1)):
        assert result.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ["native", "triton"])
def test_logits_at_hand_are_neither_copied_nor_changed(library, monkeypatch, rows, dtype):
    rows = HostGpu(library) if rows == "native" else dispatch.rows(rows)
    given, target = (4 * torch.randn(5, 700)).to(dtype), torch.arange(5)
    kept, upstream = given.clone(), (torch.randn(5), torch.randn(5))
    expected = sweep.score_logits(rows_torch, given.float(), target, LogitTransform(), True)
    gradient = sweep.score_logits_backward(rows_torch, given.float(), target, LogitTransform(), expected, *upstream)
    monkeypatch.setattr(sweep, "_own_copy", lambda *arguments: pytest.fail("copied"))
    ours = sweep.score_logits(rows, given, target, LogitTransform(), True)
    for part, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(part, wanted)
    found = sweep.score_logits_backward(rows, given, target, LogitTransform(), ours, *upstream)
    torch.testing.assert_close(found.float(), gradient, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert found.dtype == dtype and torch.equal(given, kept)


def test_a_row_of_more_columns_than_32_bits_count_is_refused(library):
    logits, target = torch.empty(1, 2**30, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)  # never touched
    with pytest.raises(RuntimeError, match=r"fewer than 2\^30 columns, got 1073741824\. Shard the vocabulary"):
        HostGpu(library).statistics(logits, target, LogitTransform(), True)


@pytest.mark.parametrize("kl", KL_CASES, ids=str)
@pytest.mark.parametrize("gate", GATE_CASES, ids=str)
def test_coefficients_equal_the_slopes_of_every_gate_and_kl(library, gate, kl):
    check_coefficients(HostGpu(library).coefficients, gate, kl)


@pytest.mark.parametrize("scale", [1.0, 12.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    ("shape", "multiprocessors"),
    [((1, 8, 1), 4), ((64, 64, 256), 4), ((128, 320, 700), 2), ((129, 72, 257), 1), ((300, 200, 1500), 6), ((1537, 128, 300), 4)],
    ids=str,
)
def test_scoring_against_fp64(library, shape, multiprocessors, scale):
    gpus = [HostGpu(library, seed, multiprocessors=multiprocessors) for seed in SEEDS]
    cuda_checks.check_scoring(gpus, shape, scale)
    assert gpus[-1].largest_cluster == (1 if shape[0] <= 128 else 2)


def test_scoring_of_a_target_outside_the_vocabulary_is_nan(library):
    cuda_checks.check_targets_outside(HostGpu(library))


def test_scoring_of_a_nan_logit_is_nan(library):
    cuda_checks.check_scoring_of_nan(HostGpu(library))


def test_a_thread_that_has_used_no_gpu_yet_can_score(library):
    hidden, weight = torch.randn(5, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    given, gpu = (hidden, weight, torch.arange(5), LogitTransform()), HostGpu(library)
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(gpu.fused_scoring, *given).result().logprob, gpu.fused_scoring(*given).logprob)


def test_operands_that_lie_where_tma_cannot_read_are_moved(library):
    hidden, weight = (torch.randn(rows * 64 + 1).bfloat16()[1:].view(rows, 64) for rows in (5, 300))
    target, gpu = torch.arange(5), HostGpu(library)
    moved, plain = (gpu.fused_scoring(*x, target, LogitTransform()) for x in ((hidden, weight), (hidden.clone(), weight.clone())))
    assert torch.equal(moved.logprob, plain.logprob)


def test_no_rows_launch_nothing(library):
    gpu, logits, target = HostGpu(library), torch.empty(0, 50), torch.empty(0, dtype=torch.int64)
    operands = torch.empty(0, 64, dtype=torch.bfloat16), torch.zeros(50, 64, dtype=torch.bfloat16)
    for stats in (gpu.statistics(logits, target, LogitTransform(), True), gpu.fused_scoring(*operands, target, LogitTransform())):
        assert all(part.shape == (0,) for part in stats)


@pytest.mark.parametrize(
    ("major", "change", "message"),
    [
        (10, {}, "for sm_90, got sm_10x"),
        (9, {"dtype": torch.float32}, "must be torch.bfloat16"),
        (9, {"hidden_size": 63}, "multiples of 16 bytes"),
    ],
)
def test_what_scoring_refuses(library, major, change, message):
    cuda_checks.check_refused_scoring(HostGpu(library, major=major), message, **change)


def _check_a_block_per_row(library):
    cuda_checks.check_rows(HostGpu(library, major=8), 4099, torch.float32, torch.bfloat16, True, False)


def _check_a_cluster_per_row(library):
    for seed in range(4):
        gpu = _with_clusters_of(2, library, 9001, torch.float32, seed)
        cuda_checks.check_rows(gpu, 9001, torch.float32, torch.bfloat16, True, True)


def _check_scoring(library):
    cuda_checks.check_scoring([HostGpu(library, seed) for seed in range(8)], (300, 200, 1500), 1.0)


WRONG, LEFT = "not close", "shared memory of one that has left"
READ = (
    "  s = combine_lanes<kLargestCluster>(block < cluster.num_blocks() "
    "? *cluster.map_shared_rank(&of_block, block) : empty_softmax());\n"
)
ARRIVE = "cluster.barrier_arrive();\n"
FAULTS = {  # what is wrong: the check that finds it, how, and the change, which leaves all as it is where FAULT is false
    "gradients over logits still to be read": (
        _check_a_block_per_row, WRONG,
        ("row_kernels.cuh", "    __syncthreads();\n    store_gradient<G", "    if (!FAULT) __syncthreads();\n    store_gradient<G"),
    ),
    "gradients over another block's slice": (
        _check_a_cluster_per_row, WRONG,
        ("row_kernels.cuh", "cluster.sync();  // all slices", "if (!FAULT) cluster.sync();  // all slices"),
    ),
    "a block leaves while its sums are read": (
        _check_a_cluster_per_row, LEFT,
        ("row_kernels.cuh", "cluster.barrier_wait();  // no block", "if (!FAULT) cluster.barrier_wait();  // no block"),
    ),
    "half a slice summed too early": (
        _check_a_cluster_per_row, WRONG, ("row_kernels.cuh", "  wait_copies<1>();", "  if (!FAULT) wait_copies<1>();"),
    ),
    "the other half summed too early": (
        _check_a_cluster_per_row, WRONG, ("row_kernels.cuh", "  wait_copies<0>();", "  if (!FAULT) wait_copies<0>();"),
    ),
    "a block done with the others' sums before it has read them": (
        _check_a_cluster_per_row, LEFT,
        ("row_kernels.cuh", f"{READ}  {ARRIVE}", f"  if (FAULT) {ARRIVE}{READ}  if (!FAULT) {ARRIVE}"),
    ),
    "a load into a block whose barriers do not stand": (
        _check_scoring, "before it is initialised",
        ("hopper_scoring.cuh", "cluster.sync();  // the other", "if (FAULT) __syncthreads(); else cluster.sync();  // the other"),
    ),
    "a stage given back while it is read": (
        _check_scoring, WRONG,
        ("hopper_scoring.cuh", "        wgmma_wait<1>();", "        if (FAULT) wgmma_wait<2>(); else wgmma_wait<1>();"),
    ),
    "a stage given back to one block": (
        _check_scoring, "deadlock",
        ("hopper_scoring.cuh", "if (lane < kCluster) barrier", "if (lane < kCluster && !(FAULT && lane > 0)) barrier"),
    ),
    "a block leaves that is loaded into": (
        _check_scoring, LEFT,
        ("hopper_scoring.cuh", "cluster.sync();  // no block leaves", "if (!FAULT) cluster.sync();  // no block leaves"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(compiler, tmp_path_factory):
    """The library with all of FAULTS in it, of which one at a time is made."""
    return host_gpu.build(tmp_path_factory.mktemp("faulty"), [change for _, _, change in FAULTS.values()])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_sees_a_missing_barrier(faulty, fault):
    check, message, _ = FAULTS[fault]
    faulty.functions.set_fault(0)
    check(faulty)
    faulty.functions.set_fault(1 + list(FAULTS).index(fault))
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(faulty)


def test_consumers_cannot_ask_for_registers_that_nobody_gives(tmp_path, capfd):
    """They would wait for ever."""
    with pytest.raises(subprocess.CalledProcessError):
        host_gpu.build(tmp_path, [("hopper_scoring.cuh", "kConsumerRegisters = 232", "kConsumerRegisters = 240")])
    assert "static assertion failed" in capfd.readouterr().err


def test_arguments_of_another_shape_or_gpu_are_refused(library):
    cuda_checks.check_refused_arguments(library.ops)
    logits, rows, role = torch.zeros(2, 3), torch.zeros(2), torch.ones(2, dtype=torch.uint8)
    target, factor, weight = torch.zeros(2, dtype=torch.int64), torch.tensor(2.0), torch.zeros(5, 64, dtype=torch.bfloat16)
    hidden, transform, stats = torch.zeros(2, 64, dtype=torch.bfloat16), (None, None, 1.0, 0.0), (rows,) * 4
    gradient, gates = library.ops.row_gradient, ([1, 1, 0], [0.0] * terms.NUM_SCALARS)
    for name, home, elsewhere, call in (
        ("target", "logits", target, lambda: library.ops.row_statistics(logits, target, *transform)),
        ("grad", "logits", grad := torch.zeros(2, 3), lambda: gradient([logits], target, *transform, *stats, None, None, [grad])),
        ("role", "logprob", role, lambda: library.ops.token_coefficient(rows, role, *stats[:3], None, None, *gates)),
        ("weight", "hidden", weight, lambda: library.ops.scoring(hidden, weight, target, None, 1.0)),
        ("target", "hidden", target, lambda: library.ops.scoring(hidden, weight, target, None, 1.0)),
        ("factor", "x", factor, lambda: library.ops.scale(rows, factor, rows)),
        ("out", "x", grad, lambda: library.ops.scale(rows, torch.tensor(2.0), grad)),
    ):
        message = rf"{name} must be on the GPU of {home}, cuda:0, got a tensor on cuda:1\. Pass {name}\.to\({home}\.device\)"
        library.functions.put_elsewhere(ctypes.c_void_p(elsewhere.data_ptr()))
        try:
            with pytest.raises(RuntimeError, match=message):
                call()
        finally:
            library.functions.put_elsewhere(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("elements", "offset"), [(0, 0), (1, 0), (1003, 0), (1003, 1), (600_001, 0)])
def test_a_gradient_times_the_upstream_gradient(library, dtype, elements, offset):
    cuda_checks.check_scale(HostGpu(library), dtype, elements, offset)


def test_a_gradient_that_cannot_be_scaled_is_refused(library):
    factor, x = torch.tensor(2.0), torch.ones(3, 4)
    dtypes = "x must be float32, bfloat16 or float16 and out of its dtype or narrower, got torch"
    for grad, by, out, message in (
        (x.t(), factor, torch.ones(4, 3), r"scale: x and out must be contiguous, got shape \[4, 3\]"),
        (torch.ones(4, 3), factor, x.t(), r"scale: x and out must be contiguous, got shape \[4, 3\]"),
        (x, torch.ones(2), x, r"factor must be one number, got shape \[2\]"),
        (x, factor, torch.ones(4, 3), r"out must have the shape of x, \[3, 4\], got \[4, 3\]"),
        (x.double(), factor, x, rf"{dtypes}\.float64 and torch\.float32"),
        (x.half(), factor, x, rf"{dtypes}\.float16 and torch\.float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            HostGpu(library).scale_to(grad, by, out)
