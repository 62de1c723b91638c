"""Pictures of a concept as Stable Diffusion learns them: noised latents, with a text for each."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomadam.durable_files import sha256
from nomadam.experiments.data.image_folder import FORMATS, of_eight_bits
from nomadam.experiments.data.saved_models import read_model

if TYPE_CHECKING:
    import torch

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
PARTS = ("unet", "vae", "text_encoder")
# Sets these draws apart from any other use of the same seed.
_LATENTS = 0x6C6174656E7473
_HELD_OUT = 2**64 - 1
_LARGEST_PIXELS = 2**28
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")


@dataclasses.dataclass(frozen=True, eq=False)
class ConceptBatch:
    """Rows of noised latents; slices and moves as a tensor does.

    Args:
        noised: float32 `[rows, channels, height, width]`.
        steps: int64 `[rows]`, of the noise schedule.
        texts: float32 `[rows, tokens, width]`, the encoded texts.
        target: like `noised`, what the UNet is to say.
    """

    noised: "torch.Tensor"
    steps: "torch.Tensor"
    texts: "torch.Tensor"
    target: "torch.Tensor"

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.steps)

    def __getitem__(self, rows: slice) -> "ConceptBatch":
        """Some of the rows."""
        return ConceptBatch(*(each[rows] for each in self._tensors))

    def to(self, device: "torch.device", *, non_blocking: bool = False) -> "ConceptBatch":
        """The same on a device."""
        return ConceptBatch(*(each.to(device, non_blocking=non_blocking) for each in self._tensors))

    @property
    def _tensors(self) -> tuple["torch.Tensor", ...]:
        return self.noised, self.steps, self.texts, self.target


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ConceptDataset:
    """Pictures as the VAE sees them, and the texts that go with them, both encoded once.

    Args:
        means: float32 `[n, channels, height, width]`, of each picture's latent; the training ones.
        deviations: like the means.
        held_out: float32 `[m, channels, height, width]`, latents of the held-out pictures.
        texts: float32 `[texts, tokens, width]`, encoded, one of which is drawn for each row.
        prompt: the first of the texts, by which samples are drawn.
        scheduler: diffusers' noise schedule.
        draws: noises and steps for each held-out picture, at least 1.
        size: side of the pictures in pixels.
        weights: the folder that VAE, text encoder and schedule were read from.
        description: what the data is, in JSON scalars.
    """

    means: "torch.Tensor"
    deviations: "torch.Tensor"
    held_out: "torch.Tensor"
    texts: "torch.Tensor"
    prompt: str
    scheduler: Any
    draws: int
    size: int
    weights: str
    description: dict[str, str | int | float | bool | None]

    def train_batch(self, *, seed: int, step: int, micro: int = 0, batch_size: int) -> ConceptBatch:
        """Random pictures, texts, noises and steps, a pure function of the arguments.

        They are drawn by numpy's Generator, whose methods may change from one version of numpy to
        another: they repeat exactly within one, as does what `validation_batches` draws.

        Args:
            seed: from 0 to 2**64 - 1.
            step: the optimizer step, from 0.
            micro: the micro-batch within the step, from 0. Default 0.
            batch_size: at least 1.
        """
        import torch

        draw = _generator(seed, step, micro)
        rows = torch.from_numpy(draw.integers(len(self.means), size=batch_size))
        spread = self.deviations[rows] * _normal(draw, self.means[rows].shape)
        return self._noised(draw, self.means[rows] + spread)

    def validation_batches(
        self, *, batch_size: int, max_batches: int | None = None
    ) -> Iterator[ConceptBatch]:
        """The held-out pictures, all of them `draws` times, with noise that no seed changes.

        Args:
            batch_size: at least 1.
            max_batches: stops after so many, at least 1. Default all.
        """
        rows = self.held_out.repeat(self.draws, 1, 1, 1)
        whole = self._noised(_generator(_HELD_OUT, 0, 0), rows)
        for start in range(0, len(rows), batch_size)[:max_batches]:
            yield whole[start : start + batch_size]

    def _noised(self, draw: np.random.Generator, latents: "torch.Tensor") -> ConceptBatch:
        import torch

        schedule = self.scheduler
        noise = _normal(draw, latents.shape)
        steps = torch.from_numpy(
            draw.integers(schedule.config.num_train_timesteps, size=len(noise))
        )
        texts = self.texts[torch.from_numpy(draw.integers(len(self.texts), size=len(noise)))]
        velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, steps) if velocity else noise
        return ConceptBatch(schedule.add_noise(latents, noise, steps), steps, texts, target)


def _generator(seed: int, step: int, micro: int) -> np.random.Generator:
    counter = step << 128 | micro << 64
    return np.random.Generator(np.random.Philox(key=_LATENTS << 64 | seed, counter=counter))


def _normal(draw: np.random.Generator, shape: Sequence[int]) -> "torch.Tensor":
    import torch

    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))


def load_concept(
    pictures: str,
    *,
    weights: str,
    texts: Sequence[str],
    size: int,
    flip: bool,
    validation_fraction: float,
    draws: int,
) -> ConceptDataset:
    """Read pictures and encode them and their texts by the parts of a Stable Diffusion.

    Args:
        pictures: a folder of at least two pictures; each is scaled to its shorter side and cut.
        weights: a folder as diffusers saves a `StableDiffusionPipeline`, in safetensors.
        texts: at least one.
        size: side of the pictures in pixels, a multiple of what the VAE makes one pixel of.
        flip: whether each training picture counts a second time, mirrored.
        validation_fraction: of the pictures, held out, at least one and never all.
        draws: see `ConceptDataset`.

    Errors:
        ValueError: a folder, a part or a picture is missing or can not be read, or does not fit.
        ImportError: a library is missing, naming the extra to install.
    """
    import torch

    folder = check_weights(weights)
    paths = _paths(Path(pictures).expanduser())
    pixels = torch.stack([_pixels(path, size) for path in paths])
    vae, encoder, tokenizer, scheduler = read_parts(weights)
    halved = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % halved:
        raise ValueError(f"data.size = {size}: must be a multiple of the VAE's {halved}")
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"{weights}/scheduler predicts {kind!r}: must be epsilon or v_prediction")
    num_held_out = min(max(1, round(len(paths) * validation_fraction)), len(paths) - 1)
    training, held_out = pixels[num_held_out:], pixels[:num_held_out]
    if flip:
        training = torch.cat([training, training.flip(3)])
    means, deviations = _latents(vae, training)
    tokens = _tokens(
        tokenizer, texts, min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    )
    with torch.no_grad():
        encoded = encoder(tokens)[0].float()
    return ConceptDataset(
        means=means,
        deviations=deviations,
        held_out=_latents(vae, held_out)[0],
        texts=encoded,
        prompt=texts[0],
        scheduler=scheduler,
        draws=draws,
        size=size,
        weights=weights,
        description={
            "source": Path(pictures).name,
            "sha256": _digest(paths, folder),
            "train_images": len(paths) - num_held_out,
            "validation_images": num_held_out,
            "prompt": texts[0],
        },
    )


def _tokens(tokenizer: Any, texts: Sequence[str], most: int) -> "torch.Tensor":
    for text in texts:
        count = len(tokenizer(text).input_ids)
        if count > most:
            raise ValueError(
                f"data.templates with data.concept: {text!r} has {count} tokens with the two at "
                f"its ends; must have at most {most}, which the text encoder reads"
            )
    padded = tokenizer(list(texts), padding="max_length", max_length=most, return_tensors="pt")
    return padded.input_ids


def check_weights(weights: str) -> Path:
    """The folder of the weights; refuses one that is no Stable Diffusion in safetensors.

    Raises:
        ValueError: naming what is missing.
    """
    folder = Path(weights).expanduser()
    needed = [*(f"{part}/config.json" for part in PARTS), "scheduler/scheduler_config.json"]
    missing = [name for name in needed if not (folder / name).is_file()]
    missing += [f"{part}/*.safetensors" for part in PARTS if not _weights_of(folder / part)]
    if not (folder / "tokenizer").is_dir():
        missing.append("tokenizer/")
    if missing:
        raise ValueError(
            f"data.weights = {weights!r}: must be a local folder as diffusers saves Stable "
            f"Diffusion, weights in safetensors; missing: {', '.join(missing)}"
        )
    return folder


def _weights_of(part: Path) -> list[Path]:
    """The files that the weights of a part are read from; other variants may lie beside them."""
    there = sorted(part.iterdir()) if part.is_dir() else []
    return [path for path in there if _WEIGHTS.fullmatch(path.name)]


def _paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"data.pictures = {str(folder)!r}: must be a folder of pictures")
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in ENDINGS and path.name[0] != "." and not path.is_dir()
    )
    if len(paths) < 2:
        raise ValueError(
            f"data.pictures = {str(folder)!r}: must hold at least 2 pictures, one of them to be "
            f"held out ({', '.join(ENDINGS)}); found {len(paths)}"
        )
    return paths


def _pixels(path: Path, size: int) -> "torch.Tensor":
    """A picture, [3, size, size], from -1 to 1; on white where it is transparent."""
    import torch

    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "nomadam[lab]"') from error
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > _LARGEST_PIXELS:
                raise ValueError(f"it has {opened.width} x {opened.height} pixels")
            upright = ImageOps.exif_transpose(of_eight_bits(opened))
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            upright = upright.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a file that is damaged
        raise ValueError(f"{path} can not be read as a picture: {error}") from error
    fitted = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def read_parts(weights: str) -> tuple[Any, Any, Any, Any]:
    """VAE, text encoder, tokenizer and noise schedule, of these classes whatever the files say.

    Raises:
        ValueError: one of them can not be read.
        ImportError: a library is missing, naming the extra to install.
    """
    try:
        from diffusers import AutoencoderKL, DDPMScheduler
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        needs = "Stable Diffusion needs diffusers and transformers"
        raise ImportError(f'{needs}: pip install "nomadam[lab]"') from error
    folder = Path(weights).expanduser()
    vae = read_model(AutoencoderKL, folder / "vae").eval()
    encoder = read_model(CLIPTextModel, folder / "text_encoder").eval()
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        schedule = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    except Exception as error:  # the libraries raise many kinds for a file that is damaged
        raise ValueError(f"data.weights = {weights!r} can not be read: {error}") from error
    return vae, encoder, tokenizer, schedule


def _latents(vae: Any, pixels: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mean and deviation of the latents of pictures, as the UNet is used to them."""
    import torch

    with torch.no_grad():
        # One by one: a VAE at full size needs gigabytes for each.
        found = [vae.encode(each).latent_dist for each in pixels.split(1)]
    scale = vae.config.scaling_factor
    means, deviations = [each.mean for each in found], [each.std for each in found]
    return torch.cat(means).float() * scale, torch.cat(deviations).float() * scale


def _digest(pictures: Sequence[Path], weights: Path) -> str:
    """Of the pictures, and of what of the weights' parts is read."""
    parts = [weights / part for part in PARTS]
    read = [*pictures, *(p for part in parts for p in (part / "config.json", *_weights_of(part)))]
    return hashlib.sha256("".join(sha256(path) for path in read).encode()).hexdigest()
