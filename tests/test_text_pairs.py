"""Pairs of texts: from docstrings and from CSV files of E2E's form, whole and damaged."""

import json

import numpy as np
import pytest
import torch

from nomadam.experiments.data import text_pairs
from nomadam.experiments.data.text_pairs import (
    IGNORED,
    Pair,
    docstring_pairs,
    load_docstrings,
    load_e2e,
)
from nomadam.experiments.data.tokens import load_tokens

tokenizers = pytest.importorskip("tokenizers")

TRAIN = '''
def add(one, two=2):
    """Add one to two. Say so."""

class Box:
    async def open(self, *, wide: bool = False) -> int:
        """
        Open it,
        however wide.

        More of it.
        """

    def shut(self):
        """Shut it (e.g. by hand) and wait."""

    def named(self):
        """Name."""

    def bare(self):
        return 1
'''
HELD_OUT = '''
def new(box):
    """Make a new box of it."""

def add(one, two=2):
    """Add one to two. Otherwise."""
'''


def test_docstrings_are_read_with_their_signatures():
    assert list(docstring_pairs(TRAIN)) == [
        Pair('def add(one, two=2):\n    """', "Add one to two."),
        Pair(
            'async def open(self, *, wide: bool=False) -> int:\n    """', "Open it, however wide."
        ),
        Pair('def shut(self):\n    """', "Shut it (e.g. by hand) and wait."),
    ]


@pytest.mark.parametrize("source", ["def f(:", "\0", b"\xff\xfe\x00"])
def test_what_is_no_python_is_told(source):
    with pytest.raises((SyntaxError, ValueError)):
        list(docstring_pairs(source))


@pytest.fixture
def modules(tmp_path):
    """Two modules to train on, one of them unreadable, and as many as needed to hold one out."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "b.py").write_text(TRAIN + TRAIN)
    (folder / "broken.py").write_text("def f(:\n" * 99)
    (folder / "notes.txt").write_text("def add(x):\n    'Not in Python.'\n" * 30)
    # Of all of them this alone fits into a fifth.
    (folder / "held.py").write_text(HELD_OUT + "# Nothing more.\n" * 15)
    return folder


def read(folder, tmp_path, context=96, fraction=0.2, vocab_size=300, **changes):
    options = {"vocab_size": vocab_size, "context": 16, "validation_fraction": fraction}
    tokens = load_tokens(str(folder), cache_folder=tmp_path / "cache", **options)
    keywords = {"context": context, "validation_fraction": fraction, "max_bytes": None, **changes}
    return load_docstrings(tokens, str(folder), **keywords)


def held_out_names(folder):
    from nomadam.experiments.data.corpus import survey, text_files, training_bytes

    corpus = text_files(folder)
    training = training_bytes(corpus, survey(corpus).sizes, 0.2)
    return [name for name, kept in zip(corpus.names, training, strict=True) if not kept]


def test_held_out_are_the_modules_of_the_tokens_and_no_target_is_in_both(modules, tmp_path):
    assert held_out_names(modules) == ["held.py"]
    other = "\ndef plus(box):\n    'Add one to two.'\n"  # the sentence under another signature
    (modules / "b.py").write_text(TRAIN + other + TRAIN)
    data = read(modules, tmp_path)
    texts = [(data.decode(prompt), data.decode(target)) for prompt, target in data.train]
    assert texts[0][1] == "Open it, however wide."
    assert len(texts) == len(set(texts)) == 2
    held_out = ["Make a new box of it.", "Add one to two."]
    assert [data.decode(target) for _, target in data.validation] == held_out
    assert data.judged == [
        (prompt, [text]) for (prompt, _), text in zip(data.validation, held_out, strict=True)
    ]
    described = data.description
    assert described["train_pairs"] == 2 and described["validation_pairs"] == 2
    assert described["shared_targets"] == 2
    assert described["unreadable_files"] == 1 and described["too_long_pairs"] == 0
    assert len(str(described["sha256"])) == len(str(described["tokenizer_sha256"])) == 64


def test_what_is_too_long_is_left_out_and_counted(modules, tmp_path):
    (modules / "b.py").write_text(TRAIN + "\ndef less(box):\n    'Take one out of it.'\n" + TRAIN)
    lengths = sorted(len(p) + len(t) for p, t in read(modules, tmp_path).train)
    assert lengths[1] < lengths[2]
    data = read(modules, tmp_path, context=lengths[1] - 1)
    assert sorted(len(p) + len(t) for p, t in data.train) == lengths[:2]
    assert data.description["too_long_pairs"] == 1
    with pytest.raises(ValueError, match="3 train pairs, of which none fits into data.context = 5"):
        read(modules, tmp_path, context=5)


def test_modules_without_docstrings_are_refused(modules, tmp_path):
    (modules / "b.py").write_text("x = 1\n" * 140)
    with pytest.raises(ValueError, match="has 0 train pairs: at least one is needed"):
        read(modules, tmp_path)


def test_tokens_that_were_not_made_of_files_of_python_are_named(modules, tmp_path):
    datasets = pytest.importorskip("datasets")
    binary, saved, one = (tmp_path / name for name in ("binary", "saved", "one"))
    for folder in (binary, one):
        folder.mkdir()
    for part in ("train", "val"):
        np.arange(99, dtype=np.uint16).tofile(binary / f"{part}.bin")
    datasets.Dataset.from_dict({"text": ["x = 1\n" * 99] * 9}).save_to_disk(str(saved))
    (one / "b.py").write_text(TRAIN + TRAIN)
    with pytest.raises(ValueError, match="binary' holds tokens that are ready-made"):
        read(binary, tmp_path, vocab_size=None)
    with pytest.raises(ValueError, match="saved' is a data set, which has no files of Python"):
        read(saved, tmp_path)
    for source in (one, one / "b.py"):
        with pytest.raises(ValueError, match=r"its files \(1\) are too few to hold out whole ones"):
            read(source, tmp_path)


def test_half_of_a_surrogate_pair_becomes_a_question_mark(modules, tmp_path):
    text = TRAIN + "def lone():\n    'Half of \\ud800 a pair.'\n"
    (modules / "b.py").write_text(text + TRAIN)
    data = read(modules, tmp_path)
    assert "Half of ? a pair." in [data.decode(target) for _, target in data.train]


def test_the_mean_of_all_pairs_is_worked_out_once(modules, tmp_path, monkeypatch):
    data, counted = read(modules, tmp_path), []
    mean = sum(len(target) for _, target in data.train) / len(data.train)
    plain = text_pairs._mean_targets
    monkeypatch.setattr(text_pairs, "_mean_targets", lambda p: counted.append(p) or plain(p))
    for step in range(3):
        assert data.train_batch(seed=0, step=step, batch_size=2).mean_targets == mean
    assert len(counted) == 1


def test_batches_are_pure_functions_and_label_the_target_alone(modules, tmp_path):
    data = read(modules, tmp_path)
    one, two = (data.train_batch(seed=3, step=5, micro=1, batch_size=4) for _ in range(2))
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
    others = [
        data.train_batch(**{"seed": 3, "step": 5, "micro": 1, "batch_size": 4, **change}).tokens
        for change in ({"seed": 4}, {"step": 6}, {"micro": 0})
    ]
    same = [other.shape == one.tokens.shape and torch.equal(other, one.tokens) for other in others]
    assert not all(same)
    rows = {(*prompt, *target): len(prompt) for prompt, target in data.train}
    for tokens, labels in zip(one.tokens.tolist(), one.labels.tolist(), strict=True):
        (row,) = [row for row in rows if tuple(tokens[: len(row)]) == row]
        learned = [label for label in labels if label != IGNORED]
        assert labels[: rows[row]] == [IGNORED] * rows[row]
        assert learned == list(row[rows[row] :]) and learned[-1] == data.end
    assert len(one) == 4 and torch.equal(one[1::2].tokens, one.tokens[[1, 3]])
    assert one.to(torch.device("cpu")).mean_targets == one.mean_targets


E2E = {
    "trainset.csv": (
        "mr,ref\n"
        '"name[The Vaults], eatType[pub], priceRange[more than £30]",The Vaults is a dear pub.\n'
        '"name[The Vaults], eatType[pub], priceRange[more than £30]","A pub, ""The Vaults""."\n'
    ),
    "devset.csv": 'mr,ref\r\n"name[Zizzi], area[riverside]","  Zizzi is by\n the river. "\r\n',
    "testset_w_refs.csv": (
        "mr,ref\n"
        '"name[Aromi], food[French]",Aromi is French.\n'
        '"name[Aromi], food[French]",French food at Aromi.\n'
        '"name[Cotto]",Cotto is there.\n'
    ),
}


def tokenizer_file(folder, texts=(), special=("<|endoftext|>",)):
    """A byte-level BPE as GPT-2's tokenizer.json has it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def e2e_folder(tmp_path, **changes):
    for name, content in {**E2E, **changes}.items():
        if content is not None:
            content = content if isinstance(content, bytes) else content.encode()
            (tmp_path / name).write_bytes(content)
    return tokenizer_file(tmp_path, E2E.values())


def test_e2e_is_read_from_its_csv(tmp_path):
    folder = e2e_folder(tmp_path)
    data = load_e2e(str(folder), tokenizer=str(folder), context=128)
    assert [(data.decode(p), data.decode(t)) for p, t in (*data.train, *data.validation)] == [
        ("name : The Vaults | eatType : pub | priceRange : more than £30 ||", text)
        for text in ("The Vaults is a dear pub.", 'A pub, "The Vaults".')
    ] + [("name : Zizzi | area : riverside ||", "Zizzi is by the river.")]
    assert [references for _, references in data.judged] == [
        ["Aromi is French.", "French food at Aromi."],
        ["Cotto is there."],
    ]
    assert data.description["judged_by"] == "testset_w_refs.csv"
    assert data.description["train_pairs"] == 2 and data.description["judged_prompts"] == 2


def test_e2e_without_its_test_set_is_judged_by_the_development_set(tmp_path):
    folder = e2e_folder(tmp_path, **{"testset_w_refs.csv": None})
    data = load_e2e(str(folder), tokenizer=str(folder / "tokenizer.json"), context=128)
    assert [references for _, references in data.judged] == [["Zizzi is by the river."]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("trainset.csv", None, r"trainset.csv can not be read \(No such file"),
        ("devset.csv", None, r"devset.csv can not be read"),
        ("devset.csv", "", "lacks the column mr, ref: .* this one none"),
        ("devset.csv", "mr,text\na[b],c\n", "lacks the column ref: .* this one mr, text"),
        ("devset.csv", "mr,ref\n", "has 0 validation pairs"),
        ("trainset.csv", "mr,ref\nname of it,A text.\n", "line 2: mr must be such as"),
        ("trainset.csv", 'mr,ref\n"name[A], junk, area[x",A text.\n', "line 2: mr must be such"),
        ("trainset.csv", 'mr,ref\n"junk name[A]], area[x]",A text.\n', "line 2: mr must be such"),
        ("trainset.csv", "mr,ref\nname[it]\n", "line 2: mr must be such as"),
        ("trainset.csv", "mr,ref\n [it],A text.\n", "line 2: mr must be such as"),
        ("trainset.csv", f'mr,ref\n"name[A], {"a " * 60_000}",A text.\n', "line 2: mr must"),
        ("trainset.csv", "mr,ref,ref\nname[it],A text.,B.\n", "more than one column ref"),
        ("trainset.csv", "mr,ref\nname[it],   \n", "line 2: mr must be such as"),
        (
            "trainset.csv",
            "mr,ref\nname[A], area[x],A text.\n",
            "2: has more fields than the 2",
        ),
        ("testset_w_refs.csv", b"mr,ref\nname[\xff\xfe],a b\n", "is no CSV in UTF-8"),
        ("trainset.csv", 'mr,ref\nname[it],"A text', "is no CSV in UTF-8"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path, name, content, words):
    folder = e2e_folder(tmp_path, **{name: content})
    with pytest.raises(ValueError, match=words):
        load_e2e(str(folder), tokenizer=str(folder), context=128)


def test_a_wrong_tokenizer_is_named(tmp_path):
    folder = e2e_folder(tmp_path)
    for tokenizer, words in (
        ("nowhere", "data.tokenizer = 'nowhere': must be"),
        (str(folder / "devset.csv"), "is no file of the tokenizers library"),
    ):
        with pytest.raises(ValueError, match=words):
            load_e2e(str(folder), tokenizer=tokenizer, context=128)
    tokenizer_file(folder, special=())
    with pytest.raises(ValueError, match="has no token '<|endoftext|>'"):
        load_e2e(str(folder), tokenizer=str(folder), context=128)
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ValueError, match="is no file of the tokenizers library"):
        load_e2e(str(folder), tokenizer=str(folder), context=128)


def test_words_of_the_end_token_do_not_end_a_text(tmp_path):
    line = "mr,ref\nname[it],Write <|endoftext|> here.\n"
    folder = e2e_folder(tmp_path, **{"trainset.csv": line})
    data = load_e2e(str(folder), tokenizer=str(folder), context=128)
    ((_, target),) = data.train
    assert target.count(data.end) == 1 and data.decode(target) == "Write <|endoftext|> here."
