"""What several kernel tests share."""

import shutil

import pytest
import torch.distributed as dist

from tests import pretended_gpu
from tests.trapo_kernels import cases, host_gpu


@pytest.fixture(autouse=cases.PRETENDED)
def a_pretended_gpu(monkeypatch):
    """What every test runs on where TRAPO_TEST_ON asks for it (see test_gpu_tests.py)."""
    with pretended_gpu.pretend(monkeypatch) as gpu:
        yield gpu


@pytest.fixture(scope="session")
def compiler():
    """The C++ compiler; trapo installs and works without one, and so do the other tests."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine")


@pytest.fixture(scope="session")
def host_gpu_library(compiler, tmp_path_factory):
    """csrc's CUDA code, compiled for the host."""
    return host_gpu.build(tmp_path_factory.mktemp("host_gpu"))


@pytest.fixture(scope="module")
def one_rank():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
