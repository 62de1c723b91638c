"""SGD-SaI whose gains follow training: a number a block, and a number a row of tables and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from nomadam.numerics.moments import gsnr, moments
from nomadam.optimizers.options import check_learning_rate, check_range
from nomadam.optimizers.roles import Names, outputs_last, role_groups
from nomadam.optimizers.wide_state import restore_wide


class RowSGDSaI(Optimizer):
    r"""SGD-SaI whose blocks and rows step less where gradients have grown since they started.

    A block starts at its first informative gradient g_1 (present, finite, not all zero), as in
    `SGDSaI`: with its gain and its momentum. From there on, at the step t of its own,

    ```text
    m <- momentum * m + (1 - momentum) * g           from m = g_1
    v <- beta2 * v + (1 - beta2) * mean(g^2)         one number a block, or one a row; from 0
    r  = sqrt(v / (1 - beta2^t))
    f  = sqrt(rms(g_1) / r)                          of a block
    f_i = sqrt(R / r_i)   R = sum(r^2) / sum(r)      of row i
    p <- p - lr * weight_decay * p
    p <- p - lr * gain * f * m                       gain = |g_1| / std(g_1)
    ```

    where f and f_i are 0 where r is. At t = 1 a block's f is 1 and this is `SGDSaI`; a gradient
    that then grows a hundredfold makes the step ten times as long and not a hundred. Rows share the
    length that the block's step would have (sum of (f_i r_i)^2 = sum of r_i^2): frequent tokens
    give to rare ones, half of the way, in logarithms, to steps of one length. It is meant for
    embeddings and output layers, whose gain is that of their most frequent rows.

    The state is one momentum, as SGDSaI's, and those numbers, kept in float32 or wider in units of
    rms(g_1)^2, so that they do not depend on the scale of the loss.

    Each parameter group may have a `row_dim`: None (default) for a number a block; -1 or 0, the
    dimension that runs along a row: -1 for `nn.Embedding` and `nn.Linear`, 0 for an output layer
    that lies as `[inputs, outputs]`.

    Args:
        params: Parameters, named parameters or groups, as torch's.
        lr: Learning rate, finite and at least 0. Default 1e-2.
        momentum: In [0, 1). Default 0.9.
        beta2: Of the average of squares, in [0, 1). Default 0.99.
        weight_decay: Decoupled decay, at least 0. Default 1e-2.

    Raises:
        ValueError: A value is out of its range, a group with rows holds a tensor below two
            dimensions, or a parameter is complex.
        RuntimeError: From `step`, for sparse gradients, before anything is changed.

    Source: our own. A square root of the ratio, and not the ratio as in Adam, and a length of the
    step that the rows share: first trials, which are not kept, were better with both.

    Examples:
        >>> table = nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = RowSGDSaI([{"params": [table], "row_dim": -1}], lr=1.0)
        >>> table.grad = torch.tensor([[4.0, -4.0], [1.0, -1.0]])
        >>> optimizer.step()
        >>> (table[0, 0] / table[1, 0]).item()  # and not 4
        2.0
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 1e-2,
    ) -> None:
        """Makes the optimizer; the arguments are those of the class."""
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay}
        _check(defaults | {"row_dim": None, "params": []})
        super().__init__(params, defaults | {"row_dim": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does, or raises ValueError for it and adds none."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes one step.

        Args:
            closure: Optional; called once, with gradients enabled.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        blocks = [
            (param, param.grad, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and param.numel()
        ]
        if any(grad.layout != torch.strided for _, grad, _ in blocks):
            raise RuntimeError("RowSGDSaI does not support sparse gradients: ask for dense ones")
        unusable = self._start([block for block in blocks if "gsnr" not in self.state[block[0]]])
        for param, grad, group in blocks:
            if param not in unusable:
                param.mul_(1 - group["lr"] * group["weight_decay"])
            if "gsnr" in self.state[param]:
                self._step_block(param, grad, group)
        return loss

    def _start(self, waiting: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> set[Tensor]:
        """Starts the blocks whose gradient is informative; returns those with one not finite."""
        unusable = set()
        measured = moments([grad for _, grad, _ in waiting]) if waiting else []
        for (param, grad, group), found in zip(waiting, measured, strict=True):
            if not found.informative:
                if found.largest != 0.0:
                    unusable.add(param)
                continue
            wide, row_dim = torch.promote_types(param.dtype, torch.float32), group["row_dim"]
            shape = () if row_dim is None else _row_shape(param, row_dim)
            self.state[param].update(
                step=0,
                gsnr=gsnr(found),
                first_rms=found.largest * found.norm / found.count**0.5,
                momentum_buffer=grad.to(param.dtype, copy=True),
                mean_square=torch.zeros(shape, dtype=wide, device=param.device),
            )
        return unusable

    def _step_block(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, wide = self.state[param], torch.promote_types(param.dtype, torch.float32)
        state["step"] += 1
        if state["step"] > 1:
            state["momentum_buffer"].lerp_(grad.to(param.dtype), 1 - group["momentum"])
        square = (grad.to(wide) / state["first_rms"]).square()
        square = square.mean() if group["row_dim"] is None else square.mean(group["row_dim"], True)
        kept = state["mean_square"].lerp_(square, 1 - group["beta2"])
        rms = (kept / (1 - group["beta2"] ** state["step"])).sqrt()
        shared = 1.0 if group["row_dim"] is None else rms.square().sum() / rms.sum()
        factor = torch.where(rms > 0, shared / rms, 0.0).sqrt()
        step = state["momentum_buffer"].to(wide) * (group["lr"] * state["gsnr"] * factor)
        param.sub_(step.to(param.dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, whose squares stay in float32: torch rounds them to bfloat16 parameters'.

        Args:
            state_dict: What `state_dict()` gave.
        """
        super().load_state_dict(state_dict)
        restore_wide(self, state_dict, "mean_square")


def _row_shape(param: Tensor, row_dim: int) -> list[int]:
    shape = list(param.shape)
    shape[row_dim] = 1
    return shape


def _check(group: dict[str, Any]) -> None:
    check_learning_rate(group["lr"])
    check_range("momentum", group["momentum"], 0.0, 1.0)
    check_range("beta2", group["beta2"], 0.0, 1.0)
    check_range("weight_decay", group["weight_decay"], 0.0)
    if group["row_dim"] not in (None, 0, -1):
        raise ValueError(f"row_dim must be None, 0 or -1, got {group['row_dim']!r}")
    low = [list(p.shape) for p in group["params"] if p.ndim < 2]
    if group["row_dim"] is not None and low:
        raise ValueError(f"rows need tensors of two or more dimensions, got shapes {low}")
    if any(p.is_complex() for p in group["params"]):
        raise ValueError("RowSGDSaI takes real parameters, got complex ones")


def row_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head: Names | None = None,
    rest: Names = (),
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model for `RowSGDSaI`: rows for embeddings and output layer, blocks for the rest.

    Args:
        model: The model, as `role_groups` takes it, like all other arguments.
        weight_decay: Decoupled decay of what decays, at least 0.
        head: Name of the output layer's weight; default None: ask the model.
        rest: Names of further tables, as position tables, beside the embeddings.
        decay_embeddings: Whether embeddings decay. Default True.

    Returns:
        Groups with `params`, `weight_decay` and `row_dim`.

    Raises:
        ValueError: As `role_groups`.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3), nn.Linear(3, 5))
        >>> groups = row_groups(model, 0.1, head="2.weight")
        >>> [(g["row_dim"], [name for name, _ in g["params"]]) for g in groups]
        [(None, ['1.weight']), (-1, ['0.weight', '2.weight']), (None, ['1.bias', '2.bias'])]
    """
    groups = role_groups(
        model,
        weight_decay,
        head=head,
        rest=rest,
        convolutions="flatten",
        decay_embeddings=decay_embeddings,
    )
    last, joined = outputs_last(model), {}
    for group in groups:
        rows = group.pop("role") in ("embedding", "head")
        for name, param in group.pop("params"):
            row_dim = (0 if param in last else -1) if rows else None
            key = (group["weight_decay"], row_dim)
            into = joined.setdefault(key, {**group, "row_dim": row_dim, "params": []})
            into["params"].append((name, param))
    return list(joined.values())


def sgd_sai_rows(
    groups: list[dict[str, Any]],
    lr: float | Tensor,
    *,
    momentum: float = 0.9,
    beta2: float = 0.99,
) -> RowSGDSaI:
    """`RowSGDSaI` over the groups of `row_groups`.

    Args:
        groups: Of `row_groups`.
        lr: Learning rate, at least 0.
        momentum: In [0, 1). Default 0.9.
        beta2: Of the average of squares, in [0, 1). Default 0.99.

    Raises:
        ValueError: A value is out of its range.

    Examples:
        >>> sgd_sai_rows(row_groups(nn.Linear(2, 3), 0.1, head=()), 1e-2).defaults["beta2"]
        0.99
    """
    return RowSGDSaI(groups, lr, momentum=momentum, beta2=beta2)
