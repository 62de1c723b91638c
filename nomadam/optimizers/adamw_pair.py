"""One optimizer of two: a method of its own in some groups, torch's AdamW in the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class AdamWPair(Optimizer):
    """What optimizers with AdamW on the rest have in common: one state, one list of groups.

    Each parameter group has a `method`, `"adamw"` or one of the subclass's, and that method's own
    settings. torch's AdamW works on the state and the groups of this optimizer, so there is one
    `state`, one `state_dict`, one list of `param_groups` for schedulers, and a closure is called
    once.

    A subclass defines `own_settings` and `step_own`, and may extend `check_group`.

    Args:
        params: Groups as `torch.optim` takes them, named or not, each with a `method`.
        lr: Learning rate, at least 0; a float or a one-element tensor. Default 1e-3.
        weight_decay: Decoupled decay, at least 0. Default 0.1.

    Raises:
        ValueError: A group has no method, a setting does not belong to it or is out of its range.

    Examples:
        >>> class SignOrAdamW(AdamWPair):
        ...     def own_settings(self):
        ...         return {"sign": {}}
        ...     def step_own(self, group):
        ...         for p in group["params"]:
        ...             p.sub_(p.grad.sign(), alpha=group["lr"])
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SignOrAdamW([{"params": [weight], "method": "sign"}], lr=0.5)
        >>> weight.grad = torch.tensor([3.0, -0.1])
        >>> optimizer.step()
        >>> weight.tolist()
        [0.5, 1.5]
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, *, weight_decay: float = 0.1
    ) -> None:
        """Makes the optimizer; the arguments are those of the class."""
        self._make_methods()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _make_methods(self) -> None:
        # Empty at rest: each step lends it this optimizer's groups and state.
        self._adamw = torch.optim.AdamW([{"params": []}])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from a pickle or a state dict, with methods of its own."""
        super().__setstate__(state)
        self._make_methods()

    def own_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """The subclass's methods, each with the defaults of its settings."""
        raise NotImplementedError

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a group, complete, that its method can not take."""
        if group["method"] == "adamw":
            check_settings(self._adamw, group)

    def step_own(self, group: dict[str, Any]) -> None:
        """Takes a step in a group of the subclass's, without gradients being recorded."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; settings that it lacks take the defaults of its method.

        Args:
            param_group: As for `torch.optim`, with a `method`.

        Raises:
            ValueError: The method is missing or unknown, a setting does not belong to it or is
                out of its range, or a tensor does not suit it; nothing is added then.
        """
        known = {**self.own_settings(), "adamw": self._adamw.defaults}
        method = param_group.get("method")
        if method not in known:
            names = " or ".join(map(repr, known))
            raise ValueError(f"method of a group must be {names}, it is {method!r}")
        refuse_unknown_settings(param_group, method, (*known[method], "lr", "weight_decay"))
        super().add_param_group({**known[method], **self.defaults, **param_group})
        try:
            self.check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes one step in every group.

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
            if group["method"] != "adamw":
                self.step_own(group)
        self._adamw.state = self.state
        self._adamw.param_groups = [g for g in self.param_groups if g["method"] == "adamw"]
        self._adamw.step()
        self._adamw.param_groups = []
        return loss


def refuse_unknown_settings(group: dict[str, Any], method: str, known: Iterable[str]) -> None:
    """Raises ValueError for what a group sets and its method does not have."""
    unknown = set(group) - {*known, "params", "method", "param_names", "initial_lr"}
    if unknown:
        raise ValueError(f"settings that {method} does not know: {', '.join(sorted(unknown))}")


def check_settings(part: Optimizer, filled: Mapping[str, Any]) -> None:
    """Raises ValueError for settings out of their range, by the checks of torch's constructor."""
    checked = {key: filled[key] for key in part.defaults if key != "decoupled_weight_decay"}
    type(part)([{"params": []}], **checked)
