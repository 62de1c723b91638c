"""PyTorch's laws on ways to compute a step: for-loop, foreach, differentiable, compiled.

The list of all laws, and where each is run, is in ``test_torch_laws.py``.
"""

import sys
import weakref

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import (
    INPUTS,
    SCHEDULERS,
    arguments,
    fill_gradients,
    linear_problem,
    over_configurations,
    over_inputs,
)

from nomadam import SGDSaI
from nomadam.optimizers import sgd_sai_fused

NO_GRADIENTS, FROZEN = {2}, {3, 4}  # steps at which all, or some, parameters have no gradient


def mixed_params(dtypes, seed=0):
    """For each dtype matrices, a vector and an empty tensor; one 0-d parameter closes the list."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for dtype in dtypes:
        for shape in [(2, 3), (3,), (3, 1), (1,), (0, 2)]:
            params.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        params.append(torch.randn(4, 6, generator=generator, dtype=torch.float64).to(dtype).t())
    params.append(torch.randn((), generator=generator, dtype=torch.float64).to(dtypes[0]))
    return [param.requires_grad_() for param in params]


def assert_foreach_equals_forloop(configuration, dtypes, **tolerance):
    runs = []
    for foreach in (False, True):
        params = mixed_params(dtypes)
        optimizer = SGDSaI(params, **arguments(configuration, foreach=foreach))
        generator = torch.Generator().manual_seed(1)
        history = []
        for i in range(7):
            fill_gradients(params, generator)
            for k, param in enumerate(params):
                if i in NO_GRADIENTS or (i in FROZEN and k % 3 == 0):
                    param.grad = None
            optimizer.step()
            history.append([param.detach().clone() for param in params])
        runs.append((history, [optimizer.state[param] for param in params]))
    (history, states), (foreach_history, foreach_states) = runs
    assert_close(foreach_history, history, **tolerance)
    for state, foreach_state in zip(states, foreach_states, strict=True):
        assert state.keys() == foreach_state.keys()
        for name, tensor in state.items():
            assert_close(foreach_state[name], tensor, **tolerance)
            assert foreach_state[name].stride() == tensor.stride()


@over_inputs()
def test_foreach_equals_forloop(configuration):
    assert_foreach_equals_forloop(configuration, [torch.float64])


@over_inputs()
def test_foreach_equals_forloop_on_mixed_dtypes(configuration):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    assert_foreach_equals_forloop(configuration, dtypes)


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
@over_inputs()
def test_foreach_equals_forloop_under_another_default_dtype(configuration, default):
    old = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert_foreach_equals_forloop(configuration, [torch.float64, torch.float32])
        param = torch.zeros(3, dtype=torch.float32)
        param.grad = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float32)
        optimizer = SGDSaI([param])
        optimizer.step()
        assert optimizer.state[param]["gsnr"].dtype == torch.float32
    finally:
        torch.set_default_dtype(old)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, and how many live at a time at most."""

    def __enter__(self):
        self.live, self.peak_bytes = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
        return result


def tensors_in(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def peak_bytes_of_a_step(params, **kwargs):
    """The most memory that a step takes beside parameters, gradients and state."""
    optimizer = SGDSaI(params, **kwargs)
    optimizer.step()
    with PeakMemory() as memory:
        optimizer.step()
    return memory.peak_bytes


@over_inputs()
def test_foreach_needs_at_most_one_intermediate(configuration):
    params = [torch.rand(16, 8) for _ in range(10)]
    for param in params:
        param.grad = torch.rand_like(param)
    peak = {
        foreach: peak_bytes_of_a_step(params, **arguments(configuration, foreach=foreach))
        for foreach in (False, True)
    }
    # A step that may be taken back computes parameter and momentum apart and then chooses.
    num_intermediates = 3 if INPUTS[configuration].get("skip_nonfinite") else 1
    assert peak[True] <= peak[False] + num_intermediates * sum(p.nbytes for p in params)
    assert configuration != "maximize" or peak[True] > 0  # else nothing was measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_foreach_takes_a_large_tensor_in_slices(dtype):
    numel = 2**21
    start = torch.linspace(-1, 1, numel).to(dtype).view(-1, 64)
    grad = torch.sin(torch.arange(numel, dtype=torch.float32)).to(dtype).view(-1, 64)
    results = []
    for foreach in (True, False):
        param = start.clone()
        param.grad = grad.clone()
        peak_bytes = peak_bytes_of_a_step([param], foreach=foreach, nesterov=True)
        # A slice has 2 ** 16 elements; it is widened, and nesterov needs a direction apart.
        assert not foreach or peak_bytes <= 4 * 2**16 * 4 < 2 * 2**20 <= start.nbytes
        results.append(param)
    assert_close(*results)


def test_default_is_foreach_where_torch_has_it_so(monkeypatch):
    calls = []

    def spy(name):
        original = getattr(sgd_sai_fused, name)
        monkeypatch.setattr(
            sgd_sai_fused,
            name,
            lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs),
        )

    def taken(**kwargs):
        calls.clear()
        param = torch.rand(2, 5)
        param.grad = torch.rand(2, 5)
        SGDSaI([param], **kwargs).step()
        return set(calls)

    spy("update_forloop")
    spy("update_foreach")
    for kwargs in INPUTS.values():
        assert taken(**kwargs) == {"update_forloop"}  # a CPU is not among torch's foreach devices
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules[torch.optim.Optimizer.__module__],
            "_get_foreach_kernels_supported_devices",
            lambda: ["cpu"],
        )
        for kwargs in INPUTS.values():
            assert taken(**kwargs) == {"update_foreach"}
        assert taken(foreach=False) == {"update_forloop"}
        assert taken(differentiable=True) == {"update_forloop"}
    assert taken(foreach=True) == {"update_foreach"}


@over_inputs()
def test_differentiable_in_parameter_gradient_and_momentum(configuration):
    kwargs = arguments(configuration, foreach=False, differentiable=True)

    def step(param, grad, momentum_buffer):
        param = param.clone()
        param.grad = grad
        optimizer = SGDSaI([param], **kwargs)
        state = optimizer.state[param]
        state["gsnr"] = torch.tensor(3.0, dtype=torch.float64)
        state["momentum_buffer"] = momentum_buffer.clone()
        optimizer.step()
        return param, state["momentum_buffer"]

    inputs = [torch.rand(10, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(step, inputs)


@over_inputs()
def test_gain_is_a_constant_to_autograd(configuration):
    kwargs = arguments(configuration, foreach=False, differentiable=True)
    start = torch.rand(10, dtype=torch.float64)
    grad = torch.rand(10, dtype=torch.float64, requires_grad=True)
    param = start.clone()
    param.grad = grad
    optimizer = SGDSaI([param], **kwargs)
    optimizer.step()
    lr = float(kwargs.get("lr", 1e-2))
    sign = 1 if kwargs.get("maximize") else -1
    (slope,) = torch.autograd.grad(param.sum(), grad)
    assert_close(slope, torch.full_like(slope, sign * lr * optimizer.gains()[0]))


@pytest.mark.parametrize("shape", [None, (), (1,)], ids=["float", "0-d", "1-d"])
@over_inputs()
def test_differentiable_in_lr(configuration, shape):
    """Through three steps of a problem whose first gradient has always the same direction."""
    kwargs = arguments(configuration, foreach=False, differentiable=True)
    weights = torch.linspace(0.5, 2.0, 10, dtype=torch.float64)

    def train(lr, start):
        param = start.clone()
        optimizer = SGDSaI([param], **{**kwargs, "lr": lr})
        for _ in range(3):
            loss = ((weights * param).sum() - 2) ** 2
            (param.grad,) = torch.autograd.grad(loss, param, create_graph=True)
            optimizer.step()
        return ((weights * param).sum() - 2) ** 2, param

    lr = 1e-3
    if shape is not None:
        lr = torch.full(shape, lr, dtype=torch.float64, requires_grad=True)
    start = torch.rand(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(train, (lr, start))


def compiled_and_eager(configuration, backend, steps, make_schedulers=(), missing=()):
    """Parameters after the steps, compiled and not; ``missing`` steps lack a gradient of two."""
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        weight, bias, loss = linear_problem()
        optimizer = SGDSaI([weight, bias], **arguments(configuration))
        schedulers = [make(optimizer) for make in make_schedulers]
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for i in range(steps):
            optimizer.zero_grad()
            loss().backward()
            if i in missing:
                bias.grad = None
            step()
            for scheduler in schedulers:
                scheduler.step()
        results.append([weight.detach(), bias.detach(), *optimizer.gains().values()])
    return results


@over_configurations(skip=("differentiable",))
def test_compiled_step_equals_eager(configuration):
    compiled, eager = compiled_and_eager(configuration, "eager", steps=3)
    assert_close(compiled, eager)


@pytest.mark.parametrize("configuration", ["default", "tensor lr & foreach", "nesterov & foreach"])
def test_compiled_step_equals_eager_through_aot(configuration):
    compiled, eager = compiled_and_eager(configuration, "aot_eager", steps=3)
    assert_close(compiled, eager)


@pytest.mark.parametrize("configuration", ["default", "tensor lr", "tensor lr & foreach"])
def test_compiled_step_with_a_scheduler_equals_eager(configuration):
    schedulers = SCHEDULERS["step and linear"]
    compiled, eager = compiled_and_eager(configuration, "eager", 5, schedulers)
    assert_close(compiled, eager)


@pytest.mark.parametrize("missing", [{0}, {2, 3}], ids=["at first", "in between"])
@pytest.mark.parametrize("configuration", ["default", "default & foreach"])
def test_compiled_step_guards_on_missing_gradients(configuration, missing):
    compiled, eager = compiled_and_eager(configuration, "eager", 5, missing=missing)
    assert_close(compiled, eager)
