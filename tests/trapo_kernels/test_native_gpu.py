"""The compiled CUDA kernels by themselves, on a GPU: every width, layout and dtype that a launch distinguishes, against fp64.

`make gpu-test` runs this file under compute-sanitizer, too. The same checks run on the host in test_native_on_host.py.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.trapo_kernels import cases, cuda_checks
from trapo_kernels.backends import native
from trapo_kernels.backends.logits import LogitTransform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.why_not("cuda") is not None, reason=str(native.why_not("cuda"))),
]
# One thread's worth, odd, a block, clusters of 1 to 8 blocks with two or one to a multiprocessor, too wide for a cluster.
WIDTHS = [1, 7, 1000, 4099, 28_000, 57_000, 100_000, 152_064, 250_001, 470_000]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "bias, softcap, temperatures"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd stride"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), cuda_checks.DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_rows_against_fp64(vocab_size, dtype, grad_dtype, aligned, plain):
    cuda_checks.check_rows(native, vocab_size, dtype, grad_dtype, aligned, plain)


def test_a_softcap_or_temperature_near_the_largest_number():
    cuda_checks.check_huge_divisors(native)


def test_row_kernels_give_the_same_bits_twice():
    given = cuda_checks.logits(152_064, torch.float32, True)
    first, second = (cuda_checks.policy_bits(native, 152_064, given) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("elements", "offset"), [(0, 0), (1, 0), (1003, 1), (9_000_001, 0)])
def test_a_gradient_times_the_upstream_gradient(dtype, elements, offset):
    cuda_checks.check_scale(native, dtype, elements, offset)


hopper = pytest.mark.skipif(
    cases.DEVICE != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="the scoring kernel is for sm_90"
)


@hopper
@pytest.mark.parametrize("scale", [1.0, 12.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "shape", [(1, 8, 1), (64, 64, 256), (129, 72, 257), (300, 200, 5000), (128 * 12 + 1, 128, 1000), (70, 3584, 33_000)], ids=str
)
def test_scoring_against_fp64(shape, scale):
    cuda_checks.check_scoring([native, native], shape, scale)


@hopper
def test_a_thread_that_has_used_no_gpu_yet_can_score():
    hidden, weight = (torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16) for rows in (5, 300))
    given = hidden, weight, torch.arange(5, device="cuda"), LogitTransform()
    with ThreadPoolExecutor(1) as thread:
        there = thread.submit(native.fused_scoring, *given).result()
    assert torch.equal(there.logprob, native.fused_scoring(*given).logprob)


@hopper
def test_scoring_of_a_target_outside_the_vocabulary_is_nan():
    cuda_checks.check_targets_outside(native)


@hopper
def test_scoring_of_a_nan_logit_is_nan():
    cuda_checks.check_scoring_of_nan(native)


@hopper
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "must be torch.bfloat16"),
        ({"hidden_size": 63}, "multiples of 16 bytes"),
    ],
)
def test_what_scoring_refuses(change, message):
    cuda_checks.check_refused_scoring(native, message, **change)


def test_arguments_of_another_shape_or_device_are_refused():
    cuda_checks.check_refused_arguments(torch.ops.trapo_native)
    logits = torch.zeros(2, 3, device="cuda")
    with pytest.raises(RuntimeError, match="target must be on the GPU"):
        torch.ops.trapo_native.row_statistics(logits, torch.zeros(2, dtype=torch.int64), None, None, 1.0, 0.0)
