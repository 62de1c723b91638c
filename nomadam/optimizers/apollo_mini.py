"""APOLLO-Mini: SGD whose step for each matrix follows Adam's on a random line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nomadam.optimizers.adamw_pair import AdamWPair
from nomadam.optimizers.options import check_range, check_seed
from nomadam.optimizers.roles import Names, method_groups, role_groups
from nomadam.optimizers.wide_state import restore_wide

# Of the growth of a step's norm from one step to the next.
LARGEST_GROWTH = 1.01


class ApolloMini(AdamWPair):
    r"""APOLLO at rank 1 with one factor a matrix; AdamW on embeddings, output layer and vectors.

    For a matrix with gradient G of shape `[m, n]`, m <= n (else transposed), step t of its own and
    a row of normal numbers P of length m, drawn anew every `project_every` steps

    ```text
    r <- P G                                                        a vector of n numbers
    u <- Adam's update for r: beta1, beta2, eps, both bias corrections
    s <- |u| / |r|
    D <- s G, but not longer than 1.01 times its length a step ago  (norm-growth limiter)
    W <- W - lr * weight_decay * W
    W <- W - lr * sqrt(scale) * D
    ```

    So a matrix keeps Adam's two moments of r, 2 n numbers, and the length of D. A gradient that is
    all zero moves nothing. P depends on `seed`, the position of the matrix among the parameters and
    t alone, and is not kept.

    Each parameter group has a `method`, `"apollo"` or `"adamw"`, and that method's own settings:
    `betas` (default (0.9, 0.999)) and `eps` (default 1e-8) of both; `scale`, above 0 (default 128),
    `project_every`, at least 1 (default 200), and `seed` (default 0) of `"apollo"`, which takes
    convolution filters as matrices of `[first dimension, everything else]`.

    Args:
        params: Groups as `torch.optim` takes them, named or not, each with a `method`.
        lr: Learning rate, at least 0. Default 1e-3.
        weight_decay: Decoupled decay, at least 0. Default 0.1.

    Raises:
        ValueError: A group has no method, a setting does not belong to it or is out of its range,
            or an `"apollo"` group holds a tensor below two dimensions.

    Source: Zhu et al., *APOLLO: SGD-like Memory, AdamW-level Performance*, arXiv 2412.05270,
    Algorithm 1 and section 4.2, limiter of section 4.1. Our own: pytorch_optimizer 4.1.0 scales the
    projected gradient and steps along its projection back, of rank 1, where the method scales the
    gradient itself; and both it and apollo_torch keep an object in the state, which
    `torch.load(weights_only=True)` refuses.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = ApolloMini([{"params": [weight], "method": "apollo"}], lr=0.1)
        >>> weight.grad = torch.eye(2, 3)
        >>> optimizer.step()
        >>> (weight[0, 0] == weight[1, 1]).item(), weight[0, 1].item()
        (True, 0.0)
        >>> {key: value.numel() for key, value in optimizer.state[weight].items()}
        {'step': 1, 'exp_avg': 3, 'exp_avg_sq': 3, 'length': 1}
    """

    def own_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """APOLLO's."""
        own = {"scale": 128.0, "project_every": 200, "seed": 0}
        return {"apollo": {"betas": (0.9, 0.999), "eps": 1e-8} | own}

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for settings out of their range, and for vectors among the matrices."""
        super().check_group(group)
        if group["method"] == "adamw":
            return
        for beta in group["betas"]:
            check_range("betas", beta, 0.0, 1.0)
        check_range("eps", group["eps"], 0.0)
        check_range("scale", group["scale"], 0.0)
        check_range("project_every", group["project_every"], 1)
        check_seed(group["seed"], below=2**31)
        low = [list(p.shape) for p in group["params"] if p.ndim < 2]
        if low:
            raise ValueError(f"apollo needs tensors of two or more dimensions, got shapes {low}")

    def step_own(self, group: dict[str, Any]) -> None:
        """Scales gradients by what Adam does on a line."""
        indices = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        for param in group["params"]:
            if param.grad is not None and param.numel():
                self._step_matrix(param, param.grad, group, indices[param])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, whose moments stay in float32: torch rounds them to bfloat16 parameters'.

        Args:
            state_dict: What `state_dict()` gave.
        """
        super().load_state_dict(state_dict)
        # Of APOLLO's matrices, which alone have a length; the others' moments are torch's.
        restore_wide(self, state_dict, "length", "exp_avg", "exp_avg_sq")

    def _step_matrix(self, param: Tensor, grad: Tensor, group: dict[str, Any], index: int) -> None:
        wide = torch.promote_types(param.dtype, torch.float32)
        matrix = grad.to(wide).reshape(grad.shape[0], -1)
        matrix = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), device="cpu")
            state["exp_avg"] = matrix.new_zeros(matrix.shape[1])
            state["exp_avg_sq"] = matrix.new_zeros(matrix.shape[1])
            state["length"] = matrix.new_zeros(())
        state["step"] += 1
        step = int(state["step"])
        line = _normal_numbers(matrix, group["seed"], index, (step - 1) // group["project_every"])
        projected = line @ matrix
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].lerp_(projected, 1 - beta1)
        second = state["exp_avg_sq"].lerp_(projected.square(), 1 - beta2)
        update = first / (1 - beta1**step)
        update = update / ((second / (1 - beta2**step)).sqrt() + group["eps"])
        # Without a gradient along the line nothing is known of its scale: no step.
        size = projected.norm()
        factor = torch.where(size > 0, update.norm() / size, 0.0)
        length = factor * matrix.norm()
        allowed = LARGEST_GROWTH * state["length"]
        shrunk = (state["length"] > 0) & (length > allowed)
        factor = torch.where(shrunk, factor * allowed / length, factor)
        state["length"].copy_(torch.where(shrunk, allowed, length))
        lr = group["lr"]
        param.mul_(1 - lr * group["weight_decay"])
        param.sub_((lr * math.sqrt(group["scale"]) * factor * grad.to(wide)).to(param.dtype))


def _normal_numbers(matrix: Tensor, seed: int, index: int, draw: int) -> Tensor:
    """The line that a matrix is projected on, drawn on the host: alike on every device."""
    # Matrices and draws count apart, up to 65536 each, which is 13 million steps by default.
    generator = torch.Generator().manual_seed((seed << 32) ^ (index << 16) ^ draw)
    numbers = torch.randn(matrix.shape[0], generator=generator, dtype=torch.float64)
    return numbers.to(matrix.device, matrix.dtype)


def apollo_mini_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head: Names | None = None,
    adamw: Names = (),
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model into hidden matrices, for APOLLO-Mini, and the rest, for AdamW.

    Args:
        model: The model, as `role_groups` takes it, like all other arguments. Convolution filters
            are matrices of `[channels out, everything else]`.
        weight_decay: Decoupled decay of what decays, at least 0.
        head: Name of the output layer's weight; default None: ask the model.
        adamw: Names of further weights that go to AdamW.
        decay_embeddings: Whether embeddings decay. Default True.

    Returns:
        Groups for `ApolloMini`, each with `params`, `weight_decay` and `method`.

    Raises:
        ValueError: As `role_groups`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> [g["method"] for g in apollo_mini_groups(model, 0.1, head="1.weight")]
        ['apollo', 'adamw', 'adamw']
    """
    groups = role_groups(
        model,
        weight_decay,
        head=head,
        rest=adamw,
        convolutions="flatten",
        decay_embeddings=decay_embeddings,
        rest_is_called="adamw",
    )
    other = dict.fromkeys(("embedding", "head", "vector"), "adamw")
    return method_groups(groups, {"hidden": "apollo", **other})


def apollo_mini(
    groups: list[dict[str, Any]],
    lr: float | Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    scale: float = 128.0,
    project_every: int = 200,
    seed: int = 0,
) -> ApolloMini:
    """`ApolloMini`, each method with its own settings.

    Args:
        groups: Of `apollo_mini_groups`.
        lr: Learning rate, at least 0.
        beta1: Of both methods, in [0, 1). Default 0.9.
        beta2: Of both methods, in [0, 1). Default 0.999.
        eps: Of both methods, at least 0. Default 1e-8.
        scale: Its square root multiplies the matrices' step, at least 0. Default 128.
        project_every: Steps between draws of the line, at least 1. Default 200.
        seed: Of the draws, an integer in [0, 2^31). Default 0.

    Raises:
        ValueError: A value is out of its range.

    Examples:
        >>> groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "method": "apollo"}]
        >>> apollo_mini(groups, 1e-3).param_groups[0]["project_every"]
        200
    """
    adam = {"betas": (beta1, beta2), "eps": eps}
    own = {"scale": scale, "project_every": project_every, "seed": seed}
    settings = {"apollo": adam | own, "adamw": adam}
    return ApolloMini([group | settings[group["method"]] for group in groups], lr)
