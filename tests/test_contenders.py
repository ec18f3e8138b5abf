"""Contenders from other packages: each adapter runs as far as a CPU lets it, and calls what the installed version offers.

Triton kernels of peers are interpreted, like ours. A package that is not installed is skipped with a message; the extra `bench` has
the ones that are pure Python.
"""

import importlib
import inspect

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import contenders
from benchmarks.contenders import BY_NAME, CONTENDERS
from benchmarks.problem import Case, build, errors, truth

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="here the interpreter stands in for a GPU")
SHAPE = (16, 64, 320)
OURS_AND_TORCHS = ("floor", "ours", "eager", "torch.compile", "F.linear_cross_entropy")


def check(name, job, dtype="float32", tolerance=1e-4, shape=SHAPE):
    """The adapter's result against fp64, both gradients included."""
    problem = build(Case("test", job, *shape, dtype), "cpu")
    assert BY_NAME[name].cannot(problem.case) is None
    found = errors(BY_NAME[name].prepare(problem)(), truth(problem), problem.batch)
    assert {"grad_hidden_relative", "grad_weight_relative"} <= found.keys()
    assert all(error < tolerance for key, error in found.items() if key != "loss_relative"), found  # terms that cancel to near zero


@INTERPRETED
@pytest.mark.parametrize("name", ["ours (triton)", "ours, two-phase (triton)"])
def test_our_triton_adapters(name):
    assert BY_NAME[name].absent(torch.device("cpu")) is None
    check(name, "trapo", shape=(8, 16, 72))


@INTERPRETED
@pytest.mark.parametrize("name", ["Liger FLCE", "Liger FLCE, fp32 dWeight"])
@pytest.mark.parametrize("job", ["sft", "grpo"])
def test_liger_cross_entropy(name, job):
    pytest.importorskip("liger_kernel.transformers", reason="pip install liger-kernel")
    check(name, job)


def test_liger_grpo():
    pytest.importorskip("liger_kernel.chunked_loss", reason="pip install liger-kernel")
    check("Liger fused GRPO", "grpo")


@pytest.mark.parametrize("job", ["sft", "grpo", "trapo"])
def test_trl(job):
    pytest.importorskip("trl.kernels", reason="pip install trl")
    check("TRL chunked logprob", job)


def test_trls_chunk_is_its_own_setting():
    utils = pytest.importorskip("trl.trainer.utils", reason="pip install trl")
    source = inspect.getsource(contenders._trl)
    assert f"1.0, {utils._CHUNKED_LOGPROB_CHUNK_SIZE}, " in source


def log1p(a):
    return tl.log(1.0 + a)


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("job", ["sft", "grpo"])
def test_cut_cross_entropy(job, monkeypatch):
    """In fp16: the interpreter's bf16 is wrong in exp. Its log1p is libdevice's, which is compiled code, so ours stands in."""
    utils = pytest.importorskip("cut_cross_entropy.tl_utils", reason="pip install cut-cross-entropy")
    monkeypatch.setattr(utils, "tl_log1p", triton.jit(log1p))
    check("cut-cross-entropy", job, "float16", tolerance=5e-3)


@pytest.mark.parametrize(
    "module, function, arguments",
    [
        ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", ("x", "weight", "target")),
        (
            "verl.utils.kernel.linear_cross_entropy",
            "LinearCrossEntropy.forward",
            ("hidden", "weight", "labels", "temperature", "reduction"),
        ),
    ],
)
def test_adapters_that_need_a_gpu_call_what_there_is(module, function, arguments):
    """quack's kernels are compiled for a GPU, verl asserts that its tensors are on one: only their signatures can be checked."""
    try:
        found = importlib.import_module(module)
    except Exception as error:
        pytest.skip(f"{module} does not import here: {error}")
    for name in function.split("."):
        found = getattr(found, name)
    offered = [name for name in inspect.signature(found).parameters if name != "ctx"]
    assert tuple(offered[: len(arguments)]) == arguments


@pytest.mark.parametrize("contender", [c for c in CONTENDERS if not c.name.startswith(OURS_AND_TORCHS)], ids=lambda c: c.name)
def test_a_peer_is_there_or_says_why_not(contender):
    reason = contender.absent(torch.device("cpu"))
    assert (
        reason is None or reason.endswith(("Install it to have it measured.", "need a CUDA device.")) or "fails on import" in reason
    )
