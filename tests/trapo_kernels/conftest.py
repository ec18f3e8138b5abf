"""What several kernel tests share."""

import shutil

import pytest

from tests.trapo_kernels import host_gpu


@pytest.fixture(scope="session")
def host_gpu_library(tmp_path_factory):
    """csrc's CUDA code, compiled for the host."""
    if shutil.which("g++") is None:  # trapo installs and works without one, and so do its other tests
        pytest.skip("no C++ compiler on this machine")
    return host_gpu.build(tmp_path_factory.mktemp("host_gpu"))
