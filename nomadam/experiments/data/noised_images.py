"""Images with noise to be found in them: the batches of a diffusion model, which need no state."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nomadam.experiments.data.images import ImageDataset, load_images

if TYPE_CHECKING:
    import torch

# Sets these draws apart from any other use of the same seed.
_NOISE = 0x6E6F697365
_HELD_OUT = 2**64 - 1
# Multiples of it, modulo 1, fill the interval evenly however many are taken.
_GOLDEN = 0.6180339887498949


@dataclasses.dataclass(frozen=True, eq=False)
class NoisedBatch:
    """Rows of images, the noise for each and its time; slices and moves as a tensor does.

    Args:
        images: float32 `[rows, channels, height, width]`, from -1 to 1.
        noise: like the images, of mean 0 and deviation 1.
        times: float32 `[rows]`, from 0 to below 1: where between image and noise.

    Examples:
        >>> import torch
        >>> batch = NoisedBatch(torch.zeros(4, 1, 8, 8), torch.ones(4, 1, 8, 8), torch.arange(4.0))
        >>> len(batch), batch[1::2].times.tolist()
        (4, [1.0, 3.0])
    """

    images: "torch.Tensor"
    noise: "torch.Tensor"
    times: "torch.Tensor"

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.times)

    def __getitem__(self, rows: slice) -> "NoisedBatch":
        """Some of the rows."""
        return NoisedBatch(self.images[rows], self.noise[rows], self.times[rows])

    def to(self, device: "torch.device", *, non_blocking: bool = False) -> "NoisedBatch":
        """The same on a device."""
        tensors = (self.images, self.noise, self.times)
        return NoisedBatch(*(each.to(device, non_blocking=non_blocking) for each in tensors))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NoisedDataset:
    """The images of some classes, to be noised, and those of all classes, to judge samples by.

    Args:
        everything: the images of all classes.
        chosen: those of `classes` alone.
        classes: what is learned to be drawn.
        draws: noises and times for each held-out image, at least 1.
        description: what the data is, in JSON scalars.
    """

    everything: ImageDataset
    chosen: ImageDataset
    classes: tuple[int, ...]
    draws: int
    description: dict[str, str | int | float | bool | None]

    def train_batch(
        self, *, seed: int, step: int, micro: int = 0, batch_size: int, shift: float = 0.0
    ) -> NoisedBatch:
        """Random images with random noise at random times, a pure function of the arguments.

        Noise and times are drawn by numpy's Generator, whose methods may change from one version
        of numpy to another: they repeat exactly within one, as does the noise of
        `validation_batches`. Which images are drawn, and how they are changed, does not depend
        on it.

        Args:
            seed: from 0 to 2**64 - 1.
            step: the optimizer step, from 0.
            micro: the micro-batch within the step, from 0. Default 0.
            batch_size: at least 1.
            shift: as `nomadam.experiments.data.images.augmented` takes it. Default 0.
        """
        images = self.chosen.train_batch(
            seed=seed, step=step, micro=micro, batch_size=batch_size, shift=shift
        ).images
        draw = np.random.Generator(
            np.random.Philox(key=_NOISE << 64 | seed, counter=step << 128 | micro << 64)
        )
        times = draw.random(batch_size, dtype=np.float32)
        return _noised(images, draw.standard_normal(images.shape, dtype=np.float32), times)

    def validation_batches(
        self, *, batch_size: int, max_batches: int | None = None
    ) -> Iterator[NoisedBatch]:
        """The held-out images, all of them `draws` times, each row with its own noise and time.

        Neither depends on a seed, so that two evaluations differ by the model alone. The times are
        spread evenly from 0 to 1.

        Args:
            batch_size: at least 1.
            max_batches: stops after so many, at least 1. Default all.
        """
        import torch

        held_out = [batch.images for batch in self.chosen.validation_batches(batch_size=1024)]
        images = torch.cat(held_out).repeat(self.draws, 1, 1, 1)
        draw = np.random.Generator(np.random.Philox(key=_NOISE << 64 | _HELD_OUT))
        noise = draw.standard_normal(images.shape, dtype=np.float32)
        times = ((np.arange(len(images)) + 0.5) * _GOLDEN % 1).astype(np.float32)
        for start in range(0, len(images), batch_size)[:max_batches]:
            rows = slice(start, start + batch_size)
            yield _noised(images[rows], noise[rows], times[rows])


def _noised(images: "torch.Tensor", noise: np.ndarray, times: np.ndarray) -> NoisedBatch:
    import torch

    return NoisedBatch(images, torch.from_numpy(noise), torch.from_numpy(times))


def load_noised(
    source: str, *, classes: Sequence[int], validation_fraction: float, draws: int
) -> NoisedDataset:
    """Read images, those of some classes to be drawn.

    Args:
        source: as `load_images` takes it, and `validation_fraction` too.
        classes: their labels, at least one, none twice.
        validation_fraction: see there.
        draws: noises and times for each held-out image, at least 1.

    Errors:
        ValueError: an unknown source, or a class that has no image to train on or to hold out.
        ImportError: a library is missing, naming the extra to install.

    Examples:
        >>> data = load_noised("digits", classes=[8], validation_fraction=1 / 3, draws=2)
        >>> data.chosen.num_train, data.chosen.num_validation
        (119, 55)
    """
    loaded = load_images(source, validation_fraction=validation_fraction)
    centred: dict[str, Any] = {**loaded.description, "mean": 0.5, "deviation": 0.5}  # -1 to 1
    training, held_out = np.split(loaded.labels, [loaded.num_train])
    for label in classes:
        if label not in training or label not in held_out:
            have = ", ".join(str(each) for each in sorted(set(training) & set(held_out)))
            raise ValueError(f"data.classes has {label}: must be of those of {source}: {have}")
    kept = np.isin(loaded.labels, classes)
    chosen = ImageDataset(
        images=loaded.images[kept],
        labels=loaded.labels[kept],
        num_validation=int(np.isin(held_out, classes).sum()),
        num_classes=loaded.num_classes,
        description=centred,
    )
    return NoisedDataset(
        everything=dataclasses.replace(loaded, description=centred),
        chosen=chosen,
        classes=tuple(classes),
        draws=draws,
        description={
            "source": source,
            "sha256": loaded.description["sha256"],
            "classes": ", ".join(str(label) for label in classes),
            "train_images": chosen.num_train,
            "validation_images": chosen.num_validation,
        },
    )
