"""Compiles a C++ file for this machine, once, and keeps the library for later processes."""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nomadam.durable_files import default_cache_folder

COMPILERS = ("c++", "g++", "clang++")
# Full speed without a change to what NaN and infinity mean: no -ffast-math.
FLAGS = ["-std=c++14", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]
TARGETS = (["-march=native"], ["-mcpu=native"], [])  # the processor at hand, or any of its kind
LONGEST_COMPILE_SECONDS = 120.0


class NoCompilerError(RuntimeError):
    """No compiler was found, or none that could make a library that loads."""


def load_cpp(source: Path, folder: Path | None = None) -> ctypes.CDLL:
    """The library of a C++ file, which includes nothing but the standard headers.

    A library that is kept has a name with the hash of the source, of the compiler and its flags and
    of the processor, and with the hash of its own content: another compiler or machine makes its
    own, and what is damaged is made again. It appears under its name at once, so processes may
    share the folder. Where it can not be kept it is made for this process alone.

    Args:
        source: the file.
        folder: where libraries are kept; default in the user's cache folder.

    Raises:
        NoCompilerError: where there is no working compiler, with what was tried.
    """
    reasons = []
    for command in _commands():
        try:
            return _kept_or_made(command, source, folder or _default_folder())
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            reasons.append(f"{' '.join(command)}: {said or error}")
    raise NoCompilerError("; ".join(reasons) or f"none of {', '.join(COMPILERS)} was found")


@functools.cache
def torch_fork() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP that torch has loaded; None without OpenMP.

    Whichever OpenMP torch came with has this entry point, so that no second pool of threads is
    made.
    """
    import torch

    fork = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    return fork and ctypes.cast(fork, ctypes.c_void_p).value


def _commands() -> Iterator[list[str]]:
    for compiler in COMPILERS if sys.platform != "win32" else ():
        if path := shutil.which(compiler):
            yield from ([path, *FLAGS, *target] for target in TARGETS)


def _kept_or_made(command: list[str], source: Path, folder: Path | None) -> ctypes.CDLL:
    # The compiler prints its version, and "native" resolved to what this processor is.
    explained = _run([*command, "-fsyntax-only", "-###", "-x", "c++", os.devnull], source.parent)
    key = _hash(b"\0".join([source.read_bytes(), explained]))
    for kept in folder.glob(f"{source.stem}-{key}-*.so") if folder else ():
        with contextlib.suppress(OSError):
            if kept.stem.endswith(_hash(kept.read_bytes())):
                return ctypes.CDLL(str(kept))
            kept.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary, "made.so")
        _run([*command, "-shared", "-fPIC", "-o", str(made), str(source)], source.parent)
        content = made.read_bytes()
        with contextlib.suppress(OSError):
            if folder:
                kept = folder / f"{source.stem}-{key}-{_hash(content)}.so"
                _keep(content, kept)
                return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(made))  # an open library outlives its file


def _run(command: list[str], folder: Path) -> bytes:
    done = subprocess.run(
        command,
        cwd=folder,  # which some compilers print
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=LONGEST_COMPILE_SECONDS,
    )
    return done.stderr


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _keep(content: bytes, path: Path) -> None:
    """Writes a file at once or not at all, whoever else is writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        os.unlink(partial)
        raise


def _default_folder() -> Path | None:
    with contextlib.suppress(RuntimeError):  # a user without a home
        return default_cache_folder() / "compiled"
    return None
