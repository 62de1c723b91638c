"""Controls for SGD-SaI's gains: the same gains on the wrong blocks, and one gain for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nomadam.optimizers.options import check_seed
from nomadam.optimizers.sgd_sai import SGDSaI
from nomadam.optimizers.sgd_sai_blocks import Block, Slot


class ShuffledSGDSaI(SGDSaI):
    r"""SGD-SaI with its measured gains exchanged among the blocks: what does the right place bring?

    The gains that one step measures are permuted among the blocks that it measures, in the order of
    the blocks, by the permutation that `seed` draws for their number. Each block then keeps what it
    got, in its state, and all else is `SGDSaI`.

    Args:
        params: As `SGDSaI`, like `lr`, `momentum`, `weight_decay`, `eps`, `nesterov`, `foreach`.
        lr: Learning rate, at least 0. Default 1e-2.
        momentum: In [0, 1). Default 0.9.
        weight_decay: Decoupled decay, at least 0. Default 1e-2.
        eps: Added to the deviation in the gain, at least 0. Default 0.
        nesterov: As torch's.
        foreach: As torch's.
        seed: Of the permutation, an integer in [0, 2^63). Default 0.

    Raises:
        ValueError: As `SGDSaI`, and for a seed out of its range.

    Examples:
        >>> model = torch.nn.Linear(4, 9)
        >>> optimizer = ShuffledSGDSaI(model.named_parameters(), seed=1)
        >>> model(torch.randn(2, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.gains()["bias"] > optimizer.gains()["weight"]
        True
    """

    steps_alone = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        eps: float = 0.0,
        nesterov: bool = False,
        foreach: bool | None = None,
        seed: int = 0,
    ) -> None:
        """Makes the optimizer; the arguments are those of the class."""
        check_seed(seed, below=2**63)
        super().__init__(
            params,
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            eps=eps,
            nesterov=nesterov,
            foreach=foreach,
            seed=seed,
        )

    def _begin(
        self, waiting: Sequence[Block], joining: Sequence[Slot], *of_step: Any
    ) -> dict[int, bool]:
        if joining:
            raise RuntimeError("gains can not be shuffled among sharded parameters (DTensor)")
        unmeasured = [block for block in waiting if float(block.state["gsnr"]) == 0.0]
        starts = super()._begin(waiting, joining, *of_step)
        measured = [block.state for block in unmeasured if float(block.state["gsnr"]) > 0.0]
        gains = [float(state["gsnr"]) for state in measured]
        if measured:
            generator = torch.Generator().manual_seed(unmeasured[0].slot.group["seed"])
            order = torch.randperm(len(measured), generator=generator).tolist()
            for state, source in zip(measured, order, strict=True):
                state["gsnr"].fill_(gains[source])
        return starts


def equal_gain(groups: Sequence[dict[str, Any]]) -> float:
    """The one number that stands for all gains: the geometric mean of the blocks' sqrt(numel).

    With it and without decay SGD-SaI is SGD with momentum, whose learning rate is that number times
    as large; the number is there for a learning rate to mean about the same as for SGD-SaI.

    Args:
        groups: With `params`, tensors or pairs of a name and a tensor.

    Raises:
        ValueError: No tensor has an element.

    Examples:
        >>> equal_gain([{"params": [torch.ones(4), ("matrix", torch.ones(8, 8))]}])
        4.0
    """
    params = [p[1] if isinstance(p, tuple) else p for g in groups for p in g["params"]]
    logs = [math.log2(p.numel()) / 2 for p in params if p.numel()]
    if not logs:
        raise ValueError("an equal gain needs a parameter that has elements, got none")
    return 2.0 ** (sum(logs) / len(logs))


def equal_sgd_sai(
    groups: list[dict[str, Any]],
    lr: float | Tensor,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> SGDSaI:
    """`SGDSaI` with `equal_gain` for every block.

    Args:
        groups: With `params` and `weight_decay`.
        lr: Learning rate, at least 0.
        momentum: In [0, 1). Default 0.9.
        nesterov: As torch's.
        foreach: As torch's.
        fused: As torch's.

    Raises:
        ValueError: As `SGDSaI`.

    Examples:
        >>> equal_sgd_sai([{"params": [torch.ones(4)]}], 1e-2).param_groups[0]["gain"]
        2.0
    """
    return SGDSaI(
        groups,
        lr,
        momentum=momentum,
        gain=equal_gain(groups),
        nesterov=nesterov,
        foreach=foreach,
        fused=fused,
    )
