"""Parameters that an engine has flattened into vectors, where the blocks of SGD-SaI are lost."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Size, Tensor

from nomadam.numerics.sharded import is_sharded

WAY_OUT = (
    "as DeepSpeed's ZeRO and the first FSDP do, so that its blocks are lost. Measure before "
    "wrapping, and take the gains along: gains = nomadam.measure_gains(model, loss_fn, batches), "
    "then SGDSaI(nomadam.scaled_param_groups(model, gains, lr=...), gain=1.0). "
    "FSDP2 (fully_shard) keeps the blocks, and needs none of this"
)


def is_flat(param: Tensor) -> bool:
    """Whether the first FSDP has put a parameter into a vector with others.

    Examples:
        >>> import torch
        >>> is_flat(torch.zeros(3))
        False
    """
    named = any(cls.__name__ == "FlatParameter" for cls in type(param).__mro__)
    return named or getattr(param, "_fsdp_flattened", False) or hasattr(param, "ds_id")


def shapes_of(group: Mapping[str, Any]) -> list[Size]:
    """The shape of each parameter of a group, of sharded ones of the whole."""
    return [param.shape for param in group["params"]]


def refuse_flat(groups: Sequence[Mapping[str, Any]], shapes: Sequence[Sequence[Size]]) -> None:
    """Refuse parameters that are no blocks any more, where a block has a gain of its own.

    Args:
        groups: as they are now.
        shapes: of each group, when it was added.

    Raises:
        ValueError: with the way out.
    """
    for index, group in enumerate(groups):
        if isinstance(group["gain"], (int, float)) and not group["normalize"]:
            continue
        params = group["params"]
        flat = [param for param in params if is_flat(param)]
        if not flat and index < len(shapes) and shapes_of(group) != list(shapes[index]):
            known = set(shapes[index])
            sizes = {shape.numel() for shape in known}
            # A vector of the size of a matrix can hold the halves of two.
            flat = [
                param
                for param in params
                if not is_sharded(param)
                and param.shape not in known
                and (param.ndim == 1 or param.numel() not in sizes)
            ]
        if flat:
            raise ValueError(
                f"parameters of group {index} were flattened ({tuple(flat[0].shape)}), {WAY_OUT}"
            )
