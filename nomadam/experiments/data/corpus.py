"""What text there is: ordered documents read as a stream, hashed, and held out by document."""

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

CHUNK_BYTES = 2**20
_NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written at installation, so different on every machine that has the same Python.
_WRITTEN_AT_INSTALLATION = ("_sysconfigdata_", "sitecustomize.", "usercustomize.")
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Documents in a fixed order; `read` makes one pass over them, a document as its chunks.

    Args:
        source: what the user asked for.
        names: one name a document; the order of the names is the order of the pass.
        read: starts a new pass; the chunks of a document are taken before the next document.
        held_out: which documents are the validation set, where the data says so itself.
        any_bytes: whether a document may hold NUL bytes; elsewhere such a file is refused.
    """

    source: str
    names: list[str]
    read: Callable[[], Iterator[Iterable[bytes]]]
    held_out: np.ndarray | None = None
    any_bytes: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What one pass over a corpus found: bytes a document, the hash, documents not in UTF-8."""

    sizes: np.ndarray
    sha256: str
    undecodable: int


def standard_library(max_bytes: int | None = None) -> Corpus:
    """The source of Python's own standard library, without tests and installed packages.

    Files are sorted by their relative POSIX path. What an installation writes for itself
    (`_sysconfigdata_*`, `config-*`, `sitecustomize`) is left out, so that two installations of
    one release have the same text, as long as their distributors did not patch it.

    Args:
        max_bytes: at most so many bytes, from files chosen by the hash of their name.

    Errors:
        ValueError: this Python has no source files (a zipped or frozen library).

    >>> "json/decoder.py" in standard_library().names
    True
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_OURS and not f.startswith("config-")]
        found += [
            Path(folder, file)
            for file in files
            if file.endswith(".py") and not file.startswith(_WRITTEN_AT_INSTALLATION)
        ]
    paths = {path.relative_to(root).as_posix(): path for path in found if path.is_file()}
    if not paths:
        raise ValueError(
            "data source 'stdlib': this Python has no *.py files of its standard library; "
            "give a folder of text files instead"
        )
    return _of_files("stdlib", paths, max_bytes, any_bytes=True)


def text_files(path: Path, max_bytes: int | None = None) -> Corpus:
    """One text file, or every file below a folder, sorted by relative POSIX path.

    Hidden files and `__pycache__` are passed over, links to folders are not followed.

    Args:
        path: the file or folder.
        max_bytes: at most so many bytes, from files chosen by the hash of their name.

    Errors:
        ValueError: no files.
    """
    if path.is_file():
        return _of_files(str(path), {path.name: path}, max_bytes)
    paths = {}
    for folder, folders, files in os.walk(path):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for file in (Path(folder, name) for name in files if not name.startswith(".")):
            if file.is_file():  # not a pipe, a device or a dangling link
                paths[file.relative_to(path).as_posix()] = file
    if not paths:
        raise ValueError(f"data source {str(path)!r}: the folder holds no files")
    return _of_files(str(path), paths, max_bytes)


def in_bytes(source: str, documents: dict[str, bytes], max_bytes: int | None = None) -> Corpus:
    """Documents that are held in memory, in the order of their names.

    Args:
        source: what the user asked for.
        documents: content by name.
        max_bytes: at most so many bytes, from documents chosen by the hash of their name.
    """
    sizes = {name: len(content) for name, content in documents.items()}
    taken = _within(sizes, max_bytes)

    def read() -> Iterator[Iterable[bytes]]:
        return ([documents[name][:size]] for name, size in taken.items())

    return Corpus(source=source, names=list(taken), read=read, any_bytes=True)


def _of_files(
    source: str, paths: dict[str, Path], max_bytes: int | None, any_bytes: bool = False
) -> Corpus:
    """A corpus of files by their names."""
    taken = _within({name: path.stat().st_size for name, path in paths.items()}, max_bytes)
    read = partial(_read_files, [paths[name] for name in taken], list(taken.values()))
    return Corpus(source=source, names=list(taken), read=read, any_bytes=any_bytes)


def _within(sizes: dict[str, int], max_bytes: int | None) -> dict[str, int]:
    """Name to the bytes that are taken of it, in the order of the names."""
    names = sorted(sizes, key=os.fsencode)
    taken = np.array([sizes[name] for name in names], dtype=np.int64)
    if max_bytes is not None:
        taken = first_bytes(taken, hashed_order(names), max_bytes)
    kept = zip(names, taken.tolist(), strict=True)
    return {name: size for name, size in kept if size or max_bytes is None}


def _read_files(paths: list[Path], sizes: list[int]) -> Iterator[Iterable[bytes]]:
    for path, size in zip(paths, sizes, strict=True):
        yield _file_chunks(path, size)


def _file_chunks(path: Path, size: int) -> Iterator[bytes]:
    """About a mebibyte at a time, ended at a line where there is one."""
    try:
        with path.open("rb") as file:
            while size > 0 and (block := file.read(min(CHUNK_BYTES, size))):
                size -= len(block)
                if size > 0:
                    line = file.readline(min(CHUNK_BYTES, size))
                    block, size = block + line, size - len(line)
                yield block
    except OSError as error:
        raise ValueError(f"{str(path)!r} can not be read: {error.strerror}") from error


def hashed_order(names: list[str]) -> list[int]:
    """The documents in the order of the SHA-256 of their names: fixed, and of no one's choosing.

    >>> hashed_order(["a", "b", "c"])
    [2, 1, 0]
    """
    return sorted(range(len(names)), key=lambda i: hashlib.sha256(os.fsencode(names[i])).digest())


def first_bytes(sizes: np.ndarray, order: list[int], budget: int) -> np.ndarray:
    """How much of each document is taken when documents in this order fill a budget of bytes.

    >>> first_bytes(np.array([10, 10, 10]), [2, 0, 1], 15).tolist()
    [5, 0, 10]
    """
    taken = np.zeros_like(sizes)
    for i in order:
        taken[i] = min(int(sizes[i]), budget)
        budget -= int(taken[i])
        if budget == 0:
            break
    return taken


def survey(corpus: Corpus) -> Survey:
    """One pass over everything: sizes, and the SHA-256 over names and contents.

    The hash is over `name NUL sha256(content)` for each document in order, so that neither a
    renamed file nor a byte that moved from one file to the next goes unnoticed.

    Errors:
        ValueError: a file that is not text (it holds a NUL byte), or no text at all.
    """
    total = hashlib.sha256()
    sizes = np.zeros(len(corpus.names), dtype=np.int64)
    undecodable = 0
    for i, (name, chunks) in enumerate(zip(corpus.names, corpus.read(), strict=True)):
        content = hashlib.sha256()
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        readable = True
        for chunk in chunks:
            if not corpus.any_bytes and b"\0" in chunk:
                raise ValueError(
                    f"data source {corpus.source!r}: {name!r} is not text (it holds a NUL byte; "
                    "UTF-8 is read): move it elsewhere or convert it"
                )
            content.update(chunk)
            sizes[i] += len(chunk)
            if readable:
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError:
                    readable = False
        undecodable += not readable
        total.update(os.fsencode(name) + b"\0" + content.digest())
    if not sizes.any():
        raise ValueError(f"data source {corpus.source!r}: its documents hold no text")
    return Survey(sizes=sizes, sha256=total.hexdigest(), undecodable=undecodable)


def training_bytes(corpus: Corpus, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """How many leading bytes of each document are for training; the others are held out.

    Whole documents are held out, in the order of `hashed_order`, while they fit in the
    fraction. Where they do not come to half of it (a single file, or few of very different
    sizes), the end of every document is held out instead.

    Args:
        corpus: whose own validation set is used where it has one.
        sizes: bytes a document.
        fraction: of the bytes that is held out, above 0, at most 0.5.

    Returns:
        An int64 array `[documents]`, 0 where the document is held out as a whole.
    """
    if corpus.held_out is not None:
        return np.where(corpus.held_out, 0, sizes)
    target = fraction * float(sizes.sum())
    training, held_out = sizes.copy(), 0
    for i in hashed_order(corpus.names):
        if held_out + int(sizes[i]) <= target:
            held_out += int(sizes[i])
            training[i] = 0
    if held_out < target / 2:
        return sizes - (sizes * fraction).astype(np.int64)
    return training


def texts(corpus: Corpus, start: np.ndarray, stop: np.ndarray) -> Iterator[Iterator[str]]:
    """The text between two byte positions of each document that has any, in pieces.

    What is not UTF-8 becomes U+FFFD; a character that a position cuts in two is dropped.
    """
    for i, chunks in enumerate(corpus.read()):
        if stop[i] > start[i]:
            yield _decoded(chunks, int(start[i]), int(stop[i]))


def _decoded(chunks: Iterable[bytes], start: int, stop: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")("replace")
    position, begun = 0, start == 0
    for chunk in chunks:
        if position >= stop:
            break
        part = chunk[max(0, start - position) : stop - position]
        position += len(chunk)
        if part and not begun:
            part, begun = part.lstrip(_CONTINUATION_BYTES), True
        if text := decoder.decode(part):
            yield text
