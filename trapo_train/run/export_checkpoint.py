"""The model of a checkpoint, of a run that is over or goes on, as a Hugging Face model or LoRA's adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trapo_train.checkpoints.checkpoint import CheckpointError, CheckpointStore
from trapo_train.checkpoints.export import check_replaceable, export_adapter, export_model, other_tokenizer
from trapo_train.checkpoints.model_state import load_trained_weights
from trapo_train.config import load_config
from trapo_train.config_file import CONFIG_FILE, MODEL_DIR
from trapo_train.models.loading import check_places, name_model_in_hub_errors
from trapo_train.models.lora import other_layers
from trapo_train.models.model import DTYPES, load_model_and_tokenizer
from trapo_train.schema import UserError
from trapo_train.tasks import tokenizer_of


def export_checkpoint(
    run_dir: str | Path,
    directory: str | Path | None = None,
    *,
    step: int | str | None = None,
    dtype: str = "float32",
    adapter: bool = False,
) -> tuple[Path, int, list[str]]:
    """Write the model of a checkpoint, LoRA's adapters added, in one process, whatever number of ranks saved it.

    Args:
        run_dir: output_dir of the run.
        directory: where to; by default model_step_<step> in `run_dir`, or adapter_step_<step>.
        step: of the checkpoint, or "best" for that of the best evaluation among those that are there; by default the newest.
        dtype: float32 or bfloat16.
        adapter: write LoRA's adapter alone, in PEFT's format, to be loaded beside the model that the run started from.

    Returns: the directory, the step, and what there is to say: of "best" what `better_before` says, of the directory what
        `other_tokenizer` does, of an adapter what `other_layers` does.
    Memory: the whole model in float32 on the CPU, once more in `dtype` where that is another or adapters are added.
    Raises: FileNotFoundError, CheckpointError or UserError for what is not there, damaged, of another model or not to be replaced.
    """
    run_dir = Path(run_dir)
    if not (run_dir / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"export: {run_dir} must be the output_dir of a run and hold {CONFIG_FILE}, this one does not.")
    config = load_config(run_dir / CONFIG_FILE)
    if adapter and (config.model.lora is None or config.model.name_or_path is None):
        given = "no model.lora" if config.model.lora is None else "model.scratch"
        raise UserError(
            f"export: --adapter needs a run with model.lora that started from a model.name_or_path, got one with {given}. Leave "
            "--adapter out."
        )
    store = CheckpointStore.of(run_dir)
    notes = [store.better_before()] if step == "best" else []
    step = _existing(store, step, run_dir)
    directory = Path(directory) if directory is not None else run_dir / f"{'adapter' if adapter else MODEL_DIR}_step_{step}"
    check_replaceable(directory)
    origin = config.model.name_or_path
    if origin is not None and Path(origin).resolve() == directory.resolve():
        raise UserError(f"export: DIRECTORY must not be the model that the run started from, got {directory}. Choose another.")
    store.check(step)
    check_places(config.model)
    task_tokenizer = tokenizer_of(config.data.task)
    anywhere = replace(config.model, attention="auto", liger=False)  # nothing runs: the weights are all that counts
    with name_model_in_hub_errors(config.model):
        model, tokenizer = load_model_and_tokenizer(anywhere, task_tokenizer=task_tokenizer, seed=config.seed)
    load_trained_weights(model, store, step)
    directory.absolute().parent.mkdir(parents=True, exist_ok=True)
    if adapter:
        notes.append(other_layers(model))
        export_adapter(model, tokenizer, directory, dtype=DTYPES[dtype], revision=config.model.revision)
        return directory.resolve(), step, [note for note in notes if note is not None]
    export_model(model, tokenizer, directory, dtype=DTYPES[dtype])
    # A generated task brings its tokenizer, too.
    if config.data.task is None:
        notes.append(other_tokenizer(directory, tokenizer, config.model.trust_remote_code))
    return directory, step, [note for note in notes if note is not None]


def _existing(store: CheckpointStore, step: int | str | None, run_dir: Path) -> int:
    steps = store.steps()
    if not steps:
        trained = run_dir / MODEL_DIR
        remedy = f"What it trained is in {trained}." if trained.is_dir() else "Set checkpoint.every=N in the next run."
        raise CheckpointError(f"export: {store.directory} must hold a checkpoint, it has none. {remedy}")
    if step == "best":
        step = store.best()
        if step is None:
            raise CheckpointError(f"export: --step best must find an evaluated step among {steps}, it has none. Give one of these.")
    if step is not None and step not in steps:
        raise CheckpointError(f"export: --step must be one that has a checkpoint, {', '.join(map(str, steps))}, got {step}.")
    return steps[-1] if step is None else step
