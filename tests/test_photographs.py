"""Photographs: each random change, batches as pure functions, and a training that goes on."""

import itertools

import numpy as np
import pytest
import torch
from tiny_training import assert_same_training, go, raise_signal_at

from nomadam.experiments.configuration import from_json, override, to_json
from nomadam.experiments.data.photographs import Changes, load_photographs
from nomadam.experiments.data.random_changes import (
    CHANGES,
    GREY,
    central_crop,
    mirrored,
    random_changes,
    random_crop,
)
from nomadam.experiments.data.shuffled import shuffled_rows
from nomadam.experiments.photographs import PhotographData
from nomadam.experiments.vit_classification import vit_s16_imagenet, vit_s16_imagenet_grid
from nomadam.runs import Interrupted, RunFolder

Image = pytest.importorskip("PIL.Image")
CPU = torch.device("cpu")
STILL = Changes(size=8, smallest_area=1.0, changes=0, magnitude=0, mixup=0.0)
WILD = Changes(size=8, smallest_area=0.1, changes=2, magnitude=10, mixup=0.2)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    seeds = itertools.count()
    for split, count in (("train", 5), ("val", 3)):
        for name in ("ant", "bee", "cow"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noise(14, 11, next(seeds)).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return load_photographs(str(folder))


def equal(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_a_crop_of_everything_is_a_resize():
    picture = noise(16, 16)
    # A ratio of 0.5 is a square.
    assert random_crop(picture, [0.3, 0.5, 0, 0], size=16, smallest_area=1.0) == picture
    half = random_crop(picture, [0.0, 0.5, 0.0, 0.0], size=8, smallest_area=0.25)
    assert half == picture.crop((0, 0, 8, 8))
    corner = random_crop(picture, [0.0, 0.5, 1.0, 1.0], size=8, smallest_area=0.25)
    assert corner == picture.crop((8, 8, 16, 16))


@pytest.mark.parametrize("size", [(40, 30), (9, 200), (200, 9), (1, 1)])
def test_a_crop_lies_in_any_picture(size, monkeypatch):
    boxes = []
    resize = Image.Image.resize

    def watched(self, *arguments, box, **options):
        boxes.append(box)
        return resize(self, *arguments, box=box, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    picture = Image.new("RGB", size)
    for draws in itertools.product((0.0, 0.4, 0.999999), repeat=4):
        assert random_crop(picture, draws, size=8, smallest_area=0.05).size == (8, 8)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (3, 2), (224, 223), (255, 257)])
def test_only_the_middle_is_resized(size, monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def watched(self, size, *arguments, **options):
        sizes.append(size)
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert central_crop(Image.new("RGB", size), size=224).size == (224, 224)
    assert sizes == [(224, 224)]


def test_the_middle_of_a_picture_is_taken():
    picture = Image.new("RGB", (32, 16), (255, 0, 0))
    picture.paste((0, 255, 0), (8, 0, 24, 16))
    assert central_crop(picture, size=14).getcolors() == [(196, (0, 255, 0))]
    assert central_crop(Image.new("RGB", (3, 500)), size=14).size == (14, 14)
    halved = noise(32, 64)
    whole = halved.resize((16, 32), Image.Resampling.BILINEAR)
    middle = np.int64(central_crop(halved, size=14))
    assert np.abs(middle - np.int64(whole.crop((1, 9, 15, 23)))).max() <= 1  # by rounding
    assert mirrored(picture, 0.5) == picture
    lopsided = noise(6, 4)
    assert mirrored(mirrored(lopsided, 0.1), 0.1) == lopsided != mirrored(lopsided, 0.1)


NAMES = (
    "autocontrast equalize invert rotate posterize solarize color contrast brightness sharpness "
    "shear_x shear_y translate_x translate_y cutout solarize_add"
).split()


def changed(name, magnitude, picture, right=0.1, down=0.5):
    which = (NAMES.index(name) + 0.5) / len(CHANGES)
    return random_changes(picture, [which, right, down], magnitude=magnitude)


def subdued():
    """Colours without the darkest and the lightest, so that autocontrast has what to do."""
    pixels = np.random.default_rng(0).integers(40, 200, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_recipe_has_sixteen_changes_of_which_one_does_nothing_at_10():
    picture = subdued()
    moved = {name: changed(name, 10, picture) for name in NAMES}
    assert len(CHANGES) == 16
    assert [name for name in NAMES if moved[name] == picture] == ["solarize"]  # from 256 on
    assert all(each.size == (40, 40) and each.mode == "RGB" for each in moved.values())
    signed = [name for name in NAMES if changed(name, 10, picture, right=0.9) != moved[name]]
    assert signed == ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "cutout"]


def test_what_a_magnitude_of_0_leaves_as_it_is():
    picture = subdued()
    same = {name for name in NAMES if changed(name, 0, picture) == picture}
    moving = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    assert same == moving | {"cutout", "solarize_add"}


def test_the_strengths_are_those_of_the_recipe():
    picture = Image.new("RGB", (20, 20), (10, 100, 201))

    def pixel(name, magnitude):
        return changed(name, magnitude, picture).getpixel((0, 0))

    assert pixel("invert", 10) == (245, 155, 54)
    assert pixel("solarize", 9.9) == (10, 100, 201)  # from 253 on
    assert pixel("solarize", 5) == (10, 100, 54)
    assert pixel("solarize_add", 10) == (120, 210, 201)
    assert pixel("solarize_add", 5) == (65, 155, 201)
    assert pixel("posterize", 10) == (0, 96, 192)
    assert pixel("posterize", 0) == (0, 0, 128)
    assert pixel("brightness", 10) == (19, 190, 255)
    assert pixel("brightness", 5) == (10, 100, 201)
    assert pixel("brightness", 0) == (1, 10, 20)


def grey_box(picture):
    """Left, top, right and bottom of what is grey."""
    rows, columns = np.nonzero((np.asarray(picture) == GREY).all(2))
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_shifts_and_squares_are_counted_in_pixels_of_224():
    picture = Image.new("RGB", (224, 224), (10, 100, 201))
    assert grey_box(changed("translate_x", 10, picture)) == (124, 0, 224, 224)
    assert grey_box(changed("translate_y", 10, picture, right=0.9)) == (0, 0, 224, 100)
    assert grey_box(changed("cutout", 10, picture, 0.5, 0.25)) == (72, 16, 152, 96)
    assert grey_box(changed("cutout", 10, picture, 0.0, 0.999)) == (0, 183, 40, 224)
    half = picture.resize((112, 112))
    assert grey_box(changed("translate_x", 10, half)) == (62, 0, 112, 112)
    assert grey_box(changed("cutout", 10, half, 0.5, 0.25)) == (36, 8, 76, 48)
    assert picture.getcolors() == [(224 * 224, (10, 100, 201))]


def test_angles_and_shears():
    picture = Image.new("RGB", (224, 224), (10, 100, 201))
    assert changed("rotate", 10, picture) == picture.rotate(30, fillcolor=GREY)
    assert changed("rotate", 5, picture, right=0.9) == picture.rotate(-15, fillcolor=GREY)
    last_row = np.asarray(changed("shear_x", 10, picture))[-1, :, 0]
    assert (last_row == GREY[0]).sum() == 67  # 0.3 of the height
    last_column = np.asarray(changed("shear_y", 5, picture))[:, -1, 0]
    assert (last_column == GREY[0]).sum() == 34


def test_a_batch_is_a_pure_function_of_seed_step_and_micro(data):
    given = {"seed": 3, "step": 5, "micro": 1, "batch_size": 6}
    batch = data.train_batch(WILD, **given).to(CPU)
    torch.manual_seed(99)
    assert equal(batch, data.train_batch(WILD, **given).to(CPU))
    for change in ({"seed": 4}, {"step": 6}, {"micro": 0}):
        assert not equal(batch, data.train_batch(WILD, **{**given, **change}).to(CPU))
    assert batch.images.shape == (6, 3, 8, 8) and batch.images.abs().max() <= 1


@pytest.mark.parametrize("changes", [WILD, STILL])
def test_processes_that_read_their_own_rows_have_the_rows_of_the_batch(data, changes):
    batch = data.train_batch(changes, seed=0, step=1, batch_size=6)
    whole, parts = batch.to(CPU), [batch[index::3] for index in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    for index, part in enumerate(parts):
        assert equal(part.to(CPU), whole[index::3])


def test_each_row_is_mixed_with_the_next_and_so_is_its_label(data):
    plain = data.train_batch(STILL, seed=0, step=1, batch_size=5).to(CPU)
    mix = Changes(size=8, smallest_area=1.0, changes=0, magnitude=0, mixup=0.2)
    mixed = data.train_batch(mix, seed=0, step=1, batch_size=5).to(CPU)
    labels = torch.nn.functional.one_hot(plain.labels, 3).float()
    differing = (labels != labels.roll(-1, 0)).any(1)
    share = mixed.labels[differing].max(1).values[0]
    assert 0.5 <= share < 1
    for found, own in ((mixed.images, plain.images), (mixed.labels, labels)):
        assert torch.allclose(found, share * own + (1 - share) * own.roll(-1, 0), atol=1e-6)
    shares = [
        data.train_batch(mix, seed=0, step=step, batch_size=5).to(CPU).labels.max(1).values.min()
        for step in range(1, 9)
    ]
    assert len({share.item() for share in shares}) > 4


def test_each_pass_has_every_picture_once_and_none_that_is_held_out(data):
    batches = [data.train_batch(STILL, seed=0, step=step, batch_size=5) for step in (1, 2, 3)]
    labels = torch.cat([batch.to(CPU).labels for batch in batches])
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5 + [2] * 5
    held_out = list(data.validation_batches(size=8, batch_size=4))
    assert [len(batch) for batch in held_out] == [4, 4, 1]
    middle = central_crop(data.held_out.picture(5), size=8)
    expected = np.asarray(middle, np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.array_equal(held_out[1].to(CPU).images[1].numpy(), expected)
    assert len(list(data.validation_batches(size=8, batch_size=4, max_batches=2))) == 2


def small(folder, optimizer="sgd_sai"):
    fields = {
        "data.source": str(folder),
        "data.image_size": "16",
        "data.smallest_area": "0.5",
        "model.layers": "1",
        "model.heads": "2",
        "model.width": "16",
        "model.patch_size": "8",
        "model.label_smoothing": "0.1",
        "steps": "4",
        "batch_size": "4",
        "evaluate_every": "2",
        "precision": "fp32",
        "schedule.warmup_steps": "1",
    }
    return override(vit_s16_imagenet(optimizer), fields)


def test_the_recipe_trains_on_a_folder_and_goes_on_exactly(folder, tmp_path):
    pytest.importorskip("transformers")
    run = small(folder)
    result = go(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", progress=raise_signal_at(3, "SIGINT"))
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 4)
    assert 0 <= result["validation_accuracy"] <= 1
    assert result["validation_cross_entropy"] < 3


def test_a_training_that_met_a_damaged_file_goes_on_when_it_is_mended(folder, tmp_path):
    pytest.importorskip("transformers")
    source = tmp_path / "source"
    for file in folder.rglob("*.png"):
        copy = source / file.relative_to(folder).with_suffix(".jpg")
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(copy)
    run = override(small(source), {"checkpoint_every": 2, "seed": 1})
    go(run, tmp_path / "whole")
    rows = [
        set(shuffled_rows(15, seed=1, step=step, micro=0, batch_size=4).tolist())
        for step in (1, 2, 3)
    ]
    late = min(row for row in rows[2] - rows[0] - rows[1] if row % 5)  # no first of its class
    file = sorted((source / "train").rglob("*.jpg"))[late]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{late % 5}.jpg can not be read as a picture"):
        go(run, tmp_path / "mended")
    assert RunFolder(tmp_path / "mended").newest_checkpoint()[0] == 2
    file.write_bytes(content)
    go(run, tmp_path / "mended")
    assert_same_training(tmp_path / "whole", tmp_path / "mended", 4)
    files = [*(source / "train").rglob("*.jpg"), *(source / "val").rglob("*.jpg")]
    described = RunFolder(tmp_path / "mended").read_json("run.json")["data"]
    assert described["bytes"] == sum(file.stat().st_size for file in files)


def test_the_papers_cells():
    runs = vit_s16_imagenet_grid()
    cells = {(run.optimizer.lr, run.optimizer.weight_decay) for run in runs}
    assert len(cells) == 12 and (1e-2, 1e-2) in cells
    sgdm = {(run.optimizer.lr, run.optimizer.weight_decay) for run in vit_s16_imagenet_grid("sgdm")}
    assert (1.0, 1e-4) in sgdm and len(sgdm) == 12
    assert all(from_json(to_json(run)) == run for run in runs)
    assert vit_s16_imagenet("muon").optimizer.arguments["head"] == "classifier.weight"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""),
        ("image_size", 7),
        ("smallest_area", 0),
        ("smallest_area", 1.1),
        ("changes", -1),
        ("magnitude", 11),
        ("mixup", -0.1),
        ("mixup", "often"),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"data.{field} = "):
        PhotographData(**{"source": "x", field: value})
