"""SGDSaI on hidden matrices, and the sign of its momentum on tables, output layer and vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nomadam.optimizers.roles import Names, method_groups, role_groups, with_second_rate
from nomadam.optimizers.sgd_sai import SGDSaI


def sign_embedding_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head: Names | None = None,
    rest: Names = (),
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model into hidden matrices and filters, for SGDSaI, and the rest, for signs.

    Args:
        model: The model, as `role_groups` takes it, like all other arguments.
        weight_decay: Decoupled decay of what decays, at least 0.
        head: Name of the output layer's weight; default None: ask the model.
        rest: Names of further weights that go with the embeddings.
        decay_embeddings: Whether embeddings decay. Default True.

    Returns:
        Groups with `params`, `weight_decay` and `method`, `"sgd_sai"` or `"sign"`.

    Raises:
        ValueError: As `role_groups`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> [g["method"] for g in sign_embedding_groups(model, 0.1, head="1.weight")]
        ['sgd_sai', 'sign', 'sign']
    """
    groups = role_groups(
        model,
        weight_decay,
        head=head,
        rest=rest,
        convolutions="flatten",
        decay_embeddings=decay_embeddings,
    )
    other = dict.fromkeys(("embedding", "head", "vector"), "sign")
    return method_groups(groups, {"hidden": "sgd_sai", **other})


def sign_embedding_sgd_sai(
    groups: list[dict[str, Any]],
    lr: float | Tensor,
    *,
    momentum: float = 0.9,
    sign_lr: float = 1e-3,
    gain: str = "gsnr",
    foreach: bool | None = None,
) -> SGDSaI:
    """One `SGDSaI` whose embeddings, output layer and vectors step along signs.

    ```text
    m <- momentum * m + (1 - momentum) * g                   everywhere, from m = g
    p <- p - lr * weight_decay * p                           everywhere
    p <- p - lr * gain * m                                   hidden matrices and filters
    p <- p - sign_lr * sign(m)                               embeddings, output layer, vectors
    ```

    which is SGD-SaI beside signSGD with momentum. The state is one momentum tensor, as SGDSaI's.

    Args:
        groups: Of `sign_embedding_groups`.
        lr: Learning rate of the hidden matrices, at least 0.
        momentum: Of all, in [0, 1). Default 0.9.
        sign_lr: Size of the steps along signs, above 0. Default 1e-3.
        gain: Of the hidden matrices, as `SGDSaI` takes it. Default `"gsnr"`.
        foreach: As torch's.

    Returns:
        The optimizer. A step takes `lr * weight_decay` of any parameter that decays: in the groups
        of signs the decay is divided by `sign_lr / lr`.

    Raises:
        ValueError: A value is out of its range.

    Source: momentum with signs, arXiv 1802.04434, Algorithm 2 (Signum).

    Examples:
        >>> groups = sign_embedding_groups(nn.Linear(2, 3), 0.1, head=())
        >>> optimizer = sign_embedding_sgd_sai(groups, 1e-2)
        >>> [(g["direction"], g["gain"], g["lr"]) for g in optimizer.param_groups]
        [('momentum', 'gsnr', 0.01), ('sign', 1.0, 0.001)]
    """
    kinds = {"sgd_sai": {}, "sign": {"direction": "sign", "gain": 1.0}}
    made = []
    for group in with_second_rate(groups, lr, "sign", sign_lr, name="sign_lr"):
        own = {key: value for key, value in group.items() if key != "method"}
        made.append(own | kinds[group["method"]])
    return SGDSaI(made, lr, momentum=momentum, gain=gain, foreach=foreach)
