"""Checkpoints that are whole or not there: written beside, made durable, moved into place in one rename.

A checkpoint is a directory `step_<n>`:

- `tensors/`: weights and optimizer state, safetensors files of each rank with its shards (torch.distributed.checkpoint), which
  any number of ranks can read;
- `state.pt`: everything else, read with weights_only; neither format can run code when it is loaded;
- `manifest.json`: step, fingerprint of the run, size and SHA-256 of every file. What does not match it is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from trapo_train.checkpoints.tensor_files import tensor_writer
from trapo_train.files import UNFINISHED, replace_text
from trapo_train.parallel.world import RankError, World
from trapo_train.schema import UserError

FORMAT = 7
CHECKPOINT_DIR = "checkpoints"  # in output_dir
STATE_FILE, MANIFEST_FILE, TENSOR_DIR = "state.pt", "manifest.json", "tensors"


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves its state and how many states it keeps."""

    every: int = 0
    """Rollout steps between checkpoints, at least 0. 0 saves none while it trains; the last whole step is still saved on a signal
    (SIGTERM, SIGHUP or Ctrl-C), by several ranks at the end, and when an error ends the run, unless that comes between updates of
    one step or, of several ranks, to one in its passes of the model. Weights that are not finite are never saved: they end it."""
    keep: int = 2
    """Newest checkpoints to keep, at least 1."""
    keep_best: bool = False
    """Whether the checkpoint of the best evaluation is kept as well: of the highest mean accuracy of the sets, or the lowest
    expert_nll without sampling. evaluation.every must be a multiple of `every`. The model before training has no checkpoint: where
    its evaluation was better, the run and `trapo-train export --step best` say so."""
    resume: bool = False
    """Continue from the newest checkpoint in output_dir, or start where there is neither one nor a trained model; false refuses a
    used output_dir."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"every must be at least 0 steps, got {self.every}.")
        if self.keep < 1:
            raise UserError(f"keep must be at least 1 checkpoint, got {self.keep}. Set every=0 to save none.")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or must not be loaded."""


class CheckpointStore:
    """The checkpoints of one run in `directory`, newest last.

    Args:
        directory: on a disk that every rank sees.
        keep: newest checkpoints to keep.
        keep_best: whether to keep that of the highest score as well.
        world: the ranks that save and load together, each its own shards; None for a single process.
    """

    def __init__(self, directory: str | Path, keep: int, world: World | None = None, *, keep_best: bool = False) -> None:
        self.directory = Path(directory)
        self.keep, self.keep_best = keep, keep_best
        self._ranks = world or World.alone()
        self.undeleted: str | None = None
        """What is wrong with an old checkpoint that the last `prune` could not delete; known to the first rank."""

    @classmethod
    def of(cls, output_dir: str | Path, config: CheckpointConfig | None = None, world: World | None = None) -> CheckpointStore:
        """That of the run in `output_dir`; without `config` for one that only reads."""
        config = config or CheckpointConfig()
        return cls(Path(output_dir) / CHECKPOINT_DIR, config.keep, world, keep_best=config.keep_best)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order; whether they are intact shows when they are loaded."""
        names = [path.name for path in self.directory.glob("step_*") if path.is_dir()]
        return sorted(int(name.removeprefix("step_")) for name in names if name.removeprefix("step_").isdigit())

    def unfinished_bytes(self) -> int:
        """What was left behind by a save that was killed, and goes with the next one."""
        return sum(
            file.stat().st_size for place in self.directory.glob(f"{UNFINISHED}*") for file in place.rglob("*") if file.is_file()
        )

    def path(self, step: int) -> Path:
        """Directory of the checkpoint of `step`."""
        return self.directory / f"step_{step:08d}"

    def best(self) -> int | None:
        """The step of the checkpoint with the highest score, the later of equals; None where none has one."""
        scores = {step: self._recorded(step, "score") for step in self.steps()}
        known = [step for step, score in scores.items() if score is not None]
        return max(known, key=lambda step: (scores[step], step), default=None)

    def fingerprint(self) -> dict[str, Any]:
        """That which the newest checkpoint was saved with; empty where there is none that can be read."""
        return self._newest("fingerprint") or {}

    def score_before(self) -> float | None:
        """What the newest checkpoint knows of the score of the model before training; None where it was not evaluated."""
        return self._newest("score_before")

    def better_before(self) -> str | None:
        """A sentence where the model before training, which has no checkpoint, scored higher than the best one; else None."""
        step, before = self.best(), self.score_before()
        if step is None or before is None or before <= (score := self._recorded(step, "score")):
            return None
        of = "minus expert_nll, " if before < 0 else ""
        return f"the model before training scored higher: {of}{before:.3f} against {score:.3f} of step {step}, the best checkpoint"

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        fingerprint: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        score: float | None = None,
        score_before: float | None = None,
    ) -> Path:
        """Write a checkpoint, durable on disk when this returns, and `prune` the older ones. Every rank calls it.

        Args:
            state: the first rank's plain Python values and small tensors, in dicts, lists and tuples.
            fingerprint: what a run must have in common with this one to resume it; JSON values.
            tensors: weights and optimizer state by name, no two sharing memory; of sharded ones each rank writes its shards.
            score: how good the model is, if that is known; higher is better, and one that is not finite is none.
            score_before: how good it was before training.

        Memory: each rank holds one file of its shards on the CPU, unpinned: up to three times 2 GiB, or its largest shard.

        Raises: CheckpointError, on every rank, when the disk is full or not writable, or the step has a checkpoint; earlier ones
            stay.
        """
        unfinished = self.directory / f"{UNFINISHED}{step:08d}"
        if any(self._ranks.gather(self.path(step).exists())):
            raise CheckpointError(f"checkpoint: {self.path(step)} exists already. Save each step once.")
        try:
            with self._ranks.together():  # a rank that is lost meanwhile is no fault of the disk
                self._on_first_rank(lambda: self._begin(unfinished, state))
                if tensors:
                    with _quiet():
                        dcp.save(
                            {name: tensor.contiguous() for name, tensor in tensors.items()},
                            storage_writer=tensor_writer(unfinished / TENSOR_DIR, tensors, self._ranks.size),
                            no_dist=self._ranks.size == 1,
                        )
                manifest = {"format": FORMAT, "step": step, "fingerprint": fingerprint, "files": self._digests(unfinished)}
                manifest |= {"score": _finite(score), "score_before": _finite(score_before)}
                self._on_first_rank(lambda: self._finish(unfinished, step, manifest))
        except (OSError, RuntimeError, MemoryError, CheckpointException) as error:  # RuntimeError: torch.save's, of a full disk
            if self._ranks.first:
                shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, RankError):
                raise
            kept = f"The last one is {self.path(self.steps()[-1])}." if self.steps() else "There is no earlier one."
            remedy = "Mend that" if isinstance(error, CheckpointError) else "Free space or make the directory writable"
            raise CheckpointError(
                f"checkpoint: step {step} could not be saved to {self.directory}: {_reason(error)}. {kept} "
                f"{remedy}, then resume with checkpoint.resume=true."
            ) from error
        self.prune()
        return self.path(step)

    def prune(self) -> None:
        """Drop those older than the newest `keep`, but not the best with `keep_best`; where that fails `undeleted` says so.
        Every rank calls it."""
        self._on_first_rank(self._prune)

    def rate(self, step: int, score: float | None, state: Mapping[str, Any] | None = None) -> None:
        """Give the checkpoint of `step`, saved before its evaluation, its score, and with `keep_best` drop the one that was best
        before; every rank calls it. `state`: what the evaluation changed of the state, JSON values, which `load` returns with the
        rest."""

        def write() -> None:
            manifest = self._manifest(step) | {"score": _finite(score), "state": dict(state or {})}
            replace_text(self.path(step) / MANIFEST_FILE, json.dumps(manifest, indent=1))

        try:
            self._on_first_rank(write)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint: the score of step {step} could not be written to {self.path(step)}: {_reason(error)}. Free space or "
                "make the directory writable, then resume with checkpoint.resume=true, which evaluates that step again."
            ) from error
        if self.keep_best:
            self.prune()

    def load(self, fingerprint: Mapping[str, Any], about_data: str = "") -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest checkpoint, on the CPU; None where there is none. Every rank calls it.

        Raises: CheckpointError for a damaged checkpoint, with the newest intact one before it, and for one of a run that
            differs from `fingerprint`, with the differences, and `about_data` where "data" is one.
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
        manifest = self._manifest(steps[-1])
        differences = compare_fingerprints(manifest["fingerprint"], json.loads(json.dumps(fingerprint)))
        if differences:
            cause = f" {about_data}" if about_data and any(sentence.startswith("data ") for sentence in differences) else ""
            begin = " That checkpoint is of step 0, before any training: delete it, and the run starts from the beginning."
            raise CheckpointError(
                f"checkpoint: {path} belongs to a different run: {'; '.join(differences)}. "
                f"Set these back to resume it, or start a new run in another output_dir.{'' if steps[-1] else begin}{cause}"
            )
        state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        return steps[-1], state | manifest.get("state", {})

    def check(self, step: int) -> None:
        """Raise CheckpointError for a checkpoint that is damaged; every rank calls it."""
        damage = self._damage(step)
        if damage:
            raise CheckpointError(f"checkpoint: {self.path(step)} is damaged: {damage}. Take another of {self.steps()}.")

    def load_tensors(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Overwrite `tensors`, by name, with those of the checkpoint of `step`, which `load` or `check` found intact; each rank
        gives the shards that it holds now. Every rank calls it.

        Raises: CheckpointError for a name or a shape that the checkpoint does not have.
        """
        reader = dcp.HuggingFaceStorageReader(str(self.path(step) / TENSOR_DIR))
        try:
            with _quiet():
                dcp.load(tensors, storage_reader=reader, no_dist=self._ranks.size == 1)
        except (RuntimeError, ValueError, CheckpointException) as error:
            raise CheckpointError(
                f"checkpoint: {self.path(step)} does not fit this model or optimizer: {_reason(error)}. "
                "Start a new run in another output_dir."
            ) from error

    def _begin(self, unfinished: Path, state: Mapping[str, Any]) -> None:
        for leftover in self.directory.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)
        (unfinished / TENSOR_DIR).mkdir(parents=True)
        with (unfinished / STATE_FILE).open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        try:  # a state that only saves would show when the run is resumed, and then it is too late
            torch.load(unfinished / STATE_FILE, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise CheckpointError(
                "the state of a chooser, and the metrics of a reward, must be plain values and tensors, got "
                f"{found.group(1) if found else _one_line(error)}"
            ) from error

    def _finish(self, unfinished: Path, step: int, manifest: Mapping[str, Any]) -> None:
        replace_text(unfinished / MANIFEST_FILE, json.dumps(manifest, indent=1))
        _sync_directory(unfinished / TENSOR_DIR)
        _sync_directory(unfinished)
        unfinished.rename(self.path(step))
        _sync_directory(self.directory)

    def _prune(self) -> None:
        self.undeleted = None
        best = self.best() if self.keep_best else None
        for old in self.steps()[: -self.keep]:
            try:
                if old != best:
                    shutil.rmtree(self.path(old))
            except OSError as error:
                self.undeleted = f"{self.path(old)} could not be deleted, and takes space until it is: {_one_line(error)}"

    def _manifest(self, step: int) -> dict[str, Any]:
        return json.loads((self.path(step) / MANIFEST_FILE).read_text(encoding="utf-8"))

    def _recorded(self, step: int, which: str) -> Any:
        """What the manifest of `step` says, None where it does not; whether it is intact shows when the checkpoint is loaded."""
        try:
            return self._manifest(step).get(which)
        except (OSError, ValueError, AttributeError):
            return None

    def _newest(self, which: str) -> Any:
        steps = self.steps()
        return self._recorded(steps[-1], which) if steps else None

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        self._on_every_rank(action if self._ranks.first else lambda: None)

    def _on_every_rank(self, action: Callable[[], Any]) -> list[Any]:
        """What `action` returns on each rank; an OSError or RuntimeError on one of them is raised on all."""
        return self._ranks.attempt(action, OSError, RuntimeError)

    def _digests(self, path: Path) -> dict[str, dict[str, Any]]:
        """Digest of every file by its name; the ranks share the work."""
        # The first rank's list, for all: a network disk may show another rank a file late.
        names = self._on_every_rank(
            lambda: [STATE_FILE, *sorted(f"{TENSOR_DIR}/{file.name}" for file in (path / TENSOR_DIR).iterdir())]
        )[0]
        parts = self._on_every_rank(lambda: {name: _digest(path / name) for name in self._ranks.share(names)})
        found = {name: digest for part in parts for name, digest in part.items()}
        return {name: found[name] for name in names}

    def _damage(self, step: int) -> str | None:
        """What is wrong with the checkpoint of `step`, or None; the same on every rank."""
        found = self._ranks.gather(self._damage_seen_here(step))
        return next((damage for damage in found if damage is not None), None)

    def _damage_seen_here(self, step: int) -> str | None:
        path = self.path(step)
        try:
            manifest = self._manifest(step)
            if manifest["format"] != FORMAT:
                return f"its format is {manifest['format']}, this version reads {FORMAT}"
            expected = dict(manifest["files"])
            for name in self._ranks.share(sorted(expected)):
                actual = _digest(path / name)
                if actual["bytes"] != expected[name]["bytes"]:
                    return f"{name} has {actual['bytes']} of {expected[name]['bytes']} bytes"
                if actual != expected[name]:
                    return f"{name} does not match its SHA-256"
        except FileNotFoundError as error:
            return f"{Path(error.filename).relative_to(path)} is missing"
        except OSError as error:
            return f"{Path(error.filename).relative_to(path)} cannot be read: {error.strerror}"
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST_FILE} is not readable"
        return None


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning of torch.distributed.checkpoint that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """The first cause in one line; torch.distributed.checkpoint wraps each rank's error with its traceback."""
    if isinstance(error, CheckpointException):
        failures = sorted(error.failures.items())
        return "; ".join(f"rank {rank}: {_one_line(failure[0])}" for rank, failure in failures)
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    # torch.save reports a full disk as an "unexpected pos", raised while it handles the OSError.
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return (str(error) or type(error).__name__).split("\n", 1)[0].rstrip(".")


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
