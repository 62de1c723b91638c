"""Adam-mini: Adam with one second moment for each block of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from nomadam.optimizers.options import check_learning_rate, check_range
from nomadam.optimizers.param_groups import EMBEDDINGS, NORMS, decay_groups, trainable_parameters

# Factors of peft, whose rows are no heads, whatever layer they adapt.
ADAPTERS = ("lora_a", "lora_b")
QUERY_KEY = {"q_proj", "k_proj", "query", "key", "wq", "wk"}
VALUE_OUT = {"v_proj", "value", "wv", "o_proj", "out_proj", "wo", "c_proj", "proj", "dense"}
FUSED = {"c_attn", "qkv", "in_proj"}  # query, key and value stacked, each with its heads in order
KINDS = ("whole", "row", "head", "query_key_value")

Blocks = tuple[tuple[int, int], ...]


class AdamMini(Optimizer):
    """Adam whose second moment is one number for each block, decay decoupled.

        m <- beta1 m + (1 - beta1) g                 v_b <- beta2 v_b + (1 - beta2) mean_b(g^2)
        p <- p - lr * weight_decay * p
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v_b / (1 - beta2^t)) + eps)

    A block is a run of rows of a tensor, where a row holds the weights of one output: query and
    key by attention head; value, projections and MLP by output; embeddings by token; biases by
    element, which is Adam; norms whole. `mini_groups` writes this into the groups.

    Args:
        params: Groups as `torch.optim` takes them; each has `blocks`, `((count, rows), ...)`, that
            many blocks of that many rows one after another, which together are all rows, and
            `output_dim`, the dimension along which rows lie (0 for `nn.Linear`, 1 for the
            transposed weights of transformers' `Conv1D`).
        lr: Learning rate, at least 0. Default 1e-3.
        betas: Coefficients of the two averages, each in [0, 1). Default (0.9, 0.999).
        eps: Added to the denominator, at least 0. Default 1e-8.
        weight_decay: Decoupled decay, at least 0. Default 0.

    Raises:
        ValueError: A number out of its range, or blocks that do not fill a tensor's rows.

    Source: arXiv 2406.16793, Algorithm 1 and the partition of Algorithm 3. The numbers are those
    of the `adam_mini` 1.1.1 package where that package finds the same blocks.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(4, 3))
        >>> group = {"params": [weight], "blocks": ((2, 2),), "output_dim": 0}
        >>> optimizer = AdamMini([group], lr=0.1)
        >>> weight.grad = torch.ones(4, 3)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg_sq"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Makes the optimizer; the arguments are those of the class."""
        check_learning_rate(lr)
        check_range("eps", eps, 0.0)
        check_range("weight_decay", weight_decay, 0.0)
        for index, beta in enumerate(betas):
            check_range(f"betas[{index}]", beta, 0.0, 1.0)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking that its blocks fill the rows of its tensors.

        Args:
            param_group: As for `torch.optim`, with `blocks` and `output_dim`.

        Raises:
            ValueError: The blocks are missing or do not fit.
        """
        if "blocks" not in param_group or "output_dim" not in param_group:
            raise ValueError("each group needs its blocks and output_dim (see mini_groups)")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        num_rows = sum(count * rows for count, rows in group["blocks"])
        for param in group["params"]:
            if param.is_complex():
                self.param_groups.pop()
                raise ValueError("complex parameters are not supported")
            if _rows(param, group["output_dim"]) != num_rows:
                self.param_groups.pop()
                raise ValueError(
                    f"blocks {group['blocks']} have {num_rows} rows, a tensor of shape "
                    f"{list(param.shape)} has {_rows(param, group['output_dim'])}"
                )

    def num_blocks(self) -> dict[str | int, int]:
        """Counts the blocks of each tensor.

        Returns:
            Name of the parameter (its index where it was given without a name) to the number of
            its blocks.
        """
        counts: dict[str | int, int] = {}
        for group in self.param_groups:
            names = group.get("param_names") or range(
                len(counts), len(counts) + len(group["params"])
            )
            counts |= dict.fromkeys(names, sum(count for count, _ in group["blocks"]))
        return counts

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
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or not param.numel():
                    continue
                state = self.state[param]
                if not state:
                    blocks = sum(count for count, _ in group["blocks"])
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = param.new_zeros(blocks)
                _update(param, param.grad, state, group)
        return loss


def _update(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    dim, blocks = group["output_dim"], group["blocks"]
    state["step"] += 1
    step = int(state["step"])
    lr = float(group["lr"])
    rows = _rows(param, dim)

    rest = [other for other in range(grad.ndim) if other != dim]
    norms = torch.linalg.vector_norm(grad, dim=rest) if rest else grad.reshape(-1)
    row_mean = norms.square().mul_(rows / grad.numel())
    row_means = row_mean.split([count * size for count, size in blocks])
    means = [
        part.view(count, size).mean(1)
        for part, (count, size) in zip(row_means, blocks, strict=True)
    ]
    state["exp_avg"].lerp_(grad, 1 - beta1)
    second = state["exp_avg_sq"].lerp_(torch.cat(means), 1 - beta2)
    scales = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"]).reciprocal_()
    spread = [
        part.repeat_interleave(size)
        for part, (_, size) in zip(scales.split([n for n, _ in blocks]), blocks, strict=True)
    ]
    shape = [rows if other == dim else 1 for other in range(param.ndim)]
    param.mul_(1 - lr * group["weight_decay"])
    param.addcmul_(state["exp_avg"], torch.cat(spread).view(shape), value=-lr / (1 - beta1**step))


def mini_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head_dim: int | None = None,
    blocks: Mapping[str, str] | None = None,
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model into Adam-mini's blocks, decay as in `decay_groups`.

    By module type: embeddings by row (token), norms whole, weights of `nn.Linear` and of
    transformers' `Conv1D` by output, biases (by name) by element, everything else whole. Within
    attention, by the last part of the module's name: `q_proj k_proj query key wq wk` by head;
    `c_attn qkv` as query, key and value stacked, the first two by head; `v_proj value wv` and the
    output projection by output; `nn.MultiheadAttention` accordingly. Another matrix whose path has
    a part with "attn" or "attention" in it is an error, and not a guess: `blocks` decides.

    Args:
        model: The model. Frozen parameters are left out, tied weights come once.
        weight_decay: Decoupled decay of what decays, at least 0.
        head_dim: Rows of a head. Default None: that of `model.config`, as transformers keeps it
            (`head_dim`, else `hidden_size / num_attention_heads`).
        blocks: Parameter name to `"head"`, `"row"`, `"query_key_value"` or `"whole"`, which
            goes before every rule. Default None.
        decay_embeddings: Whether embeddings decay. Default True.

    Returns:
        Groups for `AdamMini`, each with `params`, `weight_decay`, `blocks`, `output_dim`.

    Raises:
        ValueError: `head_dim` is not known or does not divide the rows, an attention layer is not
            known, or `blocks` has an unknown name or kind.

    Source: arXiv 2406.16793, Algorithm 3.

    Examples:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "mlp": nn.Linear(8, 4, bias=False)})
        >>> for group in mini_groups(model, 0.1, head_dim=4):
        ...     print([name for name, _ in group["params"]], group["blocks"])
        ['q_proj.weight'] ((2, 4),)
        ['mlp.weight'] ((4, 1),)
        ['q_proj.bias'] ((8, 1),)
    """
    given = dict(blocks or {})
    named = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in given if name not in named]
    if unknown:
        raise ValueError(f"blocks names parameters that the model lacks: {', '.join(unknown)}")
    kinds = {named[name]: kind for name, kind in given.items()}
    partitions = {
        parameter: _partition(model, name, parameter, holders, kinds.get(parameter), head_dim)
        for name, parameter, holders in trainable_parameters(model)
    }
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in decay_groups(model, weight_decay, decay_embeddings=decay_embeddings):
        for name, parameter in group["params"]:
            dim, rows = partitions[parameter]
            key = (group["weight_decay"], dim, rows)
            fresh = {**group, "params": [], "blocks": rows, "output_dim": dim}
            groups.setdefault(key, fresh)["params"].append((name, parameter))
    return list(groups.values())


def _partition(
    model: nn.Module,
    name: str,
    parameter: nn.Parameter,
    holders: list[nn.Module],
    kind: str | None,
    head_dim: int | None,
) -> tuple[int, Blocks]:
    # transformers' Conv1D (not nn.Conv1d) keeps its weight as [inputs, outputs].
    transposed = parameter.ndim == 2 and any(type(m).__name__ == "Conv1D" for m in holders)
    dim = 1 if transposed else 0
    rows = _rows(parameter, dim)
    kind = kind or _kind(name, parameter, holders, transposed)
    if kind not in KINDS:
        raise ValueError(f"{name}: blocks must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "whole":
        return dim, ((1, rows),)
    if kind == "row":
        return dim, ((rows, 1),)
    width = head_dim or _head_dim(model, holders)
    if width is None:
        raise ValueError(f"{name} is partitioned by attention head: pass head_dim=")
    parts = 1 if kind == "head" else 3
    if width < 1 or rows % (parts * width):
        raise ValueError(f"{name} has {rows} rows, which are not {parts} times heads of {width}")
    if kind == "head":
        return dim, ((rows // width, width),)
    return dim, ((2 * rows // (3 * width), width), (rows // 3, 1))


def _head_dim(model: nn.Module, holders: list[nn.Module]) -> int | None:
    for module in holders:
        if isinstance(module, nn.MultiheadAttention):
            return module.head_dim
    config = getattr(model, "config", None)
    width = getattr(config, "head_dim", None)
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(width, int):
        return width
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def _kind(name: str, parameter: nn.Parameter, holders: list[nn.Module], transposed: bool) -> str:
    path = name.lower().split(".")
    if parameter.ndim < 2 and path[-1].endswith("bias"):
        return "row"
    if parameter.ndim < 2 or any(isinstance(module, NORMS) for module in holders):
        return "whole"
    if any(isinstance(module, EMBEDDINGS) for module in holders):
        return "row"
    if any(part in ADAPTERS for part in path):
        return "row"
    linear = transposed or any(isinstance(module, nn.Linear) for module in holders)
    role = path[-2] if len(path) > 1 else ""
    if any(isinstance(module, nn.MultiheadAttention) for module in holders):
        linear, role = True, path[-1].removesuffix("_weight")
    if linear and role in QUERY_KEY:
        return "head"
    # Three equal parts only: grouped queries and cross-attention stack otherwise.
    if (
        linear
        and role in FUSED
        and parameter.numel() == 3 * parameter.shape[int(not transposed)] ** 2
    ):
        return "query_key_value"
    attention = any("attn" in part or "attention" in part for part in path)
    if (attention or role in FUSED) and not (linear and role in VALUE_OUT):
        raise ValueError(
            f"{name}: not known which of its rows are queries and keys; say it with "
            f"blocks={{{name!r}: 'head'}}, or 'row', 'query_key_value' or 'whole'"
        )
    return "row" if linear else "whole"


def _rows(parameter: Tensor, dim: int) -> int:
    return parameter.shape[dim] if parameter.ndim else 1
