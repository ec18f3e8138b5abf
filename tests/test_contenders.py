"""Contenders from other packages: each adapter runs as far as a CPU lets it, and calls what the installed version offers.

Triton kernels of peers are interpreted, like ours. A package that is not installed is skipped with a message; the extra `bench` has
the ones that are pure Python.
"""

import ast
import importlib
import inspect
import os
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import contenders, peers
from benchmarks.contenders import BY_NAME, CONTENDERS
from benchmarks.problem import Case, build, errors, truth

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="here the interpreter stands in for a GPU")
SHAPE = (16, 64, 320)
OURS_AND_TORCHS = ("floor", "ours", "eager", "torch.compile", "F.linear_cross_entropy")


def check(name, job, dtype="float32", tolerance=1e-4, shape=SHAPE, active=1.0):
    """The adapter's result against fp64, both gradients included."""
    problem = build(Case("test", job, *shape, dtype, active=active), "cpu")
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
@pytest.mark.parametrize("name", ["Liger FLCE", "Liger FLCE, fp32 dWeight", "Liger FLCE, large chunks"])
@pytest.mark.parametrize("job", ["sft", "grpo"])
def test_liger_cross_entropy(name, job):
    pytest.importorskip("liger_kernel.transformers", reason="pip install liger-kernel")
    check(name, job)


@pytest.mark.parametrize("shape", [(32768, 3584, 152064), (8192, 4096, 151936), (4096, 3584, 152064), (48, 32, 264)])
def test_large_chunks_are_as_large_as_said(shape):
    op = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy", reason="pip install liger-kernel")
    n, d, v = shape
    rows = [op.triton.next_power_of_2(-(-n // -(-v // (const * d)))) for const in (1, peers.chunk_mem_const(n, d, v))]
    assert rows[0] < min(n, peers.LIGER_ROWS) <= rows[1] < 2 * peers.LIGER_ROWS
    assert op.LigerFusedLinearCrossEntropyFunction.supports_inner_impl_dispatch, "or the setting is dropped without a word"


@pytest.mark.parametrize("job", ["sft", "grpo", "trapo"])
def test_liger_scaled_cross_entropy(job, monkeypatch):
    pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy", reason="pip install liger-kernel")
    monkeypatch.setenv("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "1")
    check("Liger scaled CE, fallback", job, active=0.5)
    assert os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] == "0"


def test_the_way_of_liger_that_runs_is_the_one_that_is_named(monkeypatch):
    pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy", reason="pip install liger-kernel")
    case, gpu = Case("test", "trapo", *SHAPE, "bfloat16"), torch.device("cuda")
    with pytest.raises(
        RuntimeError, match="runs _FusedLinearPPOFallbackFunction here, not LigerFusedScaledCrossEntropySM90Function"
    ):
        BY_NAME["Liger scaled CE, sm_90"].prepare(build(case, "cpu"))
    for capability, name in (
        ((9, 0), "Liger scaled CE, fallback"),
        ((10, 0), "Liger scaled CE, sm_90"),
        ((10, 0), "Liger FLCE, sm_90"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert "sm_90" in BY_NAME[name].absent(gpu)
    assert all("CUDA device" in BY_NAME[f"Liger {way}, sm_90"].absent(torch.device("cpu")) for way in ("FLCE", "scaled CE"))


def test_what_the_hopper_kernels_of_liger_refuse_is_known():
    flce, scaled = (BY_NAME[f"Liger {way}, sm_90"].cannot for way in ("FLCE", "scaled CE"))
    shape = (128, 64, 512)
    assert flce(Case("test", "sft", *shape, "bfloat16")) is None and scaled(Case("test", "trapo", 16, 60, 321, "bfloat16")) is None
    for case in (Case("test", "sft", *shape, "float32"), Case("test", "sft", 120, 64, 512, "bfloat16")):
        assert flce(case)
    assert flce(Case("test", "sft", 128, 64, 384, "bfloat16")) and flce(Case("test", "grpo", *shape, "bfloat16"))
    assert scaled(Case("test", "trapo", *shape, "float16")) and flce(Case("test", "trapo", *shape, "bfloat16"))


@pytest.mark.parametrize(
    "file, function, arguments",
    [
        ("fused_linear_cross_entropy_sm90", "liger_fused_linear_cross_entropy_sm90", ["_input", "weight", "target"]),
        (
            "fused_scaled_cross_entropy_sm90",
            "LigerFusedScaledCrossEntropySM90Function.forward",
            ["ctx", "_input", "weight", "target", "temperature", "ignore_index", "m_tiles_per_cluster", "return_entropy"],
        ),
    ],
)
def test_liger_s_hopper_kernels_are_called_as_their_source_says(file, function, arguments):
    """They import where the CuTe DSL is installed only, so the source is read."""
    ops = pytest.importorskip("liger_kernel.ops", reason="pip install liger-kernel")
    text = (Path(ops.__file__).parent / "cutedsl" / "ops" / f"{file}.py").read_text()
    scope = ast.parse(text)
    for name in function.split("."):
        scope = next(node for node in scope.body if getattr(node, "name", None) == name)
    assert [argument.arg for argument in scope.args.args][: len(arguments)] == arguments
    assert "scaled" not in file or 'VALIDATE_TARGETS_ENV = "LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"' in text


def test_liger_grpo():
    pytest.importorskip("liger_kernel.chunked_loss", reason="pip install liger-kernel")
    check("Liger fused GRPO", "grpo")


@pytest.mark.parametrize("job", ["sft", "grpo", "trapo"])
def test_trl(job):
    pytest.importorskip("trl.kernels", reason="pip install trl")
    check("TRL chunked logprob", job)


def test_trls_chunk_is_its_own_setting():
    utils = pytest.importorskip("trl.trainer.utils", reason="pip install trl")
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == peers.TRL_TILE


@pytest.mark.parametrize(("compact", "rows"), [(False, 16), (True, 8)])
def test_where_triton_runs_trl_is_given_the_rows_that_it_would_score(compact, rows, monkeypatch):
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="pip install trl")
    trainer = inspect.getsource(importlib.import_module("trl.trainer.utils").add_fused_lm_head)
    assert "compact = _use_triton(" in trainer and "hidden_states[mask] if compact else" in trainer
    scored, forward = [], chunked.ChunkedLogProbFunction.apply
    monkeypatch.setattr(chunked, "_use_triton", lambda device: compact)
    monkeypatch.setattr(
        chunked.ChunkedLogProbFunction, "apply", lambda hidden, *rest: scored.append(len(hidden)) or forward(hidden, *rest)
    )
    check(peers.TRL, "trapo", active=0.5)
    assert scored == [rows]


@INTERPRETED
@pytest.mark.parametrize("job", ["sft", "grpo", "trapo"])
def test_trl_on_logits(job):
    pytest.importorskip("trl.kernels.logprob_entropy", reason="pip install trl")
    check("TRL logprob on logits", job, active=0.5)


@pytest.mark.parametrize("name", ["ours, two-phase (torch)", "ours, two-phase (triton)"])
def test_two_phases_are_told_the_rows_that_have_a_target(name, monkeypatch):
    """As our own page tells those to who train on a GPU."""
    if BY_NAME[name].absent(torch.device("cpu")):
        pytest.skip("interpreted, or on a GPU, only")
    told, linear_logprob = [], contenders.linear_logprob
    monkeypatch.setattr(
        contenders, "linear_logprob", lambda *a, **named: told.append(named["active_rows"]) or linear_logprob(*a, **named)
    )
    for active, rows in ((0.5, 8), (1.0, None)):
        check(name, "trapo", active=active)
        found = told.pop()
        assert (None if found is None else len(found)) == rows


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
