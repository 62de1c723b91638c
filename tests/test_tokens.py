"""Tokens: what is read, what is held out, what is kept, and what is refused."""

import doctest
import errno
import hashlib
import http.server
import importlib
import json
import os
import pickle
import shutil
import socket
import socketserver
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from nomadam.durable_files import DiskFullError, default_cache_folder
from nomadam.experiments.data import byte_pairs, corpus, hugging_face
from nomadam.experiments.data.tokens import TokenDataset, load_tokens

WORDS = "the gain is a number that multiplies the step of every block in a network".split()


def prose(seed, words):
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=words)) + ".\n"


@pytest.fixture
def folder(tmp_path):
    """Forty files of prose, some in folders."""
    root = tmp_path / "texts"
    for i in range(40):
        path = root / f"part{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"File {i}. " + prose(i, 150))
    return root


@pytest.fixture
def load(tmp_path):
    def loader(source, **arguments):
        arguments = {"vocab_size": 280, "context": 16, "cache_folder": tmp_path / "cache"} | (
            arguments
        )
        return load_tokens(source, **arguments)

    return loader


@pytest.fixture
def cached(tmp_path, folder, load):
    """The folder, its data, and the only folder of the cache."""
    data = load(folder)
    (kept,) = (tmp_path / "cache" / "tokens").iterdir()
    return folder, data, kept


def decoded(data, tmp_path):
    """The documents of both parts, by the tokenizer that the cache holds."""
    from tokenizers import Tokenizer

    for file in (tmp_path / "cache" / "tokens").glob("*/tokenizer.json"):
        if byte_pairs.file_sha256(file) == data.description["tokenizer_sha256"]:
            tokenizer = Tokenizer.from_file(str(file))
            break
    else:
        raise AssertionError("the cache does not hold the tokenizer")

    def documents(tokens):
        assert tokens[-1] == 0
        parts = np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]
        return [tokenizer.decode(part[:-1].tolist()) for part in parts]

    return documents(np.asarray(data.train)), documents(np.asarray(data.validation))


# What is read


def test_the_standard_library_is_its_own_source_alone():
    library = corpus.standard_library()
    assert library.names == sorted(library.names)
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(library.names)
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for name in library.names:
        assert name.endswith(".py") and not unwanted & set(name.split("/")), name
        assert "_sysconfigdata_" not in name
    root = Path(sysconfig.get_paths()["stdlib"])
    found = corpus.survey(library)
    expected = hashlib.sha256()
    for name in library.names:
        content = (root / name).read_bytes()
        expected.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    assert found.sha256 == expected.hexdigest()
    assert found.sizes.sum() == sum((root / name).stat().st_size for name in library.names)


def test_the_standard_library_in_tokens(load):
    data = load("stdlib", max_bytes=300_000, vocab_size=400)
    assert data.description["bytes"] == 300_000
    assert data.vocab_size == 400 and int(data.train.max()) < 400
    assert data.train.dtype == np.uint16
    assert data.description["held_out"] == "whole documents"
    assert data.description["sha256"] == data.sha256 and len(data.sha256) == 64
    assert len(data.train) < 300_000 / 1.5  # it does compress
    json.dumps(data.description, allow_nan=False)


def test_tokens_decode_to_the_files(folder, load, tmp_path):
    data = load(folder)
    training, validation = decoded(data, tmp_path)
    files = [p.read_text() for p in sorted(folder.rglob("*.txt"))]
    assert set(training) | set(validation) == set(files)
    assert not set(training) & set(validation)
    assert [t for t in files if t in set(training)] == training  # in the order of the names
    held_out = sum(len(text) for text in validation)
    assert 0.025 * data.description["bytes"] <= held_out <= 0.05 * data.description["bytes"]
    assert held_out == data.description["validation_bytes"]


def test_the_tokenizer_never_sees_what_is_held_out(folder, load, tmp_path):
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.txt"))]
    first = folder / names[corpus.hashed_order(names)[0]]
    before = load(folder)
    text = first.read_text()
    first.write_text("".join(chr(ord("z") - i % 26) for i in range(len(text))))
    after = load(folder)
    assert decoded(after, tmp_path)[1][0] == first.read_text()
    assert after.description["tokenizer_sha256"] == before.description["tokenizer_sha256"]
    assert after.sha256 != before.sha256
    assert np.array_equal(after.train, before.train)


def test_what_is_held_out_does_not_move_when_a_file_is_added_to_training():
    names = [f"{i}.txt" for i in range(100)]
    text = corpus.Corpus(source="", names=names, read=lambda: iter(()))
    before = corpus.training_bytes(text, np.full(100, 1000), 0.05)
    assert (before == 0).sum() == 5
    last = corpus.hashed_order(names)[-1]
    more = corpus.Corpus(source="", names=names[:last] + names[last + 1 :], read=text.read)
    after = corpus.training_bytes(more, np.full(99, 1010), 0.05)
    assert {n for n, b in zip(more.names, after, strict=True) if b == 0} <= {
        n for n, b in zip(names, before, strict=True) if b == 0
    }


def test_one_file_holds_out_its_end(tmp_path, load):
    file = tmp_path / "one.txt"
    file.write_text(prose(0, 2000), encoding="utf-8")
    for source in (file, shutil.copytree(tmp_path, tmp_path / "alone", dirs_exist_ok=False)):
        data = load(source, validation_fraction=0.2)
        (training,), (validation,) = decoded(data, tmp_path)
        assert training + validation == file.read_text()
        assert len(validation) == data.description["validation_bytes"]
        assert len(validation) == pytest.approx(0.2 * file.stat().st_size, abs=2)
        assert data.description["held_out"] == "end of each document"


def test_a_cut_within_a_character_drops_it_only(tmp_path):
    text = "héé→€😀" * 10
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    files = corpus.text_files(tmp_path)
    size = np.array([len(text.encode())])
    for cut in range(1, int(size[0])):
        cuts = np.array([cut])
        before = "".join("".join(d) for d in corpus.texts(files, np.zeros(1, int), cuts))
        after = "".join("".join(d) for d in corpus.texts(files, cuts, size))
        assert text.startswith(before) and text.endswith(after)
        assert len(text) - len(before) - len(after) in (0, 1)


def test_a_text_longer_than_a_chunk_is_whole(tmp_path, monkeypatch, load):
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 64)
    monkeypatch.setattr(byte_pairs, "_BATCH_CHARACTERS", 100)
    folder = tmp_path / "texts"
    folder.mkdir()
    long = {"lines.txt": prose(1, 300).replace(" in ", "\n"), "one.txt": "é€😀" * 200}
    for name, text in long.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load(folder, validation_fraction=1e-3, context=1)
    training, validation = decoded(data, tmp_path)
    for i, text in enumerate(long.values()):
        assert text.startswith(training[i]) and text.endswith(validation[i])
        assert len(text) - len(training[i]) - len(validation[i]) <= 1


def test_the_words_of_the_end_token_in_a_text_are_text(folder, load, tmp_path):
    path = next(folder.rglob("*.txt"))
    text = path.read_text() + "<|endoftext|>" + path.read_text()
    path.write_text(text)
    training, validation = decoded(load(folder), tmp_path)
    assert len(training) + len(validation) == 40
    assert text in training + validation


def test_files_that_are_not_utf8_are_counted_and_kept(folder, load, tmp_path):
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 30)
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + b"marked " * 30)
    (folder / "empty.txt").write_bytes(b"")
    data = load(folder)
    assert data.description["undecodable_files"] == 1
    assert data.description["files"] == 43
    texts = sum(decoded(data, tmp_path), [])
    assert "d\ufffdj\ufffd vu " * 30 in texts
    assert "marked " * 30 in texts
    assert len(texts) == 42  # an empty file is no document


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_passed_over(folder, load):
    before = load(folder)
    os.mkfifo(folder / "pipe.txt")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / ".hidden").write_bytes(b"\0\0")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_bytes(b"\0\0")
    assert load(folder).sha256 == before.sha256


def test_the_hash_is_over_names_and_contents(folder, load):
    seen = {load(folder).sha256}
    first, second = sorted(folder.rglob("*.txt"))[:2]
    first.rename(first.with_name("renamed.txt"))
    seen.add(load(folder).sha256)
    first.with_name("renamed.txt").rename(first)
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    second.write_bytes(whole[-1:] + second.read_bytes())
    seen.add(load(folder).sha256)
    assert len(seen) == 3


@pytest.mark.parametrize("most", [1500, 4001])
def test_max_bytes_is_exact_and_nested(folder, load, most):
    data = load(folder, max_bytes=most, vocab_size=260)
    assert data.description["bytes"] == most
    less, more = (set(corpus.text_files(folder, m).names) for m in (most, 2 * most))
    assert less < more


# What is kept


def test_a_second_load_makes_nothing(cached, load, monkeypatch):
    folder, data, kept = cached

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(byte_pairs, "_trained", refuse)
    again = load(folder)
    assert np.array_equal(again.train, data.train)
    assert np.array_equal(again.validation, data.validation)
    assert again.description == data.description
    with pytest.raises(AssertionError, match="trained again"):
        load(folder, vocab_size=281)
    with pytest.raises(AssertionError, match="trained again"):
        load(folder, validation_fraction=0.3)
    monkeypatch.setattr(byte_pairs, "_library_version", lambda: "0.0.0")
    with pytest.raises(AssertionError, match="trained again"):
        load(folder)
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]  # no remains of the failures


@pytest.mark.parametrize("part", ["train.bin", "validation.bin", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["flipped", "shortened", "removed"])
def test_a_damaged_cache_is_made_anew(cached, load, part, harm):
    folder, data, kept = cached
    expected = np.array(data.train), np.array(data.validation)
    whole = (kept / part).read_bytes()
    (kept / part).unlink()
    if harm == "flipped":
        (kept / part).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif harm == "shortened":
        (kept / part).write_bytes(whole[:-2])
    with pytest.warns(UserWarning, match=f"damaged.*{part}"):
        again = load(folder)
    assert np.array_equal(again.train, expected[0])
    assert np.array_equal(again.validation, expected[1])
    assert (kept / part).read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_a_manifest_that_lies_is_not_believed(cached, load):
    folder, data, kept = cached
    honest = json.loads((kept / "manifest.json").read_bytes())
    attacks = [
        json.dumps(honest | {"vocab_size": 9}).encode(),
        json.dumps(honest | {"dtype": "O"}).encode(),
        json.dumps({k: v for k, v in honest.items() if k != "files"}).encode(),
        b"[]",
        b"7",
        b"\xff\xfe",
        b"",
        b"[" * 100_000,
        pickle.dumps(honest),
    ]
    for attack in attacks:
        (kept / "manifest.json").write_bytes(attack)
        with pytest.warns(UserWarning, match=r"damaged.*manifest\.json"):
            again = load(folder)
        assert again.vocab_size == data.vocab_size


def test_a_file_in_the_place_of_a_cache_is_replaced(cached, load):
    folder, data, kept = cached
    shutil.rmtree(kept)
    kept.write_text("not a folder")
    with pytest.warns(UserWarning, match="damaged"):
        assert load(folder).description == data.description


def test_processes_may_share_a_cache(folder, tmp_path):
    script = (
        "import sys, hashlib\n"
        "from nomadam.experiments.data.tokens import load_tokens\n"
        "data = load_tokens(sys.argv[1], vocab_size=280, context=16, cache_folder=sys.argv[2])\n"
        "sys.stdout.write(hashlib.sha256(data.train.tobytes() + data.validation.tobytes())"
        ".hexdigest())\n"
    )
    arguments = [sys.executable, "-c", script, str(folder), str(tmp_path / "cache")]
    started = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    data = load_tokens(folder, vocab_size=280, context=16, cache_folder=tmp_path / "cache")
    own = hashlib.sha256(data.train.tobytes() + data.validation.tobytes()).hexdigest()
    assert own == answers[0][0]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_the_later_of_two_builders_keeps_the_earlier_result(cached, load, monkeypatch, tmp_path):
    folder, _, kept = cached
    earlier = tmp_path / "earlier"
    kept.rename(earlier)
    train = byte_pairs._trained

    def overtaken(*arguments):
        shutil.copytree(earlier, kept)
        (kept / "mark").touch()
        return train(*arguments)

    monkeypatch.setattr(byte_pairs, "_trained", overtaken)
    load(folder)
    assert (kept / "mark").exists()
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]


def test_what_killed_processes_left_is_swept_after_a_day(folder, load, tmp_path):
    parent = tmp_path / "cache" / "tokens"
    old, young = parent / ".building-a", parent / ".building-b"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    load(folder)
    assert not old.exists() and young.exists()


def test_a_cache_that_can_not_be_written_is_said_before_the_work(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache folder .*file.* can not be written"):
        load_tokens(folder, vocab_size=280, context=16, cache_folder=tmp_path / "file")


@pytest.mark.parametrize("words", [False, True])
def test_a_full_disk_is_told_with_its_place(folder, tmp_path, monkeypatch, words):
    def full(*_):
        if words:
            raise Exception("No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(byte_pairs, "_encode", full)
    with pytest.raises(DiskFullError, match=f"no space left for {tmp_path / 'cache'}.*--cache"):
        load_tokens(folder, vocab_size=280, context=16, cache_folder=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_the_default_cache_is_in_the_users_home(monkeypatch, tmp_path, folder):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_cache_folder().is_relative_to(tmp_path)
    load_tokens(folder, vocab_size=280, context=16)
    assert list(default_cache_folder().glob("tokens/*/train.bin"))


def test_large_vocabularies_take_uint32(tmp_path, load):
    folder = tmp_path / "texts"
    folder.mkdir()
    numbers = np.random.default_rng(0).integers(0, 10**6, size=100_000)
    text = " ".join(f"w{n}" for n in numbers)
    (folder / "a.txt").write_text(f"{text}\n{text}")
    data = load(folder, vocab_size=66_000)
    assert data.vocab_size == 66_000
    assert data.train.dtype == np.uint32 and 2**16 <= data.train.max() < 66_000


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 256}, "vocab_size=256 .* 257 to 1048576"),
        ({"vocab_size": 2**20 + 1}, "vocab_size=1048577 .* 257 to 1048576"),
        ({"vocab_size": "many"}, "vocab_size='many' .* whole number"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"context": 0}, "context=0 must be a whole number at least 1"),
        ({"context": 1.5}, "context=1.5"),
        ({"context": 10**9}, "context=1000000000 needs at least 1000000001"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 .* above 0 and at most 0.5"),
        ({"validation_fraction": 0.6}, "validation_fraction=0.6"),
        ({"validation_fraction": float("nan")}, "validation_fraction=nan"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"max_bytes": 20}, "validation tokens; context=16"),
        ({"max_bytes": 15}, "training tokens; context=16"),
        ({"validation_fraction": 1e-4}, "validation tokens; context=16"),
    ],
)
def test_arguments_out_of_range(folder, load, arguments, message, monkeypatch):
    def refuse(*_):
        raise AssertionError("work was done first")

    monkeypatch.setattr(byte_pairs, "_trained", refuse)
    with pytest.raises(ValueError, match=message):
        load(folder, **arguments)


def test_folders_without_text(tmp_path, load):
    with pytest.raises(ValueError, match="holds no files"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="hold no text"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\0\0", "utf sixteen".encode("utf-16")])
def test_a_binary_file_is_named(folder, load, content):
    (folder / "part1" / "picture.txt").write_bytes(content)
    with pytest.raises(ValueError, match="'part1/picture.txt' is not text"):
        load(folder)


def test_too_few_tokens_after_all(tmp_path, load):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("ab" * 400)
    with pytest.warns(UserWarning, match="vocabulary of 26. tokens, not vocab_size=280"):
        with pytest.raises(ValueError, match=r"has \d+ training tokens; context=30"):
            load(folder, context=30)


@pytest.mark.parametrize(
    "source", ["", "./nowhere", "/no/such/place", "a/b/c", "~/nowhere\0", "x" * 5000 + "/", "../.."]
)
def test_a_source_that_is_nowhere(load, source, monkeypatch, tmp_path):
    here = tmp_path / "a" / "b"  # two below a folder that nobody else writes to
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match="data source"):
        load(source, max_bytes=10)


# nanoGPT's files


@pytest.fixture
def nanogpt(tmp_path):
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rng.integers(0, 50257, 5000).astype("<u2").tofile(folder / "train.bin")
    rng.integers(0, 50257, 500).astype("<u2").tofile(folder / "val.bin")
    return folder


def test_nanogpt_tokens(nanogpt, load, tmp_path):
    data = load(nanogpt, vocab_size=50257)
    assert np.array_equal(data.train, np.fromfile(nanogpt / "train.bin", "<u2"))
    assert np.array_equal(data.validation, np.fromfile(nanogpt / "val.bin", "<u2"))
    assert data.vocab_size == 50257 and data.description["tokenizer_sha256"] is None
    derived = load(nanogpt, vocab_size=None)
    assert derived.vocab_size == 1 + max(int(data.train.max()), int(data.validation.max()))
    assert derived.sha256 == data.sha256
    assert not (tmp_path / "cache").exists()
    (nanogpt / "val.bin").write_bytes((nanogpt / "val.bin").read_bytes()[:-2])
    assert load(nanogpt, vocab_size=50257).sha256 != data.sha256


def test_nanogpt_refusals(nanogpt, load):
    tokens = np.zeros(500, "<u2")
    tokens[321] = 4096
    tokens.tofile(nanogpt / "val.bin")
    np.zeros(500, "<u2").tofile(nanogpt / "train.bin")
    with pytest.raises(ValueError, match=r"val.bin.* token 4096 at position 321.* 0 to 4095"):
        load(nanogpt, vocab_size=4096)
    assert load(nanogpt, vocab_size=4097).vocab_size == 4097
    with pytest.raises(ValueError, match="vocab_size=65537 .* 1 to 65536"):
        load(nanogpt, vocab_size=65537)
    with pytest.raises(ValueError, match="500 training tokens; context=500"):
        load(nanogpt, vocab_size=None, context=500)
    (nanogpt / "val.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"val.bin.* 3 bytes, an odd number"):
        load(nanogpt)
    (nanogpt / "val.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="0 validation tokens"):
        load(nanogpt, vocab_size=None)
    (nanogpt / "val.bin").unlink()
    with pytest.raises(ValueError, match="has no val.bin"):
        load(nanogpt)


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("was-run",))


def test_nothing_that_is_read_runs(nanogpt, folder, load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(_Evil())
    (nanogpt / "meta.pkl").write_bytes(evil)
    load(nanogpt, vocab_size=None)
    (folder / "texts.py").write_text("import os\nos.mkdir('was-run')\n" * 9)
    load(folder)
    (folder / "data.pkl").write_bytes(pickle.dumps(_Evil(), protocol=0))  # without NUL bytes
    assert load(folder).description["files"] == 42
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text('{"text": "some words"}\n' * 50)
    (rows / "rows.py").write_text("import os\nos.mkdir('was-run')\n")
    with pytest.raises(ValueError, match="can not be read as a data set"):
        load(rows)
    assert not (tmp_path / "was-run").exists()


# Data sets


def table(count, first=0):
    import datasets

    rows = {"text": [f"Row {i}. " + prose(i, 60) for i in range(first, first + count)]}
    rows |= {"stars": list(range(count)), "title": ["t"] * count}
    return datasets.Dataset.from_dict(rows)


@pytest.mark.parametrize("form", ["saved", "jsonl", "parquet", "csv", "folder"])
def test_a_local_data_set_in_every_form(form, load, tmp_path):
    rows, path = table(60), tmp_path / f"rows.{form}"
    if form == "saved":
        rows.save_to_disk(path)
    elif form == "folder":
        path.mkdir()
        rows.to_json(path / "rows.jsonl")
    else:
        getattr(rows, {"jsonl": "to_json"}.get(form, f"to_{form}"))(path)
    data = load(path)
    training, validation = decoded(data, tmp_path)
    assert sorted(training + validation) == sorted(rows["text"])
    assert validation and not set(training) & set(validation)
    assert data.description["files"] == 60
    assert data.description["bytes"] == sum(len(t) for t in rows["text"])
    assert load(path).description == data.description
    assert load(path, text_field="title", context=1, vocab_size=257).sha256 != data.sha256


def test_all_forms_have_one_hash(load, tmp_path):
    table(40).to_json(tmp_path / "a.jsonl")
    table(40).to_parquet(tmp_path / "a.parquet")
    table(40).save_to_disk(tmp_path / "saved")
    sources = (tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "saved")
    assert len({load(source).sha256 for source in sources}) == 1


def test_a_data_sets_own_validation_split_is_used(load, tmp_path):
    import datasets

    parts = {"train": table(40), "validation": table(10, first=100), "test": table(7, first=200)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    data = load(tmp_path / "parts")
    assert data.description["held_out"] == "validation split"
    training, validation = decoded(data, tmp_path)
    assert training == parts["train"]["text"] and validation == parts["validation"]["text"]
    other = load(tmp_path / "parts", split="test", validation_fraction=0.4)
    assert other.description["held_out"] == "whole documents" and other.description["files"] == 7
    part = load(tmp_path / "parts", max_bytes=5000, validation_fraction=0.2, vocab_size=260)
    assert part.description["bytes"] == 5000 and part.description["validation_bytes"] == 1000
    with pytest.raises(ValueError, match="no split 'dev'; its splits: train, validation, test"):
        load(tmp_path / "parts", split="dev")


def test_fields_that_are_missing_or_no_text(load, tmp_path):
    table(20).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no field 'content'; its fields: text, stars, title"):
        load(tmp_path / "saved", text_field="content")
    with pytest.raises(ValueError, match="field 'stars' is int64, not text"):
        load(tmp_path / "saved", text_field="stars")


def test_rows_without_text_are_no_documents(load, tmp_path):
    lines = [json.dumps({"text": t}) for t in ["", None, prose(1, 500), "", prose(2, 500)]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    training, validation = decoded(load(tmp_path / "a.jsonl"), tmp_path)
    assert len(training) == 2
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n' * 5)
    with pytest.raises(ValueError, match="hold no text"):
        load(tmp_path / "b.jsonl")


@pytest.mark.parametrize("harm", ["arrow", "state", "jsonl", "parquet", "empty"])
def test_damaged_data_sets(load, tmp_path, harm):
    path = tmp_path / f"a.{harm if harm != 'empty' else 'jsonl'}"
    if harm in ("arrow", "state"):
        table(20).save_to_disk(path)
        victim = next(path.glob("*.arrow")) if harm == "arrow" else path / "state.json"
        victim.write_bytes(b"\x80\x04damaged")
    else:
        path.write_bytes(b"" if harm == "empty" else b"\x80\x04damaged\n{")
    with pytest.raises(ValueError, match=r"data source .*a\..*"):
        load(path)


def test_the_cause_of_a_damaged_table_is_told(load, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n' * 5 + '{"text": "torn\n')
    with pytest.raises(ValueError, match=r"a\.jsonl' can not be read.*; .*(JSON|parse)") as caught:
        load(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_a_kind_that_is_no_table_of_text_is_refused(load, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "words"}\n')
    for i in range(5):
        (folder / f"{i}.xml").write_text("<a>words</a>")
    with pytest.raises(ValueError, match="kind 'xml'; data are read from: arrow, cache, csv"):
        load(folder)


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """Points the hub's library at a port of this machine: no test leaves it."""
    import datasets
    import huggingface_hub

    def point(port):
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    return point


def test_a_name_without_a_network(hub_at, load):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: a connection is refused
        hub_at(taken.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(ValueError, match="'someone/words'.*no such file.*can not be reached"):
            load("someone/words")
        assert time.monotonic() - began < 10


def test_a_name_when_the_hub_never_answers(hub_at, load, monkeypatch):
    monkeypatch.setattr(hugging_face, "ANSWER_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub_at(silent.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(ValueError, match="can not be reached"):
            load("someone/words:configuration")
        assert time.monotonic() - began < 5


def test_a_name_that_the_hub_does_not_know(hub_at, load):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub_at(server.server_address[1])
        with pytest.raises(ValueError, match="no data set of this name"):
            load("someone/wrods")
        server.shutdown()


@pytest.mark.parametrize("source", ["json", "csv", "-bad", "a/b:c:d", "hf://datasets/a/b"])
def test_names_that_are_none(hub_at, load, source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub_at(9)
    with pytest.raises(ValueError, match="data source"):
        load(source)


# Batches


def counting(train=1000, validation=203, dtype=np.uint16):
    return TokenDataset(
        train=np.arange(train, dtype=dtype),
        validation=np.arange(validation, dtype=dtype),
        vocab_size=max(train, validation),
        sha256="0" * 64,
        description={},
    )


def test_train_batches_are_windows():
    batch = counting().train_batch(seed=1, step=2, batch_size=7, context=12)
    assert batch.dtype == torch.int64 and batch.shape == (7, 13)
    assert torch.equal(batch[:, 1:] - batch[:, :-1], torch.ones(7, 12, dtype=torch.int64))


def test_train_batches_are_a_pure_function_of_their_place():
    data, again = counting(), counting(dtype=np.uint32)
    np.random.seed(3)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for place in [(0, 0, 0), (5, 9, 0), (5, 9, 1), (2**64 - 1, 2**40, 2**33)]:
        seed, step, micro = place
        arguments = {"seed": seed, "step": step, "micro": micro, "batch_size": 4, "context": 8}
        first = data.train_batch(**arguments)
        data.train_batch(seed=8, step=8, batch_size=2, context=3)
        assert torch.equal(first, again.train_batch(**arguments))
    assert torch.equal(before, torch.get_rng_state())


def test_train_batches_are_the_same_on_every_platform():
    batch = counting().train_batch(seed=7, step=3, micro=2, batch_size=6, context=4)
    assert batch[:, 0].tolist() == GOLDEN
    philox = np.random.Philox(key=[7, 0x77696E646F7773], counter=[0, 2, 3, 0])
    assert [int(x) % 996 for x in philox.random_raw(6)] == GOLDEN


GOLDEN = [223, 490, 742, 29, 815, 115]


def test_no_two_places_draw_alike():
    data = counting(train=2**20, dtype=np.uint32)
    places = [(s, t, m) for s in range(4) for t in range(25) for m in range(4)]
    starts = [
        tuple(data.train_batch(seed=s, step=t, micro=m, batch_size=8, context=1)[:, 0].tolist())
        for s, t, m in places
    ]
    assert len(set(starts)) == len(places)
    # 3200 draws from 2**20 places repeat about 5 times by chance; shifted streams would by 1000s.
    assert len({x for batch in starts for x in batch}) > 3180


def test_every_place_is_drawn_evenly():
    data = counting(train=20)
    starts = data.train_batch(seed=0, step=0, batch_size=17_000, context=3)[:, 0]
    counts = torch.bincount(starts, minlength=17)
    assert len(counts) == 17  # the first place to the last whole window
    assert counts.min() > 850 and counts.max() < 1150


@pytest.mark.parametrize("length", [17, 203, 193, 194])
def test_each_validation_token_is_a_target_once(length):
    data = counting(validation=length)
    batches = list(data.validation_batches(batch_size=5, context=16))
    assert all(batch.dtype == torch.int64 and batch.shape[1] == 17 for batch in batches)
    assert all(len(batch) == 5 for batch in batches[:-1]) and 1 <= len(batches[-1]) <= 5
    windows = torch.cat(batches)
    targets = windows[:, 1:].flatten()
    assert targets.tolist() == list(range(1, 1 + 16 * ((length - 1) // 16)))
    assert torch.equal(windows[:, :-1].flatten(), targets - 1)


def test_validation_can_be_shorter():
    data = counting()
    whole = list(data.validation_batches(batch_size=2, context=10))
    part = list(data.validation_batches(batch_size=2, context=10, max_batches=3))
    assert len(part) == 3
    assert all(torch.equal(a, b) for a, b in zip(part, whole, strict=False))
    assert len(list(data.validation_batches(batch_size=2, context=10, max_batches=99))) == 10


def test_batches_own_their_memory():
    data = counting()
    batch = data.train_batch(seed=0, step=0, batch_size=2, context=4)
    batch.zero_()
    assert data.train[999] == 999 and data.train[1] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed=-1 .* from 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"step": -1}, "step=-1"),
        ({"micro": 0.5}, "micro=0.5"),
        ({"batch_size": 0}, "batch_size=0 .* at least 1"),
        ({"context": 0}, "context=0"),
        ({"context": 1000}, "context=1000 needs at least 1001 training tokens.*1 to 999"),
    ],
)
def test_batches_out_of_range(arguments, message):
    good = {"seed": 0, "step": 0, "batch_size": 2, "context": 8}
    with pytest.raises(ValueError, match=message):
        counting().train_batch(**(good | arguments))


def test_validation_out_of_range_is_said_at_the_call():
    for arguments in ({"batch_size": 0}, {"context": 203}, {"max_batches": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            counting().validation_batches(**({"batch_size": 2, "context": 8} | arguments))


def test_a_dataset_checks_its_arrays():
    good = {"vocab_size": 3, "sha256": "", "description": {}, "validation": np.arange(3)}
    with pytest.raises(ValueError, match="train must be a one-dimensional integer array"):
        TokenDataset(train=np.zeros(3), **good)
    with pytest.raises(ValueError, match=r"shape \(3, 1\)"):
        TokenDataset(train=np.zeros((3, 1), int), **good)
    with pytest.raises(ValueError, match="vocab_size=0"):
        TokenDataset(train=np.arange(3), **(good | {"vocab_size": 0}))


@pytest.mark.parametrize("name", ["corpus", "hugging_face", "tokens"])
def test_examples(name):
    module = importlib.import_module(f"nomadam.experiments.data.{name}")
    results = doctest.testmod(module)
    assert results.attempted and not results.failed
