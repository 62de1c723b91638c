"""CIFAR-10: its python batches through an unpickler that can only read, and augmented batches."""

import dataclasses
import hashlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.durable_files import default_cache_folder
from nomadam.experiments.data import hugging_face
from nomadam.experiments.data.image_folder import Pictures, picture_tables
from nomadam.experiments.data.images import ImageBatch
from nomadam.experiments.data.shuffled import shuffled_rows, uniform_draws

TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
NUM_CLASSES = 10
IMAGE = (3, 32, 32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CifarDataset:
    """Small colour images of one size in memory; the last ones in their order are held out.

    Args:
        images: uint8 `[n, 3, side, side]`.
        labels: int64 `[n]`, from 0 to `num_classes - 1`.
        num_train: how many of them, at the beginning, are to be trained on.
        num_classes: number of labels.
        means: of each channel over the images to train on, of values from 0 to 255; float32 `[3]`.
        deviations: likewise.
        description: what the data is, in JSON scalars.
    """

    images: np.ndarray
    labels: np.ndarray
    num_train: int
    num_classes: int
    means: np.ndarray
    deviations: np.ndarray
    description: dict[str, str | int | float | bool | None]

    def train_batch(
        self,
        *,
        seed: int,
        step: int,
        micro: int = 0,
        batch_size: int,
        padding: int = 4,
        mirror: bool = True,
    ) -> ImageBatch:
        """The next images of a pass in random order, changed at random; see `shuffled_rows`.

        Args:
            seed: from 0 to 2**64 - 1.
            step: the optimizer step, from 1.
            micro: the micro-batch within the step, from 0. Default 0.
            batch_size: at least 1.
            padding: see `cropped`.
            mirror: see there.
        """
        place = {"seed": seed, "step": step, "micro": micro}
        rows = shuffled_rows(self.num_train, **place, batch_size=batch_size)
        draws = uniform_draws((batch_size, 3), **place)
        images = cropped(self.images[rows], draws, padding=padding, mirror=mirror)
        return self._batch(images, self.labels[rows])

    def validation_batches(
        self, *, batch_size: int, max_batches: int | None = None
    ) -> Iterator[ImageBatch]:
        """The held-out images in their order, unchanged; a last batch may have fewer.

        Args:
            batch_size: at least 1.
            max_batches: stops after so many, at least 1. Default all.
        """
        starts = range(self.num_train, len(self.labels), batch_size)[:max_batches]
        for start in starts:
            rows = slice(start, start + batch_size)
            yield self._batch(self.images[rows], self.labels[rows])

    def _batch(self, images: np.ndarray, labels: np.ndarray) -> ImageBatch:
        import torch

        means, deviations = (each[:, None, None] for each in (self.means, self.deviations))
        normalized = (images.astype(np.float32) - means) / deviations
        return ImageBatch(torch.from_numpy(normalized), torch.from_numpy(labels))


def cropped(images: np.ndarray, draws: np.ndarray, *, padding: int, mirror: bool) -> np.ndarray:
    """Put each image into a black frame, cut one of its size out of it, and mirror half of them.

    Args:
        images: `[rows, channels, height, width]`; not modified.
        draws: `[rows, 3]`, uniform from 0 to below 1: place from the top, from the left, mirror.
        padding: thickness of the frame in pixels, at least 0.
        mirror: whether those whose third draw is below one half are mirrored.

    Examples:
        >>> image = np.arange(1, 5).reshape(1, 1, 2, 2)
        >>> cropped(image, np.array([[0.9, 0.5, 0.9]]), padding=1, mirror=True)[0, 0].tolist()
        [[3, 4], [0, 0]]
    """
    frame = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, frame), images.shape[2:], axis=(2, 3)
    )
    top, left = (draws[:, :2] * (2 * padding + 1)).astype(np.int64).T
    changed = windows[np.arange(len(images)), :, top, left].copy()
    if mirror:
        chosen = draws[:, 2] < 0.5
        changed[chosen] = changed[chosen, :, :, ::-1]
    return changed


def load_cifar(
    source: str, *, label_field: str | None = None, cache_folder: Path | None = None
) -> CifarDataset:
    """Read CIFAR-10, or other small images of one size, into memory.

    Args:
        source: a folder that holds `data_batch_1` to `data_batch_5` and `test_batch`, the python
            version of CIFAR-10, itself or in `cifar-10-batches-py`; else a data set of Hugging
            Face, saved to disk or by name.
        label_field: of a data set, the field of the labels; None for the only one there is.
        cache_folder: for a data set that lies in table files; default the user's cache folder.

    Errors:
        ValueError: a source that is missing, incomplete or damaged, or pictures of several sizes.

    Source: www.cs.toronto.edu/~kriz/cifar.html for the format.
    """
    path = Path(source).expanduser()
    inner = path / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else path
    files = [folder / name for name in (*TRAIN_FILES, TEST_FILE)]
    if any(file.exists() for file in files):
        batches = [read_batch(file) for file in files]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        num_train, num_classes = len(labels) - len(batches[-1][1]), NUM_CLASSES
    elif path.is_dir() and not hugging_face.is_data_set_path(path):
        raise ValueError(
            f"{path} holds neither the python version of CIFAR-10 ({TRAIN_FILES[0]} and so on) nor "
            "a data set"
        )
    else:
        cache = cache_folder or default_cache_folder()
        parts = picture_tables(source, label_field, cache)
        images = _all_of_one_size(source, parts)
        labels = np.concatenate([part.labels for part in parts])
        num_train, num_classes = len(parts[0]), len(parts[0].classes)
    return _data_set(source, images, labels, num_train, num_classes)


def _data_set(
    source: str, images: np.ndarray, labels: np.ndarray, num_train: int, num_classes: int
) -> CifarDataset:
    # From a count of each value: exact, and without a copy of the images in floating point.
    levels = np.arange(256.0)
    counts = np.stack(
        [np.bincount(images[:num_train, channel].ravel(), minlength=256) for channel in range(3)]
    )
    shares = counts / counts.sum(1, keepdims=True)
    means = shares @ levels
    deviations = np.sqrt(shares @ levels**2 - means**2)
    if not deviations.all():
        raise ValueError(f"data source {source!r}: all its images are of one colour")
    return CifarDataset(
        images=images,
        labels=labels,
        num_train=num_train,
        num_classes=num_classes,
        means=means.astype(np.float32),
        deviations=deviations.astype(np.float32),
        description={
            "source": source,
            "sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
            "train_images": num_train,
            "validation_images": len(labels) - num_train,
            "means": " ".join(f"{mean / 255:.4f}" for mean in means),
            "deviations": " ".join(f"{deviation / 255:.4f}" for deviation in deviations),
        },
    )


def _all_of_one_size(source: str, parts: tuple[Pictures, ...]) -> np.ndarray:
    decoded: list[np.ndarray] = []
    for part in parts:
        for number in range(len(part)):
            image = np.asarray(part.picture(number), np.uint8).transpose(2, 0, 1)
            first = decoded[0] if decoded else image
            side = image.shape[2]
            if image.shape != first.shape or image.shape[1] != side or not 8 <= side <= 96:
                raise ValueError(
                    f"data source {source!r}: images must be squares of one size, 8 to 96 pixels; "
                    f"one has {image.shape[1]} × {side}, the first {first.shape[1]} × "
                    f"{first.shape[2]}"
                )
            decoded.append(image)
    return np.stack(decoded)


def read_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of CIFAR-10's python version: images uint8 `[n, 3, 32, 32]`, labels int64 `[n]`.

    The file is a pickle. Nothing in it can run code: the unpickler knows numpy's arrays and no
    other class, and those only as records of their shape, type and bytes.

    Errors:
        ValueError: a missing or damaged file, or a pickle of something else.
    """
    try:
        content = _BatchUnpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        images, labels = content[b"data"], np.asarray(content[b"labels"])
        if labels.size and labels.dtype.kind not in "iu":
            raise ValueError(f"its labels must be whole numbers, are {labels.dtype}")
        if labels.ndim != 1:
            raise ValueError(f"its labels must be a number an image, have shape {labels.shape}")
        labels = labels.astype(np.int64)
        if isinstance(images, _Array):
            images = images.to_numpy()
        images = images.reshape(len(labels), *IMAGE)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: CIFAR-10 has five training files and one") from None
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise ValueError(f"{file} can not be read as a batch of CIFAR-10: {error}") from error
    if not len(labels) or labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(f"{file}: labels must be from 0 to {NUM_CLASSES - 1}, at least one")
    return images, labels


class _Array:
    """What a pickle says of a numpy array, without making one."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        _, shape, kind, in_columns, content = self.state
        if not isinstance(kind, _Type) or kind.name not in (b"u1", "u1"):
            raise ValueError("its data are no array of bytes")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if in_columns else "C")


class _Type:
    """What a pickle says of a numpy type."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """The byte order, which single bytes have not."""


class _Bytes(bytes):
    """Bytes that were written as the text of the same code points."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> "_Bytes":
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: Any) -> None:
        """They have no state."""


class _BatchUnpickler(pickle.Unpickler):
    # Classes of this file alone, so that a pickle has nothing else to call or to change.
    # "numpy.core" is in the files of the web site, "numpy._core" in those of today's numpy.
    _KNOWN = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("_codecs", "encode"): _Bytes,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return self._KNOWN[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it wants {module_name}.{global_name}, which no batch of CIFAR-10 has"
            ) from None
