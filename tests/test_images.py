"""Images: the digits, batches as a pure function of their arguments, and each of the changes."""

import numpy as np
import pytest
import torch

from nomadam.experiments.data.images import ImageBatch, ImageDataset, augmented, load_images
from nomadam.experiments.image_classification import ImageData

pytest.importorskip("sklearn")
CHANGED = {"shift": 0.125, "rotation": 10.0, "erasing": 0.5}
STILL = {"shift": 0.0, "rotation": 0.0, "erasing": 0.0, "fill": 0.0}


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", validation_fraction=1 / 3)


def equal(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def draws(rows=1, **values):
    """Draws of 0.5, so that nothing is turned or shifted, with some columns set."""
    names = ("angle", "right", "down", "whether", "tall", "wide", "top", "left")
    columns = [torch.full((rows,), float(values.get(name, 0.5))) for name in names]
    return torch.stack(columns, 1)


def test_every_third_digit_is_held_out(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    assert (digits.num_train, digits.num_validation) == (1198, 599)
    assert digits.images.dtype == np.float32
    assert (digits.images.min(), digits.images.max()) == (0.0, 1.0)
    held_out = list(digits.validation_batches(batch_size=64))
    assert [len(batch) for batch in held_out] == [64] * 9 + [23]
    labels = torch.cat([batch.labels for batch in held_out])
    assert labels.tolist() == source.target[1::3].tolist()
    first = held_out[0].images[0, 0] * digits.description["deviation"] + digits.description["mean"]
    assert torch.allclose(first * 16, torch.from_numpy(source.images[1]).float(), atol=1e-5)


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.1, 0.001])
def test_what_is_held_out_is_spread_over_the_file_and_nothing_is_lost(digits, fraction):
    data = load_images("digits", validation_fraction=fraction)
    assert data.num_validation == round(1797 * fraction)
    own, other = (
        sorted(map(bytes, np.concatenate([d.images.reshape(1797, -1), d.labels[:, None]], 1)))
        for d in (data, digits)
    )
    assert own == other
    assert data.description["sha256"] != digits.description["sha256"]


def test_what_is_trained_on_has_mean_zero_and_deviation_one(digits):
    images = torch.from_numpy(digits.images[:1198])
    normalized = (images - digits.description["mean"]) / digits.description["deviation"]
    assert abs(normalized.mean()) < 1e-5 and abs(normalized.std() - 1) < 1e-4


def test_a_batch_is_a_pure_function_of_seed_step_and_micro(digits):
    given = {"seed": 3, "step": 5, "micro": 1, "batch_size": 16}
    batch = digits.train_batch(**given, **CHANGED)
    torch.manual_seed(99)
    np.random.seed(99)
    assert equal(batch, digits.train_batch(**given, **CHANGED))
    for change in ({"seed": 4}, {"step": 6}, {"micro": 0}, {"step": 1, "micro": 5}):
        assert not equal(batch, digits.train_batch(**{**given, **change}, **CHANGED))
    smaller = digits.train_batch(**{**given, "batch_size": 5}, **CHANGED)
    assert equal(batch[:5], smaller)
    largest = digits.train_batch(seed=2**32 - 1, step=10**9, batch_size=2, **CHANGED)
    assert torch.isfinite(largest.images).all()


def test_held_out_images_are_never_trained_on():
    images = np.arange(12, dtype=np.float32).reshape(12, 1, 1, 1) / 12
    data = ImageDataset(
        images=images,
        labels=np.arange(12),
        num_validation=4,
        num_classes=12,
        description={"mean": 0.0, "deviation": 1.0},
    )
    seen = [
        data.train_batch(seed=0, step=step, batch_size=32).labels.tolist() for step in range(10)
    ]
    assert set(sum(seen, [])) == set(range(8))
    batch = data.train_batch(seed=0, step=1, batch_size=32)
    assert torch.equal(batch.images.flatten(), batch.labels / 12)


def test_nothing_changes_where_nothing_is_asked_for(digits):
    images = torch.from_numpy(digits.images[:7])
    assert torch.equal(augmented(images, torch.rand(7, 8), **STILL), images)


def test_a_shift_of_a_pixel_moves_by_a_pixel():
    image = torch.rand(1, 2, 8, 8)
    moved = augmented(image, draws(right=1.0), **{**STILL, "shift": 1 / 8})
    assert torch.allclose(moved[..., :-1], image[..., 1:], atol=1e-5)
    assert moved[..., -1].abs().max() < 1e-5
    moved = augmented(image, draws(down=0.0), **{**STILL, "shift": 1 / 8})
    assert torch.allclose(moved[..., 1:, :], image[..., :-1, :], atol=1e-5)


def test_half_a_turn_and_a_quarter():
    image = torch.rand(1, 1, 6, 6)
    half = augmented(image, draws(angle=1.0), **{**STILL, "rotation": 180})
    assert torch.allclose(half, image.flip(2, 3), atol=1e-4)
    quarter = augmented(image, draws(angle=1.0), **{**STILL, "rotation": 90})
    assert torch.allclose(quarter, image.rot90(1, (2, 3)), atol=1e-4)


def test_an_image_that_is_not_square_is_turned_and_not_stretched():
    image = torch.zeros(1, 1, 5, 9)
    image[..., 2, 2:7] = 1.0
    quarter = augmented(image, draws(angle=1.0), **{**STILL, "rotation": 90})
    expected = torch.zeros(1, 1, 5, 9)
    expected[..., :, 4] = 1.0
    assert torch.allclose(quarter, expected, atol=1e-4)


def test_erasing_fills_a_rectangle_of_a_quarter_to_half_of_each_side():
    uniform = torch.rand(500, 8, generator=torch.Generator().manual_seed(0))
    images = torch.ones(500, 1, 16, 16)
    erased = augmented(images, uniform, **{**STILL, "erasing": 0.4, "fill": 0.25}) == 0.25
    touched = erased.flatten(1).any(1)
    assert torch.equal(touched, uniform[:, 3] < 0.4)
    tall, wide = erased[touched].any(3).sum(2), erased[touched].any(2).sum(2)
    assert torch.equal(erased[touched].flatten(1).sum(1), (tall * wide).flatten())
    assert 4 <= tall.min() <= 5 and 7 <= tall.max() <= 8
    assert torch.equal(images, torch.ones_like(images))


def test_a_batch_slices_and_moves_as_one():
    batch = ImageBatch(torch.rand(6, 1, 2, 2), torch.arange(6))
    assert batch[1::2].labels.tolist() == [1, 3, 5] and len(batch[4:]) == 2
    assert equal(batch.to(torch.device("cpu"), non_blocking=True), batch)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": np.zeros((4, 8, 8), np.float32)}, "images must be"),
        ({"labels": np.arange(3)}, "labels"),
        ({"labels": np.array([0, 1, 2, 9])}, "labels must be from 0 to 3, found 0 to 9"),
        ({"labels": np.array([0, -1, 2, 3])}, "found -1 to 3"),
        ({"num_validation": 0}, "num_validation = 0"),
        ({"num_validation": 4}, "below the 4 images"),
    ],
)
def test_a_data_set_that_does_not_hold_together(change, words):
    fields = {
        "images": np.zeros((4, 1, 8, 8), np.float32),
        "labels": np.arange(4),
        "num_validation": 1,
        "num_classes": 4,
        "description": {},
    }
    with pytest.raises(ValueError, match=words):
        ImageDataset(**{**fields, **change})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("validation_fraction", 0),
        ("validation_fraction", 0.6),
        ("shift", -0.1),
        ("shift", 0.6),
        ("rotation", 181),
        ("erasing", 1.5),
        ("erasing", "often"),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"data.{field} = "):
        ImageData(**{field: value})


def test_an_unknown_source():
    with pytest.raises(ValueError, match="data.source = 'cifar': must be one of digits"):
        ImageData(source="cifar").load()
