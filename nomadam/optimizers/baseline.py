"""What a row of the table of optimizers says: how one is built, searched and counted."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nomadam.optimizers.param_groups import decay_groups


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One optimizer as the comparisons use it.

    Args:
        name: Its name in `BASELINES`.
        summary: What it is, and what is particular about it here.
        package: The package that holds the method, and the oldest version that is known to work.
        extra: The extra of nomadam that installs the package; None where torch is enough.
        default_lr: Learning rate to begin with, a guess for a small GPT and no more.
        default_weight_decay: Decay that goes with it, such that where it is decoupled
            `lr * weight_decay`, by which a step shrinks the weights, is 1e-4 (Prodigy: its own).
        search_space: Argument (`lr`, `weight_decay` or one of `arguments()`) to the lowest and the
            highest value of a log-uniform search. What is not in it stays as it is.
        schedule: Name of the learning-rate schedule that goes with it, after a warm-up.
        state_bytes_per_param: State in bytes for each float32 parameter of a large matrix.
        make: `make(groups, lr, **arguments)` builds it.
        groups: `groups(model, weight_decay, **arguments)` splits the model.
        fixed: Arguments of `make` that make it this row, and are not for the caller.
        count_state: `count_state(model, arguments)` is the state in bytes.
        needs_lora: Whether it is for models with LoRA layers of peft alone.

    Examples:
        >>> from nomadam.optimizers.baselines import BASELINES
        >>> row = BASELINES["adamw"]
        >>> row.state_bytes_per_param, row.schedule, row.extra
        (8, 'cosine', None)
        >>> sorted(row.arguments())
        ['beta1', 'beta2', 'decay_embeddings', 'eps', 'foreach', 'fused']
    """

    name: str
    summary: str
    package: str = "torch"
    extra: str | None = None
    default_lr: float
    default_weight_decay: float
    search_space: Mapping[str, tuple[float, float]]
    schedule: str = "cosine"
    state_bytes_per_param: float
    make: Callable[..., Optimizer]
    groups: Callable[..., list[dict[str, Any]]] = decay_groups
    fixed: Mapping[str, Any] = field(default_factory=dict)
    count_state: Callable[[nn.Module, dict[str, Any]], int]
    needs_lora: bool = False

    def arguments(self) -> dict[str, Any]:
        """Lists what `build_optimizer` takes for this row beside `lr` and `weight_decay`.

        Returns:
            Name of the argument to its default.
        """
        known = keyword_only(self.make) | keyword_only(self.groups)
        hidden = {"weight_decay", *self.fixed}
        return {key: default for key, default in known.items() if key not in hidden}

    def state_bytes(self, model: nn.Module, **arguments: Any) -> int:
        """Counts the optimizer state that training this model will need.

        Args:
            model: The model; only its shapes and types matter (Prodigy alone looks at values:
                it keeps no copy of a tensor that is all zero).
            **arguments: As for `build_optimizer`.

        Returns:
            Bytes, without the step counter and the gain, which are one number for each tensor.

        Raises:
            TypeError: An argument is unknown.

        Examples:
            >>> from torch import nn
            >>> from nomadam.optimizers.baselines import BASELINES
            >>> BASELINES["adamw"].state_bytes(nn.Linear(10, 10, bias=False))
            800
        """
        refuse_unknown(self, arguments)
        return self.count_state(model, self.arguments() | arguments)


def keyword_only(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a function, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def refuse_unknown(row: Baseline, arguments: Mapping[str, Any]) -> None:
    """Raises TypeError for an argument that a row does not have, with the nearest names."""
    known = row.arguments()
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(
                f"{row.name} has no argument {key!r}{hint} (known: {', '.join(sorted(known))})"
            )
