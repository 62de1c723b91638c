import builtins
import copy
import inspect
import io

import pytest
import torch
from reference import baselines as reference
from torch import nn

from nomadam.optimizers.baselines import BASELINES, build_optimizer
from nomadam.optimizers.sgd_sai import SGDSaI

transformers = pytest.importorskip("transformers")
for package in ("prodigyopt", "pytorch_optimizer", "schedulefree"):
    pytest.importorskip(package)

# Those for LoRA have tests of their own.
ALL = sorted(name for name, row in BASELINES.items() if not row.needs_lora)
NAMES = {"sgd_sai", "sgdm", "sgdm_decoupled", "adam", "adamw", "adam_mini", "prodigy", "lion"} | {
    "adafactor", "schedule_free_adamw", "muon", "scaled_sgd", "scaled_adamw",
    "sgd_sai_sqrt_numel", "sgd_sai_normalized", "sgd_sai_refreshed", "sgd_sai_shuffled",
    "sgd_sai_equal", "sgd_sai_rows",
    "muon_sgd_sai", "sign_embedding_sgd_sai", "scion", "scale", "apollo_mini",
}  # fmt: skip
TWO_RATES = {"muon_sgd_sai", "sign_embedding_sgd_sai"}


def gpt2(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype)


def default(name, model, **arguments):
    lr = arguments.pop("lr", BASELINES[name].default_lr)
    return build_optimizer(name, model, lr=lr, weight_decay=0.1, **arguments)


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    getattr(optimizer, "train", lambda: None)()
    losses = []
    for _ in range(steps):
        ids = torch.arange(8) * 2 + torch.randint(5, (4, 1), generator=generator)
        optimizer.zero_grad()
        loss = model(ids % 17, labels=ids % 17).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    getattr(optimizer, "eval", lambda: None)()
    return losses


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Every row


def test_the_rows_are_the_promised_ones():
    assert set(BASELINES) == NAMES
    assert all(name == row.name for name, row in BASELINES.items())


@pytest.mark.parametrize("name", ALL)
def test_a_row_can_be_searched(name):
    row = BASELINES[name]
    known = {"lr", "weight_decay", *row.arguments()}
    assert "weight_decay" in row.search_space
    assert len(row.search_space) == (3 if name in TWO_RATES else 2)
    for argument, (low, high) in row.search_space.items():
        assert argument in known
        assert 0 < low < high
    if "lr" in row.search_space:
        assert row.search_space["lr"][0] < row.default_lr < row.search_space["lr"][1]
    low, high = row.search_space["weight_decay"]
    assert low < row.default_weight_decay < high
    if name not in ("prodigy", "schedule_free_adamw"):
        assert row.default_lr * row.default_weight_decay == pytest.approx(
            1e-7 if name == "adam" else 1e-4
        )
    assert row.schedule == ("constant" if name == "schedule_free_adamw" else "cosine")


@pytest.mark.parametrize("name", ALL)
def test_learns_and_keeps_names_and_decay_groups(name):
    model = gpt2()
    optimizer = default(name, model)
    losses = train(model, optimizer, 40)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1
    shrinking = {
        n: g["lr"] * g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]
    }
    all_of_it = 0.1 * BASELINES[name].default_lr
    for n, p in model.named_parameters():
        assert shrinking.pop(n) == pytest.approx(all_of_it if p.ndim >= 2 else 0.0)
    assert not shrinking


@pytest.mark.parametrize("name", ALL)
def test_state_bytes_are_those_of_the_state(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = gpt2(dtype=dtype)
        optimizer = default(name, model)
        predicted = BASELINES[name].state_bytes(model)
        train(model, optimizer, 2)
        tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        counted = {id(t): t.numel() * t.element_size() for t in tensors if t.ndim}
        assert predicted == sum(counted.values())


@pytest.mark.parametrize("name", ALL)
def test_state_bytes_per_param_is_the_limit_of_a_large_matrix(name):
    model = nn.Linear(2048, 2048, bias=False, device="meta")
    arguments = {"head": ()} if "head" in BASELINES[name].arguments() else {}
    measured = BASELINES[name].state_bytes(model, **arguments) / 2048**2
    assert measured == pytest.approx(BASELINES[name].state_bytes_per_param, abs=0.01)


def test_state_bytes_follow_the_arguments():
    model = gpt2()
    numel = sum(p.numel() for p in model.parameters())
    assert BASELINES["sgd_sai"].state_bytes(model, momentum=0.0) == 0
    assert BASELINES["sgdm"].state_bytes(model, momentum=0.0) == 0
    assert BASELINES["sgd_sai"].state_bytes(gpt2(dtype=torch.float16)) == 4 * numel
    full = BASELINES["prodigy"].state_bytes(model)
    assert BASELINES["prodigy"].state_bytes(model, slice_p=11) < 0.6 * full
    with pytest.raises(TypeError, match="slice_q"):
        BASELINES["prodigy"].state_bytes(model, slice_q=11)


@pytest.mark.parametrize("name", ALL)
def test_save_load_continue_is_exact(name):
    model = gpt2()
    optimizer = default(name, model)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = default(name, other, lr=0.5 * BASELINES[name].default_lr)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(model, optimizer, 3, seed=2)
    train(other, resumed, 3, seed=2)
    assert same(model, other)


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_reaches_every_group(name):
    model = gpt2()
    optimizer = default(name, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, 1)
    schedule.step()
    before = copy.deepcopy(model)
    losses = train(model, optimizer, 2)
    assert all(loss > 0 for loss in losses)
    if name == "schedule_free_adamw":  # the mean of the points does not move, up to rounding
        for one, other in zip(model.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    else:
        assert same(model, before)


@pytest.mark.parametrize("name", ALL)
def test_frozen_parameters_are_left_out_and_nothing_is_printed(name, capsys):
    model = gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = default(name, model)
    train(model, optimizer, 1)
    assert "transformer.wpe.weight" not in [
        n for group in optimizer.param_groups for n in group["param_names"]
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ALL)
def test_a_closure_is_called_once_a_step(name):
    model = gpt2()
    optimizer = default(name, model)
    getattr(optimizer, "train", lambda: None)()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [True]


@pytest.mark.parametrize("name", ALL)
def test_misspelt_arguments_are_named(name):
    argument = next(iter(BASELINES[name].arguments()))
    with pytest.raises(TypeError, match=rf"{name} has no argument '{argument}x'.*{argument}"):
        build_optimizer(name, gpt2(), lr=0.1, weight_decay=0.1, **{argument + "x": 1})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -0.1}, {"weight_decay": float("inf")},
     {"decay_embeddings": "yes"}],
)  # fmt: skip
def test_numbers_out_of_range_are_errors(name, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build_optimizer(name, gpt2(), **{"lr": 0.1, "weight_decay": 0.1, **wrong})


@pytest.mark.parametrize("name", ALL)
def test_coefficients_lie_below_one(name):
    arguments = {"momentum", "beta1", "beta2"} & set(BASELINES[name].arguments())
    assert arguments or name == "adafactor"
    for argument in arguments:
        for value in (1.0, -0.1, "0.9"):
            with pytest.raises(ValueError, match=argument):
                default(name, gpt2(), **{argument: value})


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="nearest: adam.*known: sgd_sai"):
        build_optimizer("adamW", gpt2(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="known: sgd_sai"):
        build_optimizer("zzzz", gpt2(), lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("name", [n for n in ALL if BASELINES[n].extra])
def test_a_missing_package_names_the_extra(name, monkeypatch):
    imported = builtins.__import__
    module = BASELINES[name].package.partition(">")[0]

    def without(target, *rest, **more):
        if target.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {target!r}")
        return imported(target, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", lambda target: without(target))
    with pytest.raises(ImportError, match=rf'{module}.*pip install "nomadam\[baselines\]"'):
        default(name, gpt2())


# Rows against their papers, one matrix at a time


def follow(name, grad_at, steps, *, lr, weight_decay=0.1, **arguments):
    """The weights of one 6 x 5 matrix after every step, from a library."""
    model = nn.Linear(5, 6, bias=False)
    with torch.no_grad():
        model.weight.copy_(start())
    optimizer = build_optimizer(name, model, lr=lr, weight_decay=weight_decay, **arguments)
    getattr(optimizer, "train", lambda: None)()
    for step in range(steps):
        model.weight.grad = grad_at(model.weight.detach().double(), step).float()
        optimizer.step()
        yield model.weight.detach().clone(), optimizer


def start():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def gradients(steps=12, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(6, 5, generator=generator).double() for _ in range(steps)]


def agree(found, expected, rtol=2e-5):
    for (one, _), other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "recurrence", "fixed", "arguments"),
    [
        ("sgdm", reference.sgdm, {}, {"momentum": 0.8}),
        ("sgdm", reference.sgdm, {}, {"momentum": 0.0}),
        ("sgdm_decoupled", reference.sgdm, {"decoupled": True}, {"momentum": 0.8}),
        ("adam", reference.adam, {}, {"beta1": 0.8, "beta2": 0.95}),
        ("adamw", reference.adam, {"decoupled": True}, {"beta1": 0.8, "beta2": 0.95}),
        ("lion", reference.lion, {}, {"beta1": 0.8, "beta2": 0.95}),
    ],
)
def test_follows_the_recurrence_of_its_paper(name, recurrence, fixed, arguments):
    grads = gradients()
    numbers = {"lr": 0.05, "weight_decay": 0.3}
    expected = recurrence(start().double(), grads, **numbers, **fixed, **arguments)
    for foreach in (True, False):
        found = follow(
            name, lambda _, t: grads[t], len(grads), **numbers, **arguments, foreach=foreach
        )
        agree(found, list(expected) if foreach else recurrence(
            start().double(), grads, **numbers, **fixed, **arguments))  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("foreach", [True, False])
def test_adafactor_is_the_papers_at_the_gradients_of_a_language_model(scale, foreach):
    grads = gradients(scale=scale)
    numbers = {"lr": 0.1, "weight_decay": 0.01}
    expected = reference.adafactor(start().double(), grads, **numbers)
    found = follow("adafactor", lambda _, t: grads[t], len(grads), **numbers, foreach=foreach)
    agree(found, expected)


def test_torchs_default_floor_is_not_the_papers():
    """Why this row has an eps1 of its own."""
    grads = gradients(scale=1e-6)
    expected = list(reference.adafactor(start().double(), grads, lr=0.1, weight_decay=0.0))
    weight = nn.Parameter(start())
    optimizer = torch.optim.Adafactor([weight], lr=0.1)
    for grad in grads:
        weight.grad = grad.float()
        optimizer.step()
    assert (weight.detach().double() - expected[-1]).abs().max() > 0.01


def test_adafactor_survives_rows_without_gradients():
    grads = gradients()
    for grad in grads:
        grad[2] = 0.0
    for weight, _ in follow("adafactor", lambda _, t: grads[t], 12, lr=0.1, weight_decay=0.0):
        assert torch.isfinite(weight).all()
        assert torch.equal(weight[2], start()[2])


def bowl(theta, step=0):
    target = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5)
    curvature = torch.linspace(0.1, 2.0, 30, dtype=torch.float64).view(6, 5)
    return curvature * (theta - target)


def test_prodigy_is_the_papers():
    # The package puts the new estimate before eps where the paper has the old one: 1e-3 at 1e-8.
    arguments = {"weight_decay": 0.05, "eps": 1e-14}
    found = follow("prodigy", bowl, 60, lr=1.0, d0=1e-3, **arguments)
    expected = reference.prodigy(start().double(), bowl, steps=60, d=1e-3, **arguments)
    for (weight, optimizer), (theta, d) in zip(found, expected, strict=True):
        torch.testing.assert_close(weight.double(), theta, rtol=1e-3, atol=1e-4)
        assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-3)
    assert d > 2e-3


@pytest.mark.parametrize("foreach", [True, False])
def test_schedule_free_is_the_papers_and_takes_warm_up_from_either_side(foreach):
    lrs = [0.05 * min(1.0, (t + 1) / 5) for t in range(12)]
    expected = list(
        reference.schedule_free_adamw(start().double(), [bowl] * 12, lrs=lrs, weight_decay=0.1)
    )
    for inside in (True, False):
        model = nn.Linear(5, 6, bias=False)
        with torch.no_grad():
            model.weight.copy_(start())
        optimizer = build_optimizer(
            "schedule_free_adamw", model, lr=0.05, weight_decay=0.1, foreach=foreach,
            warmup_steps=5 if inside else 0,
        )  # fmt: skip
        for step in range(12):
            optimizer.train()
            model.weight.grad = bowl(model.weight.detach().double()).float()
            if not inside:
                for group in optimizer.param_groups:
                    group["lr"] = lrs[step]
            optimizer.step()
            optimizer.eval()
            torch.testing.assert_close(
                model.weight.detach().double(), expected[step], rtol=1e-4, atol=1e-5
            )


def test_schedule_free_refuses_steps_in_evaluation_mode_and_no_momentum():
    model = gpt2()
    optimizer = default("schedule_free_adamw", model)
    with pytest.raises(Exception, match="train mode"):
        optimizer.step()
    with pytest.raises(ValueError, match="beta1"):
        default("schedule_free_adamw", model, beta1=0.0)


# Our own rows


def test_sgdm_decoupled_is_a_plain_recurrence_bit_for_bit():
    grads = [grad.float() for grad in gradients(30)]
    lr, decay, momentum = 0.7, 0.01, 0.9
    theta, buffer = start(), None
    expected = []
    for grad in grads:
        buffer = grad.clone() if buffer is None else buffer.lerp(grad, 1 - momentum)
        theta = theta.mul(1 - lr * decay).add(buffer, alpha=-lr)
        expected.append(theta)
    for foreach in (False, True):
        found = follow(
            "sgdm_decoupled", lambda _, t: grads[t], 30, lr=lr, weight_decay=decay,
            momentum=momentum, foreach=foreach,
        )  # fmt: skip
        for (weight, _), other in zip(found, expected, strict=True):
            assert torch.equal(weight, other)


def test_without_decay_the_two_sgdms_are_one():
    grads = gradients(30)
    pairs = zip(
        follow("sgdm", lambda _, t: grads[t], 30, lr=0.5, weight_decay=0.0),
        follow("sgdm_decoupled", lambda _, t: grads[t], 30, lr=0.5, weight_decay=0.0),
        strict=True,
    )
    for (one, _), (other, _) in pairs:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_sgdm_at_ten_times_the_learning_rate_is_torchs_usual_form_in_the_end():
    constant = torch.ones(6, 5).double()
    usual = nn.Parameter(start())
    optimizer = torch.optim.SGD([usual], lr=0.01, momentum=0.9)
    moved = []
    for weight, _ in follow("sgdm", lambda *_: constant, 200, lr=0.1, weight_decay=0.0):
        usual.grad = constant.float()
        before = usual.detach().clone()
        optimizer.step()
        moved.append((weight, usual.detach() - before))
    ours = moved[-1][0] - moved[-2][0]
    torch.testing.assert_close(ours, moved[-1][1], rtol=1e-3, atol=0)


def test_sgd_sai_takes_the_arguments_of_its_class_and_no_others():
    signature = inspect.signature(SGDSaI).parameters.values()
    own = {p.name for p in signature if p.kind is p.KEYWORD_ONLY} - {"weight_decay"}
    assert set(BASELINES["sgd_sai"].arguments()) == own | {"decay_embeddings"}
    assert "gain" not in BASELINES["sgdm_decoupled"].arguments()
    with pytest.raises(ValueError, match="gain"):
        default("sgd_sai", gpt2(), gain="largest")


@pytest.mark.parametrize("gain", ["sqrt_numel", 2.0, "mapping"])
def test_sgd_sai_takes_gains_by_rule_number_and_name(gain):
    model = gpt2()
    names = [name for name, _ in model.named_parameters()]
    given = {name: 1.0 + i for i, name in enumerate(names)} if gain == "mapping" else gain
    optimizer = default("sgd_sai", model, gain=given)
    train(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        expected = {"sqrt_numel": parameter.numel() ** 0.5, 2.0: 2.0}.get(gain) or given[name]
        assert optimizer.gains()[name] == pytest.approx(expected)


def test_muons_first_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ValueError, match="convolutions="):
        default("muon", model, head="2.weight")
    optimizer = default("muon", model, head="2.weight", convolutions="flatten", momentum=0.5)
    muon = [g for g in optimizer.param_groups if g["method"] == "muon"]
    assert [(g["param_names"], g["momentum"]) for g in muon] == [(["0.weight"], 0.5)]
