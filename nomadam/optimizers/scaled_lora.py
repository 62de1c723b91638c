"""The Riemannian preconditioner of LoRA, in front of any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nomadam.optimizers import libraries
from nomadam.optimizers.options import check_range
from nomadam.optimizers.param_groups import decay_groups

DELTA = 1e-6


class LoRAPair(NamedTuple):
    """The two factors of one adapter: the layer's weight is W + scaling · B A.

    Args:
        a: `[rank, inputs]`, or `[rank, ...]` of a convolution.
        b: `[outputs, rank]`, or `[outputs, rank, 1, 1]` of a convolution.
    """

    a: nn.Parameter
    b: nn.Parameter


def lora_pairs(model: nn.Module) -> list[LoRAPair]:
    """Finds the pairs of all LoRA layers of a model, by peft's own modules and not by names.

    Args:
        model: A model with LoRA layers of peft: linear, convolution or embedding.

    Returns:
        A pair for each adapter of each layer of which A or B trains, in the order of the modules.

    Raises:
        ValueError: The model has no such pair, or a layer with other shapes than A and B have.
        ImportError: peft is not installed; the message names the extra.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        >>> [(list(pair.a.shape), list(pair.b.shape)) for pair in lora_pairs(model)]
        [([2, 3], [5, 2])]
    """
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "nomadam[lab]"') from error
    pairs = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for a, b in _factors(layer):
                if b.flatten(1).shape[1] != a.shape[0]:
                    raise ValueError(
                        f"{name}: A {list(a.shape)} and B {list(b.shape)} are no pair of one rank"
                    )
                if a.requires_grad or b.requires_grad:
                    pairs.append(LoRAPair(a, b))
    if not pairs:
        raise ValueError(
            "the model has no LoRA layer of peft that trains, which scaled_sgd and scaled_adamw "
            "are for: wrap it by peft.get_peft_model, or take another optimizer"
        )
    return pairs


def _factors(layer: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    for adapter in layer.lora_A:
        yield layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    for adapter in layer.lora_embedding_A:
        yield layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def preconditioned(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, *, delta: float = DELTA
) -> tuple[Tensor, Tensor]:
    r"""The gradients of a pair in the metric in which all factors of one product are alike.

    ```text
    G_A = (B^T B + delta I)^-1 grad_A
    G_B = grad_B (A A^T + delta I)^-1
    ```

    Args:
        a: `[rank, ...]`, taken as a matrix `[rank, inputs]`.
        b: `[outputs, rank, ...]`, taken as a matrix `[outputs, rank]`.
        grad_a: Gradient of `a`, of its shape.
        grad_b: Gradient of `b`, of its shape.
        delta: Above 0. Default 1e-6.

    Returns:
        `G_A` and `G_B`, new tensors of the shapes and types of the gradients; nothing is modified.

    Source: arXiv 2402.02347, equation 4 and the damping of its section on practice.

    Examples:
        >>> a, b = torch.eye(2), 2 * torch.eye(2)
        >>> [g[0, 0].item() for g in preconditioned(a, b, a, a, delta=1.0)]
        [0.20000000298023224, 0.5]
    """
    return _left_solved(b.flatten(1), grad_a, delta), _right_solved(a.flatten(1), grad_b, delta)


def _left_solved(b: Tensor, grad_a: Tensor, delta: float) -> Tensor:
    b = b.to(_precise(b))
    gram = b.T @ b
    gram.diagonal().add_(delta)
    solved, _ = torch.linalg.solve_ex(gram, grad_a.flatten(1).to(gram.dtype))
    return solved.to(grad_a.dtype).view_as(grad_a)


def _right_solved(a: Tensor, grad_b: Tensor, delta: float) -> Tensor:
    solved = _left_solved(a.T, grad_b.flatten(1).T, delta)
    return solved.T.reshape(grad_b.shape)


def _precise(tensor: Tensor) -> torch.dtype:
    # B starts at 0 and grows one direction after another: in float32 the squares of the small
    # ones drown in the rounding of the large. The matrices are small, MPS alone has no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def precondition_lora(
    optimizer: Optimizer, pairs: Iterable[LoRAPair], *, delta: float = DELTA
) -> Optimizer:
    r"""Makes an optimizer see the preconditioned gradients of LoRA pairs, at each of its steps.

    The gradients themselves are as before after the step, and so are state dict, groups and
    schedulers: there is no state beside the optimizer's own. What is in no pair is not concerned.
    Hooks are no part of a pickle or a deep copy of an optimizer: call this for the copy again.

    Args:
        optimizer: Any of torch's kind whose `step` reads `grad`; hooks are added to it.
        pairs: As `lora_pairs` finds them.
        delta: Above 0. Default 1e-6: the smaller, the longer the first steps of A while B is
            near its start of 0.

    Returns:
        The same optimizer. Its `step` then takes no closure, which would compute the gradients
        after they were preconditioned.

    Raises:
        ValueError: `delta` is not above 0; at a step, a closure is given.

    Source: arXiv 2402.02347, algorithms 1 and 2.

    Examples:
        >>> a, b = nn.Parameter(torch.eye(2)), nn.Parameter(torch.eye(2))
        >>> optimizer = torch.optim.SGD([a, b], lr=1.0)
        >>> optimizer = precondition_lora(optimizer, [LoRAPair(a, b)], delta=1.0)
        >>> (b @ a).sum().backward()
        >>> optimizer.step()
        >>> a[0].tolist(), a.grad[0].tolist()
        ([0.5, -0.5], [1.0, 1.0])
    """
    check_range("delta", delta, 0.0)
    if delta == 0.0:
        raise ValueError("delta must be above 0: B starts at 0 and has no inverse there")
    hooks = _Hooks(list(pairs), float(delta))
    optimizer.register_step_pre_hook(hooks.before)
    optimizer.register_step_post_hook(hooks.after)
    return optimizer


class _Hooks:
    """Exchanges the gradients of the pairs before a step, and puts them back after it."""

    def __init__(self, pairs: list[LoRAPair], delta: float) -> None:
        self.pairs, self.delta = pairs, delta
        self.kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(closure is not None for closure in (*args[1:], kwargs.get("closure"))):
            raise ValueError("step takes no closure where LoRA gradients are preconditioned")
        # Those of an earlier step that failed are not this one's.
        self.kept = []
        changed = []
        for a, b in self.pairs:
            if a.grad is not None:
                changed.append((a, _left_solved(b.detach().flatten(1), a.grad, self.delta)))
            if b.grad is not None:
                changed.append((b, _right_solved(a.detach().flatten(1), b.grad, self.delta)))
        for parameter, gradient in changed:
            assert parameter.grad is not None
            self.kept.append((parameter, parameter.grad))
            parameter.grad = gradient

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self.kept:
            parameter.grad = gradient
        self.kept = []


def lora_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Splits a model as `decay_groups` does, the first group with its LoRA pairs beside it.

    Args:
        model: With LoRA layers of peft.
        weight_decay: See `decay_groups`, like `decay_embeddings`.
        decay_embeddings: See there.

    Returns:
        Groups, of which the first has `pairs`, for `scaled_sgd` and `scaled_adamw`.

    Raises:
        ValueError: As `lora_pairs` and `decay_groups`.
    """
    groups = decay_groups(model, weight_decay, decay_embeddings=decay_embeddings)
    groups[0]["pairs"] = lora_pairs(model)
    return groups


def scaled_sgd(
    groups: list[dict[str, Any]], lr: Any, *, momentum: float = 0.0, delta: float = DELTA
) -> Optimizer:
    """SGD of torch behind the preconditioner; without momentum as in arXiv 2402.02347.

    Args:
        groups: From `lora_groups`.
        lr: Learning rate, at least 0.
        momentum: 0 to below 1, in EMA form (dampening = momentum). Default 0.
        delta: Above 0. Default 1e-6.
    """
    plain, pairs = _apart(groups)
    optimizer = libraries.sgdm(plain, lr, momentum=momentum)
    return precondition_lora(optimizer, pairs, delta=delta)


def scaled_adamw(
    groups: list[dict[str, Any]],
    lr: Any,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    delta: float = DELTA,
) -> Optimizer:
    """AdamW of torch behind the preconditioner (arXiv 2402.02347, algorithm 2).

    Args:
        groups: From `lora_groups`.
        lr: Learning rate, at least 0.
        beta1: 0 to below 1. Default 0.9.
        beta2: 0 to below 1. Default 0.999.
        eps: At least 0. Default 1e-8.
        delta: Above 0. Default 1e-6.
    """
    plain, pairs = _apart(groups)
    optimizer = libraries.adamw(plain, lr, beta1=beta1, beta2=beta2, eps=eps)
    return precondition_lora(optimizer, pairs, delta=delta)


def _apart(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[LoRAPair]]:
    pairs = [pair for group in groups for pair in group.get("pairs", ())]
    return [{key: group[key] for key in group if key != "pairs"} for group in groups], pairs
