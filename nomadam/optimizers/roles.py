"""What each tensor of a model is to methods that treat them apart: hidden matrix, table, vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nomadam.optimizers.options import check_range
from nomadam.optimizers.param_groups import (
    EMBEDDINGS,
    decay_groups,
    is_laid_over_batch,
    trainable_parameters,
)

FILTERS = nn.modules.conv._ConvNd

Names = str | Sequence[str]


def role_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head: Names | None = None,
    rest: Names = (),
    convolutions: str = "refuse",
    decay_embeddings: bool = True,
    rest_is_called: str = "rest",
) -> list[dict[str, Any]]:
    """Splits a model by decay and by role: hidden matrices, embeddings, output layer, vectors.

    - `"hidden"`: weights of two dimensions outside of embeddings and of the output layer, and
      convolution filters where they are asked for.
    - `"embedding"`: by module type; and what is laid over the batch (`is_laid_over_batch`), as
      position tables, and other tensors of two or more dimensions that `rest` names.
    - `"head"`: the output layer, which has to be known: transformers' and timm's models name it
      themselves, for others it is an argument. A tied weight is one, and no embedding.
    - `"vector"`: everything below two dimensions.

    Args:
        model: The model. Frozen parameters are left out, tied weights come once.
        weight_decay: Decay coefficient of what decays by `decay_groups`, at least 0.
        head: Name of the output layer's weight, or several names (in a list, or with commas), or
            `()` where there is none. Default None: ask the model.
        rest: Names of further weights that are no hidden matrices.
        convolutions: `"refuse"` (default): convolution filters are an error; `"flatten"`: they are
            hidden; the value of `rest_is_called`: they are not, and count as embeddings.
        decay_embeddings: Whether embeddings decay. Default True.
        rest_is_called: Name of the argument `rest` in messages.

    Returns:
        Groups with `params`, `weight_decay` and `role`, in the order of `decay_groups`.

    Raises:
        ValueError: The output layer is not known, a name is not in the model, or tensors of more
            than two dimensions have no declared role.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3), nn.Linear(3, 5))
        >>> for group in role_groups(model, 0.1, head="2.weight"):
        ...     print(group["role"], group["weight_decay"], [n for n, _ in group["params"]])
        hidden 0.1 ['1.weight']
        embedding 0.1 ['0.weight']
        head 0.1 ['2.weight']
        vector 0.0 ['1.bias', '2.bias']
    """
    if convolutions not in ("refuse", "flatten", rest_is_called):
        raise ValueError(
            f"convolutions must be 'refuse', 'flatten' or '{rest_is_called}', it is "
            f"{convolutions!r}"
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    heads = {named[name] for name in _known_names("head", _head_names(model, head), named)}
    apart = {named[name] for name in _known_names(rest_is_called, rest, named)}
    roles: dict[nn.Parameter, str] = {}
    filters, unclear = [], []
    for name, parameter, holders in trainable_parameters(model):
        table = any(isinstance(module, EMBEDDINGS) for module in holders)
        table = table or parameter in apart or is_laid_over_batch(parameter, holders)
        filter_bank = any(isinstance(module, FILTERS) for module in holders)
        if parameter.ndim < 2:
            roles[parameter] = "vector"
        elif parameter in heads:
            roles[parameter] = "head"
        elif table or (filter_bank and convolutions == rest_is_called):
            roles[parameter] = "embedding"
        elif parameter.ndim == 2 or (filter_bank and convolutions == "flatten"):
            roles[parameter] = "hidden"
        else:
            (filters if filter_bank else unclear).append(name)
    if filters:
        raise ValueError(
            f"convolution filters are not matrices: {', '.join(filters)}; pass "
            f"convolutions='flatten' (views of them are) or convolutions='{rest_is_called}'"
        )
    if unclear:
        raise ValueError(
            f"neither matrices nor convolution filters: {', '.join(unclear)}; "
            f"name them with {rest_is_called}=[...]"
        )
    groups = []
    for group in decay_groups(model, weight_decay, decay_embeddings=decay_embeddings):
        for role in ("hidden", "embedding", "head", "vector"):
            params = [(n, p) for n, p in group["params"] if roles[p] == role]
            if params:
                groups.append({**group, "params": params, "role": role})
    return groups


def method_groups(groups: list[dict[str, Any]], methods: dict[str, str]) -> list[dict[str, Any]]:
    """Gives each group the method of its role, and joins those of one decay and one method.

    Args:
        groups: What `role_groups` returned.
        methods: Role to the name of its method.

    Examples:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> groups = [{"params": [("a", p)], "weight_decay": 0.1, "role": "head"}]
        >>> method_groups(groups, {"head": "sign"})[0]["method"]
        'sign'
    """
    joined: dict[tuple[float, str], dict[str, Any]] = {}
    order = list(dict.fromkeys(methods.values()))
    for group in groups:
        method = methods[group["role"]]
        key = (group["weight_decay"], method)
        into = joined.setdefault(key, {"params": [], "weight_decay": key[0], "method": method})
        into["params"] += group["params"]
    decays = list(dict.fromkeys(decay for decay, _ in joined))
    return [joined[d, m] for d in decays for m in order if (d, m) in joined]


def with_second_rate(
    groups: list[dict[str, Any]], lr: float | Tensor, method: str, second: float, *, name: str
) -> list[dict[str, Any]]:
    """Gives the groups of a method a learning rate of their own, and all the same shrinking.

    Args:
        groups: With `method` and `weight_decay`.
        lr: Learning rate of the others.
        method: Whose groups get the second one.
        second: The second learning rate, above 0.
        name: What to call it in messages.

    Returns:
        New groups; where `method` is theirs with `lr`, and the decay times `lr / second`.

    Raises:
        ValueError: `second` is not a number above 0.

    Examples:
        >>> groups = [{"params": [], "weight_decay": 1.0, "method": "sign"}]
        >>> with_second_rate(groups, 1e-2, "sign", 1e-3, name="sign_lr")[0]["weight_decay"]
        10.0
    """
    check_range(name, second, 0.0)
    if second == 0.0:
        raise ValueError(f"{name} must be above 0, got {second!r}")
    factor = float(lr) / second
    return [
        group | {"lr": second, "weight_decay": group["weight_decay"] * factor}
        if group["method"] == method
        else group
        for group in groups
    ]


def outputs_last(model: nn.Module) -> set[nn.Parameter]:
    """Weights that lie as `[inputs, outputs]`: those of transformers' `Conv1D`, as GPT-2 has it.

    Args:
        model: The model.

    Examples:
        >>> outputs_last(nn.Linear(2, 3))
        set()
    """
    return {
        parameter
        for _, parameter, holders in trainable_parameters(model)
        if parameter.ndim == 2 and any(type(module).__name__ == "Conv1D" for module in holders)
    }


def _head_names(model: nn.Module, head: Names | None) -> Sequence[str]:
    if head is not None:
        return _listed(head)
    weight = getattr(_output_layer(model), "weight", None)
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} does not say which layer is its output layer, which is no "
            "hidden matrix: pass head='name.of.its.weight', or head=() if there is none"
        )
    return names


def _output_layer(model: nn.Module) -> Any:
    """What the model itself names as its output layer, as transformers' and timm's models do."""
    for question in ("get_output_embeddings", "get_classifier"):
        ask = getattr(model, question, None)
        layer = ask() if callable(ask) else None
        if layer is not None:
            return layer
    # transformers' classifiers say it by their configuration and one attribute.
    layer, config = getattr(model, "classifier", None), getattr(model, "config", None)
    labels = getattr(config, "num_labels", None)
    return layer if isinstance(layer, nn.Linear) and layer.out_features == labels else None


def _known_names(argument: str, names: Names, named: dict[str, nn.Parameter]) -> Sequence[str]:
    names = _listed(names)
    unknown = [name for name in names if name not in named]
    if unknown:
        raise ValueError(f"{argument} names parameters that the model lacks: {', '.join(unknown)}")
    return names


def _listed(names: Names) -> list[str]:
    """Names as a list; a text has them with commas, as a JSON scalar must, and none if empty."""
    if isinstance(names, str):
        return [name.strip() for name in names.split(",")] if names.strip() else []
    return list(names)
