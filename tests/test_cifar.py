"""CIFAR-10: files of the true format, files that are not, and batches of what is in them."""

import pickle
import pickletools
import struct

import numpy as np
import pytest
import torch
from cifar_files import NAMES, integer, python2_batch, text, write_cifar

from nomadam.experiments.configuration import from_json, override, to_json
from nomadam.experiments.data.cifar import cropped, load_cifar, read_batch
from nomadam.experiments.photographs import CifarData
from nomadam.experiments.resnet18_grid import cifar10


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    return folder, *write_cifar(folder)


@pytest.fixture(scope="module")
def data(written):
    return load_cifar(str(written[0]))


def equal(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_the_files_of_python_2_are_read(written, data):
    folder, images, labels = written
    assert (data.num_train, len(data.labels), data.num_classes) == (30, 36, 10)
    assert np.array_equal(data.images, images) and np.array_equal(data.labels, labels)
    # What today's Python makes of the same file, without our unpickler.
    with open(folder / "test_batch", "rb") as file:
        plain = pickle.load(file, encoding="bytes")
    assert np.array_equal(plain[b"data"].reshape(-1, 3, 32, 32), images[30:])
    assert data.description["train_images"] == 30


def test_the_files_of_python_3_are_read_and_the_folder_of_the_archive(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    images, labels = write_cifar(folder)
    for name, rows in zip(NAMES, np.split(images, 6), strict=True):
        own = labels[:6].tolist()
        content = {b"data": rows.reshape(6, 3072), b"labels": own, b"filenames": [b"a.png"] * 6}
        with open(folder / name, "wb") as file:
            pickle.dump(content, file, protocol=2 if name == "test_batch" else 5)
        if name != "test_batch":  # protocol 5 has other functions of numpy, which are refused
            with pytest.raises(ValueError, match=r"it wants numpy.*_frombuffer"):
                read_batch(folder / name)
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    assert np.array_equal(load_cifar(str(tmp_path)).images, images)


def test_an_array_that_is_held_by_columns_is_the_same(tmp_path):
    rows = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    content = {b"data": np.asfortranarray(rows), b"labels": [3, 4]}
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol=2))
    assert np.array_equal(read_batch(tmp_path / "batch")[0].reshape(2, 3072), rows)


def test_means_and_deviations_are_those_of_the_images_to_train_on(written, data):
    train = written[1][:30].astype(np.float64)
    assert data.means == pytest.approx(train.mean((0, 2, 3)), rel=1e-6)
    assert data.deviations == pytest.approx(train.std((0, 2, 3)), rel=1e-6)
    batches = [
        data.train_batch(seed=0, step=step, batch_size=10, padding=0, mirror=False)
        for step in (1, 2, 3)
    ]
    images = torch.cat([batch.images for batch in batches])
    assert images.mean().abs() < 1e-5 and (images.std() - 1).abs() < 1e-3


def test_each_pass_has_every_image_once_in_an_order_of_its_own(written, data):
    def labels(seed, steps):
        batches = [
            data.train_batch(seed=seed, step=step, batch_size=7, padding=0, mirror=False)
            for step in steps
        ]
        return torch.cat([batch.images for batch in batches])

    steps = range(1, 31)
    first, second = labels(0, steps)[:30], labels(0, steps)[30:60]
    sums = first.sum((1, 2, 3)), second.sum((1, 2, 3))
    assert torch.equal(sums[0].sort().values, sums[1].sort().values)
    assert len(sums[0].unique()) == 30
    assert not torch.equal(*sums) and not torch.equal(sums[0], labels(1, steps)[:30].sum(1))


def test_a_batch_is_a_pure_function_of_seed_step_and_micro(data):
    given = {"seed": 3, "step": 5, "micro": 1, "batch_size": 16}
    batch = data.train_batch(**given)
    assert equal(batch, data.train_batch(**given))
    for change in ({"seed": 4}, {"step": 6}, {"micro": 0}):
        assert not equal(batch, data.train_batch(**{**given, **change}))
    assert torch.isfinite(data.train_batch(seed=2**32 - 1, step=10**9, batch_size=2).images).all()


def test_held_out_images_come_in_order_and_unchanged(written, data):
    batches = list(data.validation_batches(batch_size=4))
    assert [len(batch) for batch in batches] == [4, 2]
    found = torch.cat([batch.images for batch in batches]).numpy()
    plain = found * data.deviations[:, None, None] + data.means[:, None, None]
    assert np.allclose(plain, written[1][30:], atol=1e-3)
    assert torch.cat([b.labels for b in batches]).tolist() == written[2][30:].tolist()
    assert len(list(data.validation_batches(batch_size=4, max_batches=1))) == 1


def test_a_crop_is_a_shift_with_black_and_a_mirror_is_a_mirror():
    images = np.random.default_rng(0).integers(1, 256, (3, 3, 8, 8), dtype=np.uint8)
    middle, corner = [0.5, 0.5, 0.9], [0.0, 0.0, 0.9]
    draws = np.array([middle, corner, [0.5, 0.999, 0.1]])
    changed = cropped(images, draws, padding=2, mirror=True)
    assert np.array_equal(changed[0], images[0])
    assert np.array_equal(changed[1, :, 2:, 2:], images[1, :, :-2, :-2])
    assert not changed[1, :, :2].any() and not changed[1, :, :, :2].any()
    assert np.array_equal(changed[2, :, :, ::-1][:, :, :-2], images[2, :, :, 2:])
    assert np.array_equal(cropped(images, draws, padding=0, mirror=False), images)


HOSTILE = {
    "code": b"cposix\nsystem\n(" + text("true") + b"tR.",
    "another class": pickle.dumps({b"data": torch.zeros(1), b"labels": [0]}, protocol=2),
    "an attribute": b"c_codecs\nencode\n}" + text("__new__") + integer(0) + b"sb.",
    "a method of a class": b"cnumpy\nndarray\nNb.",
    "eval": b"cbuiltins\neval\n(" + text("1") + b"tR.",
    "a list": pickle.dumps([1, 2], protocol=2),
    "no labels": pickle.dumps({b"data": 1}, protocol=2),
    "an array that is none": python2_batch(np.zeros((2, 3072), np.uint8), [0, 1])[:-40],
    "labels of another number": python2_batch(np.zeros((2, 3072), np.uint8), [0, 1, 2]),
    "a label out of range": python2_batch(np.zeros((2, 3072), np.uint8), [0, 10]),
    "a label that is no whole number": python2_batch(np.zeros((2, 3072), np.uint8), [0, 7]).replace(
        integer(7), b"G" + struct.pack(">d", 0.5)
    ),
    "a negative label": python2_batch(np.zeros((2, 3072), np.uint8), [0, -1]),
    "labels in a list each": python2_batch(np.zeros((1, 3072), np.uint8), [0]).replace(
        b"](" + integer(0) + b"e", b"](](" + integer(0) + b"ee"
    ),
    "no image": python2_batch(np.zeros((0, 3072), np.uint8), []),
    "fewer bytes than it says": python2_batch(np.zeros((2, 3072), np.uint8), [0, 1]).replace(
        integer(2) + integer(3072), integer(9) + integer(3072)
    ),
    "nothing": b"",
    "text": b"<html>404</html>",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_of_something_else_are_refused(tmp_path, kind):
    file = tmp_path / "data_batch_1"
    file.write_bytes(HOSTILE[kind])
    with pytest.raises(ValueError, match="data_batch_1"):
        read_batch(file)


def test_a_pickle_has_nothing_to_call_but_records(tmp_path):
    file = tmp_path / "batch"
    batch = python2_batch(np.zeros((2, 3072), np.uint8), [0, 1])
    wanted = {op[1] for op in pickletools.genops(batch) if op[0].name == "GLOBAL"}
    assert wanted == {"numpy dtype", "numpy.core.multiarray _reconstruct", "numpy ndarray"}
    for module, name in (("numpy", "fromfile"), ("os", "remove"), ("builtins", "getattr")):
        file.write_bytes(f"c{module}\n{name}\n.".encode())
        with pytest.raises(ValueError, match=f"it wants {module}.{name}"):
            read_batch(file)


def test_a_missing_file_and_a_folder_of_something_else(tmp_path):
    write_cifar(tmp_path, rows=1)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="data_batch_3 is missing"):
        CifarData(source=str(tmp_path)).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither the python version of CIFAR-10"):
        CifarData(source=str(tmp_path / "empty")).load()


def saved(folder, sizes, test_labels=None, **labels):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    def table(split_sizes, labels):
        pictures = [
            Image.fromarray(np.full((side, side, 3), 10 * n, np.uint8))
            for n, side in enumerate(split_sizes)
        ]
        columns = {"img": pictures} | {key: [0, 1] * (len(pictures) // 2) for key in labels}
        features = {"img": datasets.Image()} | {
            key: datasets.ClassLabel(names=list(names)) for key, names in labels.items()
        }
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    tables = {"train": table(sizes, labels), "test": table(sizes[:2], test_labels or labels)}
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return str(folder)


def test_a_saved_data_set_of_small_pictures(tmp_path):
    source = saved(tmp_path / "set", [32] * 4, label=("cat", "dog", "owl"))
    data = load_cifar(source, cache_folder=tmp_path)
    assert data.images.shape == (6, 3, 32, 32) and data.images.dtype == np.uint8
    assert data.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 0, 10]
    assert (data.num_train, data.num_classes, data.labels.tolist()) == (4, 3, [0, 1, 0, 1, 0, 1])


def test_of_two_fields_of_labels_one_is_named(tmp_path):
    source = saved(tmp_path / "set", [32] * 4, fine=("a", "b"), coarse=("c", "d", "e"))
    with pytest.raises(ValueError, match="data.label_field.* it has: fine, coarse"):
        CifarData(source=source).load(tmp_path)
    with pytest.raises(ValueError, match="no field 'rough'"):
        CifarData(source=source, label_field="rough").load(tmp_path)
    assert CifarData(source=source, label_field="coarse").load(tmp_path).num_classes == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat", "dog", "elk"), "other classes .*: only one of the two has: elk, owl"),
        (("cat", "owl", "dog"), "are in another order; label 1 is 'owl' here, 'dog' there"),
    ],
)
def test_other_classes_of_the_test_set_are_refused(tmp_path, names, words):
    owl = ("cat", "dog", "owl")
    source = saved(tmp_path / "set", [32] * 4, test_labels={"label": names}, label=owl)
    with pytest.raises(ValueError, match=words):
        load_cifar(source, cache_folder=tmp_path)


def test_pictures_of_several_sizes_are_refused(tmp_path):
    source = saved(tmp_path / "set", [32, 32, 16, 32], label=("cat", "dog"))
    with pytest.raises(ValueError, match="squares of one size.*16 × 16, the first 32 × 32"):
        load_cifar(source, cache_folder=tmp_path)


@pytest.mark.parametrize(("field", "value"), [("source", ""), ("padding", -1), ("padding", 33)])
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"data.{field} = "):
        CifarData(**{"source": "x", field: value})


def test_the_papers_run_reads_a_folder(written):
    run = override(cifar10("adamw"), {"data.source": str(written[0])})
    assert from_json(to_json(run)) == run
    dataset = run.data.load()
    assert run.data.shape(dataset) == {"image_size": 32, "channels": 3, "num_classes": 10}
    batch = run.data.train_batch(dataset, seed=0, step=1, micro=0, batch_size=128)
    assert batch.images.shape == (128, 3, 32, 32) and batch.images.dtype == torch.float32
