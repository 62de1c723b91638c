"""SGDSaI with 8-bit and bfloat16 momentum and with every rounding of bfloat16 parameters."""

import copy
import io
import itertools

import pytest
import torch
from cases import take

from nomadam import SGDSaI
from nomadam.numerics.blockwise import dequantize
from nomadam.optimizers.baselines import BASELINES

SHAPES = {"matrix": (96, 80), "odd": (67, 64), "small": (33,), "one": (1,), "empty": (0, 4)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = (None, torch.float32, torch.bfloat16, "int8")
ROUNDINGS = ("auto", "nearest", "stochastic", "kahan")


def new_blocks(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in SHAPES.items()}
    made["transposed"] = torch.randn(70, 64, generator=generator).to(dtype).t()
    return [(name, value.requires_grad_()) for name, value in made.items()]


def gradients(named, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [(torch.randn(p.shape, generator=generator) + 0.2).to(p.dtype) for _, p in named]
        for _ in range(steps)
    ]


def trained(dtype, steps=4, **options):
    named = new_blocks(dtype)
    optimizer = SGDSaI(named, 1e-2, **options)
    for grads in gradients(named, steps):
        take(optimizer, [p for _, p in named], grads)
    return optimizer, named


def tensors(optimizer, named):
    """All that a step changes, by name."""
    found = {name: p.detach() for name, p in named}
    for name, p in named:
        state = optimizer.state[p]
        found |= {f"{name} {key}": value for key, value in state.items()}
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


every_setting = pytest.mark.parametrize(
    "options",
    [
        {"momentum_dtype": stored, "rounding": rounding}
        for stored, rounding in itertools.product(STORED, ROUNDINGS)
    ],
    ids=lambda options: f"{options['momentum_dtype']}-{options['rounding']}",
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_setting
@every_dtype
def test_bytes_of_state_are_the_documented_ones(options, dtype):
    """Elements times bytes, and the table of docs/low_precision.md: nothing is kept beside."""
    optimizer, named = trained(dtype, **options)
    for name, p in named:
        state = dict(optimizer.state[p])
        assert state.pop("gsnr").shape == ()
        held = sum(t.numel() * t.element_size() for t in state.values())
        default = 4 if dtype == torch.float16 else p.element_size()
        per_element = {None: default, torch.float32: 4, torch.bfloat16: 2, "int8": 4}
        expected = p.numel() * per_element[options["momentum_dtype"]]
        if options["momentum_dtype"] == "int8" and p.numel() >= 4096:
            expected = p.numel() + 4 * -(-p.numel() // 128)
            assert expected <= 1.04 * p.numel()
        if options["rounding"] == "kahan" and dtype == torch.bfloat16:
            expected += 2 * p.numel()
        assert held == expected, name
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(p.detach()) for name, p in named})
    total = sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for t in state.values()
        if t.ndim
    )
    as_text = {**options, "momentum_dtype": str(options["momentum_dtype"]).split(".")[-1]}
    if options["momentum_dtype"] is None:
        del as_text["momentum_dtype"]
    assert BASELINES["sgd_sai"].state_bytes(model, **as_text) == total


@every_dtype
def test_without_momentum_there_is_the_gain_alone(dtype):
    optimizer, named = trained(dtype, momentum=0.0, momentum_dtype="int8")
    assert all(set(optimizer.state[p]) == {"gsnr"} for _, p in named)


@every_setting
@every_dtype
@pytest.mark.parametrize("more", [{}, {"nesterov": True, "maximize": True, "skip_nonfinite": True}])
def test_forloop_and_foreach_agree_to_the_bit(options, dtype, more):
    one = trained(dtype, foreach=False, **options, **more)
    other = trained(dtype, foreach=True, **options, **more)
    assert_equal(tensors(*one), tensors(*other))


@every_setting
def test_slices_agree_with_the_whole_to_the_bit(options, monkeypatch):
    one = trained(torch.bfloat16, **options)
    plan = SGDSaI._plan
    monkeypatch.setattr(
        SGDSaI, "_plan", lambda self: (plan(self)[0], plan(self)[1]._replace(limit=512))
    )
    for foreach in (False, True):
        assert_equal(tensors(*one), tensors(*trained(torch.bfloat16, foreach=foreach, **options)))


@every_setting
@every_dtype
def test_steps_follow_a_float64_run(options, dtype):
    """After 30 steps each element is as near as its storage lets it be, and the mean nearer."""
    optimizer, named = trained(dtype, steps=30, **options)
    _, exact = trained(torch.float64, steps=30)
    for (name, p), (_, q) in zip(named, exact, strict=True):
        start = next(v for n, v in new_blocks(dtype) if n == name)
        shift = (start.double() - next(v for n, v in new_blocks(torch.float64) if n == name)).abs()
        scale = q.abs().max().item() if q.numel() else 0.0
        moved = (q - start.double()).abs().max().item() if q.numel() else 0.0
        eps = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 2**-20)
        stored = {"int8": 0.05, torch.bfloat16: 0.01}.get(options["momentum_dtype"], 1e-3)
        bound = 30 * eps * scale + (stored + 30 * eps) * moved + shift.max().item() if scale else 0
        if q.numel():
            assert (p.double() - q).abs().max().item() <= bound, name


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact_to_the_bit(options, dtype):
    optimizer, named = trained(dtype, steps=3, **options)
    buffer = io.BytesIO()
    torch.save({"p": [p.detach() for _, p in named], "o": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    if options["momentum_dtype"] == "int8":
        kept = saved["o"]["state"][0]
        assert kept["momentum_buffer"].dtype == torch.int8
        assert kept["momentum_scale"].dtype == torch.float32
    other = [(n, p.requires_grad_()) for (n, _), p in zip(named, saved["p"], strict=True)]
    resumed = SGDSaI(other, 1e-2, **options)
    resumed.load_state_dict(saved["o"])
    assert_equal(tensors(optimizer, named), tensors(resumed, other))
    for grads in gradients(named, 3, seed=9):
        take(optimizer, [p for _, p in named], grads)
        take(resumed, [p for _, p in other], grads)
    assert_equal(tensors(optimizer, named), tensors(resumed, other))
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["rounding_step"] == 6


@pytest.mark.parametrize("saved_as, loaded_as", list(itertools.permutations(STORED, 2)), ids=str)
def test_momentum_is_converted_when_the_checkpoint_is_older(saved_as, loaded_as):
    """A state dict that does not say how momentum is kept takes the constructor's setting."""
    optimizer, named = trained(torch.float32, momentum_dtype=saved_as)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["momentum_dtype"]
    loaded = SGDSaI(named, 1e-2, momentum_dtype=loaded_as)
    loaded.load_state_dict(state)

    def momentum(of, p):
        state = of.state[p]
        buffer = state["momentum_buffer"]
        scale = state.get("momentum_scale")
        return buffer.float() if scale is None else dequantize(buffer, scale)

    expected = {None: torch.float32, "int8": torch.int8}.get(loaded_as, loaded_as)
    for name, p in named:
        small = p.numel() < 4096 and loaded_as == "int8"
        dtype = torch.float32 if small else expected
        assert loaded.state[p]["momentum_buffer"].dtype == dtype, name
        assert ("momentum_scale" in loaded.state[p]) == (dtype == torch.int8)
        old, new = momentum(optimizer, p), momentum(loaded, p)
        tolerance = 0.02 * old.abs().max().item() if old.numel() else 0.0
        torch.testing.assert_close(new, old, atol=tolerance, rtol=0)


def test_complex_blocks_keep_pairs():
    for stored, dtype in ((None, torch.complex64), (torch.bfloat16, torch.bfloat16),
                          ("int8", torch.int8)):  # fmt: skip
        torch.manual_seed(0)
        p = torch.randn(64, 64, dtype=torch.complex64, requires_grad=True)
        pairs = torch.view_as_real(p.detach()).clone().requires_grad_()
        grad = torch.randn_like(p)
        one, other = (SGDSaI([t], momentum_dtype=stored, seed=3) for t in (p, pairs))
        for _ in range(3):
            take(one, [p], [grad])
            take(other, [pairs], [torch.view_as_real(grad)])
        assert one.state[p]["momentum_buffer"].dtype == dtype
        assert torch.equal(torch.view_as_real(p.detach()), pairs.detach())
        loaded = SGDSaI([p], momentum_dtype=stored)
        loaded.load_state_dict(one.state_dict())
        for key, value in one.state[p].items():
            assert torch.equal(loaded.state[p][key], value)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("stored", ["int8", torch.bfloat16], ids=str)
def test_momentum_without_gradient_decays_to_zero(momentum, stored):
    """Beside elements that keep the scale up, in a bounded number of steps, and stays there."""
    torch.manual_seed(0)
    p = torch.zeros(64, 128, requires_grad=True)
    optimizer = SGDSaI([p], lr=1e-3, momentum=momentum, weight_decay=0.0, momentum_dtype=stored)
    grad = torch.randn(64, 128)
    take(optimizer, [p], [grad])
    grad[:, 1:] = 0.0
    grad[:, 0] = 3.0
    bound = int(45 / (1 - momentum))
    for _ in range(bound):
        take(optimizer, [p], [grad])
    state = optimizer.state[p]
    if stored == "int8":
        assert (state["momentum_buffer"][:, 1:] == 0).all()
    else:
        assert state["momentum_buffer"][:, 1:].abs().max() < 1e-8
    before = p.detach()[:, 1:].clone()
    for _ in range(20):
        take(optimizer, [p], [grad])
    moved = (p.detach()[:, 1:] - before).abs().max()
    assert moved == 0 if stored == "int8" else moved < 1e-6


@pytest.mark.parametrize("stored", ["int8", torch.bfloat16], ids=str)
def test_low_precision_momentum_is_unbiased_over_1000_steps(stored):
    """Weights that add up 1000 noisy momenta drift as in float32, but for the noise's own walk."""
    drift = {}
    for dtype in (torch.float32, stored):
        generator = torch.Generator().manual_seed(0)
        p = torch.zeros(32, 128, requires_grad=True)
        optimizer = SGDSaI([p], lr=1.0, weight_decay=0.0, gain=1.0, momentum_dtype=dtype)
        for _ in range(1000):
            take(optimizer, [p], [torch.randn(32, 128, generator=generator) + 0.05])
        drift[dtype] = p.detach().double()
    difference = drift[stored] - drift[torch.float32]
    # Each step errs by at most a gap of the grid, 1.6 % of the largest of a block (about 1); a
    # step's error is carried on tenfold by the average.
    sigma = difference.std()
    assert abs(difference.mean()) < 5 * sigma / difference.numel() ** 0.5
    assert sigma < 10 * 0.016 * 1000**0.5


def test_small_updates_vanish_with_nearest_alone():
    """200 updates of a thousandth: 0.2 in all, each below half a step of bfloat16 at 1."""
    end = {}
    for rounding in ROUNDINGS:
        p = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
        optimizer = SGDSaI([p], lr=1e-3, gain=1.0, weight_decay=0.0, rounding=rounding)
        for _ in range(200):
            take(optimizer, [p], [torch.ones_like(p)])
        end[rounding] = p.detach().float()
    assert (end["nearest"] == 1.0).all()
    torch.testing.assert_close(end["kahan"], torch.full((64, 64), 0.8), atol=3e-3, rtol=0)
    torch.testing.assert_close(end["stochastic"].mean().item(), 0.8, atol=1e-3, rtol=0)
    assert torch.equal(end["auto"], end["stochastic"])


def test_draws_follow_seed_block_and_step():
    ends = []
    for seed in (0, 0, 1):
        optimizer, named = trained(torch.bfloat16, seed=seed)
        ends.append(tensors(optimizer, named))
    assert_equal(ends[0], ends[1])
    assert not torch.equal(ends[0]["matrix"], ends[2]["matrix"])
    torch.manual_seed(5)  # the global generator has no part in it
    assert_equal(ends[0], tensors(*trained(torch.bfloat16, seed=0)))
    p, q = (torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    optimizer = SGDSaI([p, q], lr=1e-3, gain=1.0)
    take(optimizer, [p, q], [torch.ones_like(p)] * 2)
    assert not torch.equal(p, q)


def test_no_draw_is_made_from_the_global_generator():
    before = torch.get_rng_state()
    trained(torch.bfloat16, momentum_dtype="int8")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_skipped_step_changes_no_code_and_no_scale(foreach):
    optimizer, named = trained(
        torch.bfloat16, momentum_dtype="int8", skip_nonfinite=True, foreach=foreach
    )
    before = {name: t.clone() for name, t in tensors(optimizer, named).items()}
    grads = gradients(named, 1, seed=4)[0]
    grads[0][0, 0] = float("inf")
    take(optimizer, [p for _, p in named], grads)
    assert_equal(before, tensors(optimizer, named))
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_changes_nothing_uses_no_draw(fused):
    # torch's GradScaler leaves it out, or hands over `found_inf` where the step can take that
    overflows, plain = (SGDSaI([torch.ones(64, 64)], momentum_dtype="int8") for _ in range(2))
    overflows.param_groups[0]["fused"] = fused
    overflows.found_inf = torch.ones(())
    take(overflows, overflows.param_groups[0]["params"], [torch.full((64, 64), float("inf"))])
    overflows.found_inf = torch.zeros(())
    found = []
    for optimizer in (overflows, plain):
        for grads in gradients([("", torch.ones(64, 64))], 3):
            take(optimizer, optimizer.param_groups[0]["params"], grads)
        found.append(tensors(optimizer, [("", optimizer.param_groups[0]["params"][0])]))
        assert optimizer.param_groups[0]["rounding_step"] == 3
    assert_equal(*found)


def test_state_made_before_the_first_step_uses_no_draw_and_no_turn():
    # as torch's distributed checkpoints make it
    found = []
    for made_before in (True, False):
        params = [torch.ones(64, 64, dtype=torch.bfloat16)]
        optimizer = SGDSaI(params, rounding="stochastic", momentum_dtype="int8", refresh=2)
        if made_before:
            group = optimizer.param_groups[0]
            rate, group["lr"] = group["lr"], 0.0
            take(optimizer, params, [torch.zeros_like(params[0])])
            group["lr"] = rate
        for grads in gradients([("", params[0])], 4):
            take(optimizer, params, grads)
        found.append(tensors(optimizer, [("", params[0])]))
        group = optimizer.param_groups[0]
        assert (group["rounding_step"], group["refresh_step"]) == (4, 4)
    assert_equal(*found)


def test_a_compensation_is_loaded_in_the_order_of_its_parameter():
    saved = trained(torch.bfloat16, rounding="kahan", momentum_dtype="int8")[0].state_dict()
    index = list(SHAPES).index("matrix")
    other = saved["state"][index]["compensation"]
    saved["state"][index]["compensation"] = other.t().contiguous().t()
    optimizer, named = trained(torch.bfloat16, 0, rounding="kahan", momentum_dtype="int8")
    optimizer.load_state_dict(saved)
    found = optimizer.state[named[index][1]]["compensation"]
    assert found.is_contiguous() and torch.equal(found, other)


def test_a_block_that_starts_late_gets_its_codes_then():
    p, q = (torch.ones(64, 64, requires_grad=True) for _ in range(2))
    optimizer = SGDSaI([p, q], momentum_dtype="int8")
    grad = torch.randn(64, 64)
    take(optimizer, [p, q], [grad, None])
    take(optimizer, [p, q], [grad, torch.zeros(64, 64)])
    assert (optimizer.state[q]["momentum_buffer"] == 0).all()
    take(optimizer, [p, q], [grad, grad])
    state = optimizer.state[q]
    back = dequantize(state["momentum_buffer"], state["momentum_scale"])
    torch.testing.assert_close(back, grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"momentum_dtype": "int8"}, {"rounding": "kahan"}], ids=str
)
def test_compiled_is_eager(options):
    one, other = new_blocks(torch.bfloat16), new_blocks(torch.bfloat16)
    eager, compiled = SGDSaI(one, 1e-2, **options), SGDSaI(other, 1e-2, **options)
    step = torch.compile(compiled.step, backend="aot_eager")
    for grads in gradients(one, 4):
        for named in (one, other):
            for (_, p), grad in zip(named, grads, strict=True):
                p.grad = grad.clone()
        eager.step()
        step()
    # A traced step multiplies lr and gain in another order: an element in a thousand comes to lie
    # on the other side of its random threshold, and the last bits of a compensation are others. In
    # 8 bits its first step goes along the gradient as it was stored, not as it was.
    expected, found = tensors(eager, one), tensors(compiled, other)
    in_8_bits = options.get("momentum_dtype") == "int8"
    for name, tensor in expected.items():
        if name.endswith("compensation"):
            block = name.removesuffix(" compensation")
            sums = [of[name].double() + of[block].double() for of in (expected, found)]
            torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-4)
        elif in_8_bits and tensor.dtype != torch.int8:
            torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=2e-2)
        else:
            differs = found[name] != tensor
            assert differs.float().sum() <= 1e-2 * tensor.numel() + 1, name


def test_what_an_earlier_compensation_held_is_not_added_later():
    p = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SGDSaI([p], lr=1e-3, gain=1.0, weight_decay=0.0, momentum=0.0, rounding="kahan")
    group = optimizer.param_groups[0]
    take(optimizer, [p], [torch.ones_like(p)])
    assert optimizer.state[p]["compensation"].abs().min() > 0
    group["rounding"] = "nearest"
    take(optimizer, [p], [torch.ones_like(p)])
    assert "compensation" not in optimizer.state[p]
    group["rounding"], before = "kahan", p.detach().clone()
    take(optimizer, [p], [torch.zeros_like(p)])
    assert torch.equal(p, before)
