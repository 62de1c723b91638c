"""Classifiers of images, a vision transformer and convolutional networks, and small images."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nomadam.experiments.fields import check_types, require

if TYPE_CHECKING:
    import torch

    from nomadam.experiments.data.images import ImageBatch, ImageDataset

Family = Literal["resnet18", "vgg", "mobilenet"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTModel:
    """A vision transformer of transformers, from a configuration, freshly initialised.

    Args:
        layers: number of blocks, at least 1.
        heads: attention heads, at least 1.
        width: of the residual stream, a multiple of heads.
        patch_size: side of a patch in pixels, at least 1; the images' side is a multiple of it.
        initializer_range: deviation of the initial weights, above 0; default 0.02, which suits a
            width of several hundred.
        dropout: of the hidden states and of attention, 0 to below 1; default 0.
        label_smoothing: s of the loss: a target is 1 − s of its label and s of all labels alike,
            so that no loss is below the entropy of that; 0 to below 1, default 0.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> model = ViTModel(layers=1, heads=2, width=8, patch_size=4)
        >>> module = model.build(image_size=8, channels=1, num_classes=10)
        >>> sum(parameter.numel() for parameter in module.parameters())
        1162
    """

    layers: int
    heads: int
    width: int
    patch_size: int
    initializer_range: float = 0.02
    dropout: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "model.")
        for field in ("layers", "heads", "width", "patch_size"):
            value = getattr(self, field)
            require(value >= 1, f"model.{field}", value, "at least 1")
        multiple = f"a multiple of model.heads = {self.heads}"
        require(self.width % self.heads == 0, "model.width", self.width, multiple)
        spread = self.initializer_range
        require(spread > 0, "model.initializer_range", spread, "above 0")
        for field in ("dropout", "label_smoothing"):
            value = getattr(self, field)
            require(0 <= value < 1, f"model.{field}", value, "at least 0 and below 1")

    def build(self, *, image_size: int, channels: int, num_classes: int) -> "torch.nn.Module":
        """Make the module; torch's global random generator decides the initial weights.

        Args:
            image_size: side of the square images in pixels.
            channels: of the images.
            num_classes: number of labels.

        Raises:
            ValueError: for images that do not divide into patches.
            ImportError: without transformers, naming the extra to install.
        """
        multiple = f"a divisor of the images' side, {image_size}"
        require(image_size % self.patch_size == 0, "model.patch_size", self.patch_size, multiple)
        try:
            from transformers import ViTConfig, ViTForImageClassification
        except ImportError as error:
            raise ImportError('the ViT needs transformers: pip install "nomadam[lab]"') from error
        config = ViTConfig(
            image_size=image_size,
            patch_size=self.patch_size,
            num_channels=channels,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            initializer_range=self.initializer_range,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )
        config.num_labels = num_classes
        return ViTForImageClassification(config)

    def loss(self, module: "torch.nn.Module", batch: "ImageBatch") -> "torch.Tensor":
        """Mean cross entropy with the smoothed labels, in nats an image, in float32.

        Args:
            module: what `build` gave, wrapped or not.
            batch: images and labels; where two images are mixed, a label is a row of parts.
        """
        logits = module(pixel_values=batch.images).logits
        return _cross_entropy(logits, batch, self.label_smoothing)

    def measures(self, module: "torch.nn.Module", batch: "ImageBatch") -> dict[str, "torch.Tensor"]:
        """The loss, it without smoothing, and the part whose likeliest label is right (top-1)."""
        return _measures(module(pixel_values=batch.images).logits, batch, self.label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionalModel:
    """A convolutional network of `nomadam.experiments.convolutional`, freshly initialised.

    Args:
        family: ``resnet18`` (default), ``vgg`` or ``mobilenet``.
        width: channels of the first of four stages, at least 1; the last has 8 times as many.
            ResNet-18 has 64.
        label_smoothing: as in `ViTModel`; default 0.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> module = ConvolutionalModel(width=8).build(image_size=8, channels=1, num_classes=10)
        >>> sum(parameter.numel() for parameter in module.parameters())
        176258
    """

    family: Family = "resnet18"
    width: int = 64
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "model.")
        require(self.width >= 1, "model.width", self.width, "at least 1")
        value = self.label_smoothing
        require(0 <= value < 1, "model.label_smoothing", value, "at least 0 and below 1")

    def build(self, *, image_size: int, channels: int, num_classes: int) -> "torch.nn.Module":
        """Make the module; torch's global random generator decides the initial weights.

        Args:
            image_size: side of the images in pixels, at least 8: it is halved three times.
            channels: of the images.
            num_classes: number of labels.

        Raises:
            ValueError: for smaller images.
        """
        from nomadam.experiments.convolutional import FAMILIES, ConvolutionalNet

        if image_size < 8:
            raise ValueError(f"the images' side is {image_size}: must be at least 8")
        features = FAMILIES[self.family](channels=channels, width=self.width)
        return ConvolutionalNet(features, 8 * self.width, num_classes)

    def loss(self, module: "torch.nn.Module", batch: "ImageBatch") -> "torch.Tensor":
        """Mean cross entropy with the smoothed labels, in nats an image, in float32."""
        return _cross_entropy(module(batch.images), batch, self.label_smoothing)

    def measures(self, module: "torch.nn.Module", batch: "ImageBatch") -> dict[str, "torch.Tensor"]:
        """The loss, it without smoothing, and the part whose likeliest label is right (top-1)."""
        return _measures(module(batch.images), batch, self.label_smoothing)


def _cross_entropy(logits: "torch.Tensor", batch: "ImageBatch", smoothing: float) -> "torch.Tensor":
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), batch.labels, label_smoothing=smoothing)


def _measures(
    logits: "torch.Tensor", batch: "ImageBatch", smoothing: float
) -> dict[str, "torch.Tensor"]:
    return {
        "loss": _cross_entropy(logits, batch, smoothing),
        "cross_entropy": _cross_entropy(logits, batch, 0.0),
        "accuracy": (logits.argmax(-1) == batch.labels).float().mean(),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData:
    """Images with labels, changed at random in training.

    Args:
        source: ``digits``, the 1797 handwritten digits of scikit-learn; default.
        validation_fraction: held out, above 0 and at most 0.5; default 1/3, every third image.
        shift: largest shift along each axis, as a part of the side, 0 to 0.5; default 0.125.
        rotation: largest angle to either side in degrees, 0 to 180; default 10.
        erasing: probability of erasing a rectangle of a quarter to half of each side, 0 to 1;
            default 0.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> ImageData(rotation=15).tokens_per_row
        1
    """

    source: str = "digits"
    validation_fraction: float = 1 / 3
    shift: float = 0.125
    rotation: float = 10.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "data.")
        fraction, allowed = self.validation_fraction, "above 0 and at most 0.5"
        require(0 < fraction <= 0.5, "data.validation_fraction", fraction, allowed)
        for field, most in (("shift", 0.5), ("rotation", 180), ("erasing", 1)):
            value = getattr(self, field)
            require(0 <= value <= most, f"data.{field}", value, f"from 0 to {most}")

    @property
    def tokens_per_row(self) -> int:
        """An image counts 1."""
        return 1

    def load(self, cache_folder: Path | None = None) -> "ImageDataset":
        """Read the images.

        Raises:
            ValueError: for an unknown source.
            ImportError: a library is missing, naming the extra to install.
        """
        from nomadam.experiments.data.images import load_images

        return load_images(self.source, validation_fraction=self.validation_fraction)

    def shape(self, dataset: "ImageDataset") -> dict[str, int]:
        """What a classifier needs to know: the images' side and channels, the number of classes."""
        _, channels, height, _ = dataset.images.shape
        return {"image_size": height, "channels": channels, "num_classes": dataset.num_classes}

    def train_batch(
        self, dataset: "ImageDataset", *, seed: int, step: int, micro: int, batch_size: int
    ) -> "ImageBatch":
        """Random images, randomly changed, a pure function of the arguments."""
        return dataset.train_batch(
            seed=seed,
            step=step,
            micro=micro,
            batch_size=batch_size,
            shift=self.shift,
            rotation=self.rotation,
            erasing=self.erasing,
        )

    def validation_batches(
        self, dataset: "ImageDataset", *, batch_size: int, max_batches: int | None
    ) -> Iterator[Any]:
        """The held-out images in their order, unchanged."""
        return dataset.validation_batches(batch_size=batch_size, max_batches=max_batches)
