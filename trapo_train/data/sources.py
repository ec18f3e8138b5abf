"""The rows of the configured dataset: of files, a folder, the hub, or a generated task."""

from __future__ import annotations

import glob
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trapo_train.extras import lacks
from trapo_train.schema import MissingPackage, UserError
from trapo_train.tasks import generate_rows

if TYPE_CHECKING:
    from trapo_train.data.dataset import DataConfig

FILE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
DEFAULT_TASK_PROBLEMS = 1000


def load_rows(config: DataConfig, section: str = "data") -> tuple[list[str], Sequence[dict[str, Any]]]:
    """Return the column names and the rows of the configured task or dataset, at most `num_problems` of them;
    `section` is what errors call that configuration."""
    if config.task is not None:
        num_problems = config.num_problems or DEFAULT_TASK_PROBLEMS
        rows = generate_rows(config.task_options, num_problems=num_problems, split=config.split, seed=config.seed)
        return list(rows[0]), rows
    read = _reader(config, section)
    try:
        dataset = read()
    except UserError:
        raise
    except Exception as error:  # what datasets, pyarrow and the hub raise has no class in common
        # datasets hides the reason of a failed read in the cause.
        reason = error.__cause__ or error
        reason = bad_line(config.path) or f"{type(reason).__name__}: {reason}"
        of = f"revision {config.revision!r}, " if config.revision is not None else ""
        raise UserError(
            f"{section}: reading the dataset {config.path!r}, {of}split {config.split!r}, failed: {reason}"
            ". Check that it is there, readable and not empty."
        ) from error
    dataset.info.features = _undecoded(dataset.features)  # of an image each read would be another object, with another repr
    if config.num_problems is not None:
        dataset = dataset.select(range(min(config.num_problems, len(dataset))))
    return dataset.column_names, dataset


def bad_line(path: str) -> str | None:
    """The first line of these .jsonl files that is no JSON in UTF-8; None where there is none."""
    for file in (file for file in _files(path) if file.endswith(".jsonl") and Path(file).is_file()):
        for number, line in enumerate(Path(file).read_bytes().split(b"\n"), 1):
            try:
                json.loads(line.decode("utf-8-sig").strip() or "null")
            except ValueError as error:  # a UnicodeDecodeError is one
                return f"line {number} of {file} is no JSON in UTF-8 ({error})"
    return None


def _undecoded(feature: Any) -> Any:
    """The same feature of a dataset, whose images, audio and the like are read as they are stored; JSON is read as its values."""
    import datasets

    if isinstance(feature, dict):  # datasets.Features is one
        return type(feature)({name: _undecoded(inner) for name, inner in feature.items()})
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):  # of a list
        return replace(feature, feature=_undecoded(feature.feature))
    is_media = hasattr(feature, "decode") and not isinstance(feature, datasets.Json)
    return replace(feature, decode=False) if is_media else feature


def _reader(config: DataConfig, section: str) -> Callable[[], Any]:
    """What reads the dataset with the package datasets; raises UserError for a file that is not there, or a revision of a file or
    folder, and MissingPackage."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise MissingPackage(lacks(f"{section}.path", "datasets", "train")) from error

    path, split, folder = config.path, config.split, Path(config.path)
    found = _files(path)
    if config.revision is not None and (folder.exists() or folder.suffix.lower() in FILE_SUFFIXES or found):
        raise UserError(
            f"{section}.revision must be null but for a dataset on the hub, got {config.revision!r} with {path!r}. Remove it."
        )
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return partial(_from_disk, path, split)
    suffix = folder.suffix.lower()
    if any(character in path for character in "*?[") and not found:
        raise UserError(f"{section}.path must match files: no file matches {path!r}. Correct it.")
    if suffix not in FILE_SUFFIXES and any(Path(file).is_file() for file in found):  # which datasets would ask the hub for
        raise UserError(
            f"{section}.path must be a folder, a name on the hub or a file {', '.join(FILE_SUFFIXES)}, got {path!r}. Convert it."
        )
    if suffix not in FILE_SUFFIXES:
        return partial(datasets.load_dataset, path, config.name, split=split, revision=config.revision)
    if not found:
        raise UserError(f"{section}.path must name a file: there is no file {path!r}. Correct it.")
    # A file has no splits of its own: it is the split that is asked for, so that slices work. load_dataset would read
    # it too, but asks the hub to count the download first and waits for an answer where there is no network.
    files = {re.match(r"\w*", split).group(): path}
    readers = {".parquet": datasets.Dataset.from_parquet, ".csv": partial(_from_csv, found, section)}
    reader = readers.get(suffix, datasets.Dataset.from_json)
    return partial(_from_file, reader, files, split)


def _files(path: str) -> list[str]:
    """What a path or pattern matches; ** reaches into folders, as it does where datasets reads the files."""
    return glob.glob(path, recursive=True)


def _from_disk(path: str, split: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(path)
    return saved[split] if isinstance(saved, datasets.DatasetDict) else saved


def _from_file(reader: Callable[..., Any], files: dict[str, str], split: str) -> Any:
    try:
        return reader(files, split=split)
    except StopIteration:  # of datasets, for an empty file
        raise ValueError(f"{', '.join(files.values())} holds no rows") from None


def _from_csv(found: list[str], section: str, files: dict[str, str], split: str) -> Any:
    """The `found` files, whose cells are the texts that they hold, and null where they are empty: types that are guessed would make
    7 of a solution 007."""
    import datasets
    import pandas

    headers = {file: list(pandas.read_csv(file, nrows=0, index_col=False).columns) for file in found}
    columns = headers[found[0]]
    other = next((file for file in found if set(headers[file]) != set(columns)), None)
    if other is not None:
        raise UserError(
            f"{section}.path: CSV files that are read together must have the same columns, got {columns} in {found[0]} and "
            f"{headers[other]} in {other}. Give all files the same columns."
        )
    as_it_is = {"features": datasets.Features(dict.fromkeys(columns, datasets.Value("string"))), "keep_default_na": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # of a row that is longer than the header and would be cut
        return datasets.Dataset.from_csv(files, split=split, na_values=[""], index_col=False, **as_it_is)
