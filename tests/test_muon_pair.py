import copy
import io
import pickle

import pytest
import torch
from torch import nn

from nomadam.optimizers.muon_pair import MuonAdamW, muon_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.inner = nn.Linear(6, 12)
        self.outer = nn.Linear(12, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 9, bias=False)

    def forward(self, ids):
        x = self.tokens(ids)
        return self.head(self.norm(x + self.outer(torch.tanh(self.inner(x)))))


def fresh(seed=0):
    torch.manual_seed(seed)
    return Net()


def train(model, optimizers, steps, seed=1, schedulers=()):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(9, (8,), generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), (ids + 1) % 9).backward()
        for each in (*optimizers, *schedulers):
            each.step()


def pair(model, lr=1e-2, weight_decay=0.1):
    return MuonAdamW(muon_groups(model, weight_decay, head="head.weight"), lr=lr)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def by_method(groups):
    found = {"muon": [], "adamw": []}
    for group in groups:
        found[group["method"]] += [name for name, _ in group["params"]]
    return found


def gpt2(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 13, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **tokens, **changes}))


def test_the_pair_is_torchs_two_optimizers():
    ours, theirs = fresh(), fresh()
    train(ours, [pair(ours)], 8)
    hidden = [theirs.inner.weight, theirs.outer.weight]
    tables = [theirs.tokens.weight, theirs.head.weight]
    plain = [theirs.inner.bias, theirs.outer.bias, *theirs.norm.parameters()]
    muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    train(theirs, [muon, torch.optim.AdamW(groups, lr=1e-2)], 8)
    assert same(ours, theirs)


def test_an_update_has_the_size_of_an_adamw_update_and_is_nearly_orthogonal():
    for shape in ((48, 16), (16, 48)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer = MuonAdamW([{"params": [weight], "method": "muon"}], lr=1.0, weight_decay=0.0)
        optimizer.step()
        assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)
        values = torch.linalg.svdvals(weight.detach()) / (0.2 * 48**0.5)
        assert 0.5 < values.min() and values.max() < 1.3
        u, _, v = torch.linalg.svd(-weight.grad, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(weight.flatten(), (u @ v).flatten(), 0) > 0.97


def test_save_load_continue_is_exact_in_one_state_dict():
    model = fresh()
    optimizer = pair(model)
    train(model, [optimizer], 4)
    other = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = pair(other, lr=3.0, weight_decay=0.9)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert len(resumed.state) == len(list(model.parameters()))
    train(model, [optimizer], 4, seed=2)
    train(other, [resumed], 4, seed=2)
    assert same(model, other)
    without_state = pair(fresh())
    train(fresh(), [without_state], 0)
    assert without_state.state_dict()["state"] == {}


def test_deepcopy_and_pickle_go_on_alike():
    model = fresh()
    optimizer = pair(model)
    train(model, [optimizer], 3)
    for twin_of in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        twin, twin_optimizer = twin_of((model, optimizer))
        reference, reference_optimizer = copy.deepcopy((model, optimizer))
        train(twin, [twin_optimizer], 3, seed=5)
        train(reference, [reference_optimizer], 3, seed=5)
        assert same(twin, reference)
        assert not same(twin, model)


def test_schedulers_move_both_methods():
    scheduled, plain = fresh(), fresh()
    optimizer = pair(scheduled, lr=1.0)
    rates = [1e-2, 1e-3, 1e-4]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, 2)])
    train(scheduled, [optimizer], 3, schedulers=[schedule])
    other = pair(plain)
    generator = torch.Generator().manual_seed(1)
    for rate in rates:
        for group in other.param_groups:
            group["lr"] = rate
        ids = torch.randint(9, (8,), generator=generator)
        other.zero_grad()
        nn.functional.cross_entropy(plain(ids), (ids + 1) % 9).backward()
        other.step()
    assert same(scheduled, plain)
    still = fresh()
    frozen = pair(still, lr=0.0)
    train(still, [frozen], 2)
    assert same(still, fresh())


def test_a_closure_is_called_once_with_gradients():
    model = fresh()
    optimizer = pair(model)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.arange(9)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) > 0
    assert calls == [True]


def test_gpt2s_conv1d_is_hidden_and_its_tied_head_is_not():
    found = by_method(muon_groups(gpt2(), 0.1))
    layer = "transformer.h.0."
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found["muon"] == [f"{layer}{name}.weight" for name in names]
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(found["adamw"])


def test_an_untied_head_goes_to_adamw_and_a_frozen_weight_nowhere():
    model = gpt2(tie_word_embeddings=False)
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    found = by_method(muon_groups(model, 0.1))
    assert "lm_head.weight" in found["adamw"]
    assert "transformer.h.0.mlp.c_fc.weight" not in found["muon"] + found["adamw"]


def test_the_head_has_to_be_known():
    with pytest.raises(ValueError, match="head="):
        muon_groups(Net(), 0.1)
    with pytest.raises(ValueError, match="nobody"):
        muon_groups(Net(), 0.1, head="nobody")
    assert "head.weight" in by_method(muon_groups(Net(), 0.1, head=()))["muon"]
    model = Net()
    model.head.weight = model.tokens.weight
    assert "tokens.weight" in by_method(muon_groups(model, 0.1, head="head.weight"))["adamw"]


def test_decay_is_that_of_decay_groups():
    groups = muon_groups(Net(), 0.3, head="head.weight", decay_embeddings=False)
    decay = {name: g["weight_decay"] for g in groups for name, _ in g["params"]}
    assert decay["inner.weight"] == decay["head.weight"] == 0.3
    assert decay["tokens.weight"] == decay["inner.bias"] == decay["norm.weight"] == 0.0


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 3))


def test_convolution_filters_are_refused_and_never_fall_to_adamw_silently():
    model = convolutional()
    with pytest.raises(ValueError, match=r"0\.weight.*convolutions="):
        muon_groups(model, 0.1, head="2.weight")
    flat = by_method(muon_groups(model, 0.1, head="2.weight", convolutions="flatten"))
    assert flat["muon"] == ["0.weight"]
    declared = by_method(muon_groups(model, 0.1, head="2.weight", convolutions="adamw"))
    assert declared["muon"] == []
    with pytest.raises(ValueError, match="maybe"):
        muon_groups(model, 0.1, head=(), convolutions="maybe")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_filter_moves_as_its_matrix_does_in_any_layout(layout):
    model = convolutional().to(memory_format=layout)
    groups = muon_groups(model, 0.1, head="2.weight", convolutions="flatten")
    optimizer = MuonAdamW(groups, lr=1e-2)
    matrix = nn.Parameter(model[0].weight.detach().flatten(1).clone())
    muon = torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = MuonAdamW(groups, lr=1.0)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        model(torch.randn(5, 2, 5, 5)).square().mean().backward()
        matrix.grad = model[0].weight.grad.detach().flatten(1).clone()
        optimizer.step()
        muon.step()
    assert torch.equal(model[0].weight.detach().flatten(1), matrix.detach())
    assert model[0].weight.is_contiguous(memory_format=layout)
    assert optimizer.state[model[0].weight]["momentum_buffer"].shape == (4, 2, 3, 3)


def test_other_tensors_of_many_dimensions_have_to_be_named():
    model = convolutional()
    model.register_parameter("position", nn.Parameter(torch.zeros(1, 4, 6)))
    model.register_parameter("experts", nn.Parameter(torch.zeros(2, 4, 6)))
    arguments = {"head": "2.weight", "convolutions": "flatten"}
    with pytest.raises(ValueError, match=r": experts; .*adamw="):
        muon_groups(model, 0.1, **arguments)
    found = by_method(muon_groups(model, 0.1, **arguments, adamw="experts"))
    # What is laid over the batch is no matrix, named or not.
    assert {"experts", "position"} <= set(found["adamw"])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "method"),
        ({"method": "lion"}, "lion"),
        ({"method": "muon", "betas": (0.9, 0.9)}, "betas"),
        ({"method": "adamw", "momentum": 0.9}, "momentum"),
        ({"method": "adamw", "betas": (0.9, 1.5)}, "1.5"),
        ({"method": "muon", "lr": -1.0}, "-1.0"),
        ({"method": "muon", "params": [nn.Parameter(torch.ones(3))]}, r"\[3\]"),
    ],
)
def test_groups_that_make_no_sense_are_errors(group, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(3, 3))], **group}], lr=1e-3)


def test_a_group_can_be_added_and_missing_gradients_are_skipped():
    model = fresh()
    optimizer = MuonAdamW([{"params": [model.inner.weight], "method": "muon"}], lr=1e-2)
    late = {"params": [model.outer.weight], "method": "muon", "momentum": 0.5}
    optimizer.add_param_group(late)
    assert [g["momentum"] for g in optimizer.param_groups] == [0.95, 0.5]
    model.outer.weight.grad = torch.ones_like(model.outer.weight)
    optimizer.step()
    assert set(optimizer.state) == {model.outer.weight}
    assert torch.equal(model.inner.weight, fresh().inner.weight)
    assert not torch.equal(model.outer.weight, fresh().outer.weight)
