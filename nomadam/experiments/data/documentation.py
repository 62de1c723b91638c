"""What Python says of itself in English: the docstrings of its library, and its help topics."""

import ast
import functools
import warnings
from collections.abc import Iterator

from nomadam.experiments.data.corpus import Corpus, in_bytes, standard_library


def documentation(max_bytes: int | None = None) -> Corpus:
    """The docstrings of each module of the standard library, and each topic of Python's help.

    Part of the text of `standard_library`, with little code and few symbols, and as surely at hand.
    A module that this Python can not parse, or without docstrings, is left out.

    Args:
        max_bytes: at most so many bytes, from documents chosen by the hash of their name.

    Errors:
        ValueError: this Python has no source files (a zipped or frozen library).

    >>> "topics/for" in documentation().names
    True
    """
    return in_bytes("stdlib_prose", _documents(), max_bytes)


def syntax_tree(source: str | bytes) -> ast.Module:
    """A Python file parsed, without warnings of escapes in old files.

    Raises:
        SyntaxError: it is no Python of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


@functools.cache
def _documents() -> dict[str, bytes]:
    from pydoc_data.topics import topics

    library = standard_library()
    texts = {f"topics/{name}": text for name, text in topics.items()}
    for name, chunks in zip(library.names, library.read(), strict=True):
        texts[name] = "\n\n".join(_docstrings(b"".join(chunks)))
    # Halves of surrogate pairs, which no encoding has, become "?".
    return {name: text.encode("utf-8", "replace") for name, text in texts.items() if text}


def _docstrings(source: bytes) -> Iterator[str]:
    try:
        tree = syntax_tree(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
