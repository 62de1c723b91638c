"""Pictures with labels, read when they are wanted: class folders, and data sets' tables."""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomadam.experiments.data import hugging_face

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Readers of pictures only: that of PostScript would start another program.
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
HELD_OUT = ("val", "validation", "test")
SAMPLED = 64  # pictures of a table that its SHA-256 is of; all of them may take an hour
ARCHIVES = (".7z", ".bz2", ".gz", ".tar", ".tgz", ".xz", ".zip", ".zst")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Pictures that lie elsewhere, with their labels.

    Args:
        labels: int64 `[n]`, from 0 to `len(classes) - 1`.
        classes: names of the labels.
        read: gives the file or the bytes of a picture by its number.
        sha256: of what can be known without reading them all: names and labels, and some pictures
            of a table. Sizes of files are left out, so that a training goes on after a damaged one
            is mended.
        num_bytes: of all of them together.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], Path | bytes]
    sha256: str
    num_bytes: int

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.labels)

    def picture(self, number: int) -> "Image.Image":
        """A picture in red, green and blue.

        Errors:
            ValueError: it can not be read as a picture.
        """
        content = self.read(number)
        place = str(content) if isinstance(content, Path) else f"the picture in row {number}"
        return read_picture(content, place)


def read_picture(content: Path | bytes, place: str) -> "Image.Image":
    """Decode a picture, in red, green and blue.

    Of 16 bits the upper 8 are kept, rounded: 65535 becomes 255.

    Args:
        content: a file, or the bytes of one.
        place: what it is called where it fails.

    Errors:
        ValueError: no picture of a known format, a damaged or too large one, or one with values
            of 32 bits, of which nobody can tell which is white.
        ImportError: without Pillow, naming the extra to install.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "nomadam[lab]"') from error
    file = content if isinstance(content, Path) else io.BytesIO(content)
    try:
        with Image.open(file, formats=FORMATS) as image:
            return of_eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a file that is damaged
        raise ValueError(f"{place} can not be read as a picture: {error}") from error


def of_eight_bits(image: "Image.Image") -> "Image.Image":
    """The same picture, where it has one value of 16 bits a pixel in its upper 8, rounded.

    Errors:
        ValueError: it has values of 32 bits.
    """
    from PIL import Image

    # These formats have no more than 16 bits, though Pillow may hold them in 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        shown = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        shown.info = image.info
        return shown
    if image.mode in ("I", "F"):
        raise ValueError("it has values of 32 bits; save it with 8 or 16 bits a value")
    return image


def load_pictures(
    source: str, *, label_field: str | None, cache_folder: Path
) -> tuple[Pictures, Pictures]:
    """Find the pictures to train on and those held out, of the same classes.

    Args:
        source: a folder with `train/CLASS/*.jpg` and `val/CLASS/*.jpg` (or `validation`, `test`),
            a data set of Hugging Face that was saved to disk, or the name of one.
        label_field: of a data set, the field of the labels; None for the only one there is.
        cache_folder: for a data set that lies in table files.

    Errors:
        ValueError: a source that is missing or of another kind, classes that differ, one class
            alone, a class without pictures, an empty file, a link to nothing or to a folder that it
            lies in, or a class whose first picture can not be read.
    """
    path = Path(source).expanduser()
    # Tables may lie beside the folders: lists of the files in them, say.
    tables = hugging_face.is_data_set_path(path) and not _has_classes(path)
    if path.is_dir() and not tables:
        train, held_out = (_class_folders(path / split) for split in _split_folders(path))
        _check_classes(source, train, held_out)
    else:
        train, held_out = picture_tables(source, label_field, cache_folder)
    for pictures in (train, held_out):
        for number in np.unique(pictures.labels, return_index=True)[1]:
            pictures.picture(int(number))
    return train, held_out


def _check_classes(source: str, train: Pictures, held_out: Pictures) -> None:
    """Refuse one class alone, and held-out pictures whose labels mean other classes."""
    if train.classes == held_out.classes:
        if len(train.classes) < 2:
            there = ", ".join(train.classes)
            raise ValueError(f"{source} must have two classes or more; it has: {there}")
        return
    unlike = sorted(set(train.classes) ^ set(held_out.classes))[:5]
    if unlike:
        how = f"only one of the two has: {', '.join(unlike)}"
    else:
        pairs = zip(train.classes, held_out.classes, strict=False)
        number, names = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        how = f"they are in another order; label {number} is {names[1]!r} here, {names[0]!r} there"
    raise ValueError(
        f"{source}: the held-out pictures have other classes than those to train on: {how}"
    )


def _has_classes(path: Path) -> bool:
    there = (path / "train").is_dir() and any((path / split).is_dir() for split in HELD_OUT)
    return there and bool(_folders(path / "train"))


def _folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, in order; hidden ones are none."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_symlink() and not entry.exists():
            raise ValueError(f"{entry} is a link to nothing")
    return sorted(entry.name for entry in entries if entry.is_dir())


def _split_folders(path: Path) -> tuple[str, str]:
    there = [split for split in HELD_OUT if (path / split).is_dir()]
    if not (path / "train").is_dir() or not there:
        raise ValueError(
            f"{path} holds neither a data set nor pictures in train/CLASS/ and val/CLASS/"
        )
    return "train", there[0]


def _class_folders(folder: Path) -> Pictures:
    classes = _folders(folder)
    if not classes:
        raise ValueError(
            f"{folder} holds no folders of classes; pictures are sorted by class: CLASS/*.jpg"
        )
    files: list[str] = []
    labels: list[int] = []
    digest, num_bytes = hashlib.sha256(), 0
    for label, name in enumerate(classes):
        found = sorted(_files(folder / name))
        if not found:
            raise ValueError(f"{folder / name} holds no picture ({', '.join(sorted(SUFFIXES))})")
        for file, size in found:
            if size == 0:
                raise ValueError(f"{file} is empty")
            digest.update(f"{os.path.relpath(file, folder)}\0".encode())
            num_bytes += size
        files += [file for file, _ in found]
        labels += [label] * len(found)
    return Pictures(
        labels=np.array(labels, np.int64),
        classes=tuple(classes),
        read=lambda number: Path(files[number]),
        sha256=digest.hexdigest(),
        num_bytes=num_bytes,
    )


def _files(folder: Path, above: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """Path and size in bytes of every picture below a folder; links are followed."""
    place = os.path.realpath(folder)
    if place in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in")
    found = []
    for entry in os.scandir(folder):
        try:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _files(Path(entry.path), (*above, place))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                found.append((entry.path, entry.stat().st_size))
        except OSError as error:
            raise ValueError(f"{entry.path} can not be read: {error.strerror}") from error
    return found


def picture_tables(
    source: str, label_field: str | None, cache_folder: Path
) -> tuple[Pictures, Pictures]:
    """The pictures of a Hugging Face data set: its train split, and its validation or test split.

    The fields are found by their types, a picture and a class label, and not by their names.

    Args:
        source: what `save_to_disk` wrote, a folder of table files, or a data set's name.
        label_field: the field of the labels, None for the only one there is.
        cache_folder: where tables are kept in the form that can be mapped into memory.

    Errors:
        ValueError: no such data set, no such splits, no field of these types, a row without a
            picture, or other classes in one split than in the other.
    """
    path = Path(source).expanduser()
    if path.exists():
        if path.suffix.lower() in ARCHIVES:
            raise ValueError(f"{path} is an archive: unpack it, and give the folder that was in it")
        if not hugging_face.is_data_set_path(path):
            raise ValueError(f"{path} is no data set")
        splits = hugging_face.tables_at(path, cache_folder)
    else:
        splits = hugging_face.tables_named(source)
    there = [split for split in ("validation", "val", "test") if split in splits]
    if not isinstance(splits, dict) or "train" not in splits or not there:
        names = ", ".join(splits) if isinstance(splits, dict) else "one without a name"
        raise ValueError(
            f"data source {source!r} must have the splits train and validation or test; "
            f"it has: {names}"
        )
    train, held_out = (
        _pictures_of(source, splits[split], label_field) for split in ("train", there[0])
    )
    _check_classes(source, train, held_out)
    return train, held_out


def _pictures_of(source: str, table: Any, label_field: str | None) -> Pictures:
    from datasets import ClassLabel, Image

    picture_field = _field(source, table, Image, None, "data.source")
    label_field = _field(source, table, ClassLabel, label_field, "data.label_field")
    if not len(table):
        raise ValueError(f"data source {source!r} has a split without pictures")
    labels = np.asarray(table.with_format("numpy")[label_field][:], np.int64)
    classes = tuple(table.features[label_field].names)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"data source {source!r} has pictures without a label in {label_field!r}")
    encoded = table.select_columns([picture_field]).cast_column(picture_field, Image(decode=False))
    digest = hashlib.sha256(repr((classes, encoded.num_rows)).encode() + labels.tobytes())
    digest.update(repr(encoded.data.nbytes).encode())
    for row in np.unique(np.linspace(0, len(table) - 1, SAMPLED).astype(int)):
        digest.update(_content(encoded[int(row)][picture_field]))

    empty = _rows_without_picture(encoded.data.column(picture_field))
    if len(empty):
        raise ValueError(
            f"data source {source!r} has no picture in row {empty[0]} ({len(empty)} of "
            f"{len(table)} rows have none)"
        )

    def read(number: int) -> Path | bytes:
        content = encoded[number][picture_field]
        return content["bytes"] or Path(content["path"])

    return Pictures(
        labels=labels,
        classes=classes,
        read=read,
        sha256=digest.hexdigest(),
        num_bytes=encoded.data.nbytes,
    )


def _rows_without_picture(column: Any) -> np.ndarray:
    """The rows of a column of pictures, as tables hold them, with neither bytes nor a path."""
    from pyarrow import compute

    pc: Any = compute  # whose functions are made at run time
    sizes = [
        pc.fill_null(pc.binary_length(pc.struct_field(column, part)), 0)
        for part in ("bytes", "path")
    ]
    return np.flatnonzero(pc.equal(pc.add(*sizes), 0).to_numpy())


def _content(picture: dict[str, Any] | None) -> bytes:
    """The SHA-256 of a picture of a table; of its path where that leads nowhere yet."""
    found = (picture or {}).get("bytes") or b""
    path = str((picture or {}).get("path") or "")
    if not found:
        found = Path(path).read_bytes() if os.path.isfile(path) else path.encode()
    return hashlib.sha256(found).digest()


def _field(source: str, table: Any, kind: type, name: str | None, argument: str) -> str:
    """The one field of a type, or the one that was asked for."""
    there = [each for each, feature in table.features.items() if isinstance(feature, kind)]
    if name is None and len(there) == 1:
        return there[0]
    if name in there:
        return str(name)
    have = ", ".join(there) or "none; its fields: " + ", ".join(table.features)
    wanted = f"no field {name!r}" if name is not None else "not one field"
    raise ValueError(
        f"{argument}: data source {source!r} has {wanted} of the type {kind.__name__}; "
        f"it has: {have}"
    )
