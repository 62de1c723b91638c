"""Hugging Face data sets, and text from them: by name, saved to disk, or as table files."""

import re
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.experiments.data.corpus import CHUNK_BYTES, Corpus

ANSWER_SECONDS = 10.0
FILE_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_FOLDER_SUFFIXES = {".jsonl", ".parquet", ".arrow"}
# Builders that only read tables: whatever else a data set asks for is refused.
_BUILDERS = {"arrow", "cache", "csv", "json", "parquet", "text"}
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::([\w.-]+))?", re.ASCII)
_STRINGS = {"string", "large_string", "string_view"}


def is_data_set_name(source: str) -> bool:
    """Whether this could be a data set's name: `name`, `owner/name`, `owner/name:configuration`.

    >>> is_data_set_name("owner/name:configuration"), is_data_set_name("./folder")
    (True, False)
    """
    return _NAME.fullmatch(source) is not None


def is_data_set_path(path: Path) -> bool:
    """Whether a path is a saved data set, a table file, or a folder of jsonl, parquet or arrow."""
    if path.is_file():
        return path.suffix in FILE_BUILDERS
    return _is_saved(path) or any(
        file.suffix in _FOLDER_SUFFIXES
        for folder in (path, path / "data")
        if folder.is_dir()
        for file in folder.iterdir()
    )


def _is_saved(path: Path) -> bool:
    parts = ("dataset_info.json", "state.json")
    return (path / "dataset_dict.json").is_file() or all((path / p).is_file() for p in parts)


def data_set_at(
    path: Path,
    *,
    text_field: str,
    split: str,
    validation_fraction: float,
    max_bytes: int | None,
    cache_folder: Path,
) -> Corpus:
    """The rows of a data set that lies on this machine.

    Args:
        path: what `save_to_disk` wrote, a table file, or a folder of table files.
        text_field: the field that holds the text.
        split: the split to train on; "train" is joined by the data's own "validation" split.
        validation_fraction: the share of `max_bytes` that is for the validation split.
        max_bytes: at most so many bytes, from the first rows on.
        cache_folder: where the tables are kept in the form that can be mapped into memory.

    Errors:
        ValueError: a damaged data set, an unknown split or field, a field that is not text.
    """
    splits = tables_at(path, cache_folder)
    return _corpus(str(path), splits, text_field, split, validation_fraction, max_bytes)


def data_set_named(
    source: str,
    *,
    text_field: str,
    split: str,
    validation_fraction: float,
    max_bytes: int | None,
) -> Corpus:
    """The rows of a data set on the hub, or in the library's own cache where the hub is away.

    Args:
        source: `name`, `owner/name` or `owner/name:configuration`.
        text_field: as in `data_set_at`, like all that follow.
        split: see there.
        validation_fraction: see there.
        max_bytes: see there.

    Errors:
        ValueError: no such data set, no answer within `ANSWER_SECONDS`, or as `data_set_at`.
    """
    splits = tables_named(source, instead="a local path, or 'stdlib', which needs no network")
    return _corpus(source, splits, text_field, split, validation_fraction, max_bytes)


def tables_at(path: Path, cache_folder: Path) -> Any:
    """All splits of a data set that lies on this machine: a table by split, or one table.

    Args:
        path: what `save_to_disk` wrote, a table file, or a folder of table files.
        cache_folder: where the tables are kept in the form that can be mapped into memory.

    Errors:
        ValueError: a damaged data set, or one that is not made of tables.
    """
    datasets = _library()
    try:
        if path.is_dir() and _is_saved(path):
            return datasets.load_from_disk(str(path))
        kept = str(cache_folder / "datasets")
        if path.is_file():
            builder = datasets.load_dataset_builder(
                FILE_BUILDERS[path.suffix], data_files=[str(path)], cache_dir=kept
            )
        else:
            builder = datasets.load_dataset_builder(str(path), cache_dir=kept)
        return _built(builder, str(path))
    except Exception as error:  # the library and its readers raise types without a common parent
        raise _unreadable(str(path), error) from error


def tables_named(source: str, *, instead: str = "a local path") -> Any:
    """All splits of a data set on the hub, or in the library's own cache where the hub is away.

    Args:
        source: `name`, `owner/name` or `owner/name:configuration`.
        instead: what the message advises to give where the hub can not be reached.

    Errors:
        ValueError: no such data set, no answer within `ANSWER_SECONDS`, or as `tables_at`.
    """
    datasets = _library()
    match = _NAME.fullmatch(source)
    if match is None:
        raise ValueError(
            f"data source {source!r}: no such file or folder, and not a data set's name "
            f"(owner/name); give {instead}"
        )
    name, configuration = match.groups()
    _ask_for(name, source, instead)
    try:
        return _built(datasets.load_dataset_builder(name, configuration), source)
    except Exception as error:  # as above
        raise _unreadable(source, error) from error


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Hugging Face data sets need the package datasets: pip install "nomadam[lab]"'
        ) from error
    return datasets


def _unreadable(source: str, error: Exception) -> ValueError:
    """Say why, with the cause: the library's own message is often that something failed."""
    reasons: list[str] = []
    found: BaseException | None = error
    while found is not None:
        reason = " ".join(str(found).split()) or type(found).__name__
        if not any(reason in each for each in reasons):
            reasons.append(reason)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return ValueError(
        f"data source {source!r} can not be read as a data set: {'; '.join(reasons[:4])}"
    )


def _ask_for(name: str, source: str, instead: str) -> None:
    """One question to the hub with a deadline of its own: the library's retries take minutes."""
    import huggingface_hub
    from datasets import config
    from huggingface_hub import errors

    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=ANSWER_SECONDS)
            answer.append(None)
        except Exception as error:  # carried to the caller's thread
            answer.append(error)

    # A thread, because no timeout of the library covers the look-up of the host's address.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    error = answer[0] if answer else TimeoutError(f"no answer in {ANSWER_SECONDS:g} s")
    if error is None:
        return
    if isinstance(error, errors.RepositoryNotFoundError):
        raise ValueError(
            f"data source {source!r}: no such file or folder here, and no data set of this name "
            "on the hub that you may read"
        ) from error
    if not _was_prepared(name, Path(config.HF_DATASETS_CACHE)):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data source {source!r}: no such file or folder here, and the data set hub can not "
            f"be reached ({reason}); give {instead}"
        ) from error


def _was_prepared(name: str, cache: Path) -> bool:
    """Whether the library keeps this data set: in a folder `owner___snake_case_name`."""
    plain = name.replace("/", "").replace("_", "").lower()
    folders = cache.iterdir() if cache.is_dir() else ()
    return any(folder.name.replace("_", "").lower() == plain for folder in folders)


def _built(builder: Any, source: str) -> Any:
    """All splits of a data set, if a builder that only reads tables can make them."""
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _BUILDERS or not type(builder).__module__.startswith("datasets."):
        allowed = ", ".join(sorted(_BUILDERS))
        raise ValueError(f"{source!r} is of the kind {kind!r}; data are read from: {allowed}")
    builder.download_and_prepare()
    return builder.as_dataset()


def _corpus(
    source: str,
    splits: Any,
    field: str,
    split: str,
    validation_fraction: float,
    max_bytes: int | None,
) -> Corpus:
    """The rows of the chosen split, followed by those of the data's own validation split."""
    if not isinstance(splits, dict):
        splits = {split: splits}  # a single table, saved without a split's name
    if split not in splits:
        raise ValueError(
            f"data source {source!r} has no split {split!r}; its splits: {', '.join(splits)}"
        )
    chosen = [split] + (["validation"] if split == "train" and "validation" in splits else [])
    budgets = [max_bytes] * len(chosen)
    if max_bytes is not None and len(chosen) == 2:
        held_out = max(1, int(max_bytes * validation_fraction))
        budgets = [max_bytes - held_out, held_out]
    names, passes, counts = [], [], []
    for name, budget in zip(chosen, budgets, strict=True):
        _check_field(source, splits[name], field)
        rows = partial(_rows, splits[name], field, budget)
        count = len(splits[name]) if budget is None else sum(1 for _ in rows())
        names += [f"{name}/{i}" for i in range(count)]
        passes.append(rows)
        counts.append(count)
    if not names:
        raise ValueError(f"data source {source!r}: the split {split!r} has no rows")

    def read() -> Iterator[Iterable[bytes]]:
        for rows in passes:
            yield from rows()

    held_out = np.repeat([False, True], counts) if len(chosen) == 2 else None
    return Corpus(source=source, names=names, read=read, held_out=held_out, any_bytes=True)


def _check_field(source: str, table: Any, field: str) -> None:
    if field not in table.features:
        raise ValueError(
            f"data source {source!r} has no field {field!r}; its fields: "
            f"{', '.join(map(str, table.features))}"
        )
    kind = getattr(table.features[field], "dtype", type(table.features[field]).__name__)
    if kind not in _STRINGS:
        raise ValueError(f"data source {source!r}: the field {field!r} is {kind}, not text")


def _rows(table: Any, field: str, budget: int | None) -> Iterator[list[bytes]]:
    """The text of each row in chunks; of a budget of bytes the last row may fill only the rest."""
    for batch in table.select_columns([field]).with_format("arrow").iter(batch_size=1000):
        for text in batch[field].to_pylist():
            row = (text or "").encode("utf-8", "replace")
            if budget is not None:
                if budget == 0:
                    return
                row = row[:budget]
                budget -= len(row)
            yield [row[i : i + CHUNK_BYTES] for i in range(0, len(row), CHUNK_BYTES)]
