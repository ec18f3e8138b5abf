"""Checkpoints that are whole or not there: written beside, made durable, moved into place in one rename.

A checkpoint is a directory `step_<n>` with `state.pt` (tensors and plain values, read with weights_only, so that loading never
runs code) and `manifest.json` (step, fingerprint of the run, size and SHA-256 of the state). What does not match its manifest
is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from trapo_train.lora import has_lora, merged_weights
from trapo_train.parallel import World

FORMAT = 3
STATE_FILE, MANIFEST_FILE = "state.pt", "manifest.json"
_UNFINISHED = ".unfinished_"


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves its state and how many states it keeps."""

    every: int = 0
    """Optimizer steps between checkpoints, at least 0; 0 saves on SIGTERM only."""
    keep: int = 2
    """Newest checkpoints to keep, at least 1."""
    resume: bool = False
    """Continue from the newest checkpoint in output_dir, or start where there is none; false refuses a used output_dir."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must be at least 0 steps, got {self.every}.")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {self.keep}. Set every=0 to save none.")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or must not be loaded."""


class CheckpointStore:
    """The checkpoints of one run in `directory`, newest last."""

    def __init__(self, directory: str | Path, keep: int) -> None:
        self.directory = Path(directory)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order; whether they are intact shows when they are loaded."""
        names = [path.name for path in self.directory.glob("step_*") if path.is_dir()]
        return sorted(int(name.removeprefix("step_")) for name in names if name.removeprefix("step_").isdigit())

    def path(self, step: int) -> Path:
        """Directory of the checkpoint of `step`."""
        return self.directory / f"step_{step:08d}"

    def save(self, step: int, state: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> Path:
        """Write a checkpoint, durable on disk when this returns, and drop those older than the newest `keep`.

        Args:
            state: tensors and plain Python values, in dicts, lists and tuples.
            fingerprint: what a run must have in common with this one to resume it; JSON values.

        Raises: CheckpointError when the disk is full or not writable, or the step has a checkpoint; earlier ones stay.
        """
        unfinished = self.directory / f"{_UNFINISHED}{step:08d}"
        if self.path(step).exists():
            raise CheckpointError(f"checkpoint: {self.path(step)} exists already. Save each step once.")
        try:
            for leftover in self.directory.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover)
            unfinished.mkdir(parents=True)
            with (unfinished / STATE_FILE).open("wb") as file:
                torch.save(dict(state), file)
                _make_durable(file)
            manifest = {"format": FORMAT, "step": step, "fingerprint": fingerprint, "state": _digest(unfinished / STATE_FILE)}
            with (unfinished / MANIFEST_FILE).open("w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                _make_durable(file)
            _sync_directory(unfinished)
            unfinished.rename(self.path(step))
            _sync_directory(self.directory)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = f"The last one is {self.path(self.steps()[-1])}." if self.steps() else "There is no earlier one."
            raise CheckpointError(
                f"checkpoint: step {step} could not be saved to {self.directory}: {error}. {kept} "
                "Free space or make the directory writable, then resume with checkpoint.resume=true."
            ) from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return self.path(step)

    def load(self, fingerprint: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest checkpoint, on the CPU; None where there is none.

        Raises: CheckpointError for a damaged checkpoint, with the newest intact one before it, and for one of a run that
            differs from `fingerprint`, with the differences.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        damage = self._damage(steps[-1])
        if damage:
            intact = next((step for step in reversed(steps[:-1]) if self._damage(step) is None), None)
            remedy = f"Delete {path} to resume from step {intact}, which is intact." if intact is not None else (
                f"There is no intact one before it: delete {self.directory} to start anew."
            )  # fmt: skip
            raise CheckpointError(f"checkpoint: {path} is damaged: {damage}. {remedy}")
        saved = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))["fingerprint"]
        differences = compare_fingerprints(saved, json.loads(json.dumps(fingerprint)))
        if differences:
            raise CheckpointError(
                f"checkpoint: {path} belongs to a different run: {'; '.join(differences)}. "
                "Set these back to resume it, or start a new run in another output_dir."
            )
        return steps[-1], torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)

    def _damage(self, step: int) -> str | None:
        """What is wrong with the checkpoint of `step`, or None."""
        path = self.path(step)
        try:
            manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
            expected, found = manifest["state"], manifest["format"]
            if found != FORMAT:
                return f"its format is {found}, this version reads {FORMAT}"
            actual = _digest(path / STATE_FILE)
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST_FILE} is not readable"
        if actual["bytes"] != expected["bytes"]:
            return f"{STATE_FILE} has {actual['bytes']} of {expected['bytes']} bytes"
        return None if actual == expected else f"{STATE_FILE} does not match its SHA-256"


def compare_fingerprints(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One sentence per value that differs, such as "optimizer.learning_rate was 0.001, is 0.01"."""
    differences = []
    for name in [*saved, *(name for name in current if name not in saved)]:
        old, new = saved.get(name), current.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += compare_fingerprints(old, new, f"{prefix}{name}.")
        elif old != new:
            differences.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return differences


def rng_state() -> dict[str, Any]:
    """States of the global generators of python, numpy and torch (CPU and every CUDA device), without pickled objects."""
    kind, keys, position, has_gauss, cached_gaussian = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached_gaussian),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Put every global generator back to what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached_gaussian = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached_gaussian))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        if len(state["cuda"]) != torch.cuda.device_count():
            raise CheckpointError(
                f"checkpoint: saved with {len(state['cuda'])} CUDA devices, got {torch.cuda.device_count()}. "
                "Resume with as many, so that every generator has its state."
            )
        torch.cuda.set_rng_state_all(state["cuda"])


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def training_state(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
    """Trained weights and optimizer state by parameter name, whole tensors on the CPU whatever the sharding; every rank must ask,
    the first one gets them. Frozen weights, those beside LoRA's adapters, are where the model came from."""
    return {
        "model": get_model_state_dict(model, options=_TRAINED),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_WHOLE),
    }


def load_training_state(model: PreTrainedModel, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put what `training_state` returned into a model and an optimizer, sharded over any number of ranks."""
    whole = StateDictOptions(full_state_dict=True, strict=not has_lora(model))
    set_model_state_dict(model, state["model"], options=whole)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=whole)


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, world: World | None = None
) -> Path:
    """Write model and tokenizer as Hugging Face files (float32, safetensors), replacing an older export as a whole. LoRA's adapters
    are added to the weights.

    Every rank of `world` must call this; the first one gathers the weights and writes.
    """
    directory = Path(directory)
    sharded = world is not None and world.size > 1
    weights = get_model_state_dict(model, options=_WHOLE) if sharded or has_lora(model) else None
    if world is not None and not world.first:
        return directory
    if has_lora(model):
        weights = merged_weights(model, weights)
    unfinished = directory.with_name(f"{_UNFINISHED}{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    progress_bar = is_progress_bar_enabled()
    disable_progress_bar()
    model.save_pretrained(unfinished, state_dict=weights)
    tokenizer.save_pretrained(unfinished)
    if progress_bar:
        enable_progress_bar()
    if directory.exists():
        shutil.rmtree(directory)
    unfinished.rename(directory)
    return directory


class StopSignal:
    """Catches SIGTERM while it is entered, so that a run can save at the next step boundary; `received` tells."""

    def __init__(self) -> None:
        self.received = False
        self._previous: Any = None

    def __enter__(self) -> StopSignal:
        # Only the main thread may install handlers; elsewhere SIGTERM keeps its meaning.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def _make_durable(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
