"""What a run counts its data in, as the description of the data tells: tokens, pairs or images."""

from collections.abc import Mapping
from typing import Any

HELD_OUT = {"validation_images": "image", "validation_pairs": "pair", "validation_tokens": "token"}


def unit_of(data: Mapping[str, Any]) -> str:
    """``image``, ``pair`` or ``token``; the last too where the description has no size.

    Args:
        data: what ``run.json`` says of the data.

    Example:
        >>> unit_of({"source": "digits", "validation_images": 599})
        'image'
    """
    return next((unit for key, unit in HELD_OUT.items() if data.get(key) is not None), "token")


def num_held_out(data: Mapping[str, Any]) -> int | None:
    """How many of that unit are held out, None where the description has no size.

    Example:
        >>> num_held_out({"source": "digits", "validation_images": 599})
        599
    """
    return next((data[key] for key in HELD_OUT if data.get(key) is not None), None)
