"""A byte-level BPE trained once on a corpus, and its tokens, in a cache that checks itself."""

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.durable_files import disk_full_told
from nomadam.experiments.data.corpus import Corpus, Survey, first_bytes, hashed_order, texts

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the bytes and the end of a text
LARGEST_VOCABULARY = 2**20
BPE_TRAINING_BYTES = 2**25
_FORMAT = 1
_PARTS = ("tokenizer.json", "train.bin", "validation.bin")
_BATCH_CHARACTERS = 2**22
_ABANDONED_SECONDS = 86400.0


def tokenized(
    corpus: Corpus, found: Survey, training: np.ndarray, *, vocab_size: int, cache_folder: Path
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The training and validation tokens of a corpus, from the cache or made and kept there.

    The BPE sees the training text only, and of that at most `BPE_TRAINING_BYTES`, from
    documents chosen by the hash of their names. Each document is followed by the token 0,
    `<|endoftext|>`; the same words within a text are ordinary text. The cache is keyed by the
    corpus, the split, the vocabulary size and the version of tokenizers; its files bear
    checksums and appear all at once, so that processes may share it.

    Args:
        corpus: the documents.
        found: the survey of them.
        training: leading bytes of each document that are for training.
        vocab_size: tokens wanted, from 257 to 2**20; a small corpus may give fewer.
        cache_folder: where everything is kept, under `tokens/`.

    Returns:
        Two arrays mapped from the files (uint16, or uint32 above 65536 tokens) and the manifest,
        with the path of `tokenizer.json` as `tokenizer_file`.

    Errors:
        ValueError: a cache folder that can not be written.
        DiskFullError: no space left for it.
    """
    key = {
        "format": _FORMAT,
        "corpus": found.sha256,
        "split": hashlib.sha256(training.astype("<i8").tobytes()).hexdigest(),
        "vocab_size": vocab_size,
        "tokenizers": _library_version(),
    }
    name = hashlib.sha256(_canonical(key)).hexdigest()[:16]
    folder = cache_folder / "tokens" / name
    manifest = _checked(folder, key)
    if isinstance(manifest, str):
        if folder.exists():
            warnings.warn(
                f"the token cache {str(folder)!r} is damaged ({manifest}): made anew", stacklevel=4
            )
        manifest = _make(folder, key, corpus, found, training, vocab_size)
    if manifest["vocab_size"] < vocab_size:
        warnings.warn(
            f"the text of {corpus.source!r} gives a vocabulary of {manifest['vocab_size']} tokens, "
            f"not vocab_size={vocab_size}",
            stacklevel=4,
        )
    arrays = [
        np.memmap(folder / part, dtype=manifest["dtype"], mode="r")
        if (folder / part).stat().st_size
        else np.zeros(0, dtype=manifest["dtype"])
        for part in _PARTS[1:]
    ]
    return arrays[0], arrays[1], manifest | {"tokenizer_file": folder / "tokenizer.json"}


def _library_version() -> str:
    try:
        return metadata.version("tokenizers")
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            'text data needs the package tokenizers: pip install "nomadam[lab]"'
        ) from error


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(folder: Path, key: dict[str, Any]) -> dict[str, Any] | str:
    """The manifest of a whole and undamaged cache, or what is wrong with it."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        checksum = manifest.pop("checksum")
        if hashlib.sha256(_canonical(manifest)).hexdigest() != checksum:
            return "manifest.json has another checksum"
        if manifest["key"] != key:
            return "manifest.json belongs to other data"
        for part in _PARTS:
            if file_sha256(folder / part) != manifest["files"][part]:
                return f"{part} has another checksum"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is not a manifest"
    return manifest


def _make(
    folder: Path,
    key: dict[str, Any],
    corpus: Corpus,
    found: Survey,
    training: np.ndarray,
    vocab_size: int,
) -> dict[str, Any]:
    """Trains the BPE and writes tokens in a folder of their own, which is then renamed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        building = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"the cache folder {str(folder.parent)!r} can not be written ({error.strerror}): "
            "give another one"
        ) from error
    advice = "free some, or give another cache folder (--cache)"
    try:
        with disk_full_told(folder.parent, advice):
            return _fill(building, folder, key, corpus, found, training, vocab_size)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _fill(
    building: Path,
    folder: Path,
    key: dict[str, Any],
    corpus: Corpus,
    found: Survey,
    training: np.ndarray,
    vocab_size: int,
) -> dict[str, Any]:
    nothing = np.zeros_like(training)
    taken = first_bytes(training, hashed_order(corpus.names), BPE_TRAINING_BYTES)
    tokenizer = _trained(texts(corpus, nothing, taken), vocab_size)
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(building / "tokenizer.json"))
    dtype = "<u2" if size <= 2**16 else "<u4"
    train_tokens = _encode(
        tokenizer, texts(corpus, nothing, training), building / "train.bin", dtype
    )
    validation_tokens = _encode(
        tokenizer, texts(corpus, training, found.sizes), building / "validation.bin", dtype
    )
    manifest = {
        "key": key,
        "vocab_size": size,
        "dtype": dtype,
        "train_tokens": train_tokens,
        "validation_tokens": validation_tokens,
        "files": {part: file_sha256(building / part) for part in _PARTS},
    }
    checksum = hashlib.sha256(_canonical(manifest)).hexdigest()
    (building / "manifest.json").write_bytes(_canonical(manifest | {"checksum": checksum}))
    for part in (*_PARTS, "manifest.json"):
        with (building / part).open("rb+") as file:
            os.fsync(file.fileno())
    _install(building, folder, key)
    return manifest


def _trained(documents: Iterator[Iterable[str]], vocab_size: int) -> Any:
    """A byte-level BPE whose token 0 is the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for pieces in documents for piece in pieces), trainer)
    # A text that holds the words of the special token must not end a document by them.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode(tokenizer: Any, documents: Iterator[Iterable[str]], path: Path, dtype: str) -> int:
    """Writes the tokens of the documents, each followed by the end of a text; how many."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=dtype)
    count, characters = 0, 0
    waiting: list[str | None] = []  # None is the end of a document

    with path.open("wb") as file:

        def write() -> int:
            encodings = iter(tokenizer.encode_batch_fast([w for w in waiting if w is not None]))
            tokens = [end if w is None else np.array(next(encodings).ids, dtype) for w in waiting]
            waiting.clear()
            whole = np.concatenate(tokens) if tokens else end[:0]
            file.write(whole.tobytes())
            return len(whole)

        for pieces in documents:
            for piece in pieces:
                waiting.append(piece)
                characters += len(piece)
                if characters >= _BATCH_CHARACTERS:
                    count, characters = count + write(), 0
            waiting.append(None)
        return count + write()


def _install(building: Path, folder: Path, key: dict[str, Any]) -> None:
    """Renames the finished folder into place; one that another process finished first stays."""
    for attempt in range(10):
        try:
            building.rename(folder)
            return
        except OSError:
            if isinstance(_checked(folder, key), dict):
                return
            if attempt == 9:
                raise
        aside = folder.with_name(f".building-{folder.name}-{os.getpid()}-{time.time_ns()}")
        try:
            folder.rename(aside)
        except OSError:
            continue  # another process was faster at moving the damaged one away
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _sweep(parent: Path) -> None:
    """Removes what processes that were killed a day ago or earlier left behind."""
    for path in parent.glob(".building-*"):
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        except OSError:
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)
