"""The for-loop, foreach and one-pass updates of SGDSaI on blocks of mixed dtype, shape and stride.

From the same state one step differs by at most 1 ulp of the largest term, in storage precision;
after 200 steps a path is at most twice as far from a float64 run as the for-loop is.
"""

import copy
import itertools

import pytest
import torch

from nomadam import SGDSaI
from nomadam.numerics.blockwise import dequantize
from nomadam.optimizers.sgd_sai_cpu import cpu_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

OPTIONS = [
    {},
    {"nesterov": True, "weight_decay": 0.1},
    {"maximize": True, "momentum": 0.3},
    {"momentum": 0.0},
    {"weight_decay": 0.0, "nesterov": True, "maximize": True},
    {"skip_nonfinite": True},
    {"normalize": True, "gain": "sqrt_numel"},
    {"refresh": 3},
]
STORED = [
    {"rounding": "nearest"},
    {"rounding": "stochastic", "momentum_dtype": torch.bfloat16},
    {"rounding": "kahan", "momentum_dtype": torch.float32},
    {"rounding": "auto", "momentum_dtype": "int8"},
    {"rounding": "kahan", "momentum_dtype": "int8"},
]


@pytest.fixture(autouse=True)
def compiler():
    if cpu_kernel(warn=False) is None and DEVICES == ["cpu"]:
        pytest.skip("no C++ compiler")


def mixed_blocks(device, seed=0):
    """Of every dtype, whole, transposed, strided, in channels_last, scalar and empty."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(shape, generator=generator)

    values = []
    for dtype in DTYPES:
        made = [new(80, 67), new(129), new(), new(0, 3), new(64, 96).t(), new(65, 128)[:, ::2]]
        made.append(new(8, 16, 6, 6).to(memory_format=torch.channels_last))
        values += [value.to(device, dtype) for value in made]
    return [value.requires_grad_() for value in values]


def gradient_of(p, generator):
    return (torch.randn(p.shape, generator=generator) + 0.3).to(p.device, p.dtype)


def stepped(optimizer, params, grads):
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone(memory_format=torch.preserve_format)
    optimizer.step()


def momentum_of(state):
    buffer, scale = state["momentum_buffer"], state.get("momentum_scale")
    return (buffer if scale is None else dequantize(buffer, scale)).double()


def ulp(dtype, largest):
    """The distance of neighbours of that dtype at that size."""
    bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10, torch.float64: 52}[dtype]
    tiny = torch.finfo(dtype).tiny
    exponent = torch.frexp(largest.double().clamp(min=tiny))[1] - 1
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - bits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("stored", STORED, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_step_agrees_to_an_ulp_of_the_largest_term(options, stored, path, device):
    generator = torch.Generator().manual_seed(1)
    params = mixed_blocks(device)
    loop = SGDSaI(params, lr=3e-2, foreach=False, fused=False, **options, **stored)
    for _ in range(3):
        stepped(loop, params, [gradient_of(p, generator) for p in params])
    others = [p.detach().clone(memory_format=torch.preserve_format) for p in params]
    others = [p.requires_grad_() for p in others]
    other = SGDSaI(others, lr=3e-2, **options, **stored, **path)
    state = loop.state_dict()
    for group in state["param_groups"]:
        group |= {"foreach": None, "fused": None, **path}
    other.load_state_dict(copy.deepcopy(state))
    before = [p.detach().clone() for p in params]
    momenta = [
        momentum_of(s) if "momentum_buffer" in s else 0.0 for s in map(loop.state.get, params)
    ]
    grads = [gradient_of(p, generator) for p in params]
    stepped(loop, params, grads)
    stepped(other, others, grads)
    gains = loop.gains()
    for i, (p, q, old) in enumerate(zip(params, others, before, strict=True)):
        if p.numel() == 0:
            continue
        kept, found = loop.state[p], other.state[q]
        terms = abs(momenta[i]) + grads[i].double().abs() * (1 - loop.param_groups[0]["momentum"])
        largest = torch.maximum(old.double().abs(), 3e-2 * gains[i] * terms)
        unit = ulp(p.dtype, largest)
        if "compensation" in kept:  # the sum of both is what is stored, to twice the bits
            sums = [a.double() + s["compensation"].double() for a, s in ((p, kept), (q, found))]
            assert ((sums[0] - sums[1]).abs() <= unit * 2**-7).all(), (i, p.dtype)
        off = ((p.double() - q.double()).abs() / unit).max().item()
        assert off <= 1, (i, p.dtype, off)
        if "momentum_buffer" in kept:
            m, n = momentum_of(kept), momentum_of(found)
            if "momentum_scale" in kept:
                off = (kept["momentum_buffer"].int() - found["momentum_buffer"].int()).abs()
                assert off.max() <= 1 and off.sum() <= 3, i
            else:
                assert ((m - n).abs() <= ulp(kept["momentum_buffer"].dtype, m.abs() + 0.3)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", STORED, ids=lambda s: "-".join(map(str, s.values())))
def test_random_bits_are_the_same_on_every_path(stored, device):
    """What two paths round apart, a last bit of float32 before it, is rare: bits would be half."""
    ends = []
    for path in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        generator = torch.Generator().manual_seed(1)
        params = mixed_blocks(device)
        optimizer = SGDSaI(params, lr=1e-2, seed=7, **stored, **path)
        for _ in range(3):
            stepped(optimizer, params, [gradient_of(p, generator) for p in params])
        ends.append([p.detach() for p in params])
    for one, other in itertools.combinations(ends, 2):
        for p, q in zip(one, other, strict=True):
            if p.dtype == torch.bfloat16:
                assert (p != q).float().sum() <= 2e-3 * p.numel() + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_200_steps_stay_as_near_to_float64_as_the_for_loop(options, device):
    errors = {}
    for name, path in (
        ("exact", {"foreach": False}),
        ("loop", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    ):
        generator = torch.Generator().manual_seed(1)
        params = mixed_blocks(device)
        if name == "exact":
            params = [p.detach().double().requires_grad_() for p in params]
        optimizer = SGDSaI(params, lr=1e-3, rounding="nearest", **options, **path)
        dtypes = [p.dtype for p in mixed_blocks(device)]
        for _ in range(200):
            grads = [gradient_of(p, generator) for p in params]
            grads = [g.to(d).to(p.dtype) for g, d, p in zip(grads, dtypes, params, strict=True)]
            stepped(optimizer, params, grads)
        errors[name] = [p.detach().double() for p in params]
    exact = errors.pop("exact")
    for i, p in enumerate(exact):
        if p.numel() == 0:
            continue
        far = {name: (end[i] - p).square().mean().sqrt().item() for name, end in errors.items()}
        floor = 2**-24 * p.abs().max().item()
        assert far["foreach"] <= 2 * far["loop"] + floor, (i, far)
        assert far["fused"] <= 2 * far["loop"] + floor, (i, far)
