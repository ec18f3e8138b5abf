"""The global generators of python, numpy and torch, from which rewards and dropout draw. Engines have states of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def seed_generators(seed: int) -> None:
    """Start every global generator, those of all CUDA devices too, from `seed`, at least 0."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # it takes no more
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """States of the global generators of python, numpy and torch (CPU and this rank's CUDA device), without pickled objects."""
    kind, keys, position, has_gauss, cached_gaussian = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached_gaussian),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Put every global generator back to what `rng_state` returned; that of a CUDA device stays as it is where none was saved."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached_gaussian = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached_gaussian))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def keep_generators() -> Iterator[None]:
    """Whatever is drawn or seeded inside, afterwards every global generator is where it was."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng_state(state)
