"""Pairs of texts, the second to be written after the first: from docstrings, and from E2E's CSV."""

import ast
import csv
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nomadam.experiments.data.corpus import standard_library, survey, text_files, training_bytes
from nomadam.experiments.data.documentation import syntax_tree
from nomadam.experiments.data.hugging_face import is_data_set_path

if TYPE_CHECKING:
    import torch

    from nomadam.experiments.data.tokens import TokenDataset

IGNORED = -100  # the label of what is not to be learned, as cross_entropy has it
# Sets these draws apart from any other use of the same seed.
_PAIRS = 0x7061697273
_SENTENCE = re.compile(r"(.+?[.!?])(?=\s+[A-Z\"'(`<*]|\s*$)", re.DOTALL)
_ATTRIBUTE = re.compile(r"([^,\[\]]+)\[([^\[\]]*)\]\s*(?:,|$)")
_E2E_FILES = ("trainset.csv", "devset.csv", "testset_w_refs.csv")


class Pair(NamedTuple):
    """What is read, and what is to be written after it."""

    prompt: str
    target: str


@dataclasses.dataclass(frozen=True, eq=False)
class PairBatch:
    """Rows of tokens with what is to be learned of them; slices and moves as a tensor does.

    Args:
        tokens: int64 `[rows, length]`: prompt, target and end, padded on the right.
        labels: the same, with `IGNORED` in the place of what is not a target.
        mean_targets: targets of a mean pair of the whole data, by which a loss is divided.
    """

    tokens: "torch.Tensor"
    labels: "torch.Tensor"
    mean_targets: float

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "PairBatch":
        """Some of the rows."""
        return PairBatch(self.tokens[rows], self.labels[rows], self.mean_targets)

    def to(self, device: "torch.device", *, non_blocking: bool = False) -> "PairBatch":
        """The same on a device."""
        return PairBatch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.mean_targets,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PairDataset:
    """Encoded pairs, and batches of them.

    Args:
        train: of each pair the tokens of prompt and of target, which has the end token.
        validation: held out, likewise.
        judged: held-out prompts, each once, with all the texts that people wrote after it.
        tokenizer: of the tokenizers library.
        vocab_size: tokens are below it.
        end: the token that ends a text.
        context: tokens that the longest pair may have without its last.
        description: what the data is, in JSON scalars.
    """

    train: list[tuple[list[int], list[int]]]
    validation: list[tuple[list[int], list[int]]]
    judged: list[tuple[list[int], list[str]]]
    tokenizer: Any
    vocab_size: int
    end: int
    context: int
    description: dict[str, str | int | float | bool | None]

    def train_batch(self, *, seed: int, step: int, micro: int = 0, batch_size: int) -> PairBatch:
        """Random training pairs with replacement, a pure function of the arguments.

        Args:
            seed: from 0 to 2**64 - 1.
            step: the optimizer step, from 0.
            micro: the micro-batch within the step, from 0. Default 0.
            batch_size: at least 1.
        """
        raw = np.random.Philox(
            key=_PAIRS << 64 | seed, counter=step << 128 | micro << 64
        ).random_raw(batch_size)
        rows = [self.train[int(draw % len(self.train))] for draw in raw]
        return _padded(rows, self.end, self._mean_train_targets)

    def validation_batches(
        self, *, batch_size: int, max_batches: int | None = None
    ) -> Iterator[PairBatch]:
        """The held-out pairs in their order; a last batch may have fewer.

        Args:
            batch_size: at least 1.
            max_batches: stops after so many, at least 1. Default all.
        """
        mean = _mean_targets(self.validation)
        for start in range(0, len(self.validation), batch_size)[:max_batches]:
            yield _padded(self.validation[start : start + batch_size], self.end, mean)

    @functools.cached_property
    def _mean_train_targets(self) -> float:
        return _mean_targets(self.train)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without white space at its ends."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


def _mean_targets(pairs: list[tuple[list[int], list[int]]]) -> float:
    return sum(len(target) for _, target in pairs) / len(pairs)


def _padded(rows: Sequence[tuple[list[int], list[int]]], end: int, mean: float) -> PairBatch:
    import torch

    length = max(len(prompt) + len(target) for prompt, target in rows)
    tokens = torch.full((len(rows), length), end)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (prompt, target) in enumerate(rows):
        both = torch.tensor(prompt + target)
        tokens[row, : len(both)] = both
        labels[row, len(prompt) : len(both)] = both[len(prompt) :]
    return PairBatch(tokens, labels, mean)


def load_docstrings(
    tokens: "TokenDataset",
    source: str,
    *,
    context: int,
    validation_fraction: float,
    max_bytes: int | None,
) -> PairDataset:
    """Signatures of functions, each with the first sentence of its docstring.

    Held out are the modules that the tokens hold out too, so that a model trained on these has
    seen nothing of them. Each pair comes once; a training pair whose sentence is also a held-out
    one is left out, and so is a pair that is too long.

    Args:
        tokens: made of the same source; their tokenizer is used.
        source: ``stdlib``, or a folder of Python files.
        context: a pair has at most so many tokens and one.
        validation_fraction: the part of the bytes that the tokens hold out.
        max_bytes: that the tokens were made of, None where all were.

    Raises:
        ValueError: tokens that were not made of files, no file that is held out as a whole, and no
            pairs to train on or to validate by.
    """
    if tokens.tokenizer_file is None:
        raise ValueError(
            f"data.tokens.source = {source!r} holds tokens that are ready-made, without the text "
            "that pairs are found in; must be 'stdlib' or a folder of Python files"
        )
    path = Path(os.path.expanduser(source))
    if source != "stdlib" and (is_data_set_path(path) or not path.exists()):
        raise ValueError(
            f"data.tokens.source = {source!r} is a data set, which has no files of Python to find "
            "pairs in; must be 'stdlib' or a folder of Python files"
        )
    corpus = standard_library(max_bytes) if source == "stdlib" else text_files(path, max_bytes)
    sizes = survey(corpus).sizes
    training = training_bytes(corpus, sizes, validation_fraction)
    if (training > 0).all():
        raise ValueError(
            f"data.tokens.source = {source!r}: its files ({len(sizes)}) are too few to hold out "
            f"whole ones with data.tokens.validation_fraction = {validation_fraction:g}, which "
            "pairs to validate by are taken from; give more files, or a larger fraction"
        )
    found: dict[bool, dict[Pair, None]] = {True: {}, False: {}}
    unreadable = 0
    for name, kept, chunks in zip(corpus.names, training, corpus.read(), strict=True):
        text = b"".join(chunks)
        if name.endswith(".py"):
            try:
                found[bool(kept)] |= dict.fromkeys(docstring_pairs(text))
            except (SyntaxError, ValueError, RecursionError):
                unreadable += 1
    # Of another signature too: a model could have learned the sentence by heart.
    held_out = {pair.target for pair in found[False]}
    train = [pair for pair in found[True] if pair.target not in held_out]
    return _encoded(
        {"train": train, "validation": list(found[False])},
        tokenizer_file=tokens.tokenizer_file,
        context=context,
        source=source,
        description={
            "unreadable_files": unreadable,
            "shared_targets": len(found[True]) - len(train),
            "held_out": "whole documents",
        },
    )


def docstring_pairs(source: str | bytes) -> Iterator[Pair]:
    """The functions of a Python file, each with the first sentence of its docstring.

    Args:
        source: the file's content; what no encoding has, halves of surrogate pairs, becomes "?".

    Raises:
        SyntaxError: it is no Python of this version.

    Example:
        >>> source = "async def f(x: int = 0) -> int: 'Add one. Or two.'"
        >>> pair = next(docstring_pairs(source))
        >>> pair.prompt.split(" ")[:2], pair.target
        (['async', 'def'], 'Add one.')
    """
    for node in ast.walk(syntax_tree(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            sentence = _SENTENCE.match(paragraph)
            target = sentence[1] if sentence else paragraph
            if len(target.split()) > 1:
                word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                signature = f"{word} {node.name}({ast.unparse(node.args)}){returns}:"
                texts = (f'{signature}\n    """', target)
                yield Pair(*(text.encode("utf-8", "replace").decode() for text in texts))


def load_e2e(folder: str, *, tokenizer: str, context: int) -> PairDataset:
    """The E2E NLG data: what is known of a restaurant, and sentences that say so.

    Args:
        folder: with ``trainset.csv`` and ``devset.csv``, and ``testset_w_refs.csv`` where texts are
            to be judged by it; else by the second. Columns ``mr`` and ``ref``.
        tokenizer: a ``tokenizer.json`` or the folder of a model that has one.
        context: a pair has at most so many tokens and one; what is longer is left out.

    Raises:
        ValueError: a file is missing, is no CSV in UTF-8, lacks a column, or has no pair.
    """
    place = Path(os.path.expanduser(folder))
    parts = {"train": place / _E2E_FILES[0], "validation": place / _E2E_FILES[1]}
    if (place / _E2E_FILES[2]).exists():
        parts["judged"] = place / _E2E_FILES[2]
    file = Path(os.path.expanduser(tokenizer))
    file = file / "tokenizer.json" if file.is_dir() else file
    return _encoded(
        {part: list(_e2e_pairs(path)) for part, path in parts.items()},
        tokenizer_file=file,
        context=context,
        source=folder,
        description={"held_out": _E2E_FILES[1], "judged_by": parts.get("judged", place).name},
    )


def _e2e_pairs(path: Path) -> Iterator[Pair]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            missing = {"mr", "ref"} - set(rows.fieldnames or ())
            for name in ("mr", "ref"):
                if (rows.fieldnames or []).count(name) > 1:
                    raise ValueError(f"{path} has more than one column {name}")
            if missing:
                raise ValueError(
                    f"{path} lacks the column {', '.join(sorted(missing))}: E2E's files have "
                    f"mr and ref, this one {', '.join(rows.fieldnames or ()) or 'none'}"
                )
            for row in rows:
                if None in row:
                    raise ValueError(
                        f"{path}, line {rows.line_num}: has more fields than the "
                        f"{len(rows.fieldnames or ())} columns; commas belong in quotes"
                    )
                target = " ".join((row["ref"] or "").split())
                told = (row["mr"] or "").strip()
                known = _attributes(told)
                if not known or not target:
                    raise ValueError(
                        f"{path}, line {rows.line_num}: mr must be such as 'name[Alimentum], "
                        f"area[riverside]' and ref a text, got {row['mr']!r} and {row['ref']!r}"
                    )
                prompt = " | ".join(f"{name} : {value}" for name, value in known)
                yield Pair(f"{prompt} ||", f" {target}")
    except OSError as error:
        raise ValueError(
            f"{path} can not be read ({error.strerror}): data.source must be a folder with E2E's "
            f"{_E2E_FILES[0]} and {_E2E_FILES[1]}"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8: {error}") from error


def _attributes(told: str) -> list[tuple[str, str]]:
    """Names and values of ``name[Alimentum], area[riverside]``; none where a part is not so."""
    found, place = [], 0
    # One after the other, so that what fits nowhere is read once.
    while place < len(told):
        match = _ATTRIBUTE.match(told, place)
        if match is None or not match[1].strip():
            return []
        found.append((match[1].strip(), match[2]))
        place = match.end()
    return found


def _encoded(
    parts: dict[str, list[Pair]],
    *,
    tokenizer_file: Path,
    context: int,
    source: str,
    description: dict[str, Any],
) -> PairDataset:
    tokenizer, end = _tokenizer(tokenizer_file)
    kept: dict[str, list[tuple[Pair, tuple[list[int], list[int]]]]] = {}
    for part, pairs in parts.items():
        prompts, targets = (
            (_encode(tokenizer, texts) for texts in zip(*pairs, strict=True))
            if (pairs)
            else ([], [])
        )
        rows = [(prompt, [*target, end]) for prompt, target in zip(prompts, targets, strict=True)]
        fits = [len(prompt) + len(target) <= context + 1 for prompt, target in rows]
        kept[part] = [
            both for both, fit in zip(zip(pairs, rows, strict=True), fits, strict=True) if fit
        ]
        if not kept[part]:
            why = f", of which none fits into data.context = {context}" if pairs else ""
            raise ValueError(
                f"data source {source!r} has {len(pairs)} {part} pairs{why}: at least one is needed"
            )
    judged: dict[str, tuple[list[int], list[str]]] = {}
    for pair, (prompt, _) in kept.get("judged", kept["validation"]):
        judged.setdefault(pair.prompt, (prompt, []))[1].append(pair.target.strip())
    content = "\0".join(text for pairs in parts.values() for pair in pairs for text in pair)
    return PairDataset(
        train=[row for _, row in kept["train"]],
        validation=[row for _, row in kept["validation"]],
        judged=list(judged.values()),
        tokenizer=tokenizer,
        vocab_size=tokenizer.get_vocab_size(),
        end=end,
        context=context,
        description={
            "source": source,
            "train_pairs": len(kept["train"]),
            "validation_pairs": len(kept["validation"]),
            "judged_prompts": len(judged),
            "too_long_pairs": sum(map(len, parts.values())) - sum(map(len, kept.values())),
            "sha256": hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest(),
            "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
            **description,
        },
    )


def _tokenizer(file: Path) -> tuple[Any, int]:
    """The tokenizer of a file and its token for the end of a text."""
    from nomadam.experiments.data.byte_pairs import END_OF_TEXT

    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError('text data needs tokenizers: pip install "nomadam[lab]"') from error
    if not file.is_file():
        raise ValueError(f"data.tokenizer = {str(file)!r}: must be a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{file} is no file of the tokenizers library: {error}") from error
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"{file} has no token {END_OF_TEXT!r} to end a text by")
    # A text that holds the words of the special token must not end by them.
    tokenizer.encode_special_tokens = True
    return tokenizer, end


def _encode(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch_fast(list(texts))]
