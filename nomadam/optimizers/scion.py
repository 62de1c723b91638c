"""Scion of pytorch_optimizer: which norm constrains which tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nomadam.optimizers.libraries import library
from nomadam.optimizers.roles import Names, outputs_last, role_groups

# The authors' radii for GPT-2 with a tied embedding; the second is for signs over the width.
RADIUS, TABLE_RADIUS = 50.0, 3000.0
# Of the library's `LMONorm`; as numbers, which `torch.load(weights_only=True)` reads.
SPECTRAL, SPECTRAL_CONV, SIGN, RMS = 2, 3, 4, 5


def scion_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head: Names | None = None,
    rest: Names = (),
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model by the norm that constrains a tensor's step.

    Hidden matrices and filters: the spectral norm; embeddings and output layer: the largest
    element; vectors: the root mean square. The library scales a spectral step by
    sqrt(rows / columns), which is meant to be sqrt(outputs / inputs): the transposed weights of
    transformers' `Conv1D` get a radius that corrects it, and so a group for each shape.

    Args:
        model: The model, as `role_groups` takes it, like all other arguments.
        weight_decay: Decoupled decay of what decays, at least 0.
        head: Name of the output layer's weight; default None: ask the model.
        rest: Names of further tables, as position tables, beside the embeddings.
        decay_embeddings: Whether embeddings decay. Default True.

    Returns:
        Groups with `params`, `weight_decay`, `norm_type` and `scale`.

    Raises:
        ValueError: As `role_groups`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> for group in scion_groups(model, 1.0, head="1.weight"):
        ...     print(group["norm_type"], group["scale"], [n for n, _ in group["params"]])
        2 50.0 ['0.weight']
        4 3000.0 ['1.weight']
        5 50.0 ['0.bias', '1.bias']
    """
    groups = role_groups(
        model,
        weight_decay,
        head=head,
        rest=rest,
        convolutions="flatten",
        decay_embeddings=decay_embeddings,
    )
    last, found = outputs_last(model), {}
    for group in groups:
        for name, param in group["params"]:
            norm, radius = _norm(param, group["role"], transposed=param in last)
            fresh = {"params": [], "weight_decay": group["weight_decay"]}
            fresh |= {"norm_type": norm, "scale": radius}
            key = (group["weight_decay"], norm, radius)
            found.setdefault(key, fresh)["params"].append((name, param))
    return list(found.values())


def _norm(param: Tensor, role: str, *, transposed: bool) -> tuple[int, float]:
    if role == "vector":
        return RMS, RADIUS
    if role != "hidden":
        # The library divides signs by the second dimension: the width, unless a batch comes first.
        over_batch = param.ndim > 2 and param.shape[0] == 1
        return SIGN, TABLE_RADIUS * (param.shape[1] / param.shape[-1] if over_batch else 1.0)
    if param.ndim > 2:
        return SPECTRAL_CONV, RADIUS
    rows, columns = param.shape
    return SPECTRAL, RADIUS * columns / rows if transposed else RADIUS


def scion(
    groups: list[dict[str, Any]],
    lr: float | Tensor,
    *,
    momentum: float = 0.9,
    foreach: bool | None = None,
) -> Optimizer:
    """Scion of pytorch_optimizer, one momentum for each parameter, decoupled decay.

    ```text
    m <- momentum * m + (1 - momentum) * g                    from m = 0
    W <- W - lr * weight_decay * W
    W <- W - lr * radius * sqrt(outputs / inputs) * U V^T     hidden matrices, U S V^T = m
    W <- W - lr * radius * 60 / width * sign(m)               embeddings and output layer
    p <- p - lr * radius * m / rms(m)                         vectors
    ```

    U V^T is by five Newton-Schulz iterations in bfloat16, near it only. Weight decay 1 is the
    authors' constrained form, 0 the unconstrained one; weights are initialised as they come.

    Args:
        groups: Of `scion_groups`.
        lr: Learning rate, at least 0.
        momentum: In [0, 1). Default 0.9, which the authors call 0.1.
        foreach: As the library's.

    Raises:
        ImportError: pytorch_optimizer is not installed.

    Source: Pethick et al., *Training Deep Learning Models with Norm-Constrained LMOs*, arXiv
    2502.07529, Algorithm 1; radii of appendix E.3.
    """
    make = library("scion", "pytorch_optimizer").SCION
    return make(groups, lr, momentum=1 - momentum, foreach=foreach)
