"""The optimizers to compare with, by name, and the function that builds them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nomadam.optimizers.baseline import Baseline, keyword_only, refuse_unknown
from nomadam.optimizers.baseline_rows import ROWS
from nomadam.optimizers.options import check_learning_rate, check_range

BASELINES: Mapping[str, Baseline] = MappingProxyType({row.name: row for row in ROWS})


def build_optimizer(
    name: str, model: nn.Module, *, lr: float | Tensor, weight_decay: float, **arguments: Any
) -> Optimizer:
    """Builds an optimizer of `BASELINES` for a model, with names and decay groups.

    Args:
        name: A key of `BASELINES`.
        model: The model. Frozen parameters are left out, tied weights come once.
        lr: Learning rate, finite and at least 0.
        weight_decay: Decay coefficient, finite and at least 0, for the tensors that `decay_groups`
            lets decay. Coupled (it enters the gradient) in `sgdm` and `adam`, decoupled elsewhere.
        **arguments: `BASELINES[name].arguments()` lists them. All have `decay_embeddings`
            (default True); `sgd_sai` has those of `SGDSaI`.

    Returns:
        The optimizer. One that has `train()` and `eval()` needs `train()` before its first step.

    Raises:
        ValueError: The name is unknown, or a value is out of its range.
        TypeError: An argument is unknown; the message has the nearest names.
        ImportError: The package is not installed; the message names the extra.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 3)
        >>> optimizer = build_optimizer("sgd_sai", model, lr=1e-2, weight_decay=0.1)
        >>> [(g["weight_decay"], g["param_names"]) for g in optimizer.param_groups]
        [(0.1, ['weight']), (0.0, ['bias'])]
    """
    row = find_baseline(name, arguments)
    check_learning_rate(lr)
    check_range("weight_decay", weight_decay, 0.0)
    for key, value in arguments.items():
        if key.endswith("momentum") or key in ("beta1", "beta2"):
            check_range(key, value, 0.0, 1.0)
        elif key == "decay_embeddings" and not isinstance(value, bool):
            raise ValueError(f"decay_embeddings must be True or False, got {value!r}")
    for_groups = {key: arguments.pop(key) for key in keyword_only(row.groups) if key in arguments}
    groups = row.groups(model, weight_decay, **for_groups)
    return row.make(groups, lr, **row.fixed, **arguments)


def find_baseline(name: str, arguments: Mapping[str, Any]) -> Baseline:
    """Looks up a row that takes these arguments, before there is a model to build it for.

    Args:
        name: A key of `BASELINES`.
        arguments: Keyword arguments of `build_optimizer` beside `lr` and `weight_decay`.

    Raises:
        ValueError: The name is unknown; the message has the nearest names.
        TypeError: An argument is unknown; the message has the nearest names.

    Examples:
        >>> find_baseline("adamw", {"beta2": 0.95}).default_lr
        0.001
    """
    if name not in BASELINES:
        near = difflib.get_close_matches(str(name), BASELINES, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"unknown optimizer {name!r}{hint}; known: {', '.join(BASELINES)}")
    row = BASELINES[name]
    refuse_unknown(row, arguments)
    _check_kinds(row, arguments)
    return row


def _check_kinds(row: Baseline, arguments: Mapping[str, Any]) -> None:
    """Refuses values of another kind than the default's: the text "no" would count as true."""
    known = row.arguments()
    for key, value in arguments.items():
        default = known[key]
        if isinstance(default, bool) or key in ("foreach", "fused"):
            fits = isinstance(value, bool) or (value is None and default is None)
            allowed = "true or false" + (" or none" if default is None else "")
        elif isinstance(default, int):
            fits, allowed = isinstance(value, int) and not isinstance(value, bool), "an integer"
        elif isinstance(default, float):
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            allowed = "a number"
        else:
            continue
        if not fits:
            raise ValueError(f"{row.name}: {key} = {value!r}: must be {allowed}")
