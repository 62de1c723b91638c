"""The optimizers to compare with, by name: one row each, and the function that builds them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nomadam.optimizers import libraries, state_bytes
from nomadam.optimizers.adam_mini import mini_groups
from nomadam.optimizers.muon_pair import muon_groups
from nomadam.optimizers.options import check_learning_rate, check_range
from nomadam.optimizers.param_groups import decay_groups
from nomadam.optimizers.sgd_sai import SGDSaI


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

    Examples:
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

    def arguments(self) -> dict[str, Any]:
        """Lists what `build_optimizer` takes for this row beside `lr` and `weight_decay`.

        Returns:
            Name of the argument to its default.
        """
        known = _keyword_only(self.make) | _keyword_only(self.groups)
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
            >>> BASELINES["adamw"].state_bytes(nn.Linear(10, 10, bias=False))
            800
        """
        _refuse_unknown(self, arguments)
        return self.count_state(model, self.arguments() | arguments)


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
        if key in ("momentum", "beta1", "beta2"):
            check_range(key, value, 0.0, 1.0)
        elif key == "decay_embeddings" and not isinstance(value, bool):
            raise ValueError(f"decay_embeddings must be True or False, got {value!r}")
    for_groups = {key: arguments.pop(key) for key in _keyword_only(row.groups) if key in arguments}
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
    _refuse_unknown(row, arguments)
    _check_kinds(row, arguments)
    return row


def _keyword_only(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _refuse_unknown(row: Baseline, arguments: Mapping[str, Any]) -> None:
    known = row.arguments()
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(
                f"{row.name} has no argument {key!r}{hint} (known: {', '.join(sorted(known))})"
            )


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


_ROWS = (
    Baseline(
        name="sgd_sai",
        summary="SGD with a learning rate for each block, measured once at initialisation.",
        package="nomadam",
        default_lr=1e-2,
        default_weight_decay=1e-2,
        search_space={"lr": (3e-4, 3e-1), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=4,
        make=SGDSaI,
        count_state=state_bytes.sgd_sai_state,
    ),
    Baseline(
        name="sgdm",
        summary="SGD with EMA momentum (dampening = momentum: lr 10 here is 1 in torch's usual "
        "form) and coupled decay.",
        default_lr=1.0,
        default_weight_decay=1e-4,
        search_space={"lr": (3e-2, 3e1), "weight_decay": (1e-6, 1e-2)},
        state_bytes_per_param=4,
        make=libraries.sgdm,
        count_state=state_bytes.momentum_state,
    ),
    Baseline(
        name="sgdm_decoupled",
        summary="SGDSaI with a gain of 1: sgdm with decoupled decay. At these learning rates the "
        "decay has to be small: a step takes lr * weight_decay of each weight.",
        package="nomadam",
        default_lr=1.0,
        default_weight_decay=1e-4,
        search_space={"lr": (3e-2, 3e1), "weight_decay": (1e-6, 1e-2)},
        state_bytes_per_param=4,
        make=SGDSaI,
        fixed={"gain": 1.0, "normalize": False, "eps": 0.0},
        count_state=state_bytes.sgd_sai_state,
    ),
    Baseline(
        name="adam",
        summary="Adam with coupled decay (arXiv 1412.6980).",
        default_lr=1e-3,
        default_weight_decay=1e-4,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-6, 1e-2)},
        state_bytes_per_param=8,
        make=libraries.adam,
        count_state=state_bytes.copies(2),
    ),
    Baseline(
        name="adamw",
        summary="Adam with decoupled decay (arXiv 1711.05101).",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=8,
        make=libraries.adamw,
        count_state=state_bytes.copies(2),
    ),
    Baseline(
        name="adam_mini",
        summary="Adam-mini (arXiv 2406.16793), our own: adam_mini 1.1.1 and pytorch_optimizer "
        "4.1.0 find blocks by substrings of names, and give GPT-2's c_attn one block in all "
        "instead of one for each head.",
        package="nomadam",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=4,
        make=libraries.adam_mini,
        groups=mini_groups,
        count_state=state_bytes.adam_mini_state,
    ),
    Baseline(
        name="prodigy",
        summary="Prodigy (arXiv 2306.06101): finds the step size itself; keep lr at 1 and search "
        "d_coef. One estimate for the whole model.",
        package="prodigyopt>=1.1.2",
        extra="baselines",
        default_lr=1.0,
        default_weight_decay=1e-1,
        search_space={"d_coef": (1e-1, 1e1), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=16,
        make=libraries.prodigy,
        count_state=state_bytes.prodigy_state,
    ),
    Baseline(
        name="lion",
        summary="Lion (arXiv 2302.06675): the sign of a momentum; its decay is about ten times "
        "AdamW's, its learning rate a tenth.",
        package="pytorch_optimizer>=4.0",
        extra="baselines",
        default_lr=1e-4,
        default_weight_decay=1.0,
        search_space={"lr": (3e-6, 3e-3), "weight_decay": (1e-2, 1e1)},
        state_bytes_per_param=4,
        make=libraries.lion,
        count_state=state_bytes.copies(1),
    ),
    Baseline(
        name="adafactor",
        summary="Adafactor (arXiv 1804.04235, no first moment), lr relative to the size of the "
        "weights. torch's default floor of 1.2e-7 under the mean squared gradient is above "
        "usual gradients of a language model: 1e-15 here.",
        default_lr=5e-2,
        default_weight_decay=2e-3,
        search_space={"lr": (1e-3, 1.0), "weight_decay": (1e-4, 1e-1)},
        state_bytes_per_param=0,
        make=libraries.adafactor,
        count_state=state_bytes.adafactor_state,
    ),
    Baseline(
        name="schedule_free_adamw",
        summary="Schedule-free AdamW (arXiv 2405.15682): train() before steps, eval() before "
        "evaluations. Its step overwrites the gradients.",
        package="schedulefree>=1.4",
        extra="baselines",
        default_lr=3e-3,
        default_weight_decay=3e-2,
        search_space={"lr": (1e-4, 1e-1), "weight_decay": (1e-3, 1.0)},
        schedule="constant",
        state_bytes_per_param=8,
        make=libraries.schedule_free_adamw,
        count_state=state_bytes.copies(2),
    ),
    Baseline(
        name="muon",
        summary="Muon on hidden matrices, adjusted to AdamW's update size (arXiv 2502.16982), and "
        "AdamW, at 8 bytes, on embeddings, output layer and vectors.",
        package="torch>=2.9",
        default_lr=1e-3,
        default_weight_decay=1e-1,
        search_space={"lr": (3e-5, 3e-2), "weight_decay": (1e-3, 1.0)},
        state_bytes_per_param=4,
        make=libraries.muon,
        groups=muon_groups,
        count_state=state_bytes.muon_state,
    ),
)

BASELINES: Mapping[str, Baseline] = MappingProxyType({row.name: row for row in _ROWS})
