"""The gain of each block: the signal-to-noise ratio of its gradient, without taking a step."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nomadam.numerics.moments import gsnr, moments


def measure_gains(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    eps: float = 0.0,
) -> dict[str, float]:
    r"""The gain of each block, from the mean gradient over some batches.

    A block is one parameter tensor. Of its mean gradient g over the batches, each of which counts
    the same, the gain is

    ```text
    gain = |g| / (std(g) + eps)     with the unbiased deviation over the N entries of the block
         = sqrt(N - 1 + N * mean(g)^2 / std(g)^2)     for eps = 0
    ```

    1 for a block of one element, and never above the number of elements: what `SGDSaI` measures
    at a first step along this gradient. Where the entries have a mean near 0 it is sqrt(N - 1)
    whatever the gradient.

    The model is left as it was: its parameters' gradients, its buffers (so that batch norms count
    nothing) and the random generators of Python, numpy and torch. It is measured in the mode that
    it is in, training or evaluation, and its ``.grad`` is not needed. Hooks of ``backward`` on
    parameters, as gradient release has, do not run. Of a model that is split or replicated among
    processes, a process sees its own part.

    Args:
        model: whose parameters with ``requires_grad`` are the blocks, tied ones once.
        loss_fn: ``loss_fn(model, batch)`` is the mean loss over the batch, a tensor of one element.
        batches: at least one; a generator is used up.
        eps: added to the deviation, in units of the gradient, at least 0; default 0.

    Returns:
        Name of the block to its gain. Blocks whose gradient says nothing (none, all zero or not
        finite) are left out, as `SGDSaI.gains` leaves them out.

    Raises:
        ValueError: for no batch, a loss of several elements, one that depends on no parameter, and
            an ``eps`` that is negative or not finite.

    Source: Xu et al., *No More Adam*, arXiv 2412.11768, Section 3 and Algorithm 1.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> batches = [torch.eye(4), torch.ones(3, 4)]
        >>> gains = measure_gains(model, lambda model, batch: model(batch).square().mean(), batches)
        >>> sorted(gains), model.weight.grad is None
        (['bias', 'weight'], True)
    """
    check_eps(eps)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    total: dict[str, Tensor] = {}
    count = 0
    with _left_alone(model), torch.inference_mode(False), torch.enable_grad():
        for batch in batches:
            found = _gradient(loss_fn(model, batch), params)
            total = found if not total else _sum(total, found)
            count += 1
    if count == 0:
        raise ValueError("batches is empty: there is no gradient to measure")
    return gains_of({name: grad / count for name, grad in total.items()}, eps=eps)


def gains_of(gradients: Mapping[str, Tensor], *, eps: float = 0.0) -> dict[str, float]:
    """The gain of each block from its gradient, as `measure_gains` has it.

    Args:
        gradients: by name; dense or sparse, real or complex, of any floating dtype.
        eps: added to the deviation, in units of the gradient, at least 0; default 0.

    Returns:
        Name to gain, without the blocks whose gradient is empty, all zero or not finite.

    Raises:
        ValueError: for an ``eps`` that is negative or not finite.

    Examples:
        >>> gains_of({"weight": torch.tensor([3.0, -4.0, 0.0, 0.0]), "gate": torch.zeros(2)})
        {'weight': 1.740776...}
    """
    check_eps(eps)
    plain = {name: _plain(grad.detach()) for name, grad in gradients.items() if grad.numel()}
    numel = sum(grad.numel() for grad in plain.values())
    # Slices of the size that an optimizer of these blocks takes, so that both round alike.
    found = moments(list(plain.values()), max(2**15, numel // 1000))
    measured = zip(plain, found, strict=True)
    return {name: gsnr(each, eps) for name, each in measured if each.informative}


def check_eps(eps: float) -> None:
    """Refuse an ``eps`` that is negative or not finite."""
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")


def _gradient(loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return one number, got a tensor of {tuple(loss.shape)}")
    if not params or not loss.requires_grad:
        raise ValueError("the loss of loss_fn depends on no parameter that requires a gradient")
    # Not backward: that would add to .grad, and step where gradients are released.
    found = torch.autograd.grad(loss.reshape(()), list(params.values()), allow_unused=True)
    pairs = zip(params, found, strict=True)
    return {name: _plain(grad) for name, grad in pairs if grad is not None}


def _sum(total: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both together, in float32 or wider: many batches in 16 bits would lose the later ones."""
    summed = dict(total)
    for name, grad in more.items():
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        summed[name] = summed[name] + wide if name in summed else wide
    return summed


def _plain(grad: Tensor) -> Tensor:
    """A dense real gradient; of complex entries both parts, two an entry."""
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    return torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Within it the model works on copies of its buffers; they and all draws are undone after."""
    own = [(module._buffers, name) for module in model.modules() for name in module._buffers]
    held = [buffers[name] for buffers, name in own]
    copies = {id(tensor): tensor.detach().clone() for tensor in held if tensor is not None}
    tensors = [tensor for tensor in (*model.parameters(), *held) if tensor is not None]
    cuda = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    mps = any(tensor.device.type == "mps" for tensor in tensors)
    python, numpy = random.getstate(), np.random.get_state()
    on_mps = torch.mps.get_rng_state() if mps else None
    with torch.random.fork_rng(devices=sorted(cuda)):
        try:
            for buffers, name in own:
                buffers[name] = copies.get(id(buffers[name]))
            yield
        finally:
            for (buffers, name), tensor in zip(own, held, strict=True):
                buffers[name] = tensor
            random.setstate(python)
            np.random.set_state(numpy)
            if on_mps is not None:
                torch.mps.set_rng_state(on_mps)
