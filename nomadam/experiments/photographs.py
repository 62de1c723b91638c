"""Photographs with labels: CIFAR-10, and pictures of any size as in ImageNet."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomadam.experiments.fields import check_types, require

if TYPE_CHECKING:
    from nomadam.experiments.data.cifar import CifarDataset
    from nomadam.experiments.data.images import ImageBatch
    from nomadam.experiments.data.photographs import (
        Changes,
        PhotographBatch,
        PhotographDataset,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CifarData:
    """CIFAR-10, or other small colour images of one size, shuffled anew in each pass.

    Args:
        source: a folder with the python batches (``data_batch_1`` ... ``test_batch``), a data set
            of Hugging Face that was saved to disk, or the name of one.
        padding: frame of black pixels of which a crop of the image's size is taken, at least 0;
            default 4.
        mirror: whether half of the images are mirrored; default True.
        label_field: of a data set, the field of the labels; default None, the only one there is.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> CifarData(source="uoft-cs/cifar10").padding
        4
    """

    source: str
    padding: int = 4
    mirror: bool = True
    label_field: str | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "data.")
        require(bool(self.source), "data.source", self.source, "a folder or a data set's name")
        require(0 <= self.padding <= 32, "data.padding", self.padding, "from 0 to 32")

    @property
    def tokens_per_row(self) -> int:
        """An image counts 1."""
        return 1

    def load(self, cache_folder: Path | None = None) -> "CifarDataset":
        """Read all images into memory.

        Raises:
            ValueError: for a source that is missing, incomplete or damaged.
            ImportError: a library is missing, naming the extra to install.
        """
        from nomadam.experiments.data.cifar import load_cifar

        return load_cifar(self.source, label_field=self.label_field, cache_folder=cache_folder)

    def shape(self, dataset: "CifarDataset") -> dict[str, int]:
        """What a classifier needs to know: the images' side and channels, the number of classes."""
        _, channels, height, _ = dataset.images.shape
        return {"image_size": height, "channels": channels, "num_classes": dataset.num_classes}

    def train_batch(
        self, dataset: "CifarDataset", *, seed: int, step: int, micro: int, batch_size: int
    ) -> "ImageBatch":
        """The next images of the pass, cropped and mirrored at random."""
        return dataset.train_batch(
            seed=seed,
            step=step,
            micro=micro,
            batch_size=batch_size,
            padding=self.padding,
            mirror=self.mirror,
        )

    def validation_batches(
        self, dataset: "CifarDataset", *, batch_size: int, max_batches: int | None
    ) -> Iterator[Any]:
        """The test images in their order, unchanged."""
        return dataset.validation_batches(batch_size=batch_size, max_batches=max_batches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotographData:
    """Photographs of any size, cropped to squares, shuffled anew in each pass.

    Those to train on are cropped at random, mirrored by half, changed by RandAugment and mixed
    by twos; of those held out the middle is taken. Values are from -1 to 1.

    Args:
        source: a folder with ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` (torchvision's
            ImageFolder), a data set of Hugging Face that was saved to disk, or the name of one.
        image_size: side of the squares in pixels, at least 8; default 224.
        smallest_area: of a crop as a part of the picture, above 0 and at most 1; default 0.05.
        changes: of RandAugment for each picture, 0 to 10; default 2.
        magnitude: of RandAugment, 0 to 10; default 10.
        mixup: parameter of the Beta distribution of shares, at least 0; 0 for none; default 0.2.
        label_field: of a data set, the field of the labels; default None, the only one there is.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> PhotographData(source="ILSVRC/imagenet-1k").image_size
        224
    """

    source: str
    image_size: int = 224
    smallest_area: float = 0.05
    changes: int = 2
    magnitude: float = 10.0
    mixup: float = 0.2
    label_field: str | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "data.")
        require(bool(self.source), "data.source", self.source, "a folder or a data set's name")
        require(self.image_size >= 8, "data.image_size", self.image_size, "at least 8")
        area = self.smallest_area
        require(0 < area <= 1, "data.smallest_area", area, "above 0 and at most 1")
        for field in ("changes", "magnitude"):
            value = getattr(self, field)
            require(0 <= value <= 10, f"data.{field}", value, "from 0 to 10")
        require(self.mixup >= 0, "data.mixup", self.mixup, "at least 0")

    @property
    def tokens_per_row(self) -> int:
        """An image counts 1."""
        return 1

    def load(self, cache_folder: Path | None = None) -> "PhotographDataset":
        """Find the pictures, and read the first of each class.

        Raises:
            ValueError: for a source that is missing or incomplete, and pictures that can not be
                read.
            ImportError: a library is missing, naming the extra to install.
        """
        from nomadam.experiments.data.photographs import load_photographs

        return load_photographs(
            self.source, label_field=self.label_field, cache_folder=cache_folder
        )

    def shape(self, dataset: "PhotographDataset") -> dict[str, int]:
        """What a classifier needs to know: the images' side and channels, the number of classes."""
        return {
            "image_size": self.image_size,
            "channels": 3,
            "num_classes": dataset.num_classes,
        }

    def train_batch(
        self, dataset: "PhotographDataset", *, seed: int, step: int, micro: int, batch_size: int
    ) -> "PhotographBatch":
        """The next pictures of the pass, randomly changed; they are read when they are moved."""
        place = {"seed": seed, "step": step, "micro": micro}
        return dataset.train_batch(self._changes, **place, batch_size=batch_size)

    def validation_batches(
        self, dataset: "PhotographDataset", *, batch_size: int, max_batches: int | None
    ) -> Iterator[Any]:
        """The middle of each held-out picture, in their order."""
        return dataset.validation_batches(
            size=self.image_size, batch_size=batch_size, max_batches=max_batches
        )

    @property
    def _changes(self) -> "Changes":
        from nomadam.experiments.data.photographs import Changes

        return Changes(
            size=self.image_size,
            smallest_area=self.smallest_area,
            changes=self.changes,
            magnitude=self.magnitude,
            mixup=self.mixup,
        )
