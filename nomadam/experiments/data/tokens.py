"""Tokens for language models: from text, from nanoGPT's files, or from a data set."""

import hashlib
import operator
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nomadam.durable_files import default_cache_folder
from nomadam.experiments.data import byte_pairs, hugging_face
from nomadam.experiments.data.corpus import (
    Corpus,
    standard_library,
    survey,
    text_files,
    training_bytes,
)
from nomadam.experiments.data.documentation import documentation

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_VOCAB_SIZE", "TokenDataset", "load_tokens"]

DEFAULT_VOCAB_SIZE = 4096
# Sources that need neither a file nor a network.
AT_HAND = {"stdlib": standard_library, "stdlib_prose": documentation}
_SCAN_TOKENS = 2**24
# Sets these draws apart from any other use of the same seed.
_WINDOWS = 0x77696E646F7773


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDataset:
    """Two streams of tokens, and batches of windows from them.

    Args:
        train: integer array `[train_tokens]`, may be mapped from a file.
        validation: integer array `[validation_tokens]`, likewise.
        vocab_size: tokens are from 0 to `vocab_size - 1`.
        sha256: of the corpus, in hex; results are compared only where it agrees.
        description: what the data is, in JSON scalars.
        tokenizer_file: of the tokenizers library; None where tokens were read ready-made.

    Errors:
        ValueError: arrays that are not one-dimensional and integer, or `vocab_size` below 1.

    >>> tokens = np.arange(100, dtype=np.uint16)
    >>> data = TokenDataset(train=tokens, validation=tokens, vocab_size=100, sha256="",
    ...                     description={})
    >>> data.train_batch(seed=0, step=1, batch_size=2, context=8).shape
    torch.Size([2, 9])
    >>> [batch.shape[0] for batch in data.validation_batches(batch_size=5, context=8)]
    [5, 5, 2]
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    sha256: str
    description: dict[str, str | int | float | bool | None]
    tokenizer_file: Path | None = None

    def __post_init__(self) -> None:
        """Checks what would otherwise fail inside a training step."""
        for name in ("train", "validation"):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(
                    f"{name} must be a one-dimensional integer array, not {array.dtype} of the "
                    f"shape {array.shape}"
                )
        _whole("vocab_size", self.vocab_size, 1)

    def train_batch(
        self, *, seed: int, step: int, micro: int = 0, batch_size: int, context: int
    ) -> "torch.Tensor":
        """Random windows of the training tokens, a pure function of the arguments.

        The draw is Philox keyed by the seed and counted by (step, micro), so that a run goes on
        at any step without a state, and is the same on every platform.

        Args:
            seed: from 0 to 2**64 - 1.
            step: the optimizer step, from 0.
            micro: the micro-batch within the step, from 0. Default 0.
            batch_size: windows, at least 1.
            context: tokens that the model sees, at least 1.

        Returns:
            int64 `[batch_size, context + 1]`: inputs are `[:, :-1]`, targets `[:, 1:]`.

        Errors:
            ValueError: an argument out of its range, or fewer tokens than one window.
        """
        seed = _whole("seed", seed, 0, 2**64 - 1)
        step = _whole("step", step, 0, 2**64 - 1)
        micro = _whole("micro", micro, 0, 2**64 - 1)
        batch_size = _whole("batch_size", batch_size, 1)
        places = self._places(self.train, "training", context)
        # The lowest word counts within a batch; Philox's own order of words is little-endian.
        draw = np.random.Philox(
            key=_WINDOWS << 64 | seed, counter=step << 128 | micro << 64
        ).random_raw(batch_size)
        return _windows(self.train, (draw % np.uint64(places)).astype(np.int64), context)

    def validation_batches(
        self, *, batch_size: int, context: int, max_batches: int | None = None
    ) -> Iterator["torch.Tensor"]:
        """The validation tokens in order: each is the target of exactly one window.

        Windows begin every `context` tokens; what is left after the last whole window is not
        used, a last batch with fewer windows is.

        Args:
            batch_size: windows in a batch, at least 1.
            context: tokens that the model sees, at least 1.
            max_batches: stops after so many, at least 1. Default all.

        Returns:
            An iterator over int64 `[<= batch_size, context + 1]`.

        Errors:
            ValueError: at the call: an argument out of range, or fewer tokens than one window.
        """
        batch_size = _whole("batch_size", batch_size, 1)
        self._places(self.validation, "validation", context)
        starts = np.arange((len(self.validation) - 1) // context, dtype=np.int64) * context
        if max_batches is not None:
            starts = starts[: _whole("max_batches", max_batches, 1) * batch_size]
        return (
            _windows(self.validation, starts[i : i + batch_size], context)
            for i in range(0, len(starts), batch_size)
        )

    def _places(self, tokens: np.ndarray, what: str, context: int) -> int:
        """How many windows of `context + 1` tokens begin at different places."""
        _whole("context", context, 1)
        if len(tokens) <= context:
            raise ValueError(
                f"context={context} needs at least {context + 1} {what} tokens, the data has "
                f"{len(tokens)}: allowed are 1 to {len(tokens) - 1}"
                if len(tokens) > 1
                else f"the data has {len(tokens)} {what} tokens, at least 2 are needed"
            )
        return len(tokens) - context


def load_tokens(
    source: str | os.PathLike[str],
    *,
    vocab_size: int | None,
    context: int,
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    text_field: str = "text",
    split: str = "train",
) -> TokenDataset:
    """Tokens of a source of text, with a part held out; made once and kept in a cache.

    Text is cut into tokens by a byte-level BPE trained on the training part. Validation is held
    out by document (a file, a row), chosen by the hash of its name; where few documents make
    that impossible, it is the end of each. `description["held_out"]` says which. Nothing that is
    read can run code.

    Args:
        source: "stdlib" (the source of Python's standard library), "stdlib_prose" (its docstrings
            and help topics), a text file or a folder of them, a folder with nanoGPT's `train.bin`
            and `val.bin` (uint16), a saved Hugging Face data set, files in jsonl, json, csv or
            parquet, or a data set's name on the hub (`owner/name` or `owner/name:configuration`).
        vocab_size: tokens of the BPE, 257 to 2**20; None is 4096. For nanoGPT's files the bound
            that every token must respect; None takes the largest token's.
        context: the longest window that will be drawn, in tokens, at least 1.
        validation_fraction: of the bytes, above 0, at most 0.5. Default 0.05.
        max_bytes: use at most so many bytes of text. Default all.
        cache_folder: default `default_cache_folder()`.
        text_field: the field of a data set that holds the text. Default "text".
        split: of a data set; "train" is joined by its own "validation" as the held-out part.

    Errors:
        ValueError: a source that is missing, empty, binary, damaged or too short; an argument
            out of its range; an unknown field or split; a hub that can not be reached.
        ImportError: tokenizers or datasets is not installed.
    """
    source = os.fspath(source)
    if not source:
        raise ValueError("data source '' is empty: give 'stdlib', a path or a data set's name")
    context = _whole("context", context, 1)
    if max_bytes is not None:
        max_bytes = _whole("max_bytes", max_bytes, 1)
    if not 0.0 < validation_fraction <= 0.5:
        raise ValueError(
            f"validation_fraction={validation_fraction!r} must be above 0 and at most 0.5"
        )
    folder = Path(os.path.expanduser(cache_folder or default_cache_folder()))
    path = Path(os.path.expanduser(source))
    # os.path answers False where pathlib raises, as for a name too long to be a file's.
    exists = os.path.exists(path)
    if source not in AT_HAND and any(os.path.isfile(path / p) for p in ("train.bin", "val.bin")):
        return _nanogpt(source, path, vocab_size, context)
    smallest, largest = byte_pairs.SMALLEST_VOCABULARY, byte_pairs.LARGEST_VOCABULARY
    vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    vocab_size = _whole("vocab_size", vocab_size, smallest, largest)
    of_rows = partial(
        hugging_face.data_set_at if exists else hugging_face.data_set_named,
        text_field=text_field,
        split=split,
        validation_fraction=validation_fraction,
        max_bytes=max_bytes,
    )
    if source in AT_HAND:
        corpus = AT_HAND[source](max_bytes)
    elif exists and hugging_face.is_data_set_path(path):
        corpus = of_rows(path, cache_folder=folder)
    elif exists:
        corpus = text_files(path, max_bytes)
    elif hugging_face.is_data_set_name(source):
        corpus = of_rows(source)
    else:
        raise ValueError(
            f"data source {source!r}: no such file or folder, and not a data set's name "
            "(owner/name); 'stdlib' is always there"
        )
    return _from_text(source, corpus, vocab_size, context, validation_fraction, folder)


def _from_text(
    source: str,
    corpus: Corpus,
    vocab_size: int,
    context: int,
    validation_fraction: float,
    cache_folder: Path,
) -> TokenDataset:
    found = survey(corpus)
    training = training_bytes(corpus, found.sizes, validation_fraction)
    counts = {"training": training, "validation": found.sizes - training}
    for part, sizes in counts.items():
        # A token is a byte or more, so this many bytes can not be enough; known before any work.
        most = int(sizes.sum()) + int((sizes > 0).sum())
        if most <= context:
            raise _too_short(source, part, f"at most {most}", context)
    train, validation, manifest = byte_pairs.tokenized(
        corpus, found, training, vocab_size=vocab_size, cache_folder=cache_folder
    )
    for part, tokens in (("training", train), ("validation", validation)):
        if len(tokens) <= context:
            raise _too_short(source, part, str(len(tokens)), context)
    if corpus.held_out is not None:
        held_out = "validation split"
    else:
        held_out = "whole documents"
        if bool(((training > 0) & (training < found.sizes)).any()):
            held_out = "end of each document"
    return TokenDataset(
        train=train,
        validation=validation,
        vocab_size=manifest["vocab_size"],
        sha256=found.sha256,
        tokenizer_file=manifest["tokenizer_file"],
        description={
            "source": source,
            "files": len(corpus.names),
            "bytes": int(found.sizes.sum()),
            "undecodable_files": found.undecodable,
            "train_tokens": len(train),
            "validation_tokens": len(validation),
            "vocab_size": manifest["vocab_size"],
            "held_out": held_out,
            "validation_bytes": int(counts["validation"].sum()),
            "sha256": found.sha256,
            "tokenizer_sha256": manifest["files"]["tokenizer.json"],
            "tokenizers": manifest["key"]["tokenizers"],
            "python": platform.python_version(),
        },
    )


def _too_short(source: str, part: str, count: str, context: int) -> ValueError:
    return ValueError(
        f"data source {source!r} has {count} {part} tokens; context={context} needs at least "
        f"{context + 1}: give more text, a smaller context or another validation_fraction"
    )


def _nanogpt(source: str, folder: Path, vocab_size: int | None, context: int) -> TokenDataset:
    """The token files of nanoGPT; its meta.pkl is never opened, since a pickle can run code."""
    if vocab_size is not None:
        vocab_size = _whole("vocab_size", vocab_size, 1, 2**16)
    arrays, total, largest = {}, hashlib.sha256(), -1
    for part in ("train", "val"):
        path = folder / f"{part}.bin"
        if not path.is_file():
            raise ValueError(f"data source {source!r} has no {path.name} beside its other file")
        size = path.stat().st_size
        if size % 2:
            raise ValueError(
                f"{str(path)!r} has {size} bytes, an odd number: nanoGPT's tokens are uint16, "
                "two bytes each"
            )
        if size // 2 <= context:
            name = "training" if part == "train" else "validation"
            raise _too_short(source, name, str(size // 2), context)
        array = np.memmap(path, dtype="<u2", mode="r")
        content = hashlib.sha256()
        for i in range(0, len(array), _SCAN_TOKENS):
            block = array[i : i + _SCAN_TOKENS]
            content.update(block.tobytes())
            largest = max(largest, int(block.max()))
            if vocab_size is not None and largest >= vocab_size:
                place = i + int(np.argmax(block >= vocab_size))
                raise ValueError(
                    f"{str(path)!r} holds the token {int(array[place])} at position {place}; with "
                    f"vocab_size={vocab_size} tokens are 0 to {vocab_size - 1} (GPT-2's "
                    "vocabulary has 50257)"
                )
        total.update(path.name.encode() + b"\0" + content.digest())
        arrays[part] = array
    train, validation = arrays["train"], arrays["val"]
    vocab_size = largest + 1 if vocab_size is None else vocab_size
    return TokenDataset(
        train=train,
        validation=validation,
        vocab_size=vocab_size,
        sha256=total.hexdigest(),
        description={
            "source": source,
            "files": 2,
            "bytes": 2 * (len(train) + len(validation)),
            "train_tokens": len(train),
            "validation_tokens": len(validation),
            "vocab_size": vocab_size,
            "held_out": "val.bin",
            "sha256": total.hexdigest(),
            "tokenizer_sha256": None,
        },
    )


def _windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> "torch.Tensor":
    import torch

    places = starts[:, None] + np.arange(context + 1)
    return torch.from_numpy(np.asarray(tokens[places]).astype(np.int64))


def _whole(name: str, value: int, lowest: int, highest: int | None = None) -> int:
    """The value as an int in its range, or an error that names both."""
    allowed = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number {allowed}") from None
    if isinstance(value, bool) or number < lowest or (highest is not None and number > highest):
        raise ValueError(f"{name}={value!r} must be a whole number {allowed}")
    return number
