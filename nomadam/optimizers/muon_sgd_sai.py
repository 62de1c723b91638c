"""Muon on hidden matrices and SGDSaI on the rest: one tensor of state for all, and no Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nomadam.optimizers.adamw_pair import check_settings, refuse_unknown_settings
from nomadam.optimizers.muon_pair import check_matrices, empty_muon, step_muon
from nomadam.optimizers.options import check_range
from nomadam.optimizers.roles import Names, method_groups, role_groups, with_second_rate
from nomadam.optimizers.sgd_sai import SGDSaI
from nomadam.optimizers.sgd_sai_blocks import Plan, Slot

# Settings of SGDSaI that a group may have; the others look at all gradients, or at one kernel.
OWN = ("momentum", "eps", "gain", "refresh", "nesterov", "foreach", "momentum_dtype")
OWN += ("rounding", "seed")


class MuonSGDSaI(SGDSaI):
    """One optimizer of two: `torch.optim.Muon` in some groups, `SGDSaI` in the others.

    Each parameter group has a `method`, `"muon"` or `"sgd_sai"`, and that method's own settings.
    Muon is that of `MuonAdamW`: its updates have the size of AdamW's, and tensors of more than two
    dimensions are orthogonalised as matrices of `[first dimension, everything else]`. The state of
    a tensor is its `momentum_buffer`; with SGDSaI its gain too.

    Args:
        params: Groups as `torch.optim` takes them, named or not, each with a `method`.
        lr: Learning rate of the groups that have none of their own, at least 0. Default 1e-3.
        weight_decay: Decoupled decay of the groups that have none, at least 0: a step takes
            `lr * weight_decay` of the parameter, with the group's own `lr`. Default 0.1.

    Raises:
        ValueError: A group has no method, a setting does not belong to its method or is out of its
            range, or a Muon group holds a tensor below two dimensions.
        ImportError: torch has no Muon.

    Source: Muon, kellerjordan.github.io/posts/muon, with AdamW replaced; see `MuonAdamW`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> groups = [{"params": [("weight", model.weight)], "method": "muon"},
        ...           {"params": [("bias", model.bias)], "method": "sgd_sai", "lr": 1e-2}]
        >>> optimizer = MuonSGDSaI(groups, lr=1e-3)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> [sorted(entry) for entry in optimizer.state.values()]
        [['momentum_buffer'], ['gsnr', 'momentum_buffer']]
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, *, weight_decay: float = 0.1
    ) -> None:
        """Makes the optimizer; the arguments are those of the class."""
        self._muon = empty_muon()
        super().__init__(params, lr, weight_decay=weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from a pickle or a state dict, with a Muon of its own."""
        super().__setstate__(state)
        self._muon = empty_muon()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; settings that it lacks take the defaults of its method.

        Args:
            param_group: As for `torch.optim`, with a `method`, `"muon"` or `"sgd_sai"`.

        Raises:
            ValueError: As the class; nothing is added then.
        """
        method = param_group.get("method")
        if method not in ("muon", "sgd_sai"):
            raise ValueError(f"method of a group must be 'muon' or 'sgd_sai', it is {method!r}")
        given = {"lr": self.defaults["lr"], "weight_decay": self.defaults["weight_decay"]}
        known = (*given, *(OWN if method == "sgd_sai" else self._muon.defaults))
        refuse_unknown_settings(param_group, method, known)
        filled = {**given, **param_group}
        if method == "muon":
            filled = {**self._muon.defaults, **filled}
        super().add_param_group(filled)
        if method == "muon":
            try:
                check_settings(self._muon, filled)
                check_matrices(self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise

    def _step_blocks(self, slots: Sequence[Slot], plan: Plan) -> Tensor | None:
        hidden = [slot for slot in slots if slot.group["method"] == "muon"]
        self._step_hidden(hidden)
        return super()._step_blocks([s for s in slots if s.group["method"] != "muon"], plan)

    @torch._disable_dynamo
    def _step_hidden(self, slots: Sequence[Slot]) -> None:
        for group in self.param_groups:
            mine = [slot.param for slot in slots if slot.group is group]
            if mine:
                step_muon(self._muon, group, mine, self.state)


def muon_sgd_sai_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head: Names | None = None,
    rest: Names = (),
    convolutions: str = "refuse",
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model into hidden matrices, for Muon, and the rest, for SGDSaI.

    Args:
        model: The model, as `role_groups` takes it, like all other arguments.
        weight_decay: Decoupled decay of what decays, at least 0.
        head: Name of the output layer's weight; default None: ask the model.
        rest: Names of further weights that go to SGDSaI.
        convolutions: `"refuse"` (default), `"flatten"` (to Muon) or `"rest"` (to SGDSaI).
        decay_embeddings: Whether embeddings decay. Default True.

    Returns:
        Groups for `MuonSGDSaI`, each with `params`, `weight_decay` and `method`.

    Raises:
        ValueError: As `role_groups`.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> [g["method"] for g in muon_sgd_sai_groups(model, 0.1, head="1.weight")]
        ['muon', 'sgd_sai', 'sgd_sai']
    """
    groups = role_groups(
        model,
        weight_decay,
        head=head,
        rest=rest,
        convolutions=convolutions,
        decay_embeddings=decay_embeddings,
    )
    other = dict.fromkeys(("embedding", "head", "vector"), "sgd_sai")
    return method_groups(groups, {"hidden": "muon", **other})


def muon_sgd_sai(
    groups: list[dict[str, Any]],
    lr: float | Tensor,
    *,
    momentum: float = 0.95,
    ns_steps: int = 5,
    sgd_sai_lr: float = 1e-2,
    sgd_sai_momentum: float = 0.9,
    gain: str = "gsnr",
) -> MuonSGDSaI:
    """`MuonSGDSaI` with a learning rate for each method, and one decay for both.

    Args:
        groups: Of `muon_sgd_sai_groups`.
        lr: Muon's learning rate, at least 0.
        momentum: Muon's, in [0, 1). Default 0.95.
        ns_steps: Newton-Schulz iterations, at least 1. Default 5.
        sgd_sai_lr: SGDSaI's learning rate, above 0. Default 1e-2.
        sgd_sai_momentum: SGDSaI's, in [0, 1). Default 0.9.
        gain: As `SGDSaI` takes it. Default `"gsnr"`.

    Returns:
        The optimizer. A step takes `lr * weight_decay` of any parameter that decays: in groups of
        SGDSaI the decay is divided by `sgd_sai_lr / lr`.

    Raises:
        ValueError: A value is out of its range.

    Examples:
        >>> from torch import nn
        >>> groups = muon_sgd_sai_groups(nn.Sequential(nn.Linear(2, 3)), 0.1, head="0.weight")
        >>> optimizer = muon_sgd_sai(groups, 1e-3)
        >>> [(g["lr"], round(g["weight_decay"], 9)) for g in optimizer.param_groups]
        [(0.01, 0.01), (0.01, 0.0)]
    """
    check_range("momentum", momentum, 0.0, 1.0)
    own = {"momentum": sgd_sai_momentum, "gain": gain}
    settings = {
        "muon": {"momentum": momentum, "ns_steps": ns_steps},
        "sgd_sai": own | {"lr": sgd_sai_lr},
    }
    scaled = with_second_rate(groups, lr, "sgd_sai", sgd_sai_lr, name="sgd_sai_lr")
    return MuonSGDSaI([settings[group["method"]] | group for group in scaled], lr)
