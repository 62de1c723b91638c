"""SCALE: SGD with normalised columns, momentum on the output layer alone, AdamW on vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nomadam.optimizers.adamw_pair import AdamWPair
from nomadam.optimizers.options import check_range
from nomadam.optimizers.roles import Names, outputs_last, role_groups

SMALLEST_RMS = 1e-8


class Scale(AdamWPair):
    r"""SCALE: what is stepped along is normalised column by column, and hardly anything is kept.

    A column belongs to one output of a layer: a row of `nn.Linear.weight`, a column of the weight
    of transformers' `Conv1D`, a filter of a convolution; of an embedding it is one of the features,
    over all tokens. For each column c of a gradient g

    ```text
    d <- g                                       method "column": no state
    d <- m <- momentum * m + (1 - momentum) * g  method "last": the output layer, from m = 0
    p <- p - lr * weight_decay * p
    p_c <- p_c - lr * d_c / rms(d_c)             nothing where the root mean square is 0
    ```

    and vectors take torch's AdamW. The square root of the mean square is the authors' code; their
    paper divides by the Euclidean norm, which is another learning rate for each shape.

    Each parameter group has a `method`, `"column"`, `"last"` or `"adamw"`, and that method's own
    settings: `output_dim` of the first two, the dimension that counts the columns, 0 or -1 (default
    0, as in `nn.Linear.weight`), and `momentum` of `"last"`, in [0, 1), default 0.9.

    Args:
        params: Groups as `torch.optim` takes them, named or not, each with a `method`.
        lr: Learning rate, at least 0. Default 1e-3.
        weight_decay: Decoupled decay, at least 0. Default 0.1.

    Raises:
        ValueError: A group has no method, a setting does not belong to it or is out of its range,
            or a group with normalised columns holds a tensor below two dimensions.

    Source: Glentis et al., *A Minimalist Optimizer Design for LLM Pretraining*, arXiv 2506.16659,
    Algorithm 1. No library has it.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Scale([{"params": [weight], "method": "column"}], lr=0.1)
        >>> weight.grad = torch.tensor([[3.0, 3.0], [0.0, -1e-3]])
        >>> optimizer.step()
        >>> weight.detach()
        tensor([[-0.1000, -0.1000],
                [ 0.0000,  0.1414]])
        >>> len(optimizer.state)
        0
    """

    def own_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Of the two methods that normalise columns."""
        return {"column": {"output_dim": 0}, "last": {"output_dim": 0, "momentum": 0.9}}

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for settings out of their range, and for vectors among the matrices."""
        super().check_group(group)
        if group["method"] == "adamw":
            return
        if group["output_dim"] not in (0, -1):
            raise ValueError(f"output_dim must be 0 or -1, got {group['output_dim']!r}")
        if group["method"] == "last":
            check_range("momentum", group["momentum"], 0.0, 1.0)
        low = [list(p.shape) for p in group["params"] if p.ndim < 2]
        if low:
            raise ValueError(f"columns need tensors of two or more dimensions, got shapes {low}")

    def step_own(self, group: dict[str, Any]) -> None:
        """Steps along normalised columns."""
        lr, decay = group["lr"], group["weight_decay"]
        for param in group["params"]:
            if param.grad is None or not param.numel():
                continue
            grad = param.grad
            if group["method"] == "last":
                state = self.state[param]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                grad = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            param.mul_(1 - lr * decay)
            param.sub_(lr * normalized_columns(grad, group["output_dim"]).to(param.dtype))


def normalized_columns(grad: Tensor, output_dim: int) -> Tensor:
    """A gradient with root mean square 1 in every column, in float32 or wider.

    Args:
        grad: Of two or more dimensions.
        output_dim: The dimension that counts the columns, 0 or -1; the mean is over all others.

    Returns:
        A new tensor; a column of zeros stays one.

    Examples:
        >>> normalized_columns(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), output_dim=-1)
        tensor([[1.4142, 1.4142],
                [0.0000, 0.0000]])
    """
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    over = [dim for dim in range(grad.ndim) if dim != output_dim % grad.ndim]
    return wide / wide.square().mean(over, keepdim=True).sqrt().clamp_min(SMALLEST_RMS)


def scale_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head: Names | None = None,
    rest: Names = (),
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model for `Scale`: each tensor's method, and which way its columns lie.

    Args:
        model: The model, as `role_groups` takes it, like all other arguments. Convolution filters
            are matrices of `[channels out, everything else]`.
        weight_decay: Decoupled decay of what decays, at least 0.
        head: Name of the output layer's weight; default None: ask the model.
        rest: Names of further tables, as position tables, beside the embeddings.
        decay_embeddings: Whether embeddings decay. Default True.

    Returns:
        Groups for `Scale`.

    Raises:
        ValueError: As `role_groups`.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 5))
        >>> groups = scale_groups(model, 0.1, head="1.weight")
        >>> [(g["method"], g.get("output_dim"), [n for n, _ in g["params"]]) for g in groups]
        [('column', -1, ['0.weight']), ('last', 0, ['1.weight']), ('adamw', None, ['1.bias'])]
    """
    groups = role_groups(
        model,
        weight_decay,
        head=head,
        rest=rest,
        convolutions="flatten",
        decay_embeddings=decay_embeddings,
    )
    last, found = outputs_last(model), []
    for group in groups:
        role = group.pop("role")
        if role == "vector":
            found.append({**group, "method": "adamw"})
            continue
        method = "last" if role == "head" else "column"
        for output_dim in (0, -1):
            params = [
                (name, parameter)
                for name, parameter in group["params"]
                if (role == "embedding" or parameter in last) == (output_dim == -1)
            ]
            if params:
                found.append(
                    {**group, "params": params, "method": method, "output_dim": output_dim}
                )
    return found


def scale(
    groups: list[dict[str, Any]],
    lr: float | Tensor,
    *,
    momentum: float = 0.9,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Scale:
    """`Scale`, each method with its own settings.

    Args:
        groups: Of `scale_groups`.
        lr: Learning rate, at least 0.
        momentum: Of the output layer, in [0, 1). Default 0.9.
        beta1: AdamW's, in [0, 1). Default 0.9.
        beta2: AdamW's, in [0, 1). Default 0.999.
        eps: AdamW's, at least 0. Default 1e-8.

    Raises:
        ValueError: A value is out of its range.

    Examples:
        >>> scale([{"params": [nn.Parameter(torch.ones(2, 2))], "method": "last"}], 1e-3).defaults
        {'lr': 0.001, 'weight_decay': 0.1}
    """
    adamw = {"betas": (beta1, beta2), "eps": eps}
    settings = {"column": {}, "last": {"momentum": momentum}, "adamw": adamw}
    return Scale([group | settings[group["method"]] for group in groups], lr)
