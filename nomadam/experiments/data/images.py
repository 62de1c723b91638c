"""Images with labels: scikit-learn's digits, in augmented batches that need no state."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SOURCES = ("digits",)
# Sets these draws apart from any other use of the same seed.
_IMAGES = 0x696D61676573
# Of each row: which image, angle, two shifts; whether, and with which rectangle, to erase.
_DRAWS = 9


@dataclasses.dataclass(frozen=True, eq=False)
class ImageBatch:
    """Rows of images with their labels; slices and moves as a tensor does.

    Args:
        images: float32 `[rows, channels, height, width]`, of mean 0 and deviation 1.
        labels: int64 `[rows]`.

    Examples:
        >>> import torch
        >>> batch = ImageBatch(torch.zeros(6, 1, 8, 8), torch.arange(6))
        >>> len(batch), batch[1::2].labels.tolist()
        (6, [1, 3, 5])
    """

    images: "torch.Tensor"
    labels: "torch.Tensor"

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "ImageBatch":
        """Some of the rows."""
        return ImageBatch(self.images[rows], self.labels[rows])

    def to(self, device: "torch.device", *, non_blocking: bool = False) -> "ImageBatch":
        """The same on a device."""
        return ImageBatch(
            self.images.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """Images with labels, and batches of them; the last ones in their order are held out.

    Args:
        images: float32 `[n, channels, height, width]`, from 0 to 1, of which 0 is the background.
        labels: integers `[n]`, from 0 to `num_classes - 1`.
        num_validation: how many of them, at the end, are held out; at least 1, below n.
        num_classes: at least 2.
        description: what the data is, in JSON scalars.

    Errors:
        ValueError: for shapes that do not fit, or a number out of its range.
    """

    images: np.ndarray
    labels: np.ndarray
    num_validation: int
    num_classes: int
    description: dict[str, str | int | float | bool | None]

    def __post_init__(self) -> None:
        """Checks what would otherwise fail inside a training step."""
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"images must be [n, channels, height, width] and labels [n], not "
                f"{list(self.images.shape)} and {list(self.labels.shape)}"
            )
        if not 1 <= self.num_validation < len(self.labels):
            raise ValueError(
                f"num_validation = {self.num_validation}: must be at least 1 and below "
                f"the {len(self.labels)} images"
            )
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise ValueError(
                f"labels must be from 0 to {self.num_classes - 1}, found {self.labels.min()} to "
                f"{self.labels.max()}"
            )

    @property
    def num_train(self) -> int:
        """Number of images to train on, which come first."""
        return len(self.labels) - self.num_validation

    def train_batch(
        self,
        *,
        seed: int,
        step: int,
        micro: int = 0,
        batch_size: int,
        shift: float = 0.0,
        rotation: float = 0.0,
        erasing: float = 0.0,
    ) -> ImageBatch:
        """Random training images, randomly changed, a pure function of the arguments.

        Images are drawn with replacement. The draws are Philox keyed by the seed and counted by
        (step, micro), so that a run goes on at any step without a state.

        Args:
            seed: from 0 to 2**64 - 1.
            step: the optimizer step, from 0.
            micro: the micro-batch within the step, from 0. Default 0.
            batch_size: at least 1.
            shift: see `augmented`, like the two that follow.
            rotation: see there.
            erasing: see there.
        """
        import torch

        raw = np.random.Philox(
            key=_IMAGES << 64 | seed, counter=step << 128 | micro << 64
        ).random_raw(batch_size * _DRAWS)
        raw = raw.reshape(batch_size, _DRAWS)
        rows = (raw[:, 0] % np.uint64(self.num_train)).astype(np.int64)
        # The upper 53 bits as a number from 0 to below 1.
        draws = torch.from_numpy((raw[:, 1:] >> np.uint64(11)) * 2.0**-53)
        images = augmented(
            torch.from_numpy(self.images[rows]),
            draws.to(torch.float32),
            shift=shift,
            rotation=rotation,
            erasing=erasing,
            fill=self._mean,
        )
        return ImageBatch(self._normalized(images), torch.from_numpy(self._targets[rows]))

    def validation_batches(
        self, *, batch_size: int, max_batches: int | None = None
    ) -> Iterator[ImageBatch]:
        """The held-out images in their order, unchanged; a last batch may have fewer.

        Args:
            batch_size: at least 1.
            max_batches: stops after so many, at least 1. Default all.
        """
        import torch

        starts = range(self.num_train, len(self.labels), batch_size)[:max_batches]
        for start in starts:
            rows = slice(start, start + batch_size)
            images = self._normalized(torch.from_numpy(self.images[rows]))
            yield ImageBatch(images, torch.from_numpy(self._targets[rows]))

    @property
    def _targets(self) -> np.ndarray:
        return self.labels.astype(np.int64, copy=False)

    @property
    def _mean(self) -> float:
        return float(self.description["mean"] or 0.0)

    def _normalized(self, images: "torch.Tensor") -> "torch.Tensor":
        return (images - self._mean) / float(self.description["deviation"] or 1.0)


def augmented(
    images: "torch.Tensor",
    draws: "torch.Tensor",
    *,
    shift: float,
    rotation: float,
    erasing: float,
    fill: float,
) -> "torch.Tensor":
    """Shift and rotate each image, and erase a rectangle of some.

    Args:
        images: float32 `[rows, channels, height, width]`; not modified.
        draws: float32 `[rows, 8]`, uniform from 0 to 1.
        shift: largest shift along each axis, as a part of the side, 0 to 1.
        rotation: largest angle to either side, in degrees, 0 to 180.
        erasing: probability of erasing a rectangle of a quarter to half of each side, 0 to 1.
        fill: what is written into it.

    Returns:
        A tensor like `images`, sampled bilinearly, with zeros where the image ends.

    Examples:
        >>> import torch
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> draws = torch.tensor([[0.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]])
        >>> augmented(image, draws, shift=0.25, rotation=0, erasing=0, fill=0)[0, 0, 0].tolist()
        [1.0, 2.0, 3.0, 0.0]
    """
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    angle, right, down, whether, tall, wide, top, left = draws.unbind(1)
    height, width = images.shape[2:]
    if shift or rotation:
        angle = torch.deg2rad((2 * angle - 1) * rotation)
        cosine, sine = torch.cos(angle), torch.sin(angle)
        # In units of half a side, of which the two may differ.
        across = torch.stack([cosine, -sine * height / width, (2 * right - 1) * 2 * shift], 1)
        along = torch.stack([sine * width / height, cosine, (2 * down - 1) * 2 * shift], 1)
        grid = affine_grid(torch.stack([across, along], 1), list(images.shape), align_corners=False)
        images = grid_sample(images, grid, align_corners=False)
    if erasing:
        inside = _between(height, tall, top)[:, :, None] & _between(width, wide, left)[:, None, :]
        erased = inside & (whether < erasing)[:, None, None]
        images = images.masked_fill(erased[:, None], fill)
    return images


def _between(side: int, length: "torch.Tensor", place: "torch.Tensor") -> "torch.Tensor":
    """Which of the pixels of a side, [rows, side], have their centre in an interval of it."""
    import torch

    length = side * (1 + length) / 4
    start = place * (side - length)
    centres = torch.arange(side) + 0.5
    return (centres >= start[:, None]) & (centres < (start + length)[:, None])


def load_images(source: str, *, validation_fraction: float) -> ImageDataset:
    """Read images with labels.

    Args:
        source: ``digits``: the 1797 handwritten digits that come with scikit-learn, 8 × 8 in 17
            levels of grey.
        validation_fraction: of the images, above 0 and at most 0.5. They are spread evenly over
            the file, in which neighbours resemble one another: with 1/3 it is every third.

    Errors:
        ValueError: an unknown source.
        ImportError: without scikit-learn, naming the extra to install.

    Examples:
        >>> data = load_images("digits", validation_fraction=1 / 3)
        >>> data.images.shape, data.num_train, data.num_validation
        ((1797, 1, 8, 8), 1198, 599)
    """
    if source not in SOURCES:
        raise ValueError(f"data.source = {source!r}: must be one of {', '.join(SOURCES)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "nomadam[lab]"') from error
    digits: Any = load_digits()
    num_validation = round(len(digits.target) * validation_fraction)
    order = _held_out_last(len(digits.target), num_validation)
    images = (digits.images / 16).astype(np.float32)[order, None]
    labels = digits.target.astype(np.int64)[order]
    train = images[: len(labels) - num_validation].astype(np.float64)
    return ImageDataset(
        images=images,
        labels=labels,
        num_validation=num_validation,
        num_classes=10,
        description={
            "source": source,
            "sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
            "train_images": len(train),
            "validation_images": num_validation,
            "mean": float(train.mean()),
            "deviation": float(train.std()),
        },
    )


def _held_out_last(num: int, num_validation: int) -> np.ndarray:
    """The numbers below `num`, those that are held out at the end; they are spread evenly."""
    held_out = (2 * np.arange(num_validation) + 1) * num // (2 * num_validation)
    return np.concatenate([np.setdiff1d(np.arange(num), held_out), held_out])
