"""State that is kept in a wider dtype than its parameter, through a load."""

from typing import Any

from torch.optim import Optimizer


def restore_wide(optimizer: Optimizer, state_dict: dict[str, Any], *keys: str) -> None:
    """Gives loaded tensors the dtype that they were saved in: torch casts them to the parameter's.

    Args:
        optimizer: that has just loaded the state; its tensors are replaced by copies.
        state_dict: what it has loaded.
        keys: of the tensors; a parameter whose state lacks the first of them is left alone.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> optimizer.state[weight]["sums"] = torch.ones(2)
        >>> saved = optimizer.state_dict()
        >>> optimizer.load_state_dict(saved)
        >>> restore_wide(optimizer, saved, "sums")
        >>> optimizer.state[weight]["sums"].dtype
        torch.float32
    """
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, param in zip(indices, params, strict=True):
        saved = state_dict["state"].get(i, {})
        if keys[0] in saved:
            for key in keys:
                optimizer.state[param][key] = saved[key].to(param.device, copy=True)
