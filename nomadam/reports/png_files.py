"""PNG files that a training wrote: checked, and without what is no picture. Standard library."""

import zlib
from pathlib import Path

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What is needed to show it; texts, times and profiles are left out.
KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
LARGEST_BYTES, LONGEST_SIDE = 8_000_000, 10_000


def read_png(path: Path) -> bytes:
    """Read a PNG, check that it is whole, and leave out what is no picture.

    Args:
        path: of at most 8 MB, and 10,000 pixels a side.

    Raises:
        ValueError: too large, torn, damaged, or no PNG.
        OSError: it can not be read.
    """
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, should have at most {LARGEST_BYTES:,}")
    content = path.read_bytes()
    if not content.startswith(SIGNATURE):
        raise ValueError(f"{path} is no PNG")
    parts, place, kind = [SIGNATURE], len(SIGNATURE), b""
    while kind != b"IEND":
        length = int.from_bytes(content[place : place + 4], "big")
        chunk = content[place : place + 12 + length]
        kind, body, check = chunk[4:8], chunk[4:-4], chunk[-4:]
        if len(chunk) < 12 + length or zlib.crc32(body) != int.from_bytes(check, "big"):
            raise ValueError(f"{path} is torn or damaged")
        if (kind == b"IHDR") != (place == len(SIGNATURE)):
            raise ValueError(f"{path} does not begin with its size")
        if kind in KEPT:
            parts.append(chunk)
        place += len(chunk)
    sides = [int.from_bytes(content[start : start + 4], "big") for start in (16, 20)]
    if not all(0 < side <= LONGEST_SIDE for side in sides):
        raise ValueError(f"{path} has {sides[0]} x {sides[1]} pixels, at most 10,000 a side fit")
    return b"".join(parts)
