"""How SGDSaI behaves in a training program: arguments, closures, memory, synchronisations."""

import inspect
import io
import math
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nomadam import SGDSaI


def params_with_grads(*shapes, dtype=torch.float32):
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def test_the_signature_is_the_documented_one():
    parameters = list(inspect.signature(SGDSaI).parameters.values())
    assert [p.name for p in parameters[:2]] == ["params", "lr"] and parameters[1].default == 1e-2
    assert {p.name: p.default for p in parameters[2:]} == {
        "momentum": 0.9, "weight_decay": 1e-2, "eps": 0.0, "gain": "gsnr", "normalize": False,
        "refresh": None, "direction": "momentum",
        "nesterov": False, "maximize": False, "foreach": None, "fused": None,
        "differentiable": False, "skip_nonfinite": False, "momentum_dtype": None,
            "rounding": "auto", "seed": 0,
    }  # fmt: skip
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="wieght_decay"):
        SGDSaI(params_with_grads(3), wieght_decay=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, r"lr must be a number in \[0.0, inf\), got -0.001"),
        ({"lr": math.nan}, "got nan"),
        ({"lr": math.inf}, "got inf"),
        ({"lr": "1e-3"}, "got '1e-3'"),
        ({"lr": torch.tensor([1e-3, 1e-3])}, "Tensor lr must be 1-element, got 2 elements"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0.0, 1.0\), got 1.0"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"eps": -1e-8}, "eps must be"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum above 0"),
        ({"fused": "yes"}, "fused must be None, True or False, got .yes"),
        ({"foreach": 1}, "foreach must be None, True or False, got 1"),
        ({"nesterov": "no"}, "nesterov must be True or False, got .no"),
        ({"skip_nonfinite": None}, "skip_nonfinite must be True or False, got None"),
        ({"fused": True, "differentiable": True}, "exclude each other"),
        ({"momentum_dtype": torch.float16}, "momentum_dtype must be None, .*got torch.float16"),
        ({"momentum_dtype": "int4"}, "got .int4."),
        ({"rounding": "up"}, "rounding must be .auto.*got .up."),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^64\), got -1"),
        ({"seed": 1.5}, "got 1.5"),
        ({"seed": True}, "got True"),
        ({"differentiable": True, "momentum_dtype": "int8"}, "differentiable=True needs"),
        ({"fused": True, "foreach": True}, "exclude each other"),
        ({"foreach": True, "differentiable": True}, "exclude each other"),
    ],
)
def test_wrong_options_name_the_value_and_the_range(options, message):
    with pytest.raises(ValueError, match=message):
        SGDSaI(params_with_grads(3), **options)
    if not options.get("fused"):
        with pytest.raises(ValueError, match=message):
            SGDSaI([{"params": params_with_grads(3), **options}])


def test_sparse_gradients_are_refused_before_anything_changes():
    dense, sparse = params_with_grads((3,), (4, 2))
    before = dense.detach().clone()
    sparse.grad = sparse.grad.to_sparse()
    optimizer = SGDSaI([dense, sparse])
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense.detach(), before)
    assert not optimizer.state


def test_a_closure_is_called_once_with_gradients_enabled():
    p = nn.Parameter(torch.randn(3))
    optimizer = SGDSaI([p])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        for _ in range(3):
            assert optimizer.step(closure).item() > 0
    assert calls == [True] * 3


def test_the_seed_of_another_library_is_saved_as_a_number():
    np = pytest.importorskip("numpy")
    optimizer = SGDSaI([torch.ones(3)], seed=np.uint64(2**63 + 1))
    assert optimizer.param_groups[0]["seed"] == 2**63 + 1
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["seed"] == 2**63 + 1


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor([0.1]), 0.1])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_tensor_learning_rate_and_a_scheduler(lr, foreach):
    results = []
    for rate in (lr.clone() if isinstance(lr, torch.Tensor) else lr, 0.1):
        torch.manual_seed(0)
        params = params_with_grads((4, 3), (), (0, 2))
        optimizer = SGDSaI(params, lr=rate, foreach=foreach)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 5)
        for _ in range(6):
            optimizer.step()
            scheduler.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_skip_nonfinite_changes_nothing_and_counts(dtype, foreach):
    params = params_with_grads((4, 3), (5,), (), (0,), dtype=dtype)
    optimizer = SGDSaI(params, foreach=foreach, skip_nonfinite=True)

    def bits():
        state = [s[k] for s in optimizer.state.values() for k in ("momentum_buffer", "gsnr")]
        return [t.detach().clone() for t in (*params, *state)]

    params[0].grad[1, 1] = math.inf
    start = [p.detach().clone() for p in params]
    optimizer.step()  # a first step that is skipped starts no block
    assert all(torch.equal(a, b) for a, b in zip(params, start, strict=True))
    assert optimizer.gains() == {} and optimizer.skipped_steps == 1
    params[0].grad[1, 1] = 1.0
    optimizer.step()
    params[1].grad[2] = math.nan
    before = bits()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(bits(), before, strict=True))
    assert optimizer.skipped_steps == 2
    params[1].grad[2] = 1.0
    optimizer.step()
    assert not torch.equal(params[1], before[1]) and optimizer.skipped_steps == 2
    fresh = SGDSaI(params, skip_nonfinite=True)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.skipped_steps == 2


def test_skip_nonfinite_gives_the_same_steps_where_all_is_finite():
    results = []
    for skip in (False, True):
        torch.manual_seed(0)
        params = params_with_grads((40, 3), (5,))
        optimizer = SGDSaI(params, skip_nonfinite=skip)
        for _ in range(5):
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_grad_scaler_skips_and_measures_nothing_then():
    p = nn.Parameter(torch.ones(4))
    optimizer = SGDSaI([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale((p * torch.tensor([1.0, 2.0, math.inf, 4.0])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.gains() == {} and torch.equal(p.detach(), torch.ones(4))
    optimizer.zero_grad()
    weights = torch.tensor([1.0, -2.0, 3.0, 4.0])
    scaler.scale((p * weights).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.gains()[0] == pytest.approx((weights.norm() / weights.std()).item())


class HostReads(TorchFunctionMode):
    """Counts what would make the host wait for a device, but for the gains, which are host data."""

    READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer, self.count = optimizer, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.READS:
            own = {id(state["gsnr"]) for state in self.optimizer.state.values()}
            self.count += id(args[0]) not in own
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"normalize": True}], ids=str)
def test_one_synchronisation_while_unmeasured_and_none_after(options, foreach):
    params = params_with_grads((4, 3), (5,), (300, 300))
    optimizer = SGDSaI(params, foreach=foreach, **options)
    late = params[1].grad
    params[1].grad = torch.zeros(5)
    counts = []
    for i in range(5):
        if i == 2:
            params[1].grad = late
        with HostReads(optimizer) as reads:
            optimizer.step()
        counts.append(reads.count)
    assert counts == [1, 1, 1, 0, 0]


class PeakMemory(TorchDispatchMode):
    """Bytes of tensors that operators made and that were alive at one time."""

    def __init__(self, existing):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage().data_ptr() for t in existing if t.numel()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes()
                if size and pointer not in self.seen:
                    self.seen.add(pointer)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, pointer, size)
        return out

    def _free(self, pointer, size):
        self.seen.discard(pointer)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"skip_nonfinite": True}], ids=str)
def test_a_foreach_step_needs_one_percent_of_the_parameters(options, dtype):
    numel = 200 * 2**18
    params = [nn.Parameter(torch.ones(64, 2**17, dtype=dtype)) for _ in range(3)]
    params += [nn.Parameter(torch.ones(numel - 3 * 64 * 2**17, dtype=dtype))]
    bytes_of_parameters = numel * params[0].element_size()
    for p in params:
        p.grad = torch.ones_like(p)
        p.grad.view(-1)[::3] = 2.0
    optimizer = SGDSaI(params, foreach=True, **options)
    state_bytes = bytes_of_parameters + 4 * len(params)
    for allowed in (state_bytes, 0):
        existing = [t for p in params for t in (p, p.grad)]
        existing += [t for s in optimizer.state.values() for t in s.values()]
        with PeakMemory(existing) as memory:
            optimizer.step()
        assert allowed <= memory.peak <= allowed + 0.01 * bytes_of_parameters


def test_8_bits_need_as_little_for_a_weight_in_another_order():
    # of all others, no more than a few temporaries of the limit
    weight = torch.ones(2**11, 2**11, dtype=torch.bfloat16).t()
    weight.grad = torch.rand(2**11, 2**11).to(torch.bfloat16)
    rest = torch.ones(2**27, dtype=torch.bfloat16)
    for foreach in (False, True):
        optimizer = SGDSaI([weight, rest], foreach=foreach, momentum_dtype="int8")
        optimizer.step()
        existing = [weight, weight.grad, *optimizer.state[weight].values()]
        with PeakMemory(existing) as memory:
            optimizer.step()
        assert 0 < memory.peak <= 0.01 * (weight.nbytes + rest.nbytes)


def test_state_bytes_are_one_momentum_and_one_number():
    params = params_with_grads((100, 10), (7,))
    optimizer = SGDSaI(params)
    optimizer.step()
    total = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert total == 4 * 1007 + 4 * 2
    optimizer = SGDSaI(params, momentum=0.0)
    optimizer.step()
    assert [set(s) for s in optimizer.state.values()] == [{"gsnr"}] * 2


def test_nothing_is_kept_on_the_object():
    """All that a step learns is in the state or in the groups."""
    params = params_with_grads((3, 2))
    optimizer = SGDSaI(params, normalize=True, skip_nonfinite=True)
    before = set(vars(optimizer))
    optimizer.step()
    assert set(vars(optimizer)) == before


def test_groups_may_differ_in_every_option():
    params = params_with_grads((3, 2), (3, 2))
    with torch.no_grad():
        params[1].copy_(params[0])
    params[1].grad = params[0].grad.clone()
    own = {"momentum": 0.0, "weight_decay": 0.3, "gain": 2.0, "maximize": True, "lr": 0.2}
    optimizer = SGDSaI([{"params": [params[0]]}, {"params": [params[1]], **own}])
    alone = nn.Parameter(params[1].detach().clone())
    alone.grad = params[1].grad.clone()
    optimizer.step()
    SGDSaI([alone], **own).step()
    assert torch.equal(params[1], alone)
    assert not torch.equal(params[0], alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_on_cuda():
    params = [nn.Parameter(torch.randn(50, 50, device="cuda")) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = SGDSaI(params, skip_nonfinite=True)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
