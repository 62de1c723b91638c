"""A training's state to files and back: model, optimizer, random generators, exactly.

Nothing that is read can run code: safetensors, torch's ``weights_only``, and JSON.
"""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write_checkpoint(
    folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write ``model.safetensors``, ``optimizer.pt`` and ``state.json`` into a folder.

    Args:
        folder: an empty folder.
        module: its parameters that train and persistent buffers are written, tied ones once; what
            is frozen is made again by whatever builds the module.
        optimizer: its ``state_dict()`` is written.
        state: JSON values: the step, the seconds, the random generators.

    Raises:
        ImportError: without safetensors, naming the extra to install.
        OSError: where the files can not be written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError('checkpoints need safetensors: pip install "nomadam[lab]"') from error
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(module).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # A file of our own, so that a full disk is an OSError and not a loss of words in torch.
    with open(folder / "optimizer.pt", "wb") as file:
        torch.save(optimizer.state_dict(), file)
    (folder / "state.json").write_text(json.dumps(state) + "\n")


def read_checkpoint(
    folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint into a module and its optimizer, and return its ``state.json``.

    Raises:
        ValueError: where the checkpoint is of another model.
    """
    read_weights(folder, module)
    optimizer.load_state_dict(
        torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    )
    return json.loads((folder / "state.json").read_bytes())


def read_weights(folder: Path, module: torch.nn.Module) -> None:
    """Put the weights of a checkpoint into a module.

    Raises:
        ValueError: where the checkpoint is of another model.
    """
    from safetensors.torch import load_file

    saved, own = load_file(folder / "model.safetensors"), _tensors(module)
    shapes = [{name: tuple(t.shape) for name, t in each.items()} for each in (saved, own)]
    if shapes[0] != shapes[1]:
        names = sorted({name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items())})
        raise ValueError(f"{folder} is of another model; these differ: {', '.join(names)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global random generators as JSON values.

    Example:
        >>> state = random_state()
        >>> first = torch.rand(3)
        >>> restore_random_state(json.loads(json.dumps(state)))
        >>> torch.equal(first, torch.rand(3))
        True
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": {**numpy_state, "state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}},
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in cuda],
        "mps": _text(torch.mps.get_rng_state()) if torch.backends.mps.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global random generators to what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {"key": key, "pos": numpy_state["state"]["pos"]}})
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_bytes(text) for text in state["cuda"]])
    if state["mps"] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_bytes(state["mps"]))


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global random generators.

    Args:
        seed: 0 to 2^32 − 1.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that train and persistent buffers by name, each tensor once."""
    kept = module.state_dict(keep_vars=True)
    seen: set[int] = set()
    once = {}
    for name, tensor in kept.items():
        frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        if id(tensor) not in seen and not frozen:
            seen.add(id(tensor))
            once[name] = tensor
    return once


def _text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
