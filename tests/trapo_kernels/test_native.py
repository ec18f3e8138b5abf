"""The compiled extension: it is there where it can be, every instruction set gives the same, and bad arguments are refused.

That it equals the other backends is tested where they are: see cases.COMPILED.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setuptools import Distribution, Extension
from setuptools.command.egg_info import FileList

from csrc.build import BuildNative
from trapo_kernels import Role, TokenBatch, doctor, linear_logprob, linear_policy_loss, objectives, terms
from trapo_kernels.backends import native

needs_native = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))


def test_it_is_built_where_there_is_a_compiler(compiler):
    assert native.why_not("cpu") is None


@pytest.mark.filterwarnings("ignore:.*ext-modules")
def test_a_source_distribution_builds_it_with_its_cuda_part():
    distribution = Distribution()
    distribution.parse_config_files()  # pyproject.toml
    held = distribution.get_command_obj("build_ext")
    held.ensure_finalized()
    needed = {str(file) for file in Path("csrc").rglob("*.*") if file.suffix in {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}}
    assert len(needed) > 20 and needed <= set(held.get_source_files())


@pytest.mark.filterwarnings("ignore:.*ext-modules")
def test_a_source_distribution_holds_no_test_without_its_helpers(monkeypatch):
    distribution, packed = Distribution(), []
    distribution.parse_config_files()
    command = distribution.get_command_obj("sdist")
    command.ensure_finalized()
    monkeypatch.setattr(command, "make_release_tree", lambda folder, files: packed.extend(files))
    monkeypatch.setattr(command, "make_archive", lambda *args, **options: "archive")
    command.keep_temp, command.filelist = True, FileList()
    command.filelist.extend(["tests/test_house.py", "trapo_kernels/api.py"])
    command.make_distribution()
    assert packed == ["trapo_kernels/api.py"]


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request):
    widest = native.instruction_set()
    try:
        torch.ops.trapo_native._use_instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    torch.ops.trapo_native._use_instruction_set(widest)


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
    logprob = torch.ops.trapo_native.row_statistics(logits.clone(), target, None, None, 1.0, 0.0)[0].double()
    truth = torch.log_softmax(logits.double(), 1)[:, 0]
    assert ((logprob - truth).abs() / truth.abs()).max() < 3e-7
    capped = logits.clone()
    torch.ops.trapo_native.row_statistics(capped, torch.ones_like(target), None, None, 1.0, 10.0)  # leaves tanh behind
    truth = torch.tanh(z.double() / 10.0)
    assert (capped[:, 0] - truth)[:-1].abs().div(truth[:-1].abs()).max() < 3e-7


@needs_native
def test_nan_in_a_row_stays_in_that_row(instruction_set):
    logits = torch.randn(3, 5000)
    logits[1, 4999] = float("nan")
    stats = native.statistics(logits, torch.tensor([1, 2, 3]), native.LogitTransform(), True)
    assert stats.logprob.isnan().tolist() == [False, True, False]
    assert stats.entropy.isnan().tolist() == [False, True, False]


@needs_native
@pytest.mark.parametrize("vocab_size", [1, 15, 16, 33, 4097])
def test_a_gradient_in_bf16_takes_the_place_of_the_logits_and_is_that_in_fp32_rounded_once(instruction_set, vocab_size):
    logits = 5 * torch.randn(4, vocab_size)
    logits[2, vocab_size // 2] = float("nan")
    target = torch.tensor([0, -100, vocab_size - 1, vocab_size // 2])
    stats = native.statistics(logits.clone(), target, native.LogitTransform(softcap=4.0), True)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        room = torch.full((4, vocab_size + 3), 7.0)
        room[:, :vocab_size] = logits
        args = (target, native.LogitTransform(softcap=4.0), stats, torch.linspace(-1, 1, 4), torch.linspace(1, 2, 4), dtype)
        results.append(native.logprob_gradient(room[:, :vocab_size], *args))
        assert results[-1].data_ptr() == room.data_ptr() and (room[:, vocab_size:] == 7.0).all()
    wide, narrow = results
    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert narrow.isnan().any(1).tolist() == [False, False, True, False] and not narrow[1].any()


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
        (torch.zeros(6), torch.zeros(2).long(), r"logits must have shape \[C, V\], got \[6\]\. Flatten"),
        (torch.zeros(2, 3).double(), torch.zeros(2).long(), r"logits must be torch.float32, got torch.float64\. Convert it with"),
        (
            torch.zeros(3, 2).t(),
            torch.zeros(2).long(),
            r"logits must have unit stride in a row, got 2\. Pass logits.contiguous\(\)",
        ),
        (torch.zeros(2, 3), torch.zeros(3).long(), r"target must have shape \[C\] = \[2\], got \[3\]\. Pass one value per row"),
        (torch.zeros(2, 3), torch.zeros(2).int(), r"target must be torch.int64, got torch.int32\. Convert it with target.to"),
        (torch.zeros(2, 3), torch.zeros(4).long()[::2], r"target must be contiguous, got stride"),
    ],
)
def test_bad_arguments_of_the_ops(logits, target, message):
    with pytest.raises(RuntimeError, match=f"row_statistics: {message}"):
        torch.ops.trapo_native.row_statistics(logits, target, None, None, 1.0, 0.0)


@needs_native
def test_a_gradient_of_another_shape_and_unknown_gates_are_refused():
    logits, target, rows = torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"row_gradient: grad must have the shape of logits, \[2, 3\], got \[2, 2\]"):
        torch.ops.trapo_native.row_gradient(
            [logits], target, None, None, 1.0, 0.0, rows, rows, rows, rows, None, None, [torch.zeros(2, 2)]
        )
    role = torch.ones(2, dtype=torch.uint8)
    for codes in ([10, 1, 0], [1, -1, 0], [1, 1, 5]):
        with pytest.raises(RuntimeError, match=r"token_coefficient: codes must lie in \[0, 9\], \[0, 9\] and \[0, 4\], got"):
            torch.ops.trapo_native.token_coefficient(rows, role, rows, rows, rows, None, None, codes, [0.0] * terms.NUM_SCALARS)


def _policy(logits, target, grad):
    """row_policy of SFT with an entropy bonus."""
    rows = len(target)
    one, role = torch.ones(rows), torch.full((rows,), Role.EXPERT, dtype=torch.uint8)
    streams = (role, 0 * one, one, one, None, None, -0.1 * one)
    gates = ([1, 1, 0], [0.0] * terms.NUM_SCALARS)
    return torch.ops.trapo_native.row_policy([logits], target, None, None, 1.0, 0.0, *streams, *gates, [grad])


@needs_native
@pytest.mark.parametrize("outside", [40, 43, 10**12, -2])
def test_a_target_outside_the_vocabulary_makes_its_row_nan_and_writes_nowhere_else(instruction_set, outside):
    """The ops are the last guard: the range is not checked while torch.compile traces."""
    room = torch.randn(3, 64)
    before = room.clone()
    stats = _policy(room[:, :40], torch.tensor([1, outside, 2]), room[:, :40])
    assert torch.equal(room[:, 40:], before[:, 40:])
    for value in (stats[0], stats[1], room[:, 0]):
        assert value.isnan().tolist() == [False, True, False]


@needs_native
@pytest.mark.parametrize("vocab_size", [1, 100, 5000])
def test_rows_more_than_two_to_the_31_elements_apart(instruction_set, vocab_size, tmp_path):
    """Logits in 8 GiB of address space, a mapped file of which only the rows' own pages ever exist."""
    stride = 2**30 + 16
    space = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + vocab_size, dtype=torch.float32)
    far = space.as_strided((3, vocab_size), (stride, 1))
    near = torch.randn(3, vocab_size)
    target = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    transform, stats = native.LogitTransform(temperature=0.7), native.RowStatistics(*torch.rand(4, 3))
    for run in (
        lambda logits: _policy(logits, target, logits),
        lambda logits: native.statistics(logits, target, transform, True),
        lambda logits: native.logprob_gradient(logits, target, transform, stats, stats.logprob, None, torch.float32),
    ):
        logits = near.clone()
        far.copy_(near)
        for here, there in zip([*run(logits), logits], [*run(far), far], strict=True):
            assert torch.equal(here, there)


@needs_native
@pytest.mark.parametrize("masked", [float("-inf"), torch.finfo(torch.float32).min, -1e30])
def test_masked_columns_and_subnormal_logits(instruction_set, masked):
    """A masked column has no probability and no gradient, whichever large negative number masks it; subnormals count as zero."""
    logits = torch.full((4, 5000), masked)
    logits[:, 4000:4003] = torch.tensor([[1.0, 2.0, 3.0], [1e-40, -1e-42, 0.0], [700.0, 0.0, -700.0], [1e38, 0.0, 1.0]])
    target = torch.tensor([4002, 4000, 4001, 4000])
    exact = logits[:, 4000:4003].double().log_softmax(1)
    stats = _policy(logits, target, logits)
    torch.testing.assert_close(stats[0].double(), exact[torch.arange(4), target - 4000], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats[1].double(), torch.special.entr(exact.exp()).sum(1), rtol=1e-6, atol=1e-7)
    assert (logits[:, :4000] == 0).all() and (logits[:, 4003:] == 0).all() and logits.isfinite().all()


@needs_native
def test_no_rows(instruction_set):
    logits = torch.zeros(0, 7)
    assert [len(value) for value in _policy(logits, torch.zeros(0).long(), logits)] == [0, 0, 0, 0]


@needs_native
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="no sse9"):
        torch.ops.trapo_native._use_instruction_set("sse9")


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
    assert "does not load" in native._load() and "Could not load this library" not in native._load()  # but the loader's own words


@needs_native
def test_an_extension_of_an_earlier_version_is_named(monkeypatch):
    with_bias = ["hidden", "weight", "target", "bias", "row_temperature", "temperature", "softcap"]
    scoring = SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=with_bias)))
    with_its_scalars = SimpleNamespace(num_scalars=lambda: terms.NUM_SCALARS, scoring=scoring)
    for ops in (SimpleNamespace(scoring=None), SimpleNamespace(num_scalars=lambda: terms.NUM_SCALARS - 1), with_its_scalars):
        monkeypatch.setattr(native, "_OPS", ops)
        assert native._load() == "the native extension is older than this package. Install trapo again."


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_holds_no_subnormal_numbers(instruction_set, dtype):
    """GEMMs take them at a tenth of their speed; probabilities down to 1e-38 times a weight of 1e-4 would be some."""
    logits = torch.cat([torch.zeros(2, 1), torch.linspace(-90, -70, 999).expand(2, 999)], 1).contiguous()
    stats = native.statistics(logits.clone(), torch.zeros(2, dtype=torch.int64), native.LogitTransform(), True)
    c = torch.tensor([1e-4, -1e-4])
    grad = native.logprob_gradient(logits.clone(), torch.zeros(2).long(), native.LogitTransform(), stats, c, None, dtype).float()
    size = grad[:, 1:].abs()
    assert (size == 0).any() and (size > 0).any() and size[size > 0].min() >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("in_source", [False, True])  # True: pip install -e
def test_an_installation_without_a_compiler_leaves_the_reason(in_source, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    command = BuildNative(Distribution())
    command.initialize_options()
    command.compiler = SimpleNamespace(compiler_so_cxx=["no-such-compiler"])
    command.in_source = in_source
    monkeypatch.setattr(command, "get_ext_fullpath", lambda _: str(tmp_path / "built" / "_native.abi3.so"))
    command.build_extension(Extension("trapo_kernels._native", []))
    reason = (tmp_path / ("trapo_kernels" if in_source else "built") / "_native_build.txt").read_text()
    assert re.match(r"no C\+\+ compiler \(no-such-compiler\) was found .*\. Install one, then trapo again\.", reason)
    assert capsys.readouterr().err == f"trapo: no native backend: {reason}"
    monkeypatch.setenv("TRAPO_CUDA", "1")
    with pytest.raises(RuntimeError, match="the native backend was asked for by name: no C"):
        command.build_extension(Extension("trapo_kernels._native", []))
    monkeypatch.setattr(native, "_REASON", tmp_path / ("trapo_kernels" if in_source else "built") / "_native_build.txt")
    assert native._missing_kernels("cuda") == f"the native extension was built without kernels for cuda: {reason.strip()}"
    native._REASON.unlink()
    assert native._missing_kernels("cuda").endswith("for cuda. Install trapo with TRAPO_CUDA=1 and nvcc.")


def test_a_cuda_part_needs_a_torch_with_cuda(tmp_path):
    """Said before nvcc works for minutes on what could not be linked."""
    command = BuildNative(Distribution())
    command.initialize_options()
    with pytest.raises(RuntimeError, match=r"needs a torch that was built for CUDA; .* has no libtorch_cuda\.so\. Install one"):
        command._cuda_objects(tmp_path, [])


def test_a_missing_extension_leaves_the_package_working(monkeypatch):
    monkeypatch.setitem(native._WHY_NOT, "cpu", "there is no native extension: gone.")
    (hidden, weight, _), batch = _problem(300, torch.float32)
    out = linear_logprob(hidden, weight, batch.target)
    assert torch.equal(out.logprob, linear_logprob(hidden, weight, batch.target, backend="torch").logprob)
    with pytest.raises(RuntimeError, match='backend="native" cannot run: there is no native extension: gone'):
        linear_logprob(hidden, weight, batch.target, backend="native")
    lines, healthy = doctor.report()
    assert healthy and any("native" in line and "missing: there is no native extension: gone." in line for line in lines)


def test_the_doctor_names_versions_and_every_backend(capsys):
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for word in ("torch", "GPU", "reference", "triton_fused", "native", "self-test passed"):
        assert word in printed


def test_the_doctor_tells_a_wrong_backend(monkeypatch):
    monkeypatch.setattr(doctor, "_self_test", lambda backend, device: 0.5 if backend == "torch" else 0.0)
    lines, healthy = doctor.report()
    assert not healthy and any("WRONG" in line and "5.0e-01" in line for line in lines)


def test_the_doctor_s_self_test_is_in_float32_whatever_is_allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # on a CPU with AMX or AVX512_BF16 torch then multiplies in bf16
    try:
        lines, healthy = doctor.report()
        assert healthy and torch.get_float32_matmul_precision() == "medium", lines
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_doctor_tells_that_float32_logits_are_tf32(monkeypatch, allowed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_gpu", lambda: "1 x pretended")
    monkeypatch.setattr(doctor, "_verdict", lambda backend, device: ("runs", True))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
    lines, _ = doctor.report()
    assert any("TF32" in line and "set_float32_matmul_precision('highest')" in line for line in lines) == allowed
