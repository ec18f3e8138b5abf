"""What was trained as a Hugging Face model or LoRA's adapter, which takes the place of an older export as a whole."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from trapo_train.checkpoints.checkpoint import CheckpointError
from trapo_train.checkpoints.model_state import whole_weights
from trapo_train.files import UNFINISHED
from trapo_train.models.loading import write_processor
from trapo_train.models.lora import has_lora, names_as_they_are
from trapo_train.parallel.world import World

_MARKER = ".exported_by_trapo"


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    world: World | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write model and tokenizer as Hugging Face files (safetensors), replacing an older export as a whole. LoRA's adapters are
    added to the weights, which are then rounded to `dtype`.

    Every rank of `world` must call this; the first one keeps the weights that all gather, and writes.

    Raises: CheckpointError, on the first rank, when the disk is full or not writable or transformers refuses to save the model, or
        for a directory that holds anything but an older export; what was there stays.
    """
    directory = Path(directory).resolve()  # a link to a larger disk stays one
    sharded = world is not None and world.size > 1
    first = world is None or world.first
    weights = None
    if sharded or has_lora(model) or dtype != torch.float32:
        gathered = whole_weights(model, dtype)
        weights = {name: value.cpu() for name, value in gathered if first}
    if not first:
        return directory
    with _in_place_of(directory) as unfinished:
        model.save_pretrained(unfinished, state_dict=weights)
        _name_dtype(unfinished / "config.json", dtype if weights is not None else torch.float32)
        tokenizer.save_pretrained(unfinished)
        write_processor(model, unfinished)
    return directory


def export_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    world: World | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Path:
    """Write LoRA's adapter alone, as PEFT saves and loads one, with the tokenizer; it names the model that it belongs to.

    Every rank of `world` must call this; the first one writes.

    Args:
        revision: of the model that it belongs to, on the hub.

    Raises: CheckpointError, as `export_model`.
    """
    import peft

    directory = Path(directory).resolve()
    adapter = {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in adapter.items()}
    if world is not None and not world.first:
        return directory
    with (
        torch.device("meta"),
        names_as_they_are(),
        warnings.catch_warnings(),
    ):  # PEFT saves the adapter of a model that it wrapped itself; this one has no weights
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT 0.21 asks for it
        wrapped = peft.get_peft_model(type(model)(model.config), model.peft_config["default"], revision=revision)
    weights = {f"base_model.model.{name}": value.to(dtype) for name, value in whole.items()}
    with _in_place_of(directory) as unfinished:
        wrapped.save_pretrained(unfinished, state_dict=weights, save_embedding_layers=False)
        tokenizer.save_pretrained(unfinished)
    return directory


@contextmanager
def _in_place_of(directory: Path) -> Iterator[Path]:
    """Yields a new directory, which takes the place of an older export as a whole once it is written.

    Raises: CheckpointError when it cannot be written or moved, or for a directory that holds anything but an older export.
    """
    check_replaceable(directory)
    unfinished = directory.with_name(f"{UNFINISHED}{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    progress_bar = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield unfinished
        (unfinished / _MARKER).write_text("Written by trapo-train, which replaces the whole directory with its next export.\n")
    except Exception as error:  # transformers checks when it saves, and raises what it likes; a checkpoint is saved instead
        shutil.rmtree(unfinished, ignore_errors=True)
        kind = "" if isinstance(error, OSError | SafetensorError) else f"{type(error).__name__}: "
        raise CheckpointError(f"model: could not be written to {directory}: {kind}{str(error).rstrip('.')}.") from error
    finally:
        if progress_bar:
            enable_progress_bar()
    try:
        if directory.exists():
            shutil.rmtree(directory)
        unfinished.rename(directory)
    except OSError as error:  # the new one is whole, and stays
        raise CheckpointError(
            f"model: {unfinished} must take the place of {directory}, got {error}. It is complete: move it there by hand."
        ) from error


def _name_dtype(config: Path, dtype: torch.dtype) -> None:
    """Have a saved configuration name the type of the saved weights, which loading follows; it names that of the model."""
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def other_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> str | None:
    """A sentence where AutoTokenizer, which many use, reads an exported plain tokenizer as something else; None where it does not.

    transformers 5.23 makes every tokenizer beside a qwen2 model a Qwen2Tokenizer, with that one's pre-tokenisation.
    """
    if type(tokenizer) is not PreTrainedTokenizerFast:
        return None
    try:
        loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # the run is over, and its model written
        return f"transformers' AutoTokenizer cannot read the exported tokenizer: {error}"
    theirs, ours = (json.loads(x.backend_tokenizer.to_str()) if x.is_fast else {} for x in (loaded, tokenizer))
    if all(theirs.get(part) == ours[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")):
        return None
    return (
        f"transformers' AutoTokenizer reads the exported tokenizer as a {type(loaded).__name__}, with other tokens than it was "
        "trained with. Load it with PreTrainedTokenizerFast.from_pretrained"
    )


def check_replaceable(directory: Path) -> None:
    """Raise CheckpointError for a directory that an export would replace and that is not one itself."""
    if not directory.exists() or (directory / _MARKER).is_file() or (directory.is_dir() and not any(directory.iterdir())):
        return
    raise CheckpointError(
        f"model: {directory} must be empty or an export of trapo-train, which replaces it as a whole, got other files. "
        "Move them, or choose another directory."
    )
