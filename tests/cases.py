"""The optimizers of nomadam as rows of a table, with what each is capable of, for test_laws.py.

A new optimizer gets a row here, and has to obey the laws that its capabilities name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference import sgd_sai as reference
from torch import Tensor, nn
from torch.optim import Optimizer

from nomadam import SGDSaI
from nomadam.optimizers.baselines import BASELINES, build_optimizer

SHAPES = {
    "matrix": (7, 5),
    "wide": (3, 64),
    "vector": (13,),
    "cube": (2, 3, 4),
    "one": (1,),
    "scalar": (),
    "empty": (0, 4),
    "transposed": (9, 6),
    "strided": (8, 5),
}


def given_gains(names) -> dict[Any, float]:
    """A gain for every name, as a user might read it from a file."""
    return {name: 1.5 + 0.25 * len(str(name)) for name in names}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row.

    Attributes:
        name: of the row, the id of its tests.
        baseline: name in BASELINES of what it is built by.
        arguments: of the constructor.
        blockwise: SGDSaI, which takes any parameters and not only a whole model.
        measures: its gain comes from the gradient.
        skips: a step with a non-finite gradient changes nothing at all.
        has_foreach: takes ``foreach``.
        keeps_gradients: its step leaves gradients as they are.
    """

    name: str
    baseline: str = "sgd_sai"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    blockwise: bool = True
    measures: bool = True
    skips: bool = False
    has_foreach: bool = True
    keeps_gradients: bool = True

    @property
    def decay(self) -> float:
        return self.arguments.get("weight_decay", 1e-2)

    @property
    def sign(self) -> int:
        """Of a step along the gradient."""
        return 1 if self.arguments.get("maximize") else -1

    @property
    def normalizes(self) -> bool:
        return self.arguments.get("normalize", False)

    def make(self, params, lr: Any = 1e-2, **changes: Any) -> SGDSaI:
        """SGDSaI over parameters, named parameters or groups of such."""
        arguments = {**self.arguments, **changes}
        params = list(params)
        if arguments.get("gain") == "mapping":
            groups = params if isinstance(params[0], dict) else [{"params": params}]
            names = [name for group in groups for name, _ in group["params"]]
            arguments["gain"] = given_gains(names)
        return SGDSaI(params, lr, **arguments)

    def build(self, model: nn.Module, **changes: Any) -> Optimizer:
        """The optimizer over a whole model, ready for its first step."""
        arguments = {**self.arguments, **changes}
        if arguments.get("gain") == "mapping":
            arguments["gain"] = given_gains(name for name, _ in model.named_parameters())
        row = BASELINES[self.baseline]
        arguments.setdefault("lr", row.default_lr)
        arguments.setdefault("weight_decay", row.default_weight_decay)
        optimizer = build_optimizer(self.baseline, model, **arguments)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    def gain(self, name: Any, grad: Tensor) -> float:
        """The gain of a block that starts with this gradient, before any normalisation."""
        rule = self.arguments.get("gain", "gsnr")
        grad = torch.view_as_real(grad) if grad.is_complex() else grad
        rule = given_gains([name])[name] if rule == "mapping" else rule
        return reference.gain(grad, rule, self.arguments.get("eps", 0.0))


SGD_SAI = [
    Case(name="gsnr"),
    Case(name="eps", arguments={"eps": 1e-8}),
    Case(name="sqrt_numel", arguments={"gain": "sqrt_numel"}, measures=False),
    Case(name="number", arguments={"gain": 3.0}, measures=False),
    Case(name="mapping", arguments={"gain": "mapping"}, measures=False),
    Case(name="normalize", arguments={"normalize": True}),
    Case(name="refresh", arguments={"refresh": 3}),
    Case(name="sign", arguments={"direction": "sign", "gain": 3.0}, measures=False),
    Case(name="nesterov", arguments={"nesterov": True, "weight_decay": 0.1}),
    Case(name="maximize", arguments={"maximize": True, "weight_decay": 0.1}),
    Case(name="no momentum", arguments={"momentum": 0.0}),
    Case(name="no decay", arguments={"weight_decay": 0.0}),
    Case(name="skip_nonfinite", arguments={"skip_nonfinite": True}, skips=True),
    Case(
        name="everything",
        arguments={
            "nesterov": True,
            "maximize": True,
            "normalize": True,
            "skip_nonfinite": True,
            "momentum": 0.5,
            "weight_decay": 0.1,
        },
        skips=True,
    ),
]

LIBRARIES = [
    Case(
        name=name,
        baseline=name,
        arguments={"head": "4.weight"} if "head" in row.arguments() else {},
        blockwise=False,
        measures=False,
        has_foreach="foreach" in row.arguments(),
        keeps_gradients=name != "schedule_free_adamw",  # as its row in BASELINES says
    )
    for name, row in BASELINES.items()
    if name != "sgd_sai" and not row.needs_lora
]

CASES = [*SGD_SAI, *LIBRARIES]


def blocks(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[tuple[str, Tensor]]:
    """Named parameters of every kind of shape and stride."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    values = {name: new(*shape) for name, shape in SHAPES.items()}
    values["transposed"] = new(*reversed(SHAPES["transposed"])).t()
    values["strided"] = new(8, 10)[:, ::2]
    return [(name, value.requires_grad_()) for name, value in values.items()]


def gradients(params, steps: int, seed: int = 1, scale: float = 1.0) -> list[list[Tensor]]:
    """For each step a normal gradient for each parameter, with a mean, in the parameter's dtype."""
    generator = torch.Generator().manual_seed(seed)

    def new(param: Tensor) -> Tensor:
        values = torch.randn(param.shape, generator=generator, dtype=torch.float64) + 0.3
        return (scale * values).to(param.dtype)

    return [[new(param) for param in params] for _ in range(steps)]


def take(optimizer: Optimizer, params, grads) -> None:
    """One step along the given gradients; ``None`` stands for no gradient."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    optimizer.step()


def small_model() -> nn.Module:
    """An embedding, matrices, a norm and biases: every role that a group or a rule looks for."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 11)
    )


def rows(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


both_ways = pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])


def values(params):
    return [param.detach().clone() for param in params]


def equal(tensors, others):
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


def run(case, named, grads, **changes):
    """Trains over the steps of ``grads``; the optimizer, and the parameters by name."""
    optimizer = case.make(named, **changes)
    params = [param for _, param in named]
    for grads_of_step in grads:
        take(optimizer, params, grads_of_step)
    return optimizer, {name: param.detach().clone() for name, param in named}


def expected_gains(case, firsts):
    """From the first gradient of each block, all of which start at one step."""
    gains = {name: case.gain(name, grad) for name, grad in firsts.items() if grad.numel()}
    largest = max(gains.values()) if case.normalizes else 1.0
    return {name: gain / largest for name, gain in gains.items()}


def after_first_step(case, param, grad, gain, lr=1e-2):
    along = grad.sign() if case.arguments.get("direction") == "sign" else grad
    return param * (1 - lr * case.decay) + case.sign * lr * gain * along
