"""Shared test set-up: Triton kernels are interpreted where there is no GPU; `gpu` tests are skipped there with a message."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any test module
gc.disable()  # until all is imported: looking for garbage among a million objects that stay takes a quarter of that time


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what is here now stays to the end, and no later collection looks at it
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or the bindings of triton would be told as leaks


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; run `make gpu-test` on a machine with one")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
