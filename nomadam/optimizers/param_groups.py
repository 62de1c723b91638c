"""Parameter groups: which tensors decay, and gains as plain learning rates for any engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from nomadam.optimizers.options import check_learning_rate, check_range

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Layers whose weight is a linear map, even where it has one output and so a first dimension of 1.
LINEAR_MAPS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[nn.Module]]]:
    """Yields name, parameter and the modules that hold it, for what requires a gradient.

    A tensor that several modules share (tied weights) comes once, under its first name, with all
    of the modules that hold it.

    Args:
        model: The module whose parameters are listed, in the order of `named_parameters()`.

    Yields:
        `(name, parameter, holders)`; `holders` are the modules that own the parameter directly.

    Examples:
        >>> from torch import nn
        >>> [name for name, _, _ in trainable_parameters(nn.Linear(2, 3))]
        ['weight', 'bias']
    """
    holders: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(module)
        if parametrize.is_parametrized(module):
            # A parametrized weight lies in a module of its own; it is the outer one that counts.
            for original in module.get_submodule("parametrizations").parameters():
                holders.setdefault(original, []).append(module)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, holders[parameter]


def is_laid_over_batch(parameter: nn.Parameter, holders: list[nn.Module]) -> bool:
    """Says whether a tensor is added to every row of a batch, and so is no linear map.

    It is, where it has three or more dimensions of which the first, that of the batch, is 1:
    `[1, tokens, width]`, as the class token and the position table of a vision transformer in
    transformers and in timm, or `bias_k` of `nn.MultiheadAttention`. A weight of `nn.Linear`,
    `nn.Bilinear` or a convolution never is, whatever its shape. A table without a dimension for
    the batch, `[tokens, width]`, looks like a matrix and counts as one.

    Args:
        parameter: The tensor.
        holders: The modules that own it, as `trainable_parameters` gives them.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.ParameterDict({"positions": torch.zeros(1, 17, 8), "map": torch.ones(8, 8)})
        >>> [n for n, p, held in trainable_parameters(model) if is_laid_over_batch(p, held)]
        ['positions']
    """
    linear = any(isinstance(module, LINEAR_MAPS) for module in holders)
    return parameter.ndim >= 3 and parameter.shape[0] == 1 and not linear


def decay_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Splits a model into tensors that decay and tensors that do not.

    Tensors of two or more dimensions decay; norms (by module type, whatever the dimensions of
    their weight), biases (by name), everything below two dimensions, and what is laid over the
    batch (`is_laid_over_batch`: class tokens and position tables of `[1, tokens, width]`, as the
    usual recipes for vision transformers have it) do not. Embeddings (by module type) follow
    `decay_embeddings`, and so does an output layer that is tied to one. `describe_groups` shows
    what came of it.

    Args:
        model: The model. Frozen parameters are left out, tied weights come once.
        weight_decay: Decay coefficient of the first group, at least 0.
        decay_embeddings: Whether `nn.Embedding` and `nn.EmbeddingBag` weights decay, as they do
            in the usual GPT-2 recipe. Default True.

    Returns:
        One or two groups, `{"params": [(name, parameter), ...], "weight_decay": number}`, in the
        named form that every `torch.optim` optimizer takes; an empty group is left out.

    Raises:
        ValueError: `weight_decay` is negative or not finite, or nothing requires a gradient.

    Examples:
        >>> from torch import nn
        >>> for group in decay_groups(nn.Linear(2, 3), 0.1):
        ...     print(group["weight_decay"], [name for name, _ in group["params"]])
        0.1 ['weight']
        0.0 ['bias']
    """
    check_range("weight_decay", weight_decay, 0.0)
    decayed: list[tuple[str, nn.Parameter]] = []
    kept: list[tuple[str, nn.Parameter]] = []
    for name, parameter, holders in trainable_parameters(model):
        bias = name.endswith("bias")
        added = is_laid_over_batch(parameter, holders)
        norm = any(isinstance(module, NORMS) for module in holders)
        embedding = any(isinstance(module, EMBEDDINGS) for module in holders)
        decays = parameter.ndim >= 2 and not (bias or added or norm)
        if embedding and not decay_embeddings:
            decays = False
        (decayed if decays else kept).append((name, parameter))
    if not decayed and not kept:
        raise ValueError("the model has no parameter that requires a gradient")
    groups = [
        {"params": decayed, "weight_decay": float(weight_decay)},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """Says in plain lines which tensors each parameter group holds, ready to be printed.

    Args:
        groups: What `decay_groups` or `scaled_param_groups` returned, or the `param_groups` of an
            optimizer that was built from named parameters.

    Returns:
        A line for each group with its settings, then a line for each tensor: name, shape.

    Examples:
        >>> from torch import nn
        >>> print(describe_groups(decay_groups(nn.Linear(2, 3), 0.1)))
        group 0: weight_decay 0.1, 1 tensor, 6 parameters
          weight [3, 2]
        group 1: weight_decay 0, 1 tensor, 3 parameters
          bias [3]
    """
    lines = []
    for number, group in enumerate(groups):
        named = list(group["params"])
        if named and isinstance(named[0], Tensor):
            names = group.get("param_names") or [str(index) for index in range(len(named))]
            named = list(zip(names, named, strict=True))
        settings = [
            f"{key} {float(group[key]):g}" for key in ("lr", "weight_decay") if key in group
        ]
        tensors = "1 tensor" if len(named) == 1 else f"{len(named)} tensors"
        count = sum(parameter.numel() for _, parameter in named)
        lines.append(f"group {number}: " + ", ".join([*settings, tensors, f"{count} parameters"]))
        lines += [f"  {name} {list(parameter.shape)}" for name, parameter in named]
    return "\n".join(lines)


def scaled_param_groups(
    model: nn.Module,
    gains: Mapping[str, float],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Turns gains into parameter groups, so that any optimizer or engine applies them.

    Each block becomes a group with `lr · gain` and `weight_decay / gain`: their product, by which
    a decoupled decay shrinks the weights, stays `lr · weight_decay`. With
    `torch.optim.SGD(groups, momentum=mu, dampening=mu)` and no decay this is SGDSaI. (SGD's own
    decay is coupled: it enters the momentum, and is not what SGDSaI does.)

    Args:
        model: The model. Frozen parameters are left out, tied weights come once.
        gains: Gain by parameter name, each finite and above 0, as `SGDSaI.gains()` gives them for
            named parameters. A tied weight may be named by any of its names. Parameters without
            elements need none; gains of frozen parameters are not used.
        lr: Learning rate before the gain, at least 0; a float or a one-element tensor.
        weight_decay: Decay coefficient before the gain, at least 0. Default 0.

    Returns:
        One group for each block: `{"params": [(name, parameter)], "lr": ..., "weight_decay": ...}`.

    Raises:
        ValueError: A block has no gain or a gain belongs to no parameter (all of them are
            listed), a gain is not a positive finite number, or `lr` or `weight_decay` is negative
            or not finite.

    Source: arXiv 2412.11768, Algorithm 1, without the division by the largest gain.

    Examples:
        >>> from torch import nn, optim
        >>> model = nn.Linear(2, 3)
        >>> gains = {"weight": 2.0, "bias": 4.0}
        >>> groups = scaled_param_groups(model, gains, lr=0.5, weight_decay=1.0)
        >>> [(group["lr"], group["weight_decay"]) for group in groups]
        [(1.0, 0.5), (2.0, 0.25)]
        >>> optimizer = optim.SGD(groups, momentum=0.9, dampening=0.9)
    """
    check_learning_rate(lr)
    check_range("weight_decay", weight_decay, 0.0)
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    known = {name for names in aliases.values() for name in names}
    unknown = [str(name) for name in gains if name not in known]
    if unknown:
        raise ValueError(f"gains for names that the model lacks: {', '.join(unknown)}")

    groups: list[dict[str, Any]] = []
    missing: list[str] = []
    for name, parameter, _ in trainable_parameters(model):
        named = [alias for alias in aliases[parameter] if alias in gains]
        given = {alias: _positive_gain(alias, gains[alias]) for alias in named}
        if len(set(given.values())) > 1:
            raise ValueError(f"different gains for one tied weight: {given}")
        if not given and parameter.numel():
            missing.append(name)
            continue
        gain = next(iter(given.values()), 1.0)
        scaled = {"lr": lr * gain, "weight_decay": weight_decay / gain}
        for key, value in scaled.items():
            check_range(f"{key} of {name} with its gain of {gain:g}", float(value), 0.0)
        groups.append({"params": [(name, parameter)], **scaled})
    if missing:
        raise ValueError(f"parameters without a gain: {', '.join(missing)}")
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    return groups


def _positive_gain(name: str, value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"the gain of {name} must be finite and above 0, it is {number}")
    return number
