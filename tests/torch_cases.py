"""SGDSaI as PyTorch's own suite describes an optimizer: inputs, wrong inputs, what it supports.

The record is of the wheel's ``OptimizerInfo``, and the wheel expands it into configurations, so
that the laws in ``test_torch_*.py`` run over what torch's own laws would run over.
"""

from copy import deepcopy

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from nomadam import SGDSaI

INPUTS = {
    "default": {},
    "non-default lr": {"lr": 1e-3},
    "tensor lr": {"lr": torch.tensor(1e-3)},
    "no weight_decay": {"weight_decay": 0.0},
    "weight_decay": {"weight_decay": 0.5},
    "momentum": {"momentum": 0.5},
    "no momentum": {"momentum": 0.0},
    "no momentum, no weight_decay": {"momentum": 0.0, "weight_decay": 0.0},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "maximize, no weight_decay": {"weight_decay": 0.0, "maximize": True},
    "nesterov": {"weight_decay": 0.1, "nesterov": True},
    "eps": {"eps": 1e-8},
    "sqrt_numel": {"gain": "sqrt_numel"},
    "number": {"gain": 3.0},
    "normalize": {"normalize": True, "lr": 5e-2},
    "skip_nonfinite": {"skip_nonfinite": True, "weight_decay": 0.0},
}

# Those that torch runs its own SGD with, and the rest of torch's.
SCHEDULERS = {
    "step": [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    "linear": [lambda opt: LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4)],
    "step and linear": [
        lambda opt: StepLR(opt, gamma=0.9, step_size=10),
        lambda opt: LinearLR(opt, start_factor=0.4, end_factor=0.6, total_iters=4),
    ],
    "step, exponential and plateau": [
        lambda opt: StepLR(opt, gamma=0.99, step_size=10),
        lambda opt: ExponentialLR(opt, gamma=0.99),
        lambda opt: ReduceLROnPlateau(opt),
    ],
    "constant": [lambda opt: ConstantLR(opt, factor=0.4, total_iters=4)],
    "polynomial": [lambda opt: PolynomialLR(opt, power=0.9, total_iters=4)],
    "step and plateau": [
        lambda opt: StepLR(opt, gamma=0.9, step_size=10),
        lambda opt: ReduceLROnPlateau(opt),
    ],
}
MORE_SCHEDULERS = {
    "multi-step": [lambda opt: MultiStepLR(opt, milestones=[5, 10], gamma=0.5)],
    "lambda": [lambda opt: LambdaLR(opt, lambda epoch: 0.95**epoch)],
    "multiplicative": [lambda opt: MultiplicativeLR(opt, lambda epoch: 0.95)],
    "cosine": [lambda opt: CosineAnnealingLR(opt, T_max=20)],
    "cosine with restarts": [lambda opt: CosineAnnealingWarmRestarts(opt, T_0=5)],
    "warm-up then cosine": [
        lambda opt: SequentialLR(
            opt,
            [LinearLR(opt, start_factor=0.1, total_iters=4), CosineAnnealingLR(opt, T_max=16)],
            milestones=[4],
        )
    ],
    "chained": [
        lambda opt: ChainedScheduler(
            [ConstantLR(opt, factor=0.5, total_iters=4), ExponentialLR(opt, gamma=0.95)]
        )
    ],
    # These two move the momentum as well as the learning rate.
    "cyclic": [lambda opt: CyclicLR(opt, base_lr=1e-3, max_lr=1e-2, step_size_up=5)],
    "one cycle": [lambda opt: OneCycleLR(opt, max_lr=1e-2, total_steps=40)],
}

WRONG = {
    "negative lr": ({"lr": -1e-2}, r"lr must be a number in \[0\.0, inf\), got -0\.01"),
    "lr not finite": ({"lr": float("nan")}, "lr must be a number"),
    "momentum below 0": ({"momentum": -0.5}, r"momentum must be .* \[0\.0, 1\.0\), got -0\.5"),
    "momentum of 1": ({"momentum": 1.0}, r"momentum must be .* got 1\.0"),
    "negative weight_decay": ({"weight_decay": -0.1}, r"weight_decay must be .* got -0\.1"),
    "negative eps": ({"eps": -1e-8}, r"eps must be .* got -1e-08"),
    "unknown gain": ({"gain": "snr"}, "gain must be .*'snr'"),
    "gain of 0": ({"gain": 0.0}, "gain must be .*0.0"),
    "nesterov without momentum": ({"momentum": 0.0, "nesterov": True}, "nesterov needs"),
    "fused": ({"differentiable": True, "fused": True}, "exclude each other"),
    "foreach and fused": ({"foreach": True, "fused": True}, "exclude each other"),
    "foreach and differentiable": ({"foreach": True, "differentiable": True}, "exclude"),
}


def _inputs(device, dtype=None):
    return [
        OptimizerInput(params=None, kwargs=deepcopy(kwargs), desc=desc)
        for desc, kwargs in INPUTS.items()
    ]


def _error_inputs(device, dtype):
    param = torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
    sparse = torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
    sparse.grad = torch.eye(2, 3, device=device, dtype=dtype).to_sparse()
    own = [
        ErrorOptimizerInput(
            OptimizerInput(params=[param], kwargs=kwargs, desc=desc),
            error_type=ValueError,
            error_regex=message,
        )
        for desc, (kwargs, message) in WRONG.items()
    ]
    own += [
        ErrorOptimizerInput(
            OptimizerInput([param], {"gain": {0: 1.0, "head": 2.0}}, "unknown name"),
            error_type=ValueError,
            error_regex="unknown parameter names: 'head'",
        ),
        ErrorOptimizerInput(
            OptimizerInput([("weight", param)], {"gain": {}}, "missing name"),
            error_type=ValueError,
            error_regex="lacks parameter names: 'weight'",
        ),
        ErrorOptimizerInput(
            OptimizerInput([param], {"momentun": 0.9}, "misspelt argument"),
            error_type=TypeError,
            error_regex="momentun",
        ),
        ErrorOptimizerInput(
            OptimizerInput([sparse], {}, "sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="sparse gradients",
        ),
    ]
    return get_error_inputs_for_all_optims(device, dtype) + own


INFO = OptimizerInfo(
    SGDSaI,
    optim_inputs_func=_inputs,
    optim_error_inputs_func=_error_inputs,
    scheduler_inputs=tuple(SCHEDULERS.values()),
    supported_impls=("foreach", "differentiable"),
    # What the released sgd-sai has not: state dicts without these have to load.
    not_og_supported_flags=(
        "foreach",
        "fused",
        "differentiable",
        "gain",
        "normalize",
        "largest_gain",
        "nesterov",
        "skip_nonfinite",
        "skipped_steps",
    ),
    supports_sparse=False,
    supports_complex=True,
)


def configurations(*, skip=()):
    """Fresh keyword arguments by description: each input, plainly and with each implementation."""
    # "cuda", for on a CPU the wheel leaves foreach out, which runs there all the same.
    expanded = _get_optim_inputs_including_global_cliquey_kwargs(
        "cuda", torch.float32, INFO, skip=skip
    )
    return {each.desc: each.kwargs for each in expanded}


def over_configurations(*, skip=()):
    """Runs a test once for each configuration, whose arguments :func:`arguments` makes afresh."""
    return pytest.mark.parametrize("configuration", list(configurations(skip=skip)))


def over_inputs():
    """Runs a test once for each input, whose implementation the test chooses."""
    return pytest.mark.parametrize("configuration", list(INPUTS))


def arguments(configuration, **changes):
    """Keyword arguments of one input or configuration, as new objects, with ``changes``."""
    return configurations()[configuration] | changes


def linear_problem(device="cpu", dtype=torch.float32, contiguous=True):
    """Weight, bias and a function of no arguments that returns the loss of a linear map.

    The mean of squares where torch's own problem has the sum: with a gain of sqrt(50) the default
    lr is 0.07 in torch's terms, and would swing across the sum's valley within 20 steps.
    """
    x = torch.randn(5, device=device, dtype=dtype)
    if contiguous:
        weight, bias = torch.randn(10, 5), torch.randn(10)
    else:
        weight, bias = torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]
    weight = torch.nn.Parameter(weight.to(device, dtype))
    bias = torch.nn.Parameter(bias.to(device, dtype))
    return weight, bias, lambda: (weight.mv(x) + bias).abs().square().mean()


def descend(optimizer, loss, steps, schedulers=()):
    """Steps along the gradients of ``loss()``, the schedulers with it; returns the losses."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        seen.append(value.item())
        optimizer.step()
        for scheduler in schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(value.detach())
            else:
                scheduler.step()
    return [*seen, loss().item()]


def fill_gradients(params, generator):
    """Gives each parameter a normal gradient of its own kind."""
    for param in params:
        wide = torch.complex128 if param.is_complex() else torch.float64
        grad = torch.randn(param.shape, generator=generator, dtype=wide)
        param.grad = grad.to(param.device, param.dtype)
