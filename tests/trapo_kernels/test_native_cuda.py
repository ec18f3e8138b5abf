"""The CUDA kernels without a GPU: they compile cleanly, and the arithmetic and index maps in them are right."""

import shutil
import subprocess
import sys
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from csrc.build import gencode
from tests.trapo_kernels import host_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def host(compiler, tmp_path_factory):
    """csrc's arithmetic, compiled for the host."""
    return host_gpu.build_arithmetic(tmp_path_factory.mktemp("arithmetic"))


def _pointer(x):
    return c_void_p(x.data_ptr())


def test_a_warpgroup_holds_every_logit_of_its_tile_once(host):
    rows, columns = (torch.empty(128, 128, dtype=torch.int32) for _ in range(2))
    host.accumulator_places(_pointer(rows), _pointer(columns))
    places = (rows * 256 + columns).flatten().sort().values
    assert torch.equal(places, torch.arange(64 * 256, dtype=torch.int32))
    for thread in range(128):  # two rows a thread, by bit 1 of the register: what add_tile relies on
        assert torch.equal(rows[thread], rows[thread, [0, 2]].repeat_interleave(2).repeat(32))
    assert (columns == columns[:1] + columns[:, :1]).all()  # a thread's columns are its first plus those of thread 0


def _schedule(host, rows, vocab_size, multiprocessors):
    """How often each tile is worked on, the tiles of every cluster, and (blocks of a cluster, splits, items)."""
    counts = torch.zeros(-(-rows // 128), -(-vocab_size // 256), dtype=torch.int32)
    by_cluster, sizes = torch.zeros(max(1, multiprocessors), dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    arguments = c_int64(rows), c_int64(vocab_size), multiprocessors
    host.count_tiles(*arguments, _pointer(counts), _pointer(by_cluster), _pointer(sizes))
    return counts, by_cluster, sizes.tolist()


@pytest.mark.parametrize("rows", [1, 128, 129, 1408, 1500, 5000, 65_537])
@pytest.mark.parametrize("vocab_size", [1, 256, 257, 32_000, 152_064])
@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
def test_every_tile_is_worked_on_once(host, rows, vocab_size, multiprocessors):
    counts, _, (cluster_blocks, splits, _) = _schedule(host, rows, vocab_size, multiprocessors)
    assert (counts == 1).all() and 1 <= splits <= counts.shape[1]
    assert cluster_blocks == (1 if rows <= 128 else 2)


@pytest.mark.parametrize(("rows", "slack"), [(128, 1.12), (512, 1.06), (2048, 1.06), (4096, 1.03), (8192, 1.01), (32_768, 1.002)])
@pytest.mark.parametrize("vocab_size", [152_064, 128_256])
def test_the_clusters_of_a_whole_gpu_finish_together(host, rows, vocab_size, slack):
    """132 multiprocessors are 66 clusters of two; what remains unequal is a tile more or less."""
    _, by_cluster, (cluster_blocks, _, items) = _schedule(host, rows, vocab_size, 132)
    clusters = 132 // cluster_blocks
    work = by_cluster[:clusters].double()
    assert items % clusters == 0 and not by_cluster[clusters:].any()
    assert work.max() <= slack * work.mean()


@pytest.mark.parametrize("parts", [1, 7, 512])
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0], ids=["equal", "flat", "peaked"])
@pytest.mark.parametrize(("softcap", "temperature"), [(0.0, 1.0), (30.0, 0.7)])
def test_row_arithmetic_against_fp64(host, parts, scale, softcap, temperature):
    logits = scale * torch.randn(1500)
    logits[17] = float("-inf") if softcap == 0.0 else -3.0
    target = int(logits.argmax()) if scale > 1 else 4
    statistics, gradient = torch.empty(3), torch.empty(1500)
    arguments = [c_float(x) for x in (softcap, temperature)]
    weights = [c_float(x) for x in (-0.7, 0.2)]
    host.row(_pointer(logits), 1500, target, *arguments, parts, *weights, _pointer(statistics), _pointer(gradient))
    exact = logits.double().requires_grad_()
    z = exact if softcap == 0.0 else softcap * torch.tanh(exact / softcap)
    log_p = torch.log_softmax(z / temperature, 0)
    logprob, entropy = log_p[target], -(log_p.exp() * log_p.clamp(min=-1e30)).sum()
    expected = torch.stack([logprob, entropy, torch.logsumexp(z / temperature, 0)])
    torch.testing.assert_close(statistics.double(), expected.detach(), rtol=2e-6, atol=2e-5 if softcap else 5e-6)
    (truth,) = torch.autograd.grad(-0.7 * logprob + 0.2 * entropy, exact)
    torch.testing.assert_close(gradient.double(), truth.nan_to_num(0.0), rtol=2e-5, atol=2e-6)


def test_target_gradient_keeps_its_digits_as_p_approaches_one(host):
    """Contract 5: 1 - p = 4e-9 is far below the spacing of fp32 at 1."""
    logits = torch.tensor([20.0, 0.0, 0.0])
    statistics, gradient = torch.empty(3), torch.empty(3)
    zero, one = c_float(0.0), c_float(1.0)
    host.row(_pointer(logits), 3, 0, zero, one, 1, one, zero, _pointer(statistics), _pointer(gradient))
    truth = 1 - torch.softmax(logits.double(), 0)[0]
    assert abs(gradient[0] - truth) / truth < 1e-5


@pytest.mark.parametrize(
    ("arch", "option"),
    [
        ("90a", "-gencode=arch=compute_90a,code=sm_90a"),
        ("100+PTX", "-gencode=arch=compute_100,code=[sm_100,compute_100]"),
        ("90", "must name 90a"),
        ("90a+PTX", r"must have \+PTX at 100 or later, without an a, got 90a\+PTX. Write 90a."),
        ("80+PTX", r"must have \+PTX at 100 or later, without an a, got 80\+PTX. Write 80."),
        ("sm_80", "must name architectures such as 80, 90a or 120.PTX, got sm_80"),
        ("80,90a", "got 80,90a. Separate them by spaces"),
    ],
)
def test_an_architecture_is_compiled_for_or_refused(arch, option):
    if option.startswith("-"):
        assert gencode(arch) == option
    else:
        with pytest.raises(RuntimeError, match=option):
            gencode(arch)


@pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc on this machine"
)
@pytest.mark.slow
def test_every_kernel_compiles_without_spilling_and_with_its_instructions():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.offline_native", "--check"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    committed = (ROOT / "benchmarks" / "results" / "offline_native.md").read_text()
    kernels = {line.split("|")[1] for line in result.stdout.splitlines() if "_kernel" in line.split("|")[1:2].__str__()}
    assert kernels and all(kernel in committed for kernel in kernels), "regenerate results/offline_native.md"
