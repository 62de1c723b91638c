"""When a block starts, what its gain is, and what it may be set to."""

import math

import pytest
import torch
from torch import nn

from nomadam import SGDSaI


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(shape, dtype=dtype))


def step(optimizer, *grads):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("first", ["none", "zero", "nan", "inf"])
def test_a_block_starts_at_its_first_informative_gradient(first, momentum, foreach):
    late, other = parameter(6, 4), parameter(3)
    optimizer = SGDSaI([late, other], lr=0.1, weight_decay=0.5, momentum=momentum, foreach=foreach)
    start = late.detach().clone()
    uninformative = {
        "none": None,
        "zero": torch.zeros(6, 4),
        "nan": torch.full((6, 4), math.nan),
        "inf": torch.randn(6, 4).index_fill(0, torch.tensor([1]), math.inf),
    }[first]
    for _ in range(3):
        step(optimizer, uninformative, torch.randn(3))
        assert list(optimizer.gains()) == [1]
    decayed = start * 0.95 * 0.95 * 0.95 if first == "zero" else start
    torch.testing.assert_close(late.detach(), decayed)
    g = torch.randn(6, 4)
    expected = late.detach() * 0.95 - 0.1 * (g.norm() / g.std()) * g
    step(optimizer, g, torch.randn(3))
    assert optimizer.gains()[0] == pytest.approx((g.norm() / g.std()).item(), rel=1e-6)
    torch.testing.assert_close(late.detach(), expected)


def test_no_state_for_a_block_that_never_had_a_gradient():
    used, unused = parameter(3), parameter(3)
    optimizer = SGDSaI([used, unused])
    step(optimizer, torch.randn(3), None)
    assert unused not in optimizer.state


def test_a_zero_step_materialises_state_and_starts_nothing():
    p = parameter(5, 5)
    optimizer = SGDSaI([p], lr=0.0)
    step(optimizer, torch.zeros(5, 5))
    assert set(optimizer.state[p]) == {"momentum_buffer", "gsnr"}
    assert float(optimizer.state[p]["gsnr"]) == 0.0
    assert not optimizer.state[p]["momentum_buffer"].any()
    assert optimizer.gains() == {}
    optimizer.param_groups[0]["lr"] = 0.1
    g = torch.randn(5, 5)
    step(optimizer, g)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], g)
    assert optimizer.gains()[0] == pytest.approx((g.norm() / g.std()).item(), rel=1e-6)


def test_a_learning_rate_of_zero_measures_too():
    p = parameter(5, 5)
    before = p.detach().clone()
    optimizer = SGDSaI([p], lr=0.0)
    g = torch.randn(5, 5)
    step(optimizer, g)
    assert torch.equal(p.detach(), before)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], g)
    assert 0 in optimizer.gains()


def test_the_gain_is_measured_once():
    p = parameter(50)
    optimizer = SGDSaI([p])
    step(optimizer, torch.randn(50))
    first = optimizer.gains()
    for scale in (1e6, 1e-6, 0.0, math.nan):
        step(optimizer, torch.rand(50) * scale)
        assert optimizer.gains() == first


def test_zero_gradients_after_the_start_let_the_momentum_decay():
    p = parameter(4)
    optimizer = SGDSaI([p], weight_decay=0.0)
    g = torch.randn(4)
    step(optimizer, g)
    before = p.detach().clone()
    step(optimizer, torch.zeros(4))
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.9 * g)
    assert not torch.equal(p.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_gain_is_float32_or_wider_and_on_the_host(dtype):
    p = parameter(8, 8, dtype=dtype)
    optimizer = SGDSaI([p])
    step(optimizer, torch.randn(8, 8, dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.state[p]["gsnr"].dtype == wide
    assert optimizer.state[p]["gsnr"].device.type == "cpu"
    buffer = torch.float32 if dtype == torch.float16 else dtype
    assert optimizer.state[p]["momentum_buffer"].dtype == buffer


def test_a_large_float16_gradient_does_not_overflow():
    p = parameter(64, 64, dtype=torch.float16)
    optimizer = SGDSaI([p], lr=1e-9)
    step(optimizer, (torch.rand(64, 64) - 0.5).mul(120000).half())
    assert optimizer.gains()[0] == pytest.approx(64.0, rel=1e-2)
    assert torch.isfinite(optimizer.state[p]["momentum_buffer"]).all()


@pytest.mark.parametrize("exponent", [-20, -9, 0, 9, 20])
def test_the_default_gain_is_free_of_the_loss_scale(exponent):
    g = torch.randn(30, 30)
    gains = []
    for scale in (1.0, 10.0**exponent):
        optimizer = SGDSaI([parameter(30, 30)], lr=0.0)
        step(optimizer, g * scale)
        gains.append(optimizer.gains()[0])
    assert gains[0] == pytest.approx(gains[1], rel=1e-6)


@pytest.mark.parametrize(
    ("gradient", "gain"),
    [
        (torch.tensor(3.0), 1.0),
        (torch.tensor([[-2.0]]), 1.0),
        (torch.full((10,), 0.3), 10.0),
        (torch.full((100,), -1e-30), 100.0),
        (torch.tensor([1.0, 0.0, 0.0, 0.0]), 2.0),
    ],
)
def test_the_gain_is_bounded_and_finite(gradient, gain):
    optimizer = SGDSaI([parameter(*gradient.shape)], lr=0.0)
    step(optimizer, gradient)
    assert optimizer.gains()[0] == pytest.approx(gain)


def test_a_complex_block_counts_its_reals():
    p = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    optimizer = SGDSaI([p])
    step(optimizer, torch.full((5,), 1 + 1j))
    assert optimizer.gains()[0] == 10.0


def test_lora_trains_both_factors():
    """B starts at zero, so the first gradient of A is exactly zero."""
    a, b = parameter(4, 16), nn.Parameter(torch.zeros(8, 4))
    optimizer = SGDSaI([("A", a), ("B", b)], lr=1e-2)
    x, y = torch.randn(32, 16), torch.randn(32, 8)
    start = a.detach().clone()
    for i in range(3):
        optimizer.zero_grad()
        (x @ a.T @ b.T - y).square().mean().backward()
        optimizer.step()
        assert set(optimizer.gains()) == ({"B"} if i == 0 else {"A", "B"})
    assert (a - start).abs().max() > 1e-3


def test_groups_added_later_and_layers_unfrozen_later():
    first, second = parameter(10), parameter(10)
    optimizer = SGDSaI([("first", first)])
    step(optimizer, torch.randn(10))
    optimizer.add_param_group({"params": [("second", second)], "lr": 0.5})
    step(optimizer, torch.randn(10), torch.randn(10))
    assert set(optimizer.gains()) == {"first", "second"}


def test_gains_by_shape_by_number_and_by_name():
    params = [("w", parameter(4, 9)), ("b", parameter(9))]
    grads = torch.randn(4, 9) + 1.0, torch.randn(9) + 1.0
    for gain, expected in [
        ("sqrt_numel", {"w": 6.0, "b": 3.0}),
        (2.5, {"w": 2.5, "b": 2.5}),
        ({"w": 3.0, "b": 0.25}, {"w": 3.0, "b": 0.25}),
    ]:
        optimizer = SGDSaI(params, gain=gain)
        assert optimizer.gains() == {}
        step(optimizer, *grads)
        assert optimizer.gains() == expected


def test_measured_gains_can_be_given_back():
    params = [parameter(4, 9), parameter(9)]
    optimizer = SGDSaI(params)
    step(optimizer, torch.randn(4, 9), torch.randn(9))
    again = SGDSaI(params, gain=optimizer.gains())
    step(again, torch.ones(4, 9), torch.ones(9))
    assert again.gains() == optimizer.gains()


def test_a_block_without_elements_needs_no_gain():
    params = [parameter(4), parameter(0)]
    optimizer = SGDSaI(params)
    step(optimizer, torch.randn(4), torch.zeros(0))
    again = SGDSaI(params, gain=optimizer.gains())
    step(again, torch.randn(4), torch.zeros(0))
    assert again.gains() == optimizer.gains()


def test_a_mapping_lists_missing_and_unknown_names():
    params = [("w", parameter(4)), ("b", parameter(4)), ("c", parameter(4))]
    with pytest.raises(ValueError, match="lacks parameter names: 'b', 'c'"):
        SGDSaI(params, gain={"w": 1.0})
    with pytest.raises(ValueError, match="unknown parameter names: 'd', 'e'"):
        SGDSaI(params, gain=dict.fromkeys("wbcde", 1.0) | {"w": 1.0, "b": 1.0, "c": 1.0})
    optimizer = SGDSaI(params[:1], gain={"w": 2.0})
    with pytest.raises(ValueError, match="lacks parameter names: 'b'"):
        optimizer.add_param_group({"params": params[1:2]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:2], "gain": {"b": 5.0}})
    step(optimizer, torch.randn(4), torch.randn(4))
    assert optimizer.gains() == {"w": 2.0, "b": 5.0}


@pytest.mark.parametrize("gain", [0, 0.0, -1.0, math.nan, math.inf, "gsn", True, None, {"0": "x"}])
def test_a_wrong_gain_names_itself_and_the_range(gain):
    with pytest.raises(ValueError, match="gain must be 'gsnr', 'sqrt_numel', a number in"):
        SGDSaI([("0", parameter(3))], gain=gain)


def test_normalize_divides_by_the_largest_and_settles_it_once():
    small, large, late = parameter(4), parameter(100), parameter(400)
    optimizer = SGDSaI([small, large, late], normalize=True)
    plain = SGDSaI([parameter(4), parameter(100), parameter(400)])
    for o in (optimizer, plain):
        torch.manual_seed(3)
        step(o, torch.randn(4), torch.randn(100), torch.zeros(400))
    measured = plain.gains()
    assert optimizer.gains()[1] == 1.0
    assert optimizer.gains()[0] == pytest.approx(measured[0] / measured[1])
    for o in (optimizer, plain):
        torch.manual_seed(4)
        step(o, torch.randn(4), torch.randn(100), torch.randn(400))
    assert optimizer.gains()[1] == 1.0
    assert optimizer.gains()[2] == pytest.approx(plain.gains()[2] / measured[1])
    assert optimizer.gains()[2] > 1.0


def test_normalize_is_another_learning_rate_and_another_decay():
    torch.manual_seed(0)
    w = torch.randn(6, 6)
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    g = torch.randn(6, 6)
    one = SGDSaI([p], lr=0.6, normalize=True, weight_decay=0.0)
    step(one, g)
    two = SGDSaI([q], lr=0.6 / (g.norm() / g.std()).item(), weight_decay=0.0)
    step(two, g)
    torch.testing.assert_close(p, q)


def test_normalize_survives_a_checkpoint_and_a_group_that_is_added():
    p, q = parameter(9), parameter(100)
    optimizer = SGDSaI([p], normalize=True)
    step(optimizer, torch.randn(9))
    divisor = optimizer.param_groups[0]["largest_gain"]
    optimizer.add_param_group({"params": [q]})
    step(optimizer, torch.randn(9), torch.randn(100))
    fresh = SGDSaI([{"params": [p]}, {"params": [q]}], normalize=True)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.gains() == optimizer.gains()
    assert optimizer.gains()[0] == 1.0
    assert {group["largest_gain"] for group in fresh.param_groups} == {divisor}
