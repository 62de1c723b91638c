"""The docstrings and help topics of Python as a text."""

import inspect
import json
from pydoc_data.topics import topics

import pytest

from nomadam.experiments.data import corpus, documentation
from nomadam.experiments.data.tokens import load_tokens


def contents(prose):
    documents = zip(prose.names, prose.read(), strict=True)
    return {name: b"".join(chunks) for name, chunks in documents}


def test_the_prose_of_the_standard_library():
    prose = documentation.documentation()
    assert prose.names == sorted(prose.names)
    texts = contents(prose)
    assert all(texts.values()) and texts == contents(prose)  # a second pass is the same
    assert texts["topics/for"].decode() == topics["for"]
    decoder = texts["json/decoder.py"].decode()
    assert decoder.startswith("Implementation of JSONDecoder\n\n")
    assert str(inspect.getdoc(json.JSONDecoder.decode)) in decoder and "import re" not in decoder


def test_a_part_of_the_prose_in_tokens(tmp_path):
    prose, source = (
        load_tokens(
            name, max_bytes=100_000, vocab_size=400, context=16, cache_folder=tmp_path / "cache"
        )
        for name in ("stdlib_prose", "stdlib")
    )
    assert prose.description["source"] == "stdlib_prose" and prose.sha256 != source.sha256
    assert prose.description["bytes"] == 100_000
    assert prose.description["held_out"] == "whole documents"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b'"""1."""\ndef f():\n    """2."""\nclass C:\n    "3."\n', b"1.\n\n2.\n\n3."),
        (b"x = 1  # says nothing\n", None),
        (b"print 'of another Python'\n", None),
        (b'"""Half of a pair: \\ud800, and \\0, \\d."""\n', b"Half of a pair: ?, and \0, \\d."),
    ],
)
def test_docstrings_of_hostile_files(source, expected, monkeypatch):
    library = corpus.in_bytes("stdlib", {"module.py": source})
    monkeypatch.setattr(documentation, "standard_library", lambda: library)
    documentation._documents.cache_clear()
    prose = documentation.documentation()
    documentation._documents.cache_clear()
    assert contents(prose).get("module.py") == expected
    assert corpus.survey(prose).undecodable == 0


@pytest.mark.parametrize("most", [None, 0, 1, 5, 9, 100])
def test_documents_in_memory_fill_a_budget_of_bytes(most):
    documents = {"b": b"12345", "a": b"6789", "empty": b""}
    taken = contents(corpus.in_bytes("memory", documents, most))
    assert list(taken) == sorted(taken)
    assert all(documents[name].startswith(content) for name, content in taken.items())
    assert sum(map(len, taken.values())) == (9 if most is None else min(9, most))
    assert ("empty" in taken) == (most is None)
