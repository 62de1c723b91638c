"""From AdamW to SGDSaI: the same groups and the same decay of a step."""

import logging
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nomadam.optimizers.options import check_learning_rate, check_range
from nomadam.optimizers.sgd_sai import SGDSaI

LOGGER = logging.getLogger("nomadam")

# Of a group of AdamW, what SGDSaI has under the same name and meaning.
KEPT = ("maximize", "foreach", "differentiable")
# Of a group of AdamW, what belongs to it and to no one else.
ITS_OWN = ("params", "param_names", "lr", "betas", "eps", "weight_decay", "amsgrad", "capturable",
           "fused", "decoupled_weight_decay")  # fmt: skip
# What a scheduler has left in a group.
SCHEDULED = ("initial_lr", "max_lr", "min_lr")


def from_adamw(optimizer_or_config: Optimizer | Mapping[str, Any], *, lr: float) -> SGDSaI:
    r"""Builds an SGDSaI for the groups of an AdamW, which it replaces.

    ```text
    learning rate of a group:  lr * (AdamW's of the group) / (AdamW's default)
    weight_decay of a group:   AdamW's * (AdamW's learning rate) / (the new one)
    momentum:                  betas[0]
    ```

    So the ratios of the groups' rates stay (layer-wise decay of rates, other rates for heads),
    and so does the part of each weight by which the decay shrinks it in a step. Where a scheduler
    has been at work, the rates that it started from and the present ones are scaled alike: build a
    scheduler of the same kind on the new optimizer. Moments are not carried over; gains are
    measured at the next step. What was changed is logged, as a warning of the logger ``nomadam``.

    Args:
        optimizer_or_config: an AdamW (torch's, or another one of that name whose groups have
            ``betas``), or its keyword arguments with ``params`` among them.
        lr: learning rate of SGDSaI where AdamW has its default one, above 0. Five times AdamW's is
            a place to search from.

    Returns:
        A new SGDSaI over the same parameters; the old optimizer is left as it is.

    Raises:
        TypeError: for what is neither.
        ValueError: for an Adam whose decay is coupled and not 0, a configuration without ``params``
            or ``lr``, and a learning rate that is not above 0 (SGDSaI's or the default of AdamW).

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> adamw = torch.optim.AdamW(model.named_parameters(), lr=2e-3, weight_decay=0.1)
        >>> group = from_adamw(adamw, lr=1e-2).param_groups[0]
        >>> group["lr"], round(group["weight_decay"], 12), group["momentum"]
        (0.01, 0.02, 0.9)
    """
    check_range("lr", lr, 0.0)
    if not lr > 0.0:
        raise ValueError(f"lr must be above 0, got {lr}")
    groups, defaults, begun = _read(optimizer_or_config)
    for group in groups:
        _check(group)
    reference = _reference(groups, defaults)
    if not reference > 0.0:
        raise ValueError(f"the default learning rate of AdamW must be above 0, got {reference}")
    factor = lr / reference
    further = [_further(group, defaults) for group in groups]
    made = [_group(group, factor) | more for group, more in zip(groups, further, strict=True)]
    decay, momentum = float(defaults["weight_decay"]) / factor, float(defaults["betas"][0])
    optimizer = SGDSaI(made, lr=lr, weight_decay=decay, momentum=momentum)
    _tell(made, groups, further, factor, begun)
    return optimizer


def _read(given: Any) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """The groups, complete, the defaults, and whether there is a state that is left behind."""
    if isinstance(given, Optimizer):
        named = any("adam" in cls.__name__.lower() for cls in type(given).__mro__)
        if not named or not {"betas", "weight_decay"} <= set(given.defaults):
            raise TypeError(f"optimizer_or_config must be an AdamW, got {type(given).__name__}")
        for group in given.param_groups:
            coupled = "adamw" not in type(given).__name__.lower()
            coupled = not group.get("decoupled_weight_decay", not coupled)
            if coupled and group.get("weight_decay", 0.0) != 0.0:
                raise ValueError(
                    f"the decay of {type(given).__name__} is coupled (weight_decay = "
                    f"{group['weight_decay']}), which no decoupled decay equals: "
                    "set it to 0 first, or pass the configuration that you want"
                )
        return list(given.param_groups), given.defaults, bool(given.state)
    if not isinstance(given, Mapping):
        raise TypeError(f"optimizer_or_config must be an AdamW, got {type(given).__name__}")
    for key in ("params", "lr"):
        if key not in given:
            raise ValueError(f"the configuration of AdamW must have {key!r}")
    unknown = sorted(set(given) - {*ITS_OWN, *KEPT})
    if unknown:
        raise ValueError(f"AdamW has no {', '.join(map(repr, unknown))}; it has {_listed()}")
    defaults = {"betas": (0.9, 0.999), "weight_decay": 1e-2, **given}
    params = list(defaults.pop("params"))
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    return [{**defaults, **group} for group in groups], defaults, False


def _reference(groups: list[dict[str, Any]], defaults: Mapping[str, Any]) -> float:
    """AdamW's default rate; what a scheduler began with where that one is filled in place."""
    for group in groups:
        if group.get("lr") is defaults["lr"] and isinstance(defaults["lr"], Tensor):
            return float(group.get("initial_lr", defaults["lr"]))
    return float(defaults["lr"])


def _listed() -> str:
    return ", ".join(sorted({*ITS_OWN, *KEPT} - {"param_names", "decoupled_weight_decay"}))


def _check(old: Mapping[str, Any]) -> None:
    """Raises ValueError for a number of AdamW's that is none."""
    check_learning_rate(old["lr"])
    check_range("weight_decay", old["weight_decay"], 0.0)
    betas = old["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    check_range("betas[0]", betas[0].item() if isinstance(betas[0], Tensor) else betas[0], 0.0, 1.0)


def _group(old: Mapping[str, Any], factor: float) -> dict[str, Any]:
    names = old.get("param_names")
    params = [old["params"]] if isinstance(old["params"], Tensor) else list(old["params"])
    new = {
        "params": list(zip(names, params, strict=True)) if names else params,
        "lr": old["lr"] * factor,
        "weight_decay": float(old["weight_decay"]) / factor,
        "momentum": float(old["betas"][0]),
    }
    new |= {key: old[key] for key in KEPT if key in old}
    scheduled = {key: old[key] for key in SCHEDULED if isinstance(old.get(key), Real | Tensor)}
    return new | {key: rate * factor for key, rate in scheduled.items()}


def _further(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What others have put into a group, such as the ``lr_scale`` of timm's schedulers."""
    known = {*ITS_OWN, *KEPT, *SCHEDULED, *defaults}
    return {key: value for key, value in group.items() if key not in known}


def _tell(
    made: list[dict[str, Any]],
    groups: list[dict[str, Any]],
    further: list[dict[str, Any]],
    factor: float,
    begun: bool,
) -> None:
    lines = [f"learning rates times {factor:g}, weight decays divided by it, momentum = betas[0]"]
    for index, (new, old) in enumerate(zip(made, groups, strict=True)):
        lines.append(
            f"group {index}: lr {float(old['lr']):g} -> {float(new['lr']):g}, weight_decay "
            f"{old['weight_decay']:g} -> {new['weight_decay']:g}"
        )
    dropped = ["betas[1]", "eps"]
    options = ("amsgrad", "capturable", "fused")
    dropped += [key for key in options if any(group.get(key) for group in groups)]
    lines.append(f"dropped: {', '.join(dropped)}")
    kept = dict.fromkeys(key for more in further for key in more)
    if kept:
        lines.append(f"kept as they are: {', '.join(kept)}")
    if begun:
        lines.append("AdamW's moments stay behind: gains are measured at the next step")
    LOGGER.warning("from AdamW to SGDSaI:\n  %s", "\n  ".join(lines))
