"""Stable Diffusion, read from a local folder, learns a concept from some pictures by LoRA."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomadam.experiments.fields import check_types, require

if TYPE_CHECKING:
    import torch

    from nomadam.experiments.data.concept_pictures import ConceptBatch, ConceptDataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusionLoRAModel:
    """The UNet of a Stable Diffusion, with LoRA adapters (arXiv 2106.09685) on its attention.

    Args:
        rank: of the adapters, at least 1; default 4.
        alpha: an adapter's output counts alpha / rank times, above 0; default 4.
        targets: ends of the names of the layers that have one; default those of attention.
        num_samples: pictures that are drawn after the last step, at least 1; default 4.
        sampling_steps: calls of the UNet for one of them, at least 1; default 30.
        guidance: classifier-free guidance of theirs, at least 1, which is none; default 7.5.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> StableDiffusionLoRAModel(rank=8).targets
        ('to_q', 'to_k', 'to_v', 'to_out.0')
    """

    rank: int = 4
    alpha: float = 4.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    num_samples: int = 4
    sampling_steps: int = 30
    guidance: float = 7.5

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "model.")
        for field in ("rank", "num_samples", "sampling_steps", "guidance"):
            value = getattr(self, field)
            require(value >= 1, f"model.{field}", value, "at least 1")
        require(self.alpha > 0, "model.alpha", self.alpha, "above 0")
        require(bool(self.targets), "model.targets", self.targets, "at least one name")

    def build(self, *, weights: str) -> "torch.nn.Module":
        """Make the module, of which the adapters alone require a gradient.

        Args:
            weights: the folder, as diffusers saves a ``StableDiffusionPipeline``.

        Raises:
            ValueError: for a folder that is none, and targets that the UNet does not have.
            ImportError: a library is missing, naming the extra to install.
        """
        from nomadam.experiments.adapters import adapted
        from nomadam.experiments.data.concept_pictures import check_weights
        from nomadam.experiments.data.saved_models import read_model

        folder = check_weights(weights)
        try:
            from diffusers import UNet2DConditionModel
        except ImportError as error:
            needs = "Stable Diffusion needs diffusers"
            raise ImportError(f'{needs}: pip install "nomadam[lab]"') from error
        unet = read_model(UNet2DConditionModel, folder / "unet")
        more = unet.config.addition_embed_type
        if more is not None:
            raise ValueError(
                f"data.weights = {weights!r}: its UNet has addition_embed_type = {more!r}, as that "
                "of Stable Diffusion XL; must be one that a text alone conditions"
            )
        taken, given = unet.config.in_channels, unet.config.out_channels
        if taken != given:
            raise ValueError(
                f"data.weights = {weights!r}: its UNet has in_channels = {taken}, as one for "
                f"inpainting; must be its out_channels, {given}"
            )
        return adapted(unet, rank=self.rank, alpha=self.alpha, dropout=0.0, targets=self.targets)

    def loss(self, module: "torch.nn.Module", batch: "ConceptBatch") -> "torch.Tensor":
        """Mean squared error of what the UNet predicts, a latent pixel, in float32.

        Args:
            module: what `build` gave, wrapped or not.
            batch: noised latents with their steps, texts and targets.
        """
        kind = next(module.parameters()).dtype
        said = module(
            batch.noised.to(kind), batch.steps, encoder_hidden_states=batch.texts.to(kind)
        )
        return (said.sample.float() - batch.target).square().mean()

    def finish(
        self, module: "torch.nn.Module", dataset: "ConceptDataset", folder: Path
    ) -> dict[str, float]:
        """Draw ``samples.png`` and write the adapters as ``pytorch_lora_weights.safetensors``.

        The latter is what ``load_lora_weights`` of diffusers' pipelines takes.

        Args:
            module: the trained module, in evaluation mode.
            dataset: what it was trained on.
            folder: the run folder.

        Returns:
            Nothing: of a concept the pictures are the only measure.
        """
        import diffusers
        import torch
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        from nomadam.experiments.data.concept_pictures import read_parts
        from nomadam.experiments.sample_quality import write_grid

        model: Any = module
        adapters = {
            name.removeprefix("base_model.model."): tensor
            for name, tensor in get_peft_model_state_dict(model).items()
        }
        adapters = convert_state_dict_to_diffusers(adapters)
        diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=adapters)
        vae, encoder, tokenizer, scheduler = read_parts(dataset.weights)
        place = next(module.parameters())
        # Latents go beyond -1 and 1, where a schedule made for pixels would clip.
        sampler: Any = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
        pipeline: Any = diffusers.StableDiffusionPipeline(
            vae=vae.to(place),
            text_encoder=encoder.to(place),
            tokenizer=tokenizer,
            unet=model.get_base_model(),
            scheduler=sampler,
            safety_checker=None,  # pyright: ignore[reportArgumentType]
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        drawn = [
            pipeline(
                dataset.prompt,
                height=dataset.size,
                width=dataset.size,
                num_inference_steps=self.sampling_steps,
                guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(number),
                output_type="pt",
            ).images
            for number in range(self.num_samples)
        ]
        samples = torch.cat(drawn).float().cpu() * 2 - 1
        write_grid(samples, folder / "samples.png", columns=4, scale=1)
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConceptData:
    """Pictures of a concept, and the Stable Diffusion that is to learn it.

    Args:
        weights: a local folder as diffusers saves a ``StableDiffusionPipeline``, in safetensors.
        pictures: a local folder of at least two pictures, one of which is held out at least.
        concept: what stands for it in the texts.
        templates: texts with ``{}`` for the concept, one of which is drawn for each row; samples
            are drawn by the first.
        size: side of the pictures in pixels, at least 8; default 512.
        flip: whether pictures are mirrored at random; default True.
        validation_fraction: of the pictures, held out, above 0 and at most 0.5; default 0.1.
        draws: noises and steps for each held-out picture, the same ones at each evaluation, at
            least 1; default 16.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> data = ConceptData(weights="stable-diffusion", pictures="pictures", concept="sks dog")
        >>> data.texts[0]
        'a photo of sks dog'
    """

    weights: str
    pictures: str
    concept: str
    templates: tuple[str, ...] = ("a photo of {}", "a picture of {}", "{}")
    size: int = 512
    flip: bool = True
    validation_fraction: float = 0.1
    draws: int = 16

    def __post_init__(self) -> None:
        """Check the fields."""
        check_types(self, "data.")
        require(bool(self.concept), "data.concept", self.concept, "some words")
        hold = bool(self.templates) and all(each.count("{}") == 1 for each in self.templates)
        require(hold, "data.templates", self.templates, "texts, each with one {}")
        require(self.size >= 8, "data.size", self.size, "at least 8")
        require(self.draws >= 1, "data.draws", self.draws, "at least 1")
        fraction, allowed = self.validation_fraction, "above 0 and at most 0.5"
        require(0 < fraction <= 0.5, "data.validation_fraction", fraction, allowed)

    @property
    def tokens_per_row(self) -> int:
        """A picture counts 1."""
        return 1

    @property
    def texts(self) -> tuple[str, ...]:
        """The templates with the concept in them."""
        return tuple(each.replace("{}", self.concept) for each in self.templates)

    def load(self, cache_folder: Path | None = None) -> "ConceptDataset":
        """Read the pictures, and encode them and the texts.

        Raises:
            ValueError: for a folder or file that is missing or can not be read.
            ImportError: a library is missing, naming the extra to install.
        """
        from nomadam.experiments.data.concept_pictures import load_concept

        return load_concept(
            self.pictures,
            weights=self.weights,
            texts=self.texts,
            size=self.size,
            flip=self.flip,
            validation_fraction=self.validation_fraction,
            draws=self.draws,
        )

    def shape(self, dataset: "ConceptDataset") -> dict[str, Any]:
        """What the UNet needs to know: the folder that it is read from."""
        return {"weights": self.weights}

    def train_batch(
        self, dataset: "ConceptDataset", *, seed: int, step: int, micro: int, batch_size: int
    ) -> "ConceptBatch":
        """Random pictures, texts, noises and steps, a pure function of the arguments."""
        return dataset.train_batch(seed=seed, step=step, micro=micro, batch_size=batch_size)

    def validation_batches(
        self, dataset: "ConceptDataset", *, batch_size: int, max_batches: int | None
    ) -> Iterator[Any]:
        """The held-out pictures, each time with the same noises and steps."""
        return dataset.validation_batches(batch_size=batch_size, max_batches=max_batches)
