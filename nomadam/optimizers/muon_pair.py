"""Muon on hidden matrices and AdamW on the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nomadam.optimizers.adamw_pair import AdamWPair, check_settings
from nomadam.optimizers.roles import method_groups, role_groups


def empty_muon() -> Any:
    """Muon of torch without tensors, with updates of AdamW's size: for `step_muon`.

    Raises:
        ImportError: torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"Muon needs torch>=2.9, which has it; this is {torch.__version__}")
    return torch.optim.Muon([{"params": []}], adjust_lr_fn="match_rms_adamw")


@torch.no_grad()
def step_muon(
    muon: Any, group: dict[str, Any], params: Iterable[Tensor], state: Mapping[Tensor, Any]
) -> None:
    """One step of torch's Muon, on state that is kept elsewhere.

    Args:
        muon: What `empty_muon` made; it is empty again afterwards.
        group: With Muon's settings.
        params: Tensors of the group, of two or more dimensions: more are taken as
            `[first dimension, everything else]`. Those without a gradient are left out. Modified.
        state: Keeps each tensor's `momentum_buffer`, in its shape. Modified.
    """
    params = [p for p in params if p.grad is not None and p.numel()]
    flats = [_as_matrix(p) for p in params]
    for param, flat in zip(params, flats, strict=True):
        grad = param.grad
        assert grad is not None
        flat.grad = grad if grad.ndim == 2 else grad.reshape(flat.shape)
        momentum_buffer = state[param].get("momentum_buffer")
        if momentum_buffer is not None:
            muon.state[flat] = {"momentum_buffer": momentum_buffer.view(flat.shape)}
    muon.param_groups = [{**group, "params": flats}]
    muon.step()
    for param, flat in zip(params, flats, strict=True):
        if "momentum_buffer" not in state[param]:
            momentum_buffer = muon.state[flat]["momentum_buffer"]
            state[param]["momentum_buffer"] = momentum_buffer.view(param.shape)
        if flat.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
            param.copy_(flat.view(param.shape))
    muon.state.clear()
    muon.param_groups = []


def check_matrices(group: dict[str, Any]) -> None:
    """Raises ValueError for tensors that Muon can not take."""
    low = [list(p.shape) for p in group["params"] if p.ndim < 2]
    if low:
        raise ValueError(f"muon needs tensors of two or more dimensions, got shapes {low}")


class MuonAdamW(AdamWPair):
    """One optimizer of two: `torch.optim.Muon` in some groups, `torch.optim.AdamW` in the others.

    Each parameter group has a `method`, `"muon"` or `"adamw"`, and that method's own settings (see
    `AdamWPair`). Muon's learning rate is adjusted to the update size of AdamW
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

    def _make_methods(self) -> None:
        super()._make_methods()
        self._muon = empty_muon()

    def own_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Muon's, as torch has them."""
        return {"muon": self._muon.defaults}

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for settings out of their range and tensors that are no matrices."""
        super().check_group(group)
        if group["method"] == "muon":
            check_settings(self._muon, group)
            check_matrices(group)

    def step_own(self, group: dict[str, Any]) -> None:
        """Takes Muon's step."""
        step_muon(self._muon, group, group["params"], self.state)


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
    groups = role_groups(
        model,
        weight_decay,
        head=head,
        rest=adamw,
        convolutions=convolutions,
        decay_embeddings=decay_embeddings,
        rest_is_called="adamw",
    )
    methods = {"hidden": "muon", "embedding": "adamw", "head": "adamw", "vector": "adamw"}
    return method_groups(groups, methods)


def _as_matrix(param: Tensor) -> Tensor:
    """The parameter, or a view of it as a matrix (a copy where its strides allow no view)."""
    return param if param.ndim == 2 else param.detach().reshape(param.shape[0], -1)
