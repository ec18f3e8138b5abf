"""What Triton compiles for a call: one kernel whatever the number of tokens, its tiles, its options."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.trapo_kernels import cases
from trapo_kernels import doctor, objectives, terms
from trapo_kernels.backends import triton_ops
from trapo_kernels.backends.logits import LogitTransform

KERNELS = ("fused_scoring", "row_gradient", "row_policy", "row_statistics", "scale", "token_coefficient")
fused_scoring = importlib.import_module(f"{triton_ops.__name__}.fused_scoring")  # whose name there is the function's


class Launches:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel):
        interpreted = getattr(kernel, "kwargs", {})  # of triton.jit, where it has made no JITFunction
        self.kernel = JITFunction(kernel.fn, do_not_specialize=interpreted.get("do_not_specialize")) if interpreted else kernel
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **named: self.calls.append((arguments, named))

    def compiled(self):
        """How many kernels Triton would compile for these calls."""
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
        return len({str(bind(*arguments, **named)[1:]) for arguments, named in self.calls})


@pytest.fixture
def launches(monkeypatch):
    found = {}
    for name in KERNELS:
        module, kernel = importlib.import_module(f"{triton_ops.__name__}.{name}"), f"{name}_kernel"
        found[name] = Launches(getattr(module, kernel))
        monkeypatch.setattr(module, kernel, found[name])
    return found


def _launch_all(num_rows):
    """Every Triton kernel, once."""
    hidden, weight = (torch.zeros(rows, 16, device=cases.DEVICE) for rows in (num_rows, 300))
    logits = torch.zeros(num_rows, 304, device=cases.DEVICE)[:, :300]
    b, objective = cases.batch(num_rows, 300), objectives.trapo()
    streams = terms.streams(b, objective, torch.float32)
    stats = triton_ops.statistics(logits, b.target, LogitTransform(), True)
    triton_ops.fused_scoring(hidden, weight, b.target, LogitTransform())
    triton_ops.coefficients(stats.logprob, streams, objective)
    triton_ops.logprob_gradient(logits, b.target, LogitTransform(), stats, stats.logprob, None, torch.bfloat16)
    triton_ops.policy(logits, b.target, LogitTransform(), streams, objective, False, torch.bfloat16)
    triton_ops.scale_to(hidden, torch.ones((), device=cases.DEVICE), hidden)


def test_no_number_of_tokens_compiles_a_kernel_anew(launches):
    numbers = [1, 2, 3, 16, 33, 48, 130, 131]
    for num_rows in numbers:
        _launch_all(num_rows)
    assert {name: (len(found.calls), found.compiled()) for name, found in launches.items()} == dict.fromkeys(
        KERNELS, (len(numbers), 1)
    )


def test_every_launch_says_whether_multiplications_and_additions_fuse(launches, recwarn, monkeypatch):
    """Else the environment would decide the bits, and triton 3.9 would warn on a user's first call."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    _launch_all(5)
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    for found in launches.values():
        ((_, named),) = found.calls
        options = {k: v for k, v in named.items() if k not in found.kernel.arg_names}
        assert backend.parse_options(options).enable_fp_fusion
    assert not recwarn.list


@pytest.mark.parametrize("fences", [True, False])
def test_nothing_is_pipelined_where_triton_lacks_the_fence_before_asynchronous_tensor_cores(fences, monkeypatch):
    monkeypatch.setattr(fused_scoring, "FENCES", fences)
    for major in (9, 10, 11):
        assert (fused_scoring.tile_of(torch.bfloat16, major)["num_stages"] == 1) != fences
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, major=major: SimpleNamespace(major=major, minor=0))
        verdict, healthy = doctor._verdict("triton_fused", torch.device("cuda"))
        assert healthy and ("Install a torch that brings triton 3.8 or newer" in verdict) != fences
    for major in (8, 12):
        assert fused_scoring.tile_of(torch.bfloat16, major) == fused_scoring.TILE_SM80_SM120
    assert fused_scoring.tile_of(torch.float32, 9) == fused_scoring.TILE_FP32


def test_the_fence_is_in_triton_from_3_8_on():
    major, minor = triton.__version__.split(".")[:2]
    assert fused_scoring.FENCES is (int(major) > 3 or int(minor) >= 8)


@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 152_064])
@pytest.mark.parametrize("num_rows", [1, 64, 512, 2048, 3072, 8192, 20_000, 32_768])
@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_the_vocabulary_is_split_so_that_all_multiprocessors_work_to_the_end(vocab_size, num_rows, multiprocessors):
    row_blocks, tiles = -(-num_rows // 128), -(-vocab_size // 128)
    size = fused_scoring.tiles_of_split(row_blocks, tiles, multiprocessors)
    splits = -(-tiles // size)
    waves = -(-row_blocks * splits // multiprocessors)
    assert waves * size <= 1.07 * row_blocks * tiles / multiprocessors + 1, "in tiles: of the last program, of all by their number"
    assert splits <= max(multiprocessors, 8), "partial sums take 16 bytes for every row and split"


def test_the_split_of_a_small_vocabulary():
    assert fused_scoring.tiles_of_split(1, 1, 132) == 1
    assert fused_scoring.tiles_of_split(1, 3, 132) == 1
    assert fused_scoring.tiles_of_split(16, 1188, 132) == 36  # 33 · 16 programs are four for each multiprocessor
