"""What an optimizer's options may be: one message for each mistake, with the allowed range."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeGuard

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
    if options["nesterov"] and options["momentum"] == 0.0:
        raise ValueError("nesterov needs a momentum above 0, got momentum 0")
    if options["fused"] and options["foreach"]:
        raise ValueError("foreach=True and fused=True exclude each other")
    if options["fused"]:
        raise ValueError("fused=True is not available for SGDSaI: use fused=None or fused=False")
    if options["foreach"] and options["differentiable"]:
        raise ValueError("foreach=True and differentiable=True exclude each other")


def plain_numbers(options: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of other kinds (NumPy's) as floats: ``torch.load(weights_only=True)`` reads these."""
    return {
        name: float(value)
        for name, value in options.items()
        if _is_number(value) and type(value) not in (int, float)
    }
