"""Files that are written at once or not at all, and are on the disk when the call returns."""

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import IO

PARTIAL = ".partial"


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
