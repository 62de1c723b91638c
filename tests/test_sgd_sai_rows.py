"""SGD-SaI whose gains follow training: the recurrence, its laws, and hostile gradients."""

import copy
import io

import pytest
import torch
from reference import arms as reference
from torch import nn
from torch.testing import assert_close

from nomadam import SGDSaI
from nomadam.optimizers.baselines import BASELINES, build_optimizer
from nomadam.optimizers.sgd_sai_rows import RowSGDSaI, row_groups

NUMBERS = {"lr": 0.05, "weight_decay": 0.3}


def matrix(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def grads_of(shape=(6, 5), steps=12, scale=1.0):
    """They grow, and one row has far larger ones than the others."""
    rows = torch.tensor([30.0, *[1.0] * (shape[0] - 1)], dtype=torch.float64)[:, None]
    return [scale * (1 + t) * rows * matrix(*shape, seed=10 + t) for t in range(steps)]


def one(row_dim=None, dtype=torch.float64, **changes):
    param = nn.Parameter(matrix(6, 5).to(dtype))
    return param, RowSGDSaI([{"params": [param], "row_dim": row_dim}], **{**NUMBERS, **changes})


def follow(optimizer, param, grads):
    for grad in grads:
        param.grad = None if grad is None else grad.to(param.dtype)
        optimizer.step()
        yield param.detach().double().clone()


@pytest.mark.parametrize("row_dim", [None, 0, -1])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize(("momentum", "beta2"), [(0.9, 0.99), (0.0, 0.0), (0.5, 0.9)])
def test_follows_the_recurrence(row_dim, scale, momentum, beta2):
    grads = grads_of(scale=scale)
    grads[0] = torch.zeros_like(grads[0])
    grads[4][2] = 0.0
    betas = {"momentum": momentum, "beta2": beta2}
    numbers = {**NUMBERS, "lr": 0.05 / scale, "weight_decay": 0.3 * scale}
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        param, optimizer = one(row_dim, dtype, **numbers, **betas)
        start = param.detach().double().clone()
        expected = reference.sgd_sai_rows(start, grads, row_dim=row_dim, **numbers, **betas)
        for found, wanted in zip(follow(optimizer, param, grads), expected, strict=True):
            assert_close(found, wanted, rtol=rtol, atol=rtol)


def test_the_first_step_of_a_block_is_that_of_sgd_sai():
    param, optimizer = one()
    other = nn.Parameter(param.detach().clone())
    plain = SGDSaI([other], **NUMBERS)
    for each, takes in ((param, optimizer), (other, plain)):
        each.grad = matrix(6, 5, seed=1)
        takes.step()
    assert_close(param, other, rtol=1e-14, atol=1e-14)


def test_a_gradient_a_hundred_times_as_large_makes_a_step_ten_times_as_long():
    param, optimizer = one(momentum=0.0, beta2=0.0, weight_decay=0.0)
    grad = matrix(6, 5, seed=1)
    start, first, second = param.detach().clone(), *follow(optimizer, param, [grad, 100 * grad])
    assert_close(second - first, 10 * (first - start), rtol=1e-9, atol=0)


@pytest.mark.parametrize("row_dim", [0, -1])
def test_rows_share_the_step_that_the_block_would_take(row_dim):
    param, optimizer = one(row_dim, momentum=0.0, weight_decay=0.0, lr=1.0)
    grad = grads_of()[0] if row_dim == -1 else grads_of((5, 6))[0].t()
    start = param.detach().clone()
    (moved,) = follow(optimizer, param, [grad])
    step = start - moved
    assert_close(step.norm(), grad.norm() * grad.norm() / grad.std(), rtol=1e-9, atol=0)
    lengths, before = step.norm(dim=row_dim), grad.norm(dim=row_dim)
    assert_close(lengths / lengths[1], (before / before[1]).sqrt(), rtol=1e-9, atol=0)


def test_a_linear_layer_and_its_transpose_are_trained_alike():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    linear, flipped = nn.Linear(5, 6, bias=False), transformers.pytorch_utils.Conv1D(6, 5)
    with torch.no_grad():
        flipped.weight.copy_(linear.weight.t())
    for layer, name in ((linear, "weight"), (flipped, "weight")):
        optimizer = build_optimizer("sgd_sai_rows", layer, lr=0.1, weight_decay=0.1, head=name)
        for grad in grads_of(steps=3):
            grad = grad.float()
            layer.weight.grad = grad if layer is linear else grad.t().contiguous()
            optimizer.step()
    assert_close(linear.weight, flipped.weight.t())


def test_a_position_table_over_the_batch_has_a_row_for_each_position():
    model = nn.ParameterDict({"positions": torch.zeros(1, 7, 4)})
    optimizer = build_optimizer("sgd_sai_rows", model, lr=0.1, weight_decay=0.0, head=())
    model["positions"].grad = torch.randn(1, 7, 4)
    optimizer.step()
    assert optimizer.state[model["positions"]]["mean_square"].shape == (1, 7, 1)


@pytest.mark.parametrize("row_dim", [None, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_save_load_continue_is_exact(row_dim, dtype):
    grads = grads_of(scale=1e-2)
    param, optimizer = one(row_dim, dtype)
    list(follow(optimizer, param, grads[:5]))
    copied, resumed = one(row_dim, dtype)
    with torch.no_grad():
        copied.copy_(param)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    list(follow(optimizer, param, grads[5:])), list(follow(resumed, copied, grads[5:]))
    assert torch.equal(param, copied) and param.isfinite().all()


def test_a_block_that_waits_is_saved_and_loaded():
    param, optimizer = one()
    list(follow(optimizer, param, [torch.zeros(6, 5)]))
    _, resumed = one()
    resumed.load_state_dict(optimizer.state_dict())
    assert not any(resumed.state.values())


def test_a_loaded_state_shares_nothing():
    param, optimizer = one(-1)
    list(follow(optimizer, param, grads_of(steps=2)))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"][0]["mean_square"])
    other, resumed = one(-1)
    resumed.load_state_dict(saved)
    list(follow(resumed, other, grads_of(steps=2)))
    assert torch.equal(saved["state"][0]["mean_square"], kept)


@pytest.mark.parametrize("row_dim", [None, -1])
def test_a_block_starts_with_its_first_informative_gradient(row_dim):
    param, optimizer = one(row_dim, weight_decay=0.0)
    start, grad = param.detach().clone(), matrix(6, 5, seed=1)
    bad = grad.clone()
    bad[0, 0] = float("inf")
    for uninformative in (None, torch.zeros(6, 5), bad, float("nan") * grad):
        list(follow(optimizer, param, [uninformative]))
        assert torch.equal(param, start) and "gsnr" not in optimizer.state[param]
    fresh, other = one(row_dim, weight_decay=0.0)
    list(follow(optimizer, param, [grad])), list(follow(other, fresh, [grad]))
    assert torch.equal(param, fresh)


@pytest.mark.parametrize("row_dim", [None, -1])
def test_gradients_that_end_move_nothing_for_ever(row_dim):
    param, optimizer = one(row_dim, weight_decay=0.0, beta2=0.5)
    last = list(follow(optimizer, param, [matrix(6, 5), *[torch.zeros(6, 5)] * 3000]))[-1]
    assert last.isfinite().all()
    assert torch.equal(last, list(follow(optimizer, param, [torch.zeros(6, 5)]))[0])


def test_scalars_empty_constant_and_transposed_blocks():
    shapes = {"scalar": (), "one": (1,), "empty": (0, 4), "constant": (4, 4)}
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    params["transposed"] = nn.Parameter(torch.ones(3, 5).t())
    optimizer = RowSGDSaI(params.items(), lr=0.01)
    for _ in range(3):
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
    for name, param in params.items():
        assert param.isfinite().all() and (not param.numel() or (param < 1).all()), name


def test_an_empty_table_and_one_with_empty_rows():
    params = [nn.Parameter(torch.ones(shape)) for shape in ((0, 4), (4, 0))]
    optimizer = RowSGDSaI([{"params": params, "row_dim": -1}])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not any(optimizer.state.values())


def test_sparse_gradients_are_refused_before_anything_is_changed():
    dense, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    optimizer = RowSGDSaI([dense, table.weight])
    dense.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"row_dim": 1}, "row_dim must be None, 0 or -1, got 1"),
        ({"row_dim": -1, "params": [torch.ones(3)]}, r"two or more dimensions, got shapes \[\[3\]"),
        ({"params": [torch.ones(3, dtype=torch.complex64)]}, "real parameters"),
        ({"beta2": 1.0}, "beta2"),
        ({"momentum": -0.1}, "momentum"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_bad_groups_are_refused_and_none_is_added(group, message):
    with pytest.raises(ValueError, match=message):
        RowSGDSaI([{"params": [torch.ones(2, 2)], **group}])
    optimizer = RowSGDSaI([torch.ones(2, 2)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.ones(2, 2)], **group})
    assert len(optimizer.param_groups) == 1


def test_state_is_counted_for_tables_too():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3), nn.Linear(3, 5, bias=False))
    counted = BASELINES["sgd_sai_rows"].state_bytes(model, head="2.weight")
    assert counted == 4 * (10 + 6 + 3 + 15) + 4 * (5 + 5)
    assert [g["row_dim"] for g in row_groups(model, 0.1, head="2.weight")] == [None, -1, None]
