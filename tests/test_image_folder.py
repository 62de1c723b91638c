"""Pictures in class folders and in data sets: what is there, and what is refused at once."""

import io

import numpy as np
import pytest

from nomadam.experiments.data.cifar import load_cifar
from nomadam.experiments.data.image_folder import load_pictures, read_picture

Image = pytest.importorskip("PIL.Image")


def paint(file, colour, size=(12, 9), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, **options)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                paint(tmp_path / split / name / f"{number}.png", (100 * label, number, 7))
    return tmp_path


def load(source, label_field=None):
    return load_pictures(str(source), label_field=label_field, cache_folder=source)


def test_class_folders_are_read_in_order_whatever_lies_beside_them(folder):
    before = load(folder)[0].sha256
    (folder / "train" / "ant" / "notes.txt").write_text("none")
    (folder / "train" / "LOC_train.csv").write_text("none")
    train, held_out = load(folder)
    assert train.classes == held_out.classes == ("ant", "bee")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(held_out) == 2
    assert [train.picture(n).getpixel((0, 0)) for n in (0, 2, 4)] == [
        (0, 0, 7),
        (0, 2, 7),
        (100, 1, 7),
    ]
    assert train.sha256 == before
    (folder / "train" / "ant" / "9.PNG").write_bytes((folder / "val/ant/0.png").read_bytes())
    assert len(load(folder)[0]) == 7 and load(folder)[0].sha256 != before


def test_hidden_folders_are_no_classes(folder):
    paint(folder / "train" / ".ipynb_checkpoints" / "0-checkpoint.png", (1, 1, 1))
    paint(folder / "val" / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png", (1, 1, 1))
    train, held_out = load(folder)
    assert train.classes == ("ant", "bee") and len(held_out) == 2


@pytest.mark.parametrize("name", ["labels.jsonl", "rows.parquet"])
def test_folders_of_classes_go_before_tables_beside_them(folder, name):
    before = load(folder)[0].sha256
    (folder / name).write_text("{}")
    assert load(folder)[0].sha256 == before


def test_links_are_followed(folder):
    (folder / "train" / "bee").rename(folder / "elsewhere")
    (folder / "train" / "bee").symlink_to(folder / "elsewhere")
    (folder / "elsewhere" / "4.png").symlink_to(folder / "val" / "bee" / "0.png")
    assert load(folder)[0].labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_pictures_in_folders_of_a_class_and_other_names_of_the_held_out(folder):
    paint(folder / "train" / "ant" / "deep" / "er" / "x.jpg", (1, 2, 3))
    (folder / "val").rename(folder / "test")
    train, held_out = load(folder)
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1] and len(held_out) == 2


def test_other_modes_become_red_green_blue(tmp_path):
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        file = tmp_path / f"{mode}.tiff"
        Image.new(mode, (4, 4)).save(file)
        assert read_picture(file, "x").mode == "RGB"


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.ppm"])
def test_greys_of_16_bits_keep_their_upper_8(tmp_path, name):
    values = np.array([[0, 257, 32896], [32700, 65535, 1000]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    read = np.asarray(read_picture(tmp_path / name, name))
    assert (read == np.array([[0, 1, 128], [127, 255, 4]])[:, :, None]).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_32_bits_are_refused(tmp_path, kind):
    Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="x.tiff can not be read as a picture: it has values of 3"):
        read_picture(tmp_path / "x.tiff", "x.tiff")


def damage(folder, kind):
    if kind == "held-out pictures without classes":
        (folder / "val" / "ant" / "0.png").rename(folder / "val" / "0.png")
        for name in ("ant", "bee"):
            for file in (folder / "val" / name).glob("*"):
                file.unlink()
            (folder / "val" / name).rmdir()
    elif kind == "no held-out pictures":
        (folder / "val").rename(folder / "vel")
    elif kind == "a class without pictures":
        (folder / "train" / "cow").mkdir()
    elif kind == "other classes":
        paint(folder / "val" / "cow" / "0.png", (1, 1, 1))
    elif kind == "an empty file":
        (folder / "train" / "bee" / "1.png").write_bytes(b"")
    elif kind == "no picture":
        (folder / "train" / "bee" / "0.png").write_text("<html>404</html>")
    elif kind == "half a picture":
        whole = (folder / "val" / "bee" / "0.png").read_bytes()
        (folder / "val" / "bee" / "0.png").write_bytes(whole[: len(whole) // 2])
    elif kind == "a picture that is a link to nothing":
        (folder / "train" / "ant" / "9.png").symlink_to(folder / "gone.png")
    elif kind == "a class that is a link to nothing":
        (folder / "train" / "cow").symlink_to(folder / "gone")
    elif kind == "a link to itself":
        (folder / "train" / "ant" / "9.png").symlink_to("9.png")
    elif kind == "a folder that is a link to its own":
        (folder / "train" / "ant" / "again").symlink_to("..")
    elif kind == "one class alone":
        for split in ("train", "val"):
            (folder / split / "bee").rename(folder / split / ".bee")
    elif kind == "a program":
        (folder / "train" / "ant" / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("held-out pictures without classes", "val holds no folders of classes"),
        ("no held-out pictures", "train/CLASS/ and val/CLASS/"),
        ("a class without pictures", "cow holds no picture"),
        ("other classes", "only one of the two has: cow"),
        ("an empty file", "1.png is empty"),
        ("no picture", "bee.0.png can not be read as a picture"),
        ("half a picture", "bee.0.png can not be read as a picture"),
        ("a picture that is a link to nothing", "9.png can not be read: No such file"),
        ("a class that is a link to nothing", "train.cow is a link to nothing"),
        ("a link to itself", "9.png can not be read: Too many levels"),
        ("a folder that is a link to its own", "again.ant is a link to a folder that it lies in"),
        ("one class alone", "must have two classes or more; it has: ant"),
        ("a program", "ant.0.png can not be read as a picture"),
    ],
)
def test_wrong_folders_are_found_before_training(folder, kind, words):
    damage(folder, kind)
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_a_picture_larger_than_memory_is_refused(tmp_path, monkeypatch):
    paint(tmp_path / "x.png", (0, 0, 0), size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="x.png can not be read as a picture"):
        read_picture(tmp_path / "x.png", "x.png")


def test_what_is_missing_and_what_is_packed_is_said(tmp_path):
    with pytest.raises(ValueError, match="imagenet': no such file or folder, and not a data set's"):
        load(tmp_path / "imagenet")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b")
    for read in (load, lambda source: load_cifar(str(source))):
        with pytest.raises(ValueError, match="tar.gz is an archive: unpack it"):
            read(tmp_path / "cifar-10-python.tar.gz")


def tables(rows=4, **fields):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (12, 9), (n, 0, 0)) for n in range(rows)]
    kinds = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee"])}
    columns = {"picture": pictures, "kind": [n % 2 for n in range(rows)]}
    columns |= {name: [0] * rows for name in fields}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds | fields))


def save(folder, **splits):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def test_a_saved_data_set_is_found_by_its_types(tmp_path):
    train, held_out = load(save(tmp_path / "set", train=tables(), validation=tables(2)))
    assert train.classes == ("ant", "bee") and train.labels.tolist() == [0, 1, 0, 1]
    assert train.picture(3).getpixel((0, 0)) == (3, 0, 0) and len(held_out) == 2
    assert train.labels.dtype == np.int64 and train.sha256 != held_out.sha256


def test_other_pictures_of_the_same_size_are_other_data(tmp_path):
    datasets = pytest.importorskip("datasets")

    def digest(name, last):
        files = []
        for value in (0, 1, 2, last):
            file = io.BytesIO()
            Image.new("RGB", (12, 9), (value, 0, 0)).save(file, "BMP")
            files.append({"bytes": file.getvalue(), "path": None})
        plain = tables().remove_columns("picture").add_column("picture", files)
        table = plain.cast_column("picture", datasets.Image())
        return load(save(tmp_path / name, train=table, test=tables()))[0].sha256

    assert digest("one", 3) == digest("two", 3) != digest("three", 4)


def test_a_folder_of_parquet_files_with_pictures(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        tables().to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    train, held_out = load(tmp_path)
    assert len(train) == len(held_out) == 4
    assert train.picture(2).getpixel((0, 0)) == (2, 0, 0)


@pytest.mark.parametrize("nothing", [None, {"bytes": b"", "path": None}])
def test_a_row_without_a_picture_is_found_at_once(tmp_path, nothing):
    datasets = pytest.importorskip("datasets")
    pictures = tables().cast_column("picture", datasets.Image(decode=False))["picture"][:]
    pictures[2] = nothing
    table = tables().remove_columns("picture").add_column("picture", pictures)
    table = table.cast_column("picture", datasets.Image())
    with pytest.raises(ValueError, match=r"has no picture in row 2 \(1 of 4 rows have none\)"):
        load(save(tmp_path / "set", train=table, test=tables()))


def test_any_error_of_a_reader_names_the_picture(tmp_path, monkeypatch):
    paint(tmp_path / "x.png", "red")

    def broken(*_args, **_options):
        raise TypeError("'bytes' object cannot be interpreted as an integer")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ValueError, match=r"x.png can not be read as a picture: 'bytes'"):
        read_picture(tmp_path / "x.png", "x.png")


def test_data_sets_without_pictures_labels_or_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="must have the splits train and validation or test"):
        load(save(tmp_path / "one", train=tables()))
    plain = tables().remove_columns("picture")
    with pytest.raises(ValueError, match="not one field of the type Image; it has: none"):
        load(save(tmp_path / "two", train=plain, test=plain))
    unlabelled = tables().cast_column("kind", datasets.Value("int64"))
    with pytest.raises(ValueError, match="data.label_field.*type ClassLabel"):
        load(save(tmp_path / "three", train=unlabelled, test=unlabelled))
    hidden = tables().remove_columns("kind").add_column("kind", [-1] * 4)
    hidden = hidden.cast_column("kind", datasets.ClassLabel(names=["ant", "bee"]))
    with pytest.raises(ValueError, match="pictures without a label in 'kind'"):
        load(save(tmp_path / "four", train=tables(), test=hidden))
    (tmp_path / "five.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"five.txt is no data set"):
        load(tmp_path / "five.txt")
