"""The compiled extension: it is there where it can be, every instruction set gives the same, and bad arguments are refused.

That it equals the other backends is tested where they are: see cases.COMPILED.
"""

import shutil

import pytest
import torch

from trapo_kernels import TokenBatch, doctor, linear_logprob, linear_policy_loss, objectives
from trapo_kernels.backends import native

needs_native = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_it_is_built_where_there_is_a_compiler():
    assert native.why_not("cpu") is None


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request):
    widest = native.instruction_set()
    try:
        torch.ops.trapo_native.instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    torch.ops.trapo_native.instruction_set(widest)


def _problem(vocab_size, dtype, scale=3.0, rows=9):
    generator = torch.Generator().manual_seed(3)
    hidden = (scale * torch.randn(rows, 16, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(vocab_size, (rows,), generator=generator)
    batch = TokenBatch(
        target=target,
        role=torch.tensor([0, 1, 2] * 3, dtype=torch.uint8)[:rows],
        advantage=torch.linspace(-1, 1, rows).to(dtype),
        weight=torch.full((rows,), 0.3, dtype=dtype),
        old_logprob=torch.linspace(-3, 0, rows).to(dtype),
        ref_logprob=torch.linspace(0, -3, rows).to(dtype),
    )
    return (hidden, weight, bias), batch


@needs_native
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 33, 4095, 4096, 4097, 8209])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "softcap": 5.0}], ids=["plain", "softcap"])
def test_every_instruction_set_at_ragged_widths(instruction_set, vocab_size, settings):
    objective = objectives.trapo(entropy_coef=0.1)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        (hidden, weight, bias), batch = _problem(vocab_size, dtype)
        out = linear_policy_loss(hidden, weight, batch, objective, bias=bias, backend=backend, **settings)
        results.append([out.logprob, out.entropy, out.loss, *torch.autograd.grad(out.loss, (hidden, weight, bias))])
    for truth, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)


@needs_native
def test_exponential_and_tanh_to_an_ulp_or_two(instruction_set):
    """Through the ops: two logits, one at the maximum 0, so that p = exp(z) / (1 + exp(z)); softcap gives tanh."""
    z = torch.linspace(-80.0, 0.0, 40_001)
    logits = torch.stack([z, torch.zeros_like(z)], dim=1)
    target = torch.zeros(len(z), dtype=torch.int64)
    logprob = torch.ops.trapo_native.row_statistics(logits.clone(), target, None, None, 1.0, 0.0, True)[0].double()
    truth = torch.log_softmax(logits.double(), 1)[:, 0]
    assert ((logprob - truth).abs() / truth.abs()).max() < 3e-7
    capped = logits.clone()
    torch.ops.trapo_native.row_statistics(capped, torch.ones_like(target), None, None, 1.0, 10.0, True)  # leaves z behind
    truth = 10.0 * torch.tanh(z.double() / 10.0)
    assert (capped[:, 0] - truth)[:-1].abs().div(truth[:-1].abs()).max() < 3e-7


@needs_native
def test_nan_in_a_row_stays_in_that_row(instruction_set):
    logits = torch.randn(3, 5000)
    logits[1, 4999] = float("nan")
    stats = native.statistics(logits, torch.tensor([1, 2, 3]), native.LogitTransform(), True)
    assert stats.logprob.isnan().tolist() == [False, True, False]
    assert stats.entropy.isnan().tolist() == [False, True, False]


@needs_native
def test_the_number_of_threads_changes_no_bit():
    (hidden, weight, _), batch = _problem(50_000, torch.float32)
    logits = (hidden @ weight.T).detach()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        out = native.statistics(logits.clone(), batch.target, native.LogitTransform(), True)
        results.append(torch.stack(out))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@needs_native
@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "logits must be float32"),
        (torch.zeros(3, 2).t(), torch.zeros(2, dtype=torch.int64), "unit stride"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), "target must be contiguous, of length 2"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), "target must be contiguous.*dtype"),
    ],
)
def test_bad_arguments_of_the_ops(logits, target, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.trapo_native.row_statistics(logits, target, None, None, 1.0, 0.0, True)


@needs_native
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="no sse9"):
        torch.ops.trapo_native.instruction_set("sse9")


@needs_native
def test_it_is_the_default_on_a_cpu():
    (hidden, weight, _), batch = _problem(300, torch.float32)
    default = linear_logprob(hidden, weight, batch.target, with_entropy=True)
    named = linear_logprob(hidden, weight, batch.target, with_entropy=True, backend="native")
    assert torch.equal(default.logprob, named.logprob) and torch.equal(default.entropy, named.entropy)


def test_a_missing_extension_is_named_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(native, "_REASON", tmp_path / "reason.txt")
    assert "not compiled when trapo was installed" in native._load()
    (tmp_path / "reason.txt").write_text("command 'g++' failed: No such file or directory\n")
    assert "command 'g++' failed" in native._load()
    (tmp_path / "none.so").write_text("not a library")
    assert "does not load" in native._load()


def test_a_missing_extension_leaves_the_package_working(monkeypatch):
    monkeypatch.setitem(native._WHY_NOT, "cpu", "the native extension is missing: gone.")
    (hidden, weight, _), batch = _problem(300, torch.float32)
    out = linear_logprob(hidden, weight, batch.target)
    assert torch.equal(out.logprob, linear_logprob(hidden, weight, batch.target, backend="torch").logprob)
    with pytest.raises(RuntimeError, match='backend="native" cannot run: the native extension is missing: gone'):
        linear_logprob(hidden, weight, batch.target, backend="native")
    lines, healthy = doctor.report()
    assert healthy and any("native" in line and "missing: the native extension is missing: gone." in line for line in lines)


def test_the_doctor_names_versions_and_every_backend(capsys):
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for word in ("torch", "GPU", "reference", "triton_fused", "native", "self-test passed"):
        assert word in printed


def test_the_doctor_tells_a_wrong_backend(monkeypatch):
    monkeypatch.setattr(doctor, "_self_test", lambda backend, device: 0.5 if backend == "torch" else 0.0)
    lines, healthy = doctor.report()
    assert not healthy and any("WRONG" in line and "5.0e-01" in line for line in lines)
