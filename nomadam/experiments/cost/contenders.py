"""The optimizers that are measured: torch's, those of other packages, and SGDSaI's settings."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

from nomadam.experiments.cost.models import Tensors
from nomadam.optimizers.baselines import build_optimizer
from nomadam.optimizers.sgd_sai import SGDSaI
from nomadam.optimizers.sgd_sai_cpu import cpu_kernel

REFERENCE = "torch_sgd_fused"
# Learning rates at which hundreds of steps along one gradient leave the weights ordinary numbers.
SMALL, DECAY = 1e-6, 1e-2


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One optimizer with one setting.

    Args:
        name: as the command line takes it.
        label: as the tables print it.
        make: builds it for the tensors.
        state: what it keeps for a parameter, in words.
        state_bytes: about as many bytes a parameter, to foresee what fits.
        weights: dtype of weights and gradients.
        one_pass: whether its step needs each weight, gradient and state number just once, so
            that the bytes which it must move are known.
        slow_on_cpu: whether a large model takes minutes a step, or to compile, on a CPU.
    """

    name: str
    label: str
    make: Callable[[Tensors], Optimizer]
    state: str = "float32"
    state_bytes: float
    weights: torch.dtype = torch.float32
    one_pass: bool = True
    slow_on_cpu: bool = False


def _torch(kind: str, module: Tensors, **options: Any) -> Optimizer:
    return getattr(torch.optim, kind)(module.parameters(), lr=SMALL, weight_decay=DECAY, **options)


def _row(name: str, module: Tensors, lr: float = SMALL, **arguments: Any) -> Optimizer:
    return build_optimizer(name, module, lr=lr, weight_decay=DECAY, **arguments)


def _muon(module: Tensors) -> Optimizer:
    roles = {"head": module.output, "adamw": module.not_hidden, "convolutions": "adamw"}
    return _row("muon", module, **roles)


def _package(package: str, kind: str, module: Tensors, **options: Any) -> Optimizer:
    found = getattr(importlib.import_module(package), kind)
    return found(module.parameters(), lr=SMALL, weight_decay=DECAY, **options)


def _ours(module: Tensors, **options: Any) -> Optimizer:
    on_cpu = next(module.parameters()).device.type == "cpu"
    if options.get("fused") and on_cpu and cpu_kernel(warn=False) is None:
        raise RuntimeError("no C++ compiler was found")  # it would step on the foreach path
    return SGDSaI(module.named_parameters(), lr=SMALL, weight_decay=DECAY, **options)


def _rivals() -> list[Contender]:
    sgd = {"momentum": 0.9}
    rows = [
        (REFERENCE, "torch SGD, fused", partial(_torch, "SGD", fused=True, **sgd), 4),
        ("torch_sgd_foreach", "torch SGD, foreach",
         partial(_torch, "SGD", foreach=True, **sgd), 4),
        ("torch_adamw_fused", "torch AdamW, fused", partial(_torch, "AdamW", fused=True), 8),
        ("torch_adamw_foreach", "torch AdamW, foreach",
         partial(_torch, "AdamW", foreach=True), 8),
        ("adam_mini", "Adam-mini (ours)", partial(_row, "adam_mini"), 4),
        ("lion", "Lion (pytorch_optimizer)", partial(_row, "lion"), 4),
        ("released_sgd_sai", "sgd-sai, the released code",
         partial(_package, "sgd_sai", "SGD_sai"), 4),
        ("pytorch_optimizer_sgd_sai", "SGDSaI of pytorch_optimizer",
         partial(_package, "pytorch_optimizer", "SGDSaI"), 4),
    ]  # fmt: skip
    plain = [
        Contender(name=name, label=label, make=make, state_bytes=size)
        for name, label, make, size in rows
    ]
    # What these must move is not one reading and one writing of what they keep.
    many = [
        Contender(name="prodigy", label="Prodigy (prodigyopt)", state_bytes=16, one_pass=False,
                  make=partial(_row, "prodigy", lr=1e-3)),
        Contender(name="muon", label="Muon + AdamW (torch)", state_bytes=8, one_pass=False,
                  make=_muon, slow_on_cpu=True),
    ]  # fmt: skip
    return [*plain, *many, *_low_precision_rivals()]


def _low_precision_rivals() -> list[Contender]:
    return [
        Contender(
            name="torchao_adamw8bit",
            label="8-bit AdamW (torchao)",
            make=partial(_package, "torchao.optim", "AdamW8bit"),
            state="2 x 8 bits",
            state_bytes=2.1,
            slow_on_cpu=True,
        ),
        Contender(
            name="bitsandbytes_adamw8bit",
            label="8-bit AdamW (bitsandbytes)",
            make=partial(_package, "bitsandbytes.optim", "AdamW8bit"),
            state="2 x 8 bits",
            state_bytes=2.1,
            slow_on_cpu=True,
        ),
        Contender(
            name="flash_adamw",
            label="FlashAdamW (flashoptim)",
            make=partial(_package, "flashoptim", "FlashAdamW"),
            state="2 x 8 bits, 8 of the weight",
            state_bytes=3.1,
            weights=torch.bfloat16,
        ),
        Contender(
            name="flash_sgdw",
            label="FlashSGDW (flashoptim)",
            make=partial(_package, "flashoptim", "FlashSGDW", momentum=0.9),
            state="8 bits, 8 of the weight",
            state_bytes=2.1,
            weights=torch.bfloat16,
        ),
    ]


def _own() -> list[Contender]:
    bf16 = torch.bfloat16
    rows: list[tuple[str, str, str, float, torch.dtype, dict[str, Any]]] = [
        ("for_loop", "for-loop", "float32", 4, torch.float32, {"foreach": False, "fused": False}),
        ("foreach", "foreach", "float32", 4, torch.float32, {"foreach": True, "fused": False}),
        ("fused", "fused", "float32", 4, torch.float32, {"fused": True}),
        ("bf16_momentum", "fused, bf16 momentum", "bfloat16", 2, torch.float32,
         {"fused": True, "momentum_dtype": bf16}),
        ("int8_momentum", "fused, int8 momentum", "8 bits", 1.1, torch.float32,
         {"fused": True, "momentum_dtype": "int8"}),
        ("bf16", "fused, pure bf16, stochastic rounding", "bfloat16", 2, bf16,
         {"fused": True, "rounding": "stochastic"}),
        ("bf16_int8", "fused, pure bf16, stochastic rounding, int8 momentum", "8 bits", 1.1, bf16,
         {"fused": True, "rounding": "stochastic", "momentum_dtype": "int8"}),
        ("bf16_kahan", "fused, pure bf16, Kahan summation", "2 x bfloat16", 4, bf16,
         {"fused": True, "rounding": "kahan"}),
    ]  # fmt: skip
    return [
        Contender(
            name=f"sgd_sai_{name}",
            label=f"SGDSaI, {words}",
            make=partial(_ours, **options),
            state=state,
            state_bytes=size,
            weights=weights,
        )
        for name, words, state, size, weights, options in rows
    ]


CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {each.name: each for each in (*_rivals(), *_own())}
)


def choose(names: Sequence[str] | None = None) -> list[Contender]:
    """The contenders of these names, the reference first; of none, all.

    Args:
        names: of `CONTENDERS`; `torch_sgd_fused`, to which ratios are taken, need not be there.

    Raises:
        ValueError: a name is unknown; the message has those that are known.

    Example:
        >>> [each.name for each in choose(["lion"])]
        ['torch_sgd_fused', 'lion']
    """
    unknown = [name for name in names or () if name not in CONTENDERS]
    if unknown:
        raise ValueError(
            f"unknown optimizer {', '.join(map(repr, unknown))}; known: {', '.join(CONTENDERS)}"
        )
    wanted = CONTENDERS if not names else dict.fromkeys([REFERENCE, *names])
    return [CONTENDERS[name] for name in wanted]
