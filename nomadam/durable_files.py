"""Files, of JSON too, that are written at once or not at all and are on the disk then."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"


class DiskFullError(OSError):
    """The disk is full; what was written before is intact."""


@contextlib.contextmanager
def disk_full_told(place: Path, advice: str) -> Iterator[None]:
    """Name the place in the error of a full disk, which says nothing of it by itself.

    Args:
        place: what is being written.
        advice: what to do, or what is intact.

    Raises:
        DiskFullError: in the place of any error that a full disk has caused.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(errno.ENOSPC, f"no space left for {place}; {advice}") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Say whether a full disk is behind an error.

    Example:
        >>> is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
        True
    """
    # torch hides the OSError behind one of its own, safetensors tells of it in words only.
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "no space left on device" in str(error).lower():
            return True
        error = error.__context__
    return False


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a kill or a power cut it is the old one or the new one.

    Args:
        path: the file; its folder exists.
        content: the whole content.

    Raises:
        OSError: where it can not be written; an old file is intact then.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "result.json"
        >>> write_atomically(file, b"{}")
        >>> file.read_bytes()
        b'{}'
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file at once or not at all; numbers that are not finite become null.

    Raises:
        OSError: where it can not be written; an old file is intact then.
    """
    text = json.dumps(finite(values), indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def finite(values: Any) -> Any:
    """The same JSON values with None in the place of numbers that are not finite.

    Example:
        >>> finite({"loss": float("inf"), "steps": [1, 2.5]})
        {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(values, Mapping):
        return {str(name): finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


def is_number(value: Any) -> bool:
    """Say whether a JSON value is a finite number.

    Example:
        >>> is_number(0.5), is_number(True), is_number("1"), is_number(float("nan"))
        (True, False, False, False)
    """
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def sync(path: Path) -> None:
    """Have the disk keep a file's content, or the names in a folder."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal digits.

    Raises:
        OSError: where it can not be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_folder(path: Path) -> None:
    """Remove a folder; after a kill it is whole or no longer there under its name."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


if sys.platform == "win32":
    import msvcrt

    def lock(file: IO[bytes]) -> None:
        """Lock an open file for this process; the lock goes when the file is closed.

        Raises:
            OSError: where it is locked already.
        """
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def lock(file: IO[bytes]) -> None:
        """Lock an open file for this process; the lock goes when the file is closed.

        Raises:
            OSError: where it is locked already.
        """
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def default_cache_folder() -> Path:
    """The user's cache folder for nomadam, by the platform's custom.

    Raises:
        RuntimeError: for a user without a home.

    Example:
        >>> default_cache_folder().name.lower() in ("nomadam", "cache")
        True
    """
    home = Path.home()
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "nomadam" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "nomadam"
    return home / ".cache" / "nomadam"
