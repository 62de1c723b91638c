"""Photographs with labels in augmented batches, read and changed where they are needed."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomadam.durable_files import default_cache_folder
from nomadam.experiments.data.image_folder import Pictures, load_pictures
from nomadam.experiments.data.images import ImageBatch
from nomadam.experiments.data.random_changes import (
    CROP_DRAWS,
    DRAWS_A_CHANGE,
    central_crop,
    mirrored,
    random_changes,
    random_crop,
)
from nomadam.experiments.data.shuffled import shuffled_rows, uniform_draws

if TYPE_CHECKING:
    import torch
    from PIL import Image

# Sets the shares in which pictures are mixed apart from other draws.
_SHARES = 0x736861726573


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """How pictures are changed at random in training.

    Args:
        size: side of the result in pixels.
        smallest_area: of a crop, as a part of the picture, above 0 and at most 1.
        changes: of RandAugment for each picture, at least 0.
        magnitude: of them, from 0 to 10.
        mixup: parameter of the Beta distribution of the share in which two pictures are mixed; 0
            for none.
    """

    size: int
    smallest_area: float
    changes: int
    magnitude: float
    mixup: float

    @property
    def draws(self) -> int:
        """Random numbers that a picture needs."""
        return CROP_DRAWS + 1 + DRAWS_A_CHANGE * self.changes

    def apply(self, picture: "Image.Image", draws: np.ndarray) -> "Image.Image":
        """The picture changed by its numbers."""
        numbers = draws.tolist()
        picture = random_crop(
            picture, numbers[:CROP_DRAWS], size=self.size, smallest_area=self.smallest_area
        )
        picture = mirrored(picture, numbers[CROP_DRAWS])
        return random_changes(picture, numbers[CROP_DRAWS + 1 :], magnitude=self.magnitude)


@dataclasses.dataclass(frozen=True, eq=False)
class PhotographBatch:
    """Rows of pictures that are read when they are moved to a device; slices as a tensor does.

    So a process that has its part of a batch reads that part alone.

    Args:
        make: from the numbers of rows and a device to those rows there.
        rows: numbers of the rows, int64 `[n]`.
    """

    make: Callable[[np.ndarray, "torch.device"], ImageBatch]
    rows: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, rows: slice) -> "PhotographBatch":
        """Some of the rows."""
        return PhotographBatch(self.make, self.rows[rows])

    def to(self, device: "torch.device", *, non_blocking: bool = False) -> ImageBatch:
        """Read and change the pictures of these rows, on a device.

        Errors:
            ValueError: a picture can not be read.
        """
        return self.make(self.rows, device)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PhotographDataset:
    """Pictures to train on, pictures that are held out, and batches of them.

    Args:
        train: to train on.
        held_out: of the same classes.
        description: what the data is, in JSON scalars.
    """

    train: Pictures
    held_out: Pictures
    description: dict[str, str | int | float | bool | None]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.train.classes)

    def train_batch(
        self, changes: Changes, *, seed: int, step: int, micro: int = 0, batch_size: int
    ) -> PhotographBatch:
        """The next pictures of a pass in random order, randomly changed; see `shuffled_rows`.

        With mixup each row is mixed with the one after it, the last with the first, both changed
        before, in one share for the whole batch, of which the larger part is the row's own:

            image ← s · image + (1 − s) · image after it, s = max(b, 1 − b), b ~ Beta(α, α)

        and its label is a row of parts of the classes, float32 `[rows, num_classes]`. The share is
        drawn by numpy's Generator, whose methods may change from one version of numpy to another:
        it repeats exactly within one, while rows and changes do not depend on it.

        Args:
            changes: to each picture.
            seed: from 0 to 2**64 - 1.
            step: the optimizer step, from 1.
            micro: the micro-batch within the step, from 0. Default 0.
            batch_size: at least 1.

        Source: arXiv 1710.09412, equation 2.
        """
        place = {"seed": seed, "step": step, "micro": micro}
        numbers = shuffled_rows(len(self.train), **place, batch_size=batch_size)
        draws = uniform_draws((batch_size, changes.draws), **place)
        share = _share(changes.mixup, **place)

        def make(rows: np.ndarray, device: "torch.device") -> ImageBatch:
            partners = (rows + 1) % batch_size
            needed = np.unique(np.concatenate([rows, partners])) if changes.mixup else rows
            pictures = _read(
                lambda row: changes.apply(self.train.picture(int(numbers[row])), draws[row]), needed
            )
            images = _normalized(pictures, device)
            labels = _on(self.train.labels[numbers[needed]], device)
            if not changes.mixup:
                return ImageBatch(images, labels)
            parts = _one_hot(labels, self.num_classes)
            own, other = (_on(np.searchsorted(needed, each), device) for each in (rows, partners))
            return ImageBatch(
                share * images[own] + (1 - share) * images[other],
                share * parts[own] + (1 - share) * parts[other],
            )

        return PhotographBatch(make, np.arange(batch_size))

    def validation_batches(
        self, *, size: int, batch_size: int, max_batches: int | None = None
    ) -> Iterator[PhotographBatch]:
        """The middle of each held-out picture, in their order; a last batch may have fewer.

        Args:
            size: side of the result in pixels.
            batch_size: at least 1.
            max_batches: stops after so many, at least 1. Default all.
        """

        def make(rows: np.ndarray, device: "torch.device") -> ImageBatch:
            pictures = _read(
                lambda row: central_crop(self.held_out.picture(int(row)), size=size), rows
            )
            return ImageBatch(
                _normalized(pictures, device), _on(self.held_out.labels[rows], device)
            )

        for start in range(0, len(self.held_out), batch_size)[:max_batches]:
            stop = min(start + batch_size, len(self.held_out))
            yield PhotographBatch(make, np.arange(start, stop))


def load_photographs(
    source: str, *, label_field: str | None = None, cache_folder: Path | None = None
) -> PhotographDataset:
    """Find photographs with labels.

    Args:
        source: see `load_pictures`, like `label_field`.
        label_field: see there.
        cache_folder: for a data set that lies in table files; default the user's cache folder.

    Errors:
        ValueError: see there.
    """
    train, held_out = load_pictures(
        source, label_field=label_field, cache_folder=cache_folder or default_cache_folder()
    )
    return PhotographDataset(
        train=train,
        held_out=held_out,
        description={
            "source": source,
            # Of names and labels: reading every picture would take an hour.
            "sha256": train.sha256[:32] + held_out.sha256[:32],
            "train_images": len(train),
            "validation_images": len(held_out),
            "bytes": train.num_bytes + held_out.num_bytes,
            "classes": len(train.classes),
        },
    )


def _read(picture: Callable[[int], "Image.Image"], rows: np.ndarray) -> np.ndarray:
    """Pictures as uint8 `[n, 3, size, size]`; Pillow lets threads decode side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = list(pool.map(lambda row: np.asarray(picture(row), np.uint8), rows))
    return np.stack(decoded).transpose(0, 3, 1, 2)


def _normalized(pictures: np.ndarray, device: "torch.device") -> "torch.Tensor":
    """From -1 to 1; bytes are moved, not numbers of four bytes each."""
    return _on(np.ascontiguousarray(pictures), device).float() / 127.5 - 1


def _on(values: np.ndarray, device: "torch.device") -> "torch.Tensor":
    import torch

    return torch.from_numpy(values).to(device)


def _one_hot(labels: "torch.Tensor", num_classes: int) -> Any:
    import torch

    return torch.nn.functional.one_hot(labels, num_classes).float()


def _share(mixup: float, *, seed: int, step: int, micro: int) -> float:
    if not mixup:
        return 1.0
    philox = np.random.Philox(key=_SHARES << 64 | seed, counter=step << 128 | micro << 64)
    drawn = float(np.random.Generator(philox).beta(mixup, mixup))
    return max(drawn, 1 - drawn)
