"""Gains in a file: measured once, kept, and taken along to another machine or engine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nomadam.durable_files import is_number, write_atomically, write_json

SUFFIXES = (".json", ".safetensors")


def save_gains(gains: Mapping[str, float], path: str | Path) -> None:
    """Write gains to a file, at once or not at all; `load_gains` gives the same numbers back.

    As JSON it is one object, as safetensors a float64 tensor without dimensions for each name.

    Args:
        gains: name of the block to its gain, finite and above 0, as `measure_gains` and
            `SGDSaI.gains` of named parameters give them; at least one.
        path: ends in ``.json`` or ``.safetensors``; its folder exists.

    Raises:
        ValueError: naming the path: another suffix, no gains, names that are not text (of an
            optimizer of unnamed parameters), gains that are not finite and above 0.
        ImportError: without safetensors where it is asked for, naming the extra to install.
        OSError: where it can not be written; an old file is intact then.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "gains.json")
        >>> save_gains({"weight": 2.5, "bias": 1.0}, path)
        >>> print(path.read_text(), end="")
        {
          "weight": 2.5,
          "bias": 1.0
        }
    """
    path = _known(path)
    checked = _checked(gains, path)
    if path.suffix == ".json":
        write_json(path, checked)
    else:
        tensors = {name: torch.tensor(g, dtype=torch.float64) for name, g in checked.items()}
        library = _safetensors()
        try:
            content = library.save(tensors)
            library.load(content)
        except Exception as error:  # a name that means something else there, or is no text
            raise ValueError(f"{path}: safetensors can not hold these names: {error}") from error
        write_atomically(path, content)


def load_gains(path: str | Path) -> dict[str, float]:
    """Read gains from a file, for ``SGDSaI(gain=...)`` and `scaled_param_groups`.

    Args:
        path: what `save_gains` wrote, or the ``gains.json`` of a run folder.

    Returns:
        Name of the block to its gain; from safetensors in the order of the names.

    Raises:
        ValueError: naming the path: another suffix, a damaged file, one that holds no gains.
        ImportError: without safetensors where it is needed, naming the extra to install.
        OSError: where it can not be read.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "gains.json")
        >>> save_gains({"weight": 0.1 + 0.2}, path)
        >>> load_gains(path)
        {'weight': 0.30000000000000004}
    """
    path = _known(path)
    content = path.read_bytes()
    if path.suffix == ".json":
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    else:
        library = _safetensors()
        try:
            tensors = library.load(content)
        except Exception as error:  # its own class is no ValueError
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        values = {
            name: tensor.item() if tensor.numel() == 1 else list(tensor.shape)
            for name, tensor in sorted(tensors.items())
        }
    if isinstance(values, dict) and isinstance(blocks := values.get("blocks"), dict):
        values = {  # a run folder's: each gain with its block's shape
            name: block.get("gain") if isinstance(block, dict) else block
            for name, block in blocks.items()
        }
    return _checked(values, path)


def _known(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: gains are kept in a file that ends in {' or '.join(SUFFIXES)}")
    return path


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        message = (
            'gains as safetensors need that library: pip install "nomadam[lab]"; JSON does not'
        )
        raise ImportError(message) from error
    return safetensors.torch


def _checked(gains: Any, path: Path) -> dict[str, float]:
    """The gains as floats, or a ValueError that names the path and all that is wrong."""
    if not isinstance(gains, Mapping) or not gains:
        raise ValueError(f"{path}: gains must be names with numbers, at least one")
    unnamed = [name for name in gains if not isinstance(name, str)]
    if unnamed:
        raise ValueError(
            f"{path}: gains must have names, not {unnamed[0]!r}; build the optimizer from "
            "named_parameters()"
        )
    found = {name: _plain(gain) for name, gain in gains.items()}
    wrong = [f"{name}: {x!r}" for name, x in found.items() if not (is_number(x) and x > 0)]
    if wrong:
        raise ValueError(
            f"{path}: gains must be numbers, finite and above 0, got {', '.join(wrong)}"
        )
    return {name: float(gain) for name, gain in found.items()}


def _plain(gain: Any) -> Any:
    """A number of NumPy or a tensor without dimensions as one of Python."""
    return gain.item() if hasattr(gain, "item") and getattr(gain, "shape", None) == () else gain
