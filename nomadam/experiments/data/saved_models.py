"""Models as transformers and diffusers save them, every weight of which is in the file."""

import json
import re
from pathlib import Path
from typing import Any

# Constants that files of older versions hold beside the weights.
_CONSTANTS = re.compile(r"\.(masked_bias|position_ids)$")


def read_model(kind: Any, folder: Path, **options: Any) -> Any:
    """Read a model from a folder with ``config.json`` and its weights in safetensors.

    The libraries themselves draw at random what a file lacks, and leave out what it has more.

    Args:
        kind: the class, of transformers or diffusers.
        folder: as `save_pretrained` writes it.
        **options: for the class's `from_pretrained`.

    Raises:
        ValueError: the folder can not be read, is of another class, or its weights are not exactly
            those of the model that its configuration describes.
    """
    what = f"{folder} can not be read as {kind.__name__}"
    try:
        config = json.loads((folder / "config.json").read_text())
        # Transformers' configuration has the one, diffusers' the other.
        for name, wanted in (
            ("model_type", getattr(getattr(kind, "config_class", None), "model_type", None)),
            ("_class_name", kind.__name__),
        ):
            if wanted is not None and config.get(name, wanted) != wanted:
                raise ValueError(f"config.json has {name} = {config[name]!r}, not {wanted!r}")
        model, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are told as the others are
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the libraries and their readers raise types without a parent
        raise ValueError(f"{what}: {error}") from error
    told = []
    for flaw, text in (
        ("missing_keys", "the weights lack"),
        ("unexpected_keys", "the configuration has no"),
        ("mismatched_keys", "the shape differs of"),
    ):
        keys = [key if isinstance(key, str) else key[0] for key in found[flaw]]
        keys = sorted(key for key in keys if not _CONSTANTS.search(key))
        if keys:
            told.append(f"{text} {', '.join(keys[:3])}" + " and others" * (len(keys) > 3))
    if told:
        raise ValueError(f"{what}: {'; '.join(told)}")
    return model
