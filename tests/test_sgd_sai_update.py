"""SGDSaI against the slow reference and against the released package, on every path."""

import copy

import pytest
import torch
from reference import sgd_sai as reference
from torch import nn

from nomadam import SGDSaI

OPTIONS = {
    "plain": {},
    "no momentum": {"momentum": 0.0},
    "nesterov": {"nesterov": True},
    "maximize": {"maximize": True},
    "no decay": {"weight_decay": 0.0},
    "released eps": {"eps": 1e-8},
    "sqrt_numel": {"gain": "sqrt_numel"},
    "number": {"gain": 3.0},
    "all": {"nesterov": True, "maximize": True, "weight_decay": 0.1, "momentum": 0.5},
}
SHAPES = [(7, 5), (64, 33), (13,), (1,), (), (2, 3, 4), (0, 4)]


def blocks(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    params.append(torch.randn(6, 9, generator=generator).to(dtype).t())  # transposed
    params.append(torch.randn(8, 10, generator=generator).to(dtype)[:, ::2])  # strided
    return [p.detach().requires_grad_() for p in params]


def gradients(params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_follows_the_reference(name, foreach):
    options = OPTIONS[name]
    params = blocks(torch.float64)
    slow = [
        reference.SGDSaI(p, **{"rule" if k == "gain" else k: v for k, v in options.items()})
        for p in params
    ]
    optimizer = SGDSaI(params, foreach=foreach, **options)
    for grads in gradients(params, 20):
        for p, block, g in zip(params, slow, grads, strict=True):
            p.grad = g
            block.step(g)
        optimizer.step()
    for i, (p, block) in enumerate(zip(params, slow, strict=True)):
        torch.testing.assert_close(p.detach(), block.p, rtol=1e-12, atol=1e-13)
        if p.numel():
            assert optimizer.gains()[i] == pytest.approx(block.gain, rel=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "all", "no momentum"])
def test_one_step_rounds_once(name, dtype, foreach):
    """From one state, a step in any dtype is the float64 step to 1 ulp of its largest term."""
    params = blocks(dtype)
    optimizer = SGDSaI(params, lr=1e-2, foreach=foreach, **OPTIONS[name])
    for grads in gradients(params, 2):
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
    for p, g, (old, state) in zip(params, grads, before, strict=True):
        if p.numel() == 0:
            continue
        slow = reference.SGDSaI(old, lr=1e-2, **OPTIONS[name])
        slow.gain = float(state["gsnr"])
        slow.m = state["momentum_buffer"].double() if "momentum_buffer" in state else 0.0
        slow.step(g)
        term = torch.maximum(old.double().abs(), (slow.p - old.double()).abs()).max()
        assert (p.detach().double() - slow.p).abs().max() <= 1.01 * torch.finfo(dtype).eps * term


def test_paths_agree_to_one_ulp_on_mixed_dtypes_shapes_and_strides():
    runs = []
    for foreach in (False, True):
        params = [p for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
                  for p in blocks(dtype)]  # fmt: skip
        optimizer = SGDSaI(params, foreach=foreach)
        for grads in gradients(params, 10):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
        runs.append(params)
    for one, many in zip(*runs, strict=True):
        ulp = torch.finfo(one.dtype).eps * one.detach().abs()
        assert bool(((one - many).abs() <= ulp).all())


@pytest.mark.parametrize("foreach", [False, True])
def test_follows_the_released_package_on_a_small_gpt(foreach, capsys):
    released = pytest.importorskip("sgd_sai").SGD_sai
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=16, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    ours = transformers.GPT2LMHeadModel(config)
    theirs = copy.deepcopy(ours)
    first = SGDSaI(ours.parameters(), lr=1e-3, eps=1e-8, foreach=foreach)
    second = released(theirs.parameters(), lr=1e-3)
    start = [p.detach().clone() for p in ours.parameters()]
    for _ in range(200):
        tokens = torch.randint(0, 101, (4, 16))
        for model, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            logits = model(tokens[:, :-1]).logits.flatten(0, 1)
            nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
            optimizer.step()
    capsys.readouterr()
    pairs = list(zip(ours.parameters(), theirs.parameters(), start, strict=True))
    assert max((a - b).abs().max().item() for a, b, _ in pairs) <= 2e-6
    assert max((a - s).abs().max().item() for a, _, s in pairs) > 1e-2


@pytest.mark.parametrize("foreach", [False, True])
def test_complex_parameters_are_two_reals(foreach):
    z = torch.randn(5, 3, dtype=torch.complex128, requires_grad=True)
    x = torch.view_as_real(z.detach()).clone().requires_grad_()
    first = SGDSaI([z], foreach=foreach, nesterov=True)
    second = SGDSaI([x], foreach=foreach, nesterov=True)
    for _ in range(5):
        z.grad = torch.randn_like(z)
        x.grad = torch.view_as_real(z.grad).clone()
        first.step()
        second.step()
    assert torch.equal(torch.view_as_real(z.detach()), x.detach())
    assert first.gains() == second.gains()


def test_the_gradient_is_not_modified():
    for options in OPTIONS.values():
        for foreach in (False, True):
            params = blocks()
            grads = gradients(params, 1)[0]
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            SGDSaI(params, foreach=foreach, **options).step()
            assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


def test_bfloat16_steps_round_from_the_unrounded_momentum():
    """The arithmetic is float32: only what is stored is rounded."""
    p = torch.full((4,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SGDSaI([p], lr=1.0, weight_decay=0.0, gain=1.0, rounding="nearest")
    p.grad = torch.tensor([0.5, 0.25, -0.5, 0.125], dtype=torch.bfloat16)
    optimizer.step()
    m, before = optimizer.state[p]["momentum_buffer"].clone(), p.detach().clone()
    p.grad = torch.tensor([0.3, -0.7, 0.1, 0.9], dtype=torch.bfloat16)
    optimizer.step()
    exact = 0.9 * m.double() + 0.1 * p.grad.double()
    assert torch.equal(p.detach(), (before.double() - exact).to(torch.bfloat16))
