"""What "auto" scores with: the fastest backend measured on this GPU at about this shape, the chunked path where nothing was."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from csrc import build
from tests.trapo_kernels import cases
from trapo_kernels import (
    LoraHead,
    TokenBatch,
    dispatch,
    doctor,
    linear_logprob,
    linear_policy_loss,
    objectives,
    policy_loss,
    token_logprob,
)
from trapo_kernels.backends import gemm, native, triton_ops

fused_scoring = importlib.import_module(f"{triton_ops.__name__}.fused_scoring")  # whose name there is the function's
GPU, CUDA = "NVIDIA H200", torch.device("cuda")


def _entry(shape, device=GPU, dtype="bfloat16", **median_ms):
    return {"device": device, "dtype": dtype, "shape": list(shape), "median_ms": median_ms, "fences": True}


@pytest.fixture
def measured(monkeypatch):
    """A GPU with native kernels and a table of measurements."""
    table = [
        _entry((4096, 4096, 128000), triton=2.0, triton_fused=1.5, native_fused=1.2),
        _entry((65536, 4096, 128000), triton=20.0, triton_fused=25.0, native_fused=21.0),
        _entry((4096, 4096, 128000), dtype="float32", triton=9.0, triton_fused=8.0),
    ]
    monkeypatch.setattr(dispatch, "_MEASURED", table)
    monkeypatch.setattr(dispatch, "_FENCES", True)
    monkeypatch.setattr(dispatch, "_gpu_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(major=9, minor=0))
    monkeypatch.setitem(native._WHY_NOT, "cuda", None)
    monkeypatch.setattr(native, "_CUDA_ARCHS", tuple(build.CUDA_ARCHS.split()))
    return table


def _auto(num_rows, hidden_size=4096, vocab_size=128000, dtype=torch.bfloat16, **asked):
    scoring = dispatch.Scoring(num_rows, hidden_size, vocab_size, **asked)
    return dispatch.choose("linear_logprob", "auto", CUDA, dtype, scoring)


@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        ({"num_rows": 4096}, "native_fused"),
        ({"num_rows": 4096, "bias": True}, "triton_fused"),  # which the wgmma kernel has not
        ({"num_rows": 4096, "softcap": 30.0}, "triton_fused"),
        ({"num_rows": 4096, "lora_rank": 8}, "triton"),  # none of the fused kernels has these
        ({"num_rows": 4096, "logits_dtype": torch.bfloat16}, "triton"),
        ({"num_rows": 4096, "sharded": True}, "triton"),
        ({"num_rows": 4096, "batch_invariant": True}, "triton"),
        ({"num_rows": 4096, "hidden_size": 4097}, "triton_fused"),  # nor rows that do not start at 16 bytes
        ({"num_rows": 40000}, "triton"),  # nearest to 65536 rows, where the chunked path won
        ({"num_rows": 2048, "vocab_size": 64000}, "native_fused"),  # a factor of two away
        ({"num_rows": 2047}, "triton"),  # further away than that
        ({"num_rows": 4096, "vocab_size": 32000}, "triton"),
        ({"num_rows": 0}, "triton"),
        ({"num_rows": 4096, "dtype": torch.float32}, "triton_fused"),
        ({"num_rows": 4096, "dtype": torch.float16}, "triton"),  # not measured
    ],
)
def test_auto_follows_the_table(measured, call, chosen):
    assert _auto(**call) == chosen


def test_a_triton_that_pipelines_is_not_chosen_by_the_time_of_one_that_does_not(measured, monkeypatch):
    fused = {"num_rows": 4096, "bias": True}  # which only Triton's fused kernel has
    assert _auto(**fused) == "triton_fused"
    monkeypatch.setattr(dispatch, "_FENCES", False)
    assert _auto(**fused) == "triton" and _auto(4096) == "native_fused"
    for entry in measured:
        entry["fences"] = False
    assert _auto(**fused) == "triton_fused"


def test_another_gpu_or_an_empty_table_leaves_the_chunked_path(measured, monkeypatch):
    monkeypatch.setattr(dispatch, "_gpu_name", lambda device: "NVIDIA L4")
    assert _auto(4096) == "triton"
    monkeypatch.setattr(dispatch, "_MEASURED", [])
    monkeypatch.setattr(dispatch, "_gpu_name", lambda device: pytest.fail("nothing to look up"))
    assert _auto(4096) == "triton"


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_follows_the_table_as_eager_code_does(measured, dynamic):
    measured.append(_entry((65536, 4096, 128000), dtype="float32", triton=7.0, triton_fused=8.0))

    def choice(x):
        return x + dispatch.BACKENDS.index(_auto(x.shape[0], dtype=torch.float32))

    torch._dynamo.reset()
    compiled = torch.compile(choice, fullgraph=True, backend="eager", dynamic=dynamic)
    chosen = [dispatch.BACKENDS[int(compiled(torch.zeros(rows))[0])] for rows in (4096, 2047, 65536, 40000, 8000)]
    assert chosen == ["triton_fused", "triton", "triton", "triton", "triton_fused"]
    assert chosen == [_auto(rows, dtype=torch.float32) for rows in (4096, 2047, 65536, 40000, 8000)]


def test_a_missing_native_extension_is_passed_over(measured, monkeypatch):
    monkeypatch.setitem(native._WHY_NOT, "cuda", "it was not built.")
    assert _auto(4096) == "triton_fused"


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, None),
        ((8, 0), torch.bfloat16, "its kernel is for sm_90 GPUs and this one is sm_80."),
        ((10, 0), torch.bfloat16, "its kernel is for sm_90 GPUs and this one is sm_100."),
        ((9, 0), torch.float32, 'its kernel takes bfloat16 and the inputs are float32; backend="triton_fused" does.'),
        ((9, 0), torch.float16, 'its kernel takes bfloat16 and the inputs are float16; backend="triton_fused" does.'),
    ],
)
def test_the_wgmma_kernel_has_one_dtype_and_one_gpu(measured, monkeypatch, capability, dtype, reason):
    gpu = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: gpu)
    assert dispatch.why_not("native_fused", CUDA, dtype) == reason
    verdict, healthy = doctor._verdict("native_fused", CUDA)
    assert healthy and verdict.startswith("runs:" if capability == (9, 0) else "missing: its kernel is for sm_90 GPUs")
    if dtype == torch.bfloat16:
        assert _auto(4096) == ("native_fused" if reason is None else "triton_fused")


@pytest.mark.parametrize(
    ("archs", "there", "missing"),
    [
        (build.CUDA_ARCHS, ["80", "86", "89", "90", "100", "103", "110", "120", "121"], ["75"]),
        ("80 90a 100", ["80", "89", "90", "100", "103"], ["75", "120"]),
        ("90a", ["90"], ["80", "100", "120"]),
        ("89 120", ["89", "120", "121"], ["80", "86", "90", "100"]),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_that_the_extension_was_not_compiled_for_has_a_sentence(measured, monkeypatch, archs, there, missing, compiled):
    monkeypatch.setattr(native, "_CUDA_ARCHS", tuple(archs.split()))

    def reason(x):
        return x + (dispatch.why_not("native", CUDA, torch.float32) is not None)

    for capability in there + missing:
        gpu = SimpleNamespace(major=int(capability[:-1]), minor=int(capability[-1]))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None, gpu=gpu: gpu)
        torch._dynamo.reset()
        run = torch.compile(reason, fullgraph=True, backend="eager") if compiled else reason
        assert bool(run(torch.zeros(1))) == (capability in missing), capability
    sentence = f"and this GPU is sm_{capability}. Install trapo with TRAPO_CUDA=1 TRAPO_CUDA_ARCHS={capability}."
    assert sentence in dispatch.why_not("native", CUDA, torch.float32)
    assert doctor._verdict("native", CUDA) == (f"missing: {dispatch.why_not('native', CUDA, torch.float32)}", True)


WITHOUT_TRITON = """
import logging, torch
from types import SimpleNamespace
from trapo_kernels import dispatch, doctor
logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)
cuda = torch.device("cuda")
print(dispatch.why_not("triton_fused", cuda, torch.bfloat16), dispatch.choose("here", "auto", cuda, torch.float32), sep="\\n")
print(*doctor.report(), sep="\\n")
try:
    dispatch.choose("here", "triton", cuda, torch.float32)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ImportError('libtriton: GLIBC_2.99 not found')", "the package triton does not load: libtriton: GLIBC_2.99 not found."),
        ("ModuleNotFoundError(\"No module named 'triton'\", name='triton')", "the package triton is not installed; pip install"),
    ],
)
def test_a_triton_that_does_not_load_is_missing_with_its_reason(tmp_path, error, reason):
    (tmp_path / "triton.py").write_text(f"raise {error}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    why, chosen, *report, refused = done.stdout.splitlines()
    assert why.startswith(reason) and chosen == "torch" and 'here: backend="auto" chose "torch" on cuda' in done.stderr
    assert f"missing: {reason}" in "".join(report) and refused.startswith(f'here: backend="triton" cannot run: {reason}')


@pytest.mark.parametrize("device", ["mps", "xpu"])
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_device_that_no_backend_is_made_for_has_a_sentence(device, backend):
    if backend == "reference":
        assert dispatch.choose("linear_logprob", backend, torch.device(device), torch.float32) == backend
        return
    message = (
        f'linear_logprob: backend="{backend}" runs on the CPU and on CUDA devices, got tensors on {device}. Move them with .to'
    )
    with pytest.raises(RuntimeError, match=message):
        dispatch.choose("linear_logprob", backend, torch.device(device), torch.float32)


def test_every_function_refuses_such_a_device_before_it_computes():
    with FakeTensorMode(), torch.no_grad():
        hidden, weight, logits, one = (torch.empty(shape, device="mps") for shape in ((4, 3), (7, 3), (4, 7), (4,)))
        target, role = (torch.empty(4, dtype=dtype, device="mps") for dtype in (torch.int64, torch.uint8))
        batch, objective = TokenBatch(target, role, one, one), objectives.grpo()
        for name, call in {
            "linear_logprob": lambda: linear_logprob(hidden, weight, target),
            "linear_policy_loss": lambda: linear_policy_loss(hidden, weight, batch, objective),
            "policy_loss": lambda: policy_loss(one, None, batch, objective),
            "token_logprob": lambda: token_logprob(logits, target),
        }.items():
            with pytest.raises(RuntimeError, match=f'^{name}: backend="auto" runs on the CPU and on CUDA devices'):
                call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("major", [7, 8])
def test_triton_scores_16_bits_on_the_chip_from_sm_80_on(measured, monkeypatch, major, dtype):
    """Below, where it knows no tensor cores for them, its kernel would spill 7 KB for every thread."""
    gpu = SimpleNamespace(major=major, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: gpu)
    reason = dispatch.why_not("triton_fused", CUDA, dtype)
    if major == 7 and dtype != torch.float32:
        remedy = "backend=.triton. does without" if dtype == torch.float16 else "so do all GEMMs .* take float16"
        assert re.fullmatch(rf"its kernel multiplies b?float16 on tensor cores from sm_80 .* is sm_75; {remedy}\.", reason)
        assert _auto(4096, dtype=dtype) == "triton"
    else:
        assert reason is None
    assert dispatch.why_not("triton", CUDA, dtype) is None


@pytest.mark.parametrize(("dtype", "major", "flag"), itertools.product((torch.bfloat16, torch.float16), (7, 8), (True, False)))
def test_gemms_that_a_gpu_has_not_are_refused_before_anything_is_computed(monkeypatch, dtype, major, flag):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(major=major, minor=5))
    monkeypatch.setattr(torch._C, "_get_cublas_allow_fp16_accumulation", lambda: flag)
    refused = {(torch.bfloat16, 7): r"sm_80 or later, got sm_75\. Pass .* in float16"}
    for gpu in (7, 8) if flag else ():
        refused[torch.float16, gpu] = r"got .*allow_fp16_accumulation = True\. Set it to False"
    with pytest.raises(RuntimeError, match=refused[dtype, major]) if (dtype, major) in refused else nullcontext():
        gemm.check_products(dtype, CUDA)


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU meets the tiles by dtype")
def test_each_tile_scores_the_same(monkeypatch):
    """On a CPU the interpreter multiplies in fp32, so it would only meet that tile."""
    hidden, weight, _ = (x.detach() for x in cases.head(150, 70, 300, torch.float32, scale=4.0))
    target = torch.arange(150, device=cases.DEVICE)
    expected = linear_logprob(hidden, weight, target, with_entropy=True, backend="torch")
    tiles = {name: fused_scoring.tile_of(*of) for name, of in {"bf16": (torch.bfloat16, 9), "sm_120": (torch.bfloat16, 12)}.items()}
    assert tiles["bf16"] != tiles["sm_120"] == fused_scoring.tile_of(torch.float16, 12)
    for tile in tiles.values():
        monkeypatch.setattr(fused_scoring, "tile_of", lambda dtype, major, tile=tile: tile)
        out = linear_logprob(hidden, weight, target, with_entropy=True, backend="triton_fused")
        torch.testing.assert_close(out.logprob, expected.logprob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-5, atol=1e-5)


WHOLE = (
    "its kernel has fp32 logits of a whole head: logits_dtype must be torch.float32, process_group None and batch_invariant False"
)
BOTH = "its kernel has neither bias nor softcap"


@pytest.mark.parametrize(
    ("backends", "asked", "reason"),
    [
        (dispatch.FUSED, {"lora_rank": 8}, "its kernel has no LoRA, got lora of rank 8."),
        (dispatch.FUSED, {"logits_dtype": torch.bfloat16}, f"{WHOLE}, got torch.bfloat16, None and False."),
        (dispatch.FUSED, {"sharded": True}, f"{WHOLE}, got torch.float32, a group and False."),
        (dispatch.FUSED, {"batch_invariant": True}, f"{WHOLE}, got torch.float32, None and True."),
        (["native_fused"], {"bias": True}, f'{BOTH}, got a bias and softcap None; backend="triton_fused" has both.'),
        (["native_fused"], {"softcap": 30.0}, f'{BOTH}, got no bias and softcap 30.0; backend="triton_fused" has both.'),
        (
            ["native_fused"],
            {"hidden_size": 4100},
            'its kernel needs a hidden size that is a multiple of 8, got 4100; backend="triton_fused" takes any.',
        ),
    ],
)
def test_what_a_fused_kernel_lacks_has_a_sentence(measured, backends, asked, reason):
    scoring = dispatch.Scoring(4096, 4096, 128000)._replace(**asked)
    for backend in dispatch.BACKENDS[1:]:
        assert dispatch.why_not(backend, CUDA, torch.bfloat16, scoring) == (reason if backend in backends else None)


SETTINGS = [{"logits_dtype": torch.bfloat16}, {"batch_invariant": True}, {"lora_rank": 2}, {"softcap": 30.0}, {"bias": True}, {}]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: str(*s) or "none")
def test_a_scoring_call_says_what_it_asks_for(monkeypatch, setting):
    asked = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *arguments: asked.append(arguments[4]) or choose(*arguments))
    hidden, weight, _ = cases.head(4, 6, 30, torch.bfloat16)
    target, given = torch.zeros(4, dtype=torch.int64, device=cases.DEVICE), dict(setting)
    if given.pop("lora_rank", 0):
        given["lora"] = LoraHead(torch.zeros_like(hidden[:2]), torch.zeros_like(weight[:, :2]))
    if "bias" in given:
        given["bias"] = torch.zeros_like(weight[:, 0])
    linear_logprob(hidden, weight, target, **given)
    assert asked == [dispatch.Scoring(4, 6, 30, **setting)]
    refused = {"logits_dtype", "batch_invariant", "lora_rank"} & set(setting)
    with pytest.raises(RuntimeError, match="cannot run: its kernel has") if refused else nullcontext():
        linear_logprob(hidden, weight, target, backend="triton_fused", **given)


def test_named_rows_are_scored_with_what_was_fastest_for_their_number(monkeypatch):
    asked, choose = [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *arguments: asked.append(arguments[4]) or choose(*arguments))
    hidden, weight, _ = cases.head(16, 6, 30, torch.float32)
    target, rows = (torch.arange(n, device=cases.DEVICE) for n in (16, 5))
    linear_logprob(hidden, weight, target, active_rows=rows)
    assert asked == [dispatch.Scoring(5, 6, 30)]


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not asked what the rows are")
@pytest.mark.parametrize("known", [True, False])
def test_a_loss_in_two_passes_scores_with_what_was_fastest(monkeypatch, known):
    """Here with a kernel whose logits stay on the chip, which gets the rows that count alone, where they are known."""
    asked, scored = [], []
    kernel = triton_ops.fused_scoring
    monkeypatch.setattr(triton_ops, "fused_scoring", lambda *given: scored.append(given[0].shape[0]) or kernel(*given))
    hidden, weight, _ = cases.head(16, 6, 30, torch.float32)
    b, objective = cases.batch(16, 30, torch.float32, weight=torch.arange(16) % 2 / 8), objectives.gspo()
    b = replace(b, scored_rows=(b.role == 0).nonzero().squeeze(1)[:1])
    expected = linear_policy_loss(hidden, weight, b, objective, backend="reference")
    monkeypatch.setattr(dispatch, "choose", lambda *given: asked.append(given[4]) or "triton_fused")
    if not known:
        rows = b._rows()._replace(active=None)  # as on a GPU
        monkeypatch.setattr(TokenBatch, "_rows", lambda batch: rows)
    out = linear_policy_loss(hidden, weight, b, objective)
    count = len(b.active_rows) + len(b.silent_rows) + 1 if known else 16
    assert out.passes == 2 and asked == [dispatch.Scoring(count, 6, 30)] and scored == [count]
    torch.testing.assert_close(out.logprob, expected.logprob)
    torch.testing.assert_close(
        cases.gradients(out.loss, (hidden, weight)), cases.gradients(expected.loss, (hidden, weight)), rtol=2e-5, atol=1e-6
    )


def test_the_docs_of_auto_say_whether_its_table_holds_a_measurement():
    table = json.loads((Path(dispatch.__file__).parent / "scoring.json").read_text())
    assert ("; it holds no measurement yet" in " ".join(linear_logprob.__doc__.split())) == (not table["entries"])
