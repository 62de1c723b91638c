"""Muon on hidden matrices and AdamW on the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from nomadam.optimizers.param_groups import (
    EMBEDDINGS,
    decay_groups,
    is_laid_over_batch,
    trainable_parameters,
)

FILTERS = nn.modules.conv._ConvNd


class MuonAdamW(Optimizer):
    """One optimizer of two: `torch.optim.Muon` in some groups, `torch.optim.AdamW` in the others.

    Each parameter group has a `method`, `"muon"` or `"adamw"`, and that method's own settings; the
    step hands the groups to torch's optimizers, which work on the state and the groups of this
    one. So there is one `state`, one `state_dict`, one list of `param_groups` for schedulers, and
    a closure is called once. Muon's learning rate is adjusted to the update size of AdamW
    (`adjust_lr_fn="match_rms_adamw"`: each update times 0.2 · sqrt(max(rows, columns))), so that
    one learning rate serves both.

    Parameters of more than two dimensions in a Muon group (convolution filters) are orthogonalised
    as matrices of `[first dimension, everything else]`, which are views.

    Args:
        params: Groups as `torch.optim` takes them, named or not, each with a `method`.
        lr: Learning rate, at least 0; a float or a one-element tensor. Default 1e-3.
        weight_decay: Decoupled decay, at least 0. Default 0.1.

    Raises:
        ValueError: A group has no method, or a Muon group holds a tensor below two dimensions.

    Source: Muon, kellerjordan.github.io/posts/muon; the adjustment, arXiv 2502.16982, equation 4.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> groups = [{"params": [("weight", model.weight)], "method": "muon"},
        ...           {"params": [("bias", model.bias)], "method": "adamw"}]
        >>> optimizer = MuonAdamW(groups, lr=1e-3)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> [sorted(entry) for entry in optimizer.state.values()]
        [['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step']]
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, *, weight_decay: float = 0.1
    ) -> None:
        """Makes the optimizer; the arguments are those of the class."""
        self._make_methods()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _make_methods(self) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"MuonAdamW needs torch>=2.9, which has Muon; this is {torch.__version__}"
            )
        # Empty at rest: each step lends them this optimizer's groups and state.
        self._muon = torch.optim.Muon([{"params": []}], adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW([{"params": []}])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from a pickle or a state dict, with methods of its own."""
        super().__setstate__(state)
        self._make_methods()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; settings that it lacks take the defaults of its method.

        Args:
            param_group: As for `torch.optim`, with a `method`, `"muon"` or `"adamw"`.

        Raises:
            ValueError: The method is missing or unknown, a setting does not belong to it or is
                out of its range, or a tensor does not suit it.
        """
        method = param_group.get("method")
        if method not in ("muon", "adamw"):
            raise ValueError(f"method of a group must be 'muon' or 'adamw', it is {method!r}")
        part = self._muon if method == "muon" else self._adamw
        settings = {k: v for k, v in param_group.items() if k not in ("params", "method")}
        unknown = set(settings) - set(part.defaults) - {"param_names", "initial_lr"}
        if unknown:
            raise ValueError(f"settings that {method} does not know: {', '.join(sorted(unknown))}")
        filled = {**part.defaults, **self.defaults, **param_group}
        # torch's constructors hold the range checks; they see the settings without the tensors.
        checked = {key: filled[key] for key in part.defaults if key != "decoupled_weight_decay"}
        type(part)([{"params": []}], **checked)
        super().add_param_group(filled)
        if method == "muon":
            group = self.param_groups[-1]
            low = [list(p.shape) for p in group["params"] if p.ndim < 2]
            if low:
                self.param_groups.pop()
                raise ValueError(f"muon needs tensors of two or more dimensions, got shapes {low}")

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
            if group["method"] == "muon":
                self._step_muon(group)
        self._adamw.state = self.state
        self._adamw.param_groups = [g for g in self.param_groups if g["method"] == "adamw"]
        self._adamw.step()
        self._adamw.param_groups, self._muon.param_groups = [], []
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None and p.numel()]
        flats = [_as_matrix(p) for p in params]
        for param, flat in zip(params, flats, strict=True):
            grad = param.grad
            assert grad is not None
            flat.grad = grad if grad.ndim == 2 else grad.reshape(flat.shape)
            momentum_buffer = self.state[param].get("momentum_buffer")
            if momentum_buffer is not None:
                self._muon.state[flat] = {"momentum_buffer": momentum_buffer.view(flat.shape)}
        self._muon.param_groups = [{**group, "params": flats}]
        self._muon.step()
        for param, flat in zip(params, flats, strict=True):
            if "momentum_buffer" not in self.state[param]:
                momentum_buffer = self._muon.state[flat]["momentum_buffer"]
                self.state[param]["momentum_buffer"] = momentum_buffer.view(param.shape)
            if flat.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
                param.copy_(flat.view(param.shape))
        self._muon.state.clear()


def muon_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    head: str | Sequence[str] | None = None,
    adamw: str | Sequence[str] = (),
    convolutions: str = "refuse",
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model into hidden matrices, for Muon, and the rest, for AdamW.

    Hidden matrices are the weights of two dimensions outside embeddings (by module type) and
    outside the output layer, which has to be known: transformers' models name it themselves
    (`get_output_embeddings`), for others it is an argument. A tied weight is an embedding or an
    output layer if one of the modules that hold it is. What is laid over the batch, as the class
    token of a ViT (`is_laid_over_batch`), goes to AdamW. Decay is that of `decay_groups`.

    Args:
        model: The model. Frozen parameters are left out, tied weights come once.
        weight_decay: Decoupled decay of what decays, at least 0.
        head: Name of the output layer's weight, or several names, or `()` where there is none.
            Default None: ask the model.
        adamw: Names of further weights that go to AdamW.
        convolutions: `"refuse"` (default): convolution filters are an error; `"flatten"`: Muon
            takes them as `[channels out, everything else]`; `"adamw"`: they go to AdamW.
        decay_embeddings: Whether embeddings decay. Default True.

    Returns:
        Groups for `MuonAdamW`, each with `params`, `weight_decay` and `method`.

    Raises:
        ValueError: The output layer is not known, a name is not in the model, or tensors of more
            than two dimensions have no declared method.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> for group in muon_groups(model, 0.1, head="1.weight"):
        ...     print(group["method"], group["weight_decay"], [n for n, _ in group["params"]])
        muon 0.1 ['0.weight']
        adamw 0.1 ['1.weight']
        adamw 0.0 ['0.bias', '1.bias']
    """
    if convolutions not in ("refuse", "flatten", "adamw"):
        raise ValueError(
            f"convolutions must be 'refuse', 'flatten' or 'adamw', it is {convolutions!r}"
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    heads = [named[name] for name in _known_names("head", _head_names(model, head), named)]
    chosen = [named[name] for name in _known_names("adamw", adamw, named)]
    apart = {*heads, *chosen}

    hidden, filters, unclear = set(), [], []
    for name, parameter, holders in trainable_parameters(model):
        embedding = any(isinstance(module, EMBEDDINGS) for module in holders)
        filter_bank = any(isinstance(module, FILTERS) for module in holders)
        if parameter in apart or embedding or parameter.ndim < 2:
            continue
        if is_laid_over_batch(parameter, holders):
            continue
        if parameter.ndim == 2:
            hidden.add(parameter)
        elif not filter_bank:
            unclear.append(name)
        elif convolutions == "refuse":
            filters.append(name)
        elif convolutions == "flatten":
            hidden.add(parameter)
    if filters:
        raise ValueError(
            f"convolution filters are not matrices: {', '.join(filters)}; "
            "pass convolutions='flatten' (Muon on views of them) or convolutions='adamw'"
        )
    if unclear:
        raise ValueError(
            f"neither matrices nor convolution filters: {', '.join(unclear)}; "
            "name those that go to AdamW with adamw=[...]"
        )
    groups = []
    for group in decay_groups(model, weight_decay, decay_embeddings=decay_embeddings):
        for method in ("muon", "adamw"):
            params = [(n, p) for n, p in group["params"] if (p in hidden) == (method == "muon")]
            if params:
                groups.append({**group, "params": params, "method": method})
    return groups


def _head_names(model: nn.Module, head: str | Sequence[str] | None) -> Sequence[str]:
    if head is not None:
        return [head] if isinstance(head, str) else list(head)
    ask = getattr(model, "get_output_embeddings", None)
    layer = ask() if callable(ask) else None
    weight = getattr(layer, "weight", None)
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} does not say which layer is its output layer, which Muon "
            "must leave to AdamW: pass head='name.of.its.weight', or head=() if there is none"
        )
    return names


def _known_names(
    argument: str, names: str | Sequence[str], named: dict[str, nn.Parameter]
) -> Sequence[str]:
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in named]
    if unknown:
        raise ValueError(f"{argument} names parameters that the model lacks: {', '.join(unknown)}")
    return names


def _as_matrix(param: Tensor) -> Tensor:
    """The parameter, or a view of it as a matrix (a copy where its strides allow no view)."""
    return param if param.ndim == 2 else param.detach().reshape(param.shape[0], -1)
