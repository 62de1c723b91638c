"""What an optimizer's options may be: one message for each mistake, with the allowed range."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor


def check_range(name: str, value: Any, low: float, below: float = math.inf) -> None:
    """Raises ValueError unless ``value`` is a number in [low, below).

    Examples:
        >>> check_range("momentum", 1.5, 0.0, 1.0)
        Traceback (most recent call last):
        ...
        ValueError: momentum must be a number in [0.0, 1.0), got 1.5
    """
    if not _is_number(value) or not low <= value < below:
        raise ValueError(f"{name} must be a number in [{low}, {below}), got {value!r}")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_learning_rate(lr: Any) -> None:
    """Raises ValueError unless ``lr`` is finite and >= 0, as a number or a one-element tensor."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
        lr = lr.item()
    check_range("lr", lr, 0.0)


def check_gain(gain: Any) -> None:
    """Raises ValueError unless ``gain`` is a known rule, a positive number or a mapping to such."""
    if isinstance(gain, str) and gain in ("gsnr", "sqrt_numel"):
        return
    numbers = gain if isinstance(gain, Mapping) else {"gain": gain}
    wrong = {k: x for k, x in numbers.items() if not _is_number(x) or not 1e-30 <= x <= 1e30}
    if wrong:
        raise ValueError(
            "gain must be 'gsnr', 'sqrt_numel', a number in [1e-30, 1e30] or a mapping from "
            f"parameter names to such numbers, got {wrong}"
        )


def refuse_names(what: str, names: set[Any]) -> None:
    """Raises ValueError that lists ``names``, if there are any."""
    if names:
        listed = ", ".join(repr(name) for name in sorted(names, key=str))
        raise ValueError(f"{what} parameter names: {listed}")


def pick_gains(
    gain: Mapping[Any, float], blocks: Mapping[Any, Tensor], *, all_known: bool
) -> dict[Any, float]:
    """The gains of these blocks; those without elements need none.

    Raises:
        ValueError: that lists the names without a gain; with ``all_known`` also any others.
    """
    refuse_names("gain lacks", {n for n, param in blocks.items() if param.numel()} - set(gain))
    if all_known:
        refuse_names("gain has unknown", set(gain) - set(blocks))
    return {name: float(gain[name]) for name in blocks if name in gain}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for any option of SGDSaI, of a group or the constructor, out of range."""
    check_learning_rate(options["lr"])
    check_range("momentum", options["momentum"], 0.0, 1.0)
    check_range("weight_decay", options["weight_decay"], 0.0)
    check_range("eps", options["eps"], 0.0)
    check_gain(options["gain"])
    check_refresh(options)
    check_switches(options)
    if options["direction"] not in ("momentum", "sign"):
        raise ValueError(f"direction must be 'momentum' or 'sign', got {options['direction']!r}")
    if options["fused"] and options["direction"] == "sign":
        raise ValueError("fused=True has no direction='sign': use fused=None or foreach=True")
    if options["nesterov"] and options["momentum"] == 0.0:
        raise ValueError("nesterov needs a momentum above 0, got momentum 0")
    if options["fused"] and options["foreach"]:
        raise ValueError("foreach=True and fused=True exclude each other")
    if options["fused"] and options["differentiable"]:
        raise ValueError("fused=True and differentiable=True exclude each other")
    if options["foreach"] and options["differentiable"]:
        raise ValueError("foreach=True and differentiable=True exclude each other")
    check_storage(options)


def check_switches(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a switch that is neither on nor off: any text would count as on."""
    for name in ("normalize", "nesterov", "maximize", "differentiable", "skip_nonfinite"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    for name in ("foreach", "fused"):
        if options[name] is not None and not isinstance(options[name], bool):
            raise ValueError(f"{name} must be None, True or False, got {options[name]!r}")


def check_refresh(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a period of measuring that is none, or does not suit the gain."""
    refresh, gain = options["refresh"], options["gain"]
    if refresh is None:
        return
    whole = isinstance(refresh, Integral) and not isinstance(refresh, bool)
    if not whole or int(refresh) < 1:
        raise ValueError(f"refresh must be None or an integer >= 1, got {refresh!r}")
    if gain != "gsnr":
        raise ValueError(f"refresh measures again what gain='gsnr' measures, got gain={gain!r}")
    if options["normalize"]:
        raise ValueError("refresh excludes normalize, whose divisor is settled once")


def named_dtype(momentum_dtype: Any) -> Any:
    """The dtype for ``"float32"`` and ``"bfloat16"``, as configuration files name them.

    Examples:
        >>> named_dtype("bfloat16"), named_dtype("int8"), named_dtype(None)
        (torch.bfloat16, 'int8', None)
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return names.get(momentum_dtype, momentum_dtype)


def check_storage(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of low-precision state that are out of range."""
    momentum_dtype, rounding, seed = (options[k] for k in ("momentum_dtype", "rounding", "seed"))
    if momentum_dtype not in (None, torch.float32, torch.bfloat16, "int8"):
        raise ValueError(
            "momentum_dtype must be None, torch.float32, torch.bfloat16 or 'int8', "
            f"got {momentum_dtype!r}"
        )
    if rounding not in ("auto", "nearest", "stochastic", "kahan"):
        raise ValueError(
            f"rounding must be 'auto', 'nearest', 'stochastic' or 'kahan', got {rounding!r}"
        )
    check_seed(seed)
    if options["differentiable"] and (
        momentum_dtype == "int8" or rounding in ("stochastic", "kahan")
    ):
        raise ValueError(
            "differentiable=True needs a momentum_dtype of floats and rounding 'auto' or "
            f"'nearest', got {momentum_dtype!r} and {rounding!r}"
        )


def check_seed(seed: Any, below: int = 2**64) -> None:
    """Raises ValueError unless ``seed`` is an integer in [0, below), a power of 2."""
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not whole or not 0 <= int(seed) < below:
        power = below.bit_length() - 1
        raise ValueError(f"seed must be an integer in [0, 2^{power}), got {seed!r}")


def plain_numbers(options: Mapping[str, Any]) -> dict[str, float]:
    """NumPy's numbers and the like as Python's: ``torch.load(weights_only=True)`` reads these."""
    return {
        name: int(value) if isinstance(value, Integral) else float(value)
        for name, value in options.items()
        if _is_number(value) and type(value) not in (int, float)
    }
