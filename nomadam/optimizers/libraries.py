"""What builds each baseline: one function for each library's optimizer, numbers only."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from nomadam.optimizers.adam_mini import AdamMini
from nomadam.optimizers.muon_pair import MuonAdamW

Groups = list[dict[str, Any]]


def library(name: str, module: str) -> Any:
    """A package of the extra ``baselines``, or ImportError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"optimizer {name!r} needs the package {module!r}, which could not be imported "
            f'({error}): pip install "nomadam[baselines]"'
        ) from error


def sgdm(
    groups: Groups,
    lr: Any,
    *,
    momentum: float = 0.9,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> Optimizer:
    """SGD of torch in EMA form: dampening = momentum, and the first buffer is the gradient."""
    return torch.optim.SGD(
        groups, lr, momentum=momentum, dampening=momentum, foreach=foreach, fused=fused
    )


def _adam_family(
    kind: type[torch.optim.Adam],
    groups: Groups,
    lr: Any,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> Optimizer:
    return kind(groups, lr, betas=(beta1, beta2), eps=eps, foreach=foreach, fused=fused)


adam = partial(_adam_family, torch.optim.Adam)
adamw = partial(_adam_family, torch.optim.AdamW)


def adam_mini(
    groups: Groups, lr: Any, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Optimizer:
    """Adam-mini of `nomadam.optimizers.adam_mini`."""
    return AdamMini(groups, lr, betas=(beta1, beta2), eps=eps)


def prodigy(
    groups: Groups,
    lr: Any,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = math.inf,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = True,
    slice_p: int = 1,
) -> Optimizer:
    """Prodigy of prodigyopt, decoupled decay; the safeguard is on, for schedules with warm-up."""
    # The decay is in the groups: given to the constructor it makes the package print.
    return library("prodigy", "prodigyopt").Prodigy(
        groups,
        lr,
        betas=(beta1, beta2),
        eps=eps,
        d0=d0,
        d_coef=d_coef,
        growth_rate=growth_rate,
        use_bias_correction=use_bias_correction,
        safeguard_warmup=safeguard_warmup,
        slice_p=slice_p,
    )


def lion(
    groups: Groups,
    lr: Any,
    *,
    beta1: float = 0.9,
    beta2: float = 0.99,
    foreach: bool | None = None,
) -> Optimizer:
    """Lion of pytorch_optimizer, decoupled decay."""
    return library("lion", "pytorch_optimizer").Lion(
        groups, lr, betas=(beta1, beta2), foreach=foreach
    )


def adafactor(
    groups: Groups,
    lr: Any,
    *,
    beta2_decay: float = -0.8,
    eps1: float = 1e-15,
    eps2: float = 1e-3,
    d: float = 1.0,
    foreach: bool | None = None,
) -> Optimizer:
    """Adafactor of torch; `eps1` is squared where it bounds the second moment: 1e-30."""
    return torch.optim.Adafactor(
        groups, lr, beta2_decay=beta2_decay, eps=(eps1, eps2), d=d, foreach=foreach
    )


def schedule_free_adamw(
    groups: Groups,
    lr: Any,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    foreach: bool | None = True,
) -> Optimizer:
    """AdamW of schedulefree; `train()` and `eval()` switch between its two points."""
    if beta1 == 0:
        raise ValueError("beta1 must be above 0 for schedule_free_adamw, got 0")
    return library("schedule_free_adamw", "schedulefree").AdamWScheduleFree(
        groups,
        lr,
        betas=(beta1, beta2),
        eps=eps,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        foreach=foreach,
    )


def muon(
    groups: Groups,
    lr: Any,
    *,
    momentum: float = 0.95,
    ns_steps: int = 5,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Optimizer:
    """`MuonAdamW`, each method with its own settings."""
    settings = {
        "muon": {"momentum": momentum, "ns_steps": ns_steps},
        "adamw": {"betas": (beta1, beta2), "eps": eps},
    }
    return MuonAdamW([group | settings[group["method"]] for group in groups], lr)
