"""Which directory a run may write to: a new one, or that of the run that it continues, and one run at a time: two would overwrite
each other's metrics and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.checkpoints.export import check_replaceable
from trapo_train.config import RunConfig, to_yaml
from trapo_train.config_file import ADAPTER_DIR, CONFIG_FILE, MODEL_DIR
from trapo_train.files import lock, sign
from trapo_train.parallel.world import World
from trapo_train.reports.metrics_log import METRICS_FILE
from trapo_train.schema import UserError, refused

LOCK_FILE = ".lock"
SHARED_WITHIN_S = 20.0


def check_place(config: RunConfig) -> None:
    """Raise UserError where output_dir is no place for a run, whatever it holds."""
    output_dir = Path(config.output_dir)
    file = next((path for path in (output_dir, *output_dir.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise UserError(f"output_dir must be a directory or a new name, got {output_dir}, where {file} is a file. Choose another.")
    exported = (output_dir / MODEL_DIR).resolve()
    if config.model.name_or_path is not None and Path(config.model.name_or_path).resolve() == exported:
        raise UserError(
            f"output_dir must not hold the model to start from, which the export would replace: {exported}. Choose another."
        )


def check_output_dir(config: RunConfig) -> None:
    """Raise UserError, or CheckpointError for a model/ that is no export, where the run may not write to its output_dir because of
    what that holds. What is found holds as long as no other run writes there (see `held`)."""
    output_dir = Path(config.output_dir)
    if _is_used(output_dir) and not config.checkpoint.resume:
        saved = CheckpointStore.of(output_dir).steps()
        go_on = "Continue it with checkpoint.resume=true, delete" if saved else "It has no checkpoint to continue from: delete"
        raise UserError(f"output_dir {config.output_dir} already holds a run. {go_on} it, or choose another output_dir.")
    if _is_used(output_dir) and not CheckpointStore.of(output_dir).steps() and (output_dir / MODEL_DIR).exists():
        raise UserError(
            f"output_dir {config.output_dir} must hold a checkpoint to continue from, it has none, and training anew would replace "
            f"the model that it holds. Start from that one, model.name_or_path={output_dir / MODEL_DIR}, in another output_dir, or "
            "delete this one. checkpoint.every keeps checkpoints."
        )
    if config.steps is not None:  # those of epochs are known once the problems are loaded
        check_steps(config, config.steps)
    for exported in (MODEL_DIR, ADAPTER_DIR) if config.model.lora is not None else (MODEL_DIR,):
        check_replaceable((output_dir / exported).resolve())


@contextmanager
def held(output_dir: Path, world: World) -> Iterator[str | None]:
    """Inside, no other run can begin in `output_dir`; every rank enters. Gives a note where the disk takes no locks. The lock ends
    with the process, whatever ends that and whatever it has forked.

    Raises: UserError, on every rank, where another run writes there or the directory cannot be written to.
    """
    writable = f"output_dir must be a directory that can be written to, got {output_dir}. Choose another, or mend what it lacks"
    with ExitStack() as files:

        def take() -> str | None:
            note = None
            with refused(writable, OSError):
                output_dir.mkdir(parents=True, exist_ok=True)
                file = files.enter_context((output_dir / LOCK_FILE).open("a+", encoding="utf-8"))
                try:
                    other = lock(file)
                except OSError as error:  # as of some network disks
                    note, other = f"nothing keeps a second run out of output_dir: its disk takes no locks ({error})", None
                if other is None:
                    sign(file)
            if other is not None:
                raise UserError(
                    f"output_dir must belong to one run at a time, got {output_dir}, to which {other} writes. Wait for its end, "
                    "stop it, or choose another output_dir."
                )
            return note

        yield world.attempt(take if world.first else lambda: None, UserError)[0]


def check_in_place(file: str | Path, config: RunConfig) -> None:
    """Raise UserError for the configuration that a run has left where it is, if its output_dir is another directory: the run was
    moved, or a relative output_dir is looked for from elsewhere, and would begin anew there."""
    directory, output_dir = Path(file).parent.resolve(), Path(config.output_dir).resolve()
    if Path(file).name == CONFIG_FILE and Path(file).is_file() and _is_used(directory) and directory != output_dir:
        raise UserError(
            f"a run must continue in the directory that it is in: {file} is the configuration of the run in {directory}, and its "
            f"output_dir is {output_dir}. Add output_dir={directory}, or for a new run another output_dir."
        )


def _is_used(output_dir: Path) -> bool:
    metrics = output_dir / METRICS_FILE
    return bool(CheckpointStore.of(output_dir).steps()) or (metrics.exists() and metrics.stat().st_size > 0)


def check_steps(config: RunConfig, steps: int) -> None:
    """Raise UserError where the run continues a checkpoint of more than `steps`, which are config.steps or those of its epochs."""
    saved = CheckpointStore.of(config.output_dir).steps()
    if saved and saved[-1] > steps:
        given, it = (f"{steps}", "it") if config.epochs is None else (f"{steps}, of epochs = {config.epochs:g}", "epochs")
        raise UserError(
            f"steps must be at least those of the checkpoint that the run continues, {saved[-1]}, got {given}. Raise {it}; "
            f"`trapo-train export {config.output_dir} --step N` writes the model of an earlier checkpoint, {saved}."
        )


def check_shared(config: RunConfig, world: World) -> None:
    """Raise UserError on every rank unless all of them see the output_dir that the first one writes to."""
    path, wanted = Path(config.output_dir) / CONFIG_FILE, to_yaml(config)
    world.barrier()
    deadline = time.monotonic() + SHARED_WITHIN_S  # a network disk may show a new file late
    while not (seen := path.exists() and path.read_text(encoding="utf-8") == wanted) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(world.gather(seen)) if not sees]
    if blind:
        raise UserError(
            f"output_dir must be one directory for all ranks, which write their shards of a checkpoint there; ranks {blind} do not "
            f"see what rank 0 wrote to {path.absolute()}. Put it on a disk that all of them share."
        )
