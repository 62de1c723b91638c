"""Diffusion on small images: a UNet from a configuration, LoRA on a trained one, and their data."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomadam.experiments.configuration import Run
from nomadam.experiments.fields import check_types, require

if TYPE_CHECKING:
    import torch

    from nomadam.experiments.data.noised_images import NoisedBatch, NoisedDataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetModel:
    """A denoising UNet of diffusers, from a configuration, freshly initialised.

    It predicts the noise (arXiv 2006.11239, eq. 14) that a cosine schedule (arXiv 2102.09672)
    laid over an image, and draws samples by DDIM (arXiv 2010.02502) without noise of its own.

    Args:
        channels: of each resolution, the finest first, each a multiple of 8; every further one
            has half the side. All but the finest have attention.
        layers: residual blocks a resolution on the way down, at least 1; default 1.
        timesteps: of the noise schedule, at least 2; default 1000.
        sampling_steps: calls of the UNet for a sample, from 1 to timesteps; default 50.
        num_samples: drawn and judged after the last step, at least 64; default 256.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> model = UNetModel(channels=(8, 8))
        >>> module = model.build(image_size=8, channels=1)
        >>> sum(parameter.numel() for parameter in module.parameters())
        18521
    """

    channels: tuple[int, ...]
    layers: int = 1
    timesteps: int = 1000
    sampling_steps: int = 50
    num_samples: int = 256

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "model.")
        fits = self.channels and all(each > 0 and each % 8 == 0 for each in self.channels)
        require(bool(fits), "model.channels", self.channels, "multiples of 8, at least one")
        for field, least in (("layers", 1), ("timesteps", 2), ("num_samples", 64)):
            value = getattr(self, field)
            require(value >= least, f"model.{field}", value, f"at least {least}")
        steps, most = self.sampling_steps, self.timesteps
        require(1 <= steps <= most, "model.sampling_steps", steps, f"from 1 to {most}")

    def build(self, *, image_size: int, channels: int) -> "torch.nn.Module":
        """Make the module; torch's global random generator decides the initial weights.

        Args:
            image_size: side of the square images in pixels.
            channels: of the images.

        Raises:
            ValueError: for images that can not be halved as often as `channels` asks for.
            ImportError: without diffusers, naming the extra to install.
        """
        halved = len(self.channels) - 1
        allowed = f"fewer: images of side {image_size} can not be halved {halved} times"
        require(image_size % 2**halved == 0, "model.channels", self.channels, allowed)
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError('the UNet needs diffusers: pip install "nomadam[lab]"') from error
        return UNet2DModel(
            sample_size=image_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * halved,
            up_block_types=("AttnUpBlock2D",) * halved + ("UpBlock2D",),
            attention_head_dim=8,
            norm_num_groups=8,
        )

    def loss(self, module: "torch.nn.Module", batch: "NoisedBatch") -> "torch.Tensor":
        """Mean squared error of the predicted noise, a pixel, in float32.

        Args:
            module: what `build` gave, wrapped or not.
            batch: images, the noise to lay over them, and when.
        """
        scheduler = _noise_schedule(self.timesteps)
        steps = (batch.times * self.timesteps).long()
        noised = scheduler.add_noise(batch.images, batch.noise, steps)
        predicted = module(noised.to(next(module.parameters()).dtype), steps).sample
        return (predicted.float() - batch.noise).square().mean()

    def samples(
        self, module: "torch.nn.Module", shape: tuple[int, int, int], *, number: int
    ) -> "torch.Tensor":
        """Draw images from noise; torch's global random generator decides the noise.

        Args:
            module: what `build` gave, in evaluation mode.
            shape: channels, height and width.
            number: of samples, at least 1.

        Returns:
            float32 on the CPU, `[number, channels, height, width]`, from -1 to 1.
        """
        import torch
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler.from_config(
            _noise_schedule(self.timesteps).config, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(self.sampling_steps)
        parameter = next(module.parameters())
        drawn = []
        with torch.no_grad():
            for noise in torch.randn(number, *shape).split(64):
                images = noise.to(parameter)
                for step in scheduler.timesteps:
                    predicted = module(images, step.to(images.device)).sample
                    images = scheduler.step(predicted, step, images).prev_sample
                drawn.append(images.float().cpu().clamp(-1, 1))
        return torch.cat(drawn)

    def finish(
        self, module: "torch.nn.Module", dataset: "NoisedDataset", folder: Path
    ) -> dict[str, float]:
        """Draw samples, keep some in ``samples.png``, and say what a classifier sees in them.

        Args:
            module: the trained module, in evaluation mode.
            dataset: what it was trained on.
            folder: the run folder.

        Returns:
            What `nomadam.experiments.sample_quality.judged` says.
        """
        from nomadam.experiments.sample_quality import judged, write_grid

        shape = dataset.chosen.images.shape[1:]
        drawn = self.samples(module, shape, number=self.num_samples)
        write_grid(drawn[:128], folder / "samples.png")
        return judged(drawn, dataset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAUNetModel:
    """Low-rank adapters (LoRA, arXiv 2106.09685) by peft on a UNet that another Run trains first.

    Args:
        pretraining: that Run; its model is a ``UNetModel`` and its data are ``NoisedImageData``.
        rank: of the adapters, at least 1; default 8.
        alpha: an adapter's output counts alpha / rank times, above 0; default 8.
        targets: ends of the names of the layers that have one; default those of attention and the
            convolutions of the residual blocks.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> from nomadam.experiments.diffusion import pretrain
        >>> module = LoRAUNetModel(pretraining=pretrain(), rank=2).build(image_size=8, channels=1)
        >>> sum(each.numel() for each in module.parameters() if each.requires_grad)
        19104
    """

    pretraining: Run
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "model.")
        model, data = self.pretraining.model, self.pretraining.data
        require(isinstance(model, UNetModel), "model.pretraining.model", model, "a UNetModel")
        noised = isinstance(data, NoisedImageData)
        require(noised, "model.pretraining.data", data, "NoisedImageData")
        require(self.rank >= 1, "model.rank", self.rank, "at least 1")
        require(self.alpha > 0, "model.alpha", self.alpha, "above 0")
        require(bool(self.targets), "model.targets", self.targets, "at least one name")

    @property
    def unet(self) -> UNetModel:
        """What is adapted."""
        return self.pretraining.model  # pyright: ignore[reportReturnType]

    def first_stage(self) -> Run:
        """The Run that trains what is adapted."""
        return self.pretraining

    def build(
        self, *, image_size: int, channels: int, pretrained: Path | None = None
    ) -> "torch.nn.Module":
        """Make the module, of which the adapters alone require a gradient.

        Args:
            image_size: side of the square images in pixels.
            channels: of the images.
            pretrained: the run folder of `first_stage`; default None, which leaves the UNet fresh.

        Raises:
            ValueError: for targets that the UNet does not have.
            ImportError: a library is missing, naming the extra to install.
        """
        from nomadam.experiments.adapters import adapted

        base = self.unet.build(image_size=image_size, channels=channels)
        if pretrained is not None:
            from nomadam.experiments.first_stage import load_final_weights

            load_final_weights(base, pretrained)
        return adapted(base, rank=self.rank, alpha=self.alpha, dropout=0.0, targets=self.targets)

    def loss(self, module: "torch.nn.Module", batch: "NoisedBatch") -> "torch.Tensor":
        """As `UNetModel.loss`."""
        return self.unet.loss(module, batch)

    def finish(
        self, module: "torch.nn.Module", dataset: "NoisedDataset", folder: Path
    ) -> dict[str, float]:
        """As `UNetModel.finish`."""
        return self.unet.finish(module, dataset, folder)


@functools.cache
def _noise_schedule(timesteps: int) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=timesteps, beta_schedule="squaredcos_cap_v2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisedImageData:
    """Images of some classes, with noise to be found in them.

    Args:
        source: ``digits``, the 1797 handwritten digits of scikit-learn; default.
        classes: labels of the images to learn, at least one, none twice.
        validation_fraction: held out, above 0 and at most 0.5; default 1/3, every third image.
        draws: noises and times for each held-out image, the same ones at each evaluation, at
            least 1; default 4.
        shift: largest shift along each axis, as a part of the side, 0 to 0.5; default 0.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> NoisedImageData(classes=(3,)).tokens_per_row
        1
    """

    source: str = "digits"
    classes: tuple[int, ...]
    validation_fraction: float = 1 / 3
    draws: int = 4
    shift: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "data.")
        distinct = len(set(self.classes)) == len(self.classes) > 0
        require(distinct, "data.classes", self.classes, "labels, at least one and none twice")
        fraction, allowed = self.validation_fraction, "above 0 and at most 0.5"
        require(0 < fraction <= 0.5, "data.validation_fraction", fraction, allowed)
        require(self.draws >= 1, "data.draws", self.draws, "at least 1")
        require(0 <= self.shift <= 0.5, "data.shift", self.shift, "from 0 to 0.5")

    @property
    def tokens_per_row(self) -> int:
        """An image counts 1."""
        return 1

    def load(self, cache_folder: Path | None = None) -> "NoisedDataset":
        """Read the images.

        Raises:
            ValueError: for an unknown source, or a class that it does not have.
            ImportError: a library is missing, naming the extra to install.
        """
        from nomadam.experiments.data.noised_images import load_noised

        return load_noised(
            self.source,
            classes=self.classes,
            validation_fraction=self.validation_fraction,
            draws=self.draws,
        )

    def shape(self, dataset: "NoisedDataset") -> dict[str, int]:
        """What a UNet needs to know: the images' side and channels."""
        _, channels, height, _ = dataset.chosen.images.shape
        return {"image_size": height, "channels": channels}

    def train_batch(
        self, dataset: "NoisedDataset", *, seed: int, step: int, micro: int, batch_size: int
    ) -> "NoisedBatch":
        """Random images, noises and times, a pure function of the arguments."""
        return dataset.train_batch(
            seed=seed, step=step, micro=micro, batch_size=batch_size, shift=self.shift
        )

    def validation_batches(
        self, dataset: "NoisedDataset", *, batch_size: int, max_batches: int | None
    ) -> Iterator[Any]:
        """The held-out images in their order, each time with the same noises and times."""
        return dataset.validation_batches(batch_size=batch_size, max_batches=max_batches)
