"""How good drawn images are: what a small classifier sees in them, and a Fréchet distance."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from nomadam.experiments.data.images import ImageDataset
    from nomadam.experiments.data.noised_images import NoisedDataset

FEATURES = 32
# More than to all other classes and to no digit together.
CONFIDENCE = 0.5
TRAINING_STEPS = 600
_SEED = 0


def judged(samples: "torch.Tensor", dataset: "NoisedDataset") -> dict[str, float]:
    """Compare samples with the images that were to be learned.

    The judge is a classifier of all classes and one more, *no image of these*: see `classifier`.
    It is trained anew in some seconds, from the data and a fixed seed alone, so that all runs on
    the same data have the same judge.

    Args:
        samples: `[n, channels, height, width]`, from -1 to 1, n at least 2.
        dataset: what was learned, and the images of all classes.

    Returns:
        `recognised`: the part of the samples to which the classifier gives one of the classes that
        were learned with a probability of at least `CONFIDENCE`. `recognised_held_out`: the same of
        the held-out images of these classes, the most that can be hoped for.
        `frechet_distance`: between the samples and the images that were trained on, by the
        classifier's features. `frechet_distance_held_out`: the same of the held-out images, which
        is what chance and the small number of images alone make of it. The distance falls with
        the number of images: only numbers from as many can be compared.
    """
    import torch

    judge = classifier(dataset.everything)
    learned = list(dataset.classes)
    real = (torch.from_numpy(dataset.chosen.images) * 2 - 1).split(
        [dataset.chosen.num_train, dataset.chosen.num_validation]
    )
    with torch.no_grad():
        seen = {"": samples, "_held_out": real[1]}
        features = {name: judge[0](images).numpy() for name, images in seen.items()}
        trained_on = judge[0](real[0]).numpy()
        found = {}
        for name, images in seen.items():
            sure, label = judge(images).softmax(1).max(1)
            right = (sure >= CONFIDENCE) & torch.isin(label, torch.tensor(learned))
            found[f"recognised{name}"] = right.double().mean().item()
            found[f"frechet_distance{name}"] = frechet_distance(trained_on, features[name])
    return found


def classifier(data: "ImageDataset") -> Any:
    """Train a small convolutional network to tell classes apart, and from what is none of them.

    Half of each batch are no images of any class, so that confidence means something away from the
    data too: images with their pixels shuffled, or with two halves of different images.

    Args:
        data: images with labels, from -1 to 1 in its batches.

    Returns:
        An `nn.Sequential` of the network up to its `FEATURES` features and the output layer, with
        `data.num_classes + 1` outputs, in evaluation mode, on the CPU.
    """
    import torch
    from torch import nn

    _, channels, height, width = data.images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(channels, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1, stride=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * -(-height // 2) * -(-width // 2), FEATURES),
                nn.ReLU(),
            ),
            nn.Linear(FEATURES, data.num_classes + 1),
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
        with torch.enable_grad():
            for step in range(TRAINING_STEPS):
                batch = data.train_batch(
                    seed=_SEED, step=step, batch_size=64, shift=0.05, rotation=5
                )
                others = _no_images(batch.images, step)
                labels = torch.cat([batch.labels, torch.full((64,), data.num_classes)])
                outputs = network(torch.cat([batch.images, others]))
                nn.functional.cross_entropy(outputs, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return network.eval()


def _no_images(images: "torch.Tensor", step: int) -> "torch.Tensor":
    """Half of them with their pixels shuffled, half cut in two and put together with the next."""
    import torch

    rows, channels, height, width = images.shape
    order = torch.from_numpy(
        np.random.Generator(np.random.Philox(key=_SEED, counter=step << 64)).permuted(
            np.tile(np.arange(height * width), (rows // 2, 1)), axis=1
        )
    )
    flat = images[: rows // 2].flatten(2)
    shuffled = flat.gather(2, order[:, None].expand_as(flat)).unflatten(2, (height, width))
    halves = images[rows // 2 :]
    upper, lower = halves[:, :, : height // 2], halves.roll(1, 0)[:, :, height // 2 :]
    return torch.cat([shuffled, torch.cat([lower, upper], 2)])


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The squared Fréchet distance of the Gaussians with the means and covariances of two samples.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)), in float64; the matrix in the
    last term is symmetric, so that its root is that of its eigenvalues.

    Args:
        one: `[n, features]`, n at least 2.
        other: `[m, features]`, m at least 2.

    Returns:
        At least 0. Rounding is about 1e-8 of the covariances' size where these have lower rank
        than there are features.

    Errors:
        ValueError: for other shapes, and for numbers that are not finite.

    Source:
        arXiv 1706.08500, eq. 6; Dowson and Landau, 1982.

    Examples:
        >>> points = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> round(frechet_distance(points, points + [3.0, 4.0]), 6)
        25.0
    """
    sets = [np.asarray(each, dtype=np.float64) for each in (one, other)]
    if any(each.ndim != 2 or len(each) < 2 for each in sets) or sets[0].shape[1] != len(sets[1].T):
        raise ValueError(
            f"two samples of at least 2 rows with as many features are needed, not of the shapes "
            f"{list(sets[0].shape)} and {list(sets[1].shape)}"
        )
    if not all(np.isfinite(each).all() for each in sets):
        raise ValueError("the features are not all finite")
    means = [each.mean(0) for each in sets]
    first, second = (np.atleast_2d(np.cov(each, rowvar=False)) for each in sets)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    product = np.linalg.eigvalsh(root @ second @ root)
    between = ((means[0] - means[1]) ** 2).sum()
    spread = np.trace(first) + np.trace(second) - 2 * np.sqrt(product.clip(0)).sum()
    return float(max(between + spread, 0.0))


def write_grid(samples: "torch.Tensor", path: Path, *, columns: int = 16, scale: int = 6) -> None:
    """Write images as one PNG, row by row, at once or not at all.

    Args:
        samples: `[n, channels, height, width]`, from -1 to 1, of one or three channels, n at least
            1; what is brighter is drawn darker where there is one, as ink is.
        path: the file.
        columns: images a row, at least 1. Default 16.
        scale: pixels a side for each of an image's, at least 1. Default 6.

    Errors:
        ValueError: for another number of channels or dimensions.
        ImportError: without Pillow, naming the extra to install.
    """
    import torch

    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "nomadam[lab]"') from error

    from nomadam.durable_files import write_atomically

    if samples.ndim != 4 or samples.shape[1] not in (1, 3) or len(samples) < 1:
        raise ValueError(f"samples must be [n, 1 or 3, height, width], not {list(samples.shape)}")
    channels = samples.shape[1]
    levels = (samples.clamp(-1, 1) + 1) * 127.5
    levels = (255 - levels if channels == 1 else levels).round().to(torch.uint8)
    levels = levels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    # A light frame of two pixels between them, of which the last row may lack some.
    framed = torch.nn.functional.pad(levels, (1, 1, 1, 1), value=200)
    missing = -len(framed) % min(columns, len(framed))
    framed = torch.nn.functional.pad(framed, (0,) * 7 + (missing,), value=200)
    rows = framed.unflatten(0, (-1, min(columns, len(samples))))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()
    picture = Image.fromarray(grid[:, :, 0] if channels == 1 else grid)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
