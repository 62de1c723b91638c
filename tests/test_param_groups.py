import math

import pytest
import torch
from torch import nn

from nomadam.optimizers.param_groups import (
    decay_groups,
    describe_groups,
    is_laid_over_batch,
    scaled_param_groups,
    trainable_parameters,
)
from nomadam.optimizers.sgd_sai import SGDSaI


class Tiny(nn.Module):
    """A language model in small: tied embedding, norm, bias, convolution, spare parts."""

    def __init__(self, tied=True):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm((3, 6))
        self.conv = nn.Conv1d(3, 3, 1)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        hidden = self.norm(self.tokens(ids))
        return self.head(torch.tanh(self.inner(self.conv(hidden))))


def train(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        ids = torch.randint(11, (4, 3), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def names(groups):
    return {group["weight_decay"]: [name for name, _ in group["params"]] for group in groups}


def test_matrices_decay_and_norms_biases_vectors_do_not():
    assert names(decay_groups(Tiny(), 0.3)) == {
        0.3: ["tokens.weight", "conv.weight", "inner.weight"],
        0.0: ["norm.weight", "norm.bias", "conv.bias", "inner.bias"],
    }


def test_embeddings_follow_their_argument_and_take_a_tied_head_with_them():
    tied = names(decay_groups(Tiny(), 0.3, decay_embeddings=False))
    assert tied[0.3] == ["conv.weight", "inner.weight"]
    free = names(decay_groups(Tiny(tied=False), 0.3, decay_embeddings=False))
    assert free[0.3] == ["conv.weight", "inner.weight", "head.weight"]


def test_every_trainable_tensor_is_in_one_group_once():
    model = Tiny()
    model.inner.weight.requires_grad_(False)
    grouped = [p for group in decay_groups(model, 0.1) for _, p in group["params"]]
    expected = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in grouped} == {id(p) for p in expected}
    assert len(grouped) == len(expected)


def test_a_tied_weight_is_listed_with_all_its_holders():
    found = {name: holders for name, _, holders in trainable_parameters(Tiny())}
    assert "head.weight" not in found
    assert {type(module) for module in found["tokens.weight"]} == {nn.Embedding, nn.Linear}


def test_biases_of_two_dimensions_do_not_decay():
    model = nn.Module()
    model.attn_bias = nn.Parameter(torch.ones(2, 2))
    assert names(decay_groups(model, 0.1)) == {0.0: ["attn_bias"]}


def test_names_arrive_in_the_optimizer_and_can_be_described():
    optimizer = torch.optim.AdamW(decay_groups(Tiny(), 0.1), lr=0.25)
    text = describe_groups(optimizer.param_groups)
    assert "group 0: lr 0.25, weight_decay 0.1, 3 tensors" in text
    assert "  tokens.weight [11, 6]" in text
    unnamed = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    assert "  0 [2]" in describe_groups(unnamed.param_groups)


@pytest.mark.parametrize("decay", [-0.1, math.nan, math.inf])
def test_decay_out_of_range_is_named(decay):
    with pytest.raises(ValueError, match="weight_decay"):
        decay_groups(Tiny(), decay)


def test_a_model_without_trainable_parameters_is_an_error():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        decay_groups(frozen, 0.1)
    with pytest.raises(ValueError, match="no parameter"):
        scaled_param_groups(frozen, {}, lr=0.1)


def gains_for(model, value=2.0):
    return {name: value for name, _, _ in trainable_parameters(model)}


def test_scaled_groups_are_one_a_block_and_keep_lr_times_decay():
    model = Tiny()
    gains = {name: 1.5 + i for i, name in enumerate(gains_for(model))}
    groups = scaled_param_groups(model, gains, lr=0.2, weight_decay=0.3)
    assert [[name for name, _ in group["params"]] for group in groups] == [[n] for n in gains]
    for group, gain in zip(groups, gains.values(), strict=True):
        assert group["lr"] == pytest.approx(0.2 * gain, rel=1e-12)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.06, rel=1e-12)


def test_a_decoupled_decay_shrinks_every_block_alike():
    model = Tiny()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.zeros_like(parameter)
    gains = {name: 3.0**i for i, name in enumerate(gains_for(model))}
    torch.optim.AdamW(scaled_param_groups(model, gains, lr=0.1, weight_decay=0.5)).step()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 2.0 * 0.95))


def test_torch_sgd_on_scaled_groups_is_sgd_sai():
    torch.manual_seed(0)
    ours, theirs = Tiny(), Tiny()
    theirs.load_state_dict(ours.state_dict())
    optimizer = SGDSaI(ours.named_parameters(), lr=0.01, momentum=0.8, weight_decay=0.0)
    expected = train(ours, optimizer, steps=6)
    groups = scaled_param_groups(theirs, optimizer.gains(), lr=0.01)
    sgd = torch.optim.SGD(groups, momentum=0.8, dampening=0.8)
    for one, other in zip(train(theirs, sgd, steps=6), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_gains_matter():
    torch.manual_seed(0)
    ours, theirs = Tiny(), Tiny()
    theirs.load_state_dict(ours.state_dict())
    optimizer = SGDSaI(ours.named_parameters(), lr=0.01, weight_decay=0.0)
    expected = train(ours, optimizer)
    gains = {name: 1.01 * gain for name, gain in optimizer.gains().items()}
    sgd = torch.optim.SGD(scaled_param_groups(theirs, gains, lr=0.01), momentum=0.9, dampening=0.9)
    moved = train(theirs, sgd)
    assert max((a - b).abs().max() for a, b in zip(moved, expected, strict=True)) > 1e-5


def test_missing_and_unknown_gains_are_all_listed():
    model = Tiny()
    gains = gains_for(model)
    del gains["inner.weight"], gains["norm.bias"]
    with pytest.raises(ValueError, match=r"without a gain: norm\.bias, inner\.weight"):
        scaled_param_groups(model, gains, lr=0.1)
    with pytest.raises(ValueError, match=r"lacks: nobody, 3"):
        scaled_param_groups(model, {**gains_for(model), "nobody": 1.0, 3: 1.0}, lr=0.1)


@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan, math.inf, 0, torch.tensor(math.nan)])
def test_a_gain_must_be_positive_and_finite(gain):
    with pytest.raises(ValueError, match=r"inner\.bias"):
        scaled_param_groups(Tiny(), {**gains_for(Tiny()), "inner.bias": gain}, lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": torch.ones(2)}, "lr"),
        ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay"),
        ({"lr": 1e308}, "lr of tokens.weight"),
    ],
)
def test_scaled_numbers_out_of_range_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        scaled_param_groups(Tiny(), gains_for(Tiny(), 100.0), **arguments)


def test_a_tied_weight_takes_its_gain_under_either_name_but_not_two():
    model = Tiny()
    gains = gains_for(model)
    gains["head.weight"] = gains.pop("tokens.weight")
    assert len(scaled_param_groups(model, gains, lr=0.1)) == len(gains)
    with pytest.raises(ValueError, match="different gains"):
        scaled_param_groups(model, {**gains, "tokens.weight": 9.0}, lr=0.1)


def test_frozen_and_empty_parameters_need_no_gain():
    model = Tiny()
    model.empty = nn.Parameter(torch.empty(0, 4))
    model.inner.weight.requires_grad_(False)
    gains = gains_for(model)
    del gains["empty"]
    assert "inner.weight" not in gains
    groups = scaled_param_groups(model, {**gains, "inner.weight": 5.0}, lr=0.1, weight_decay=0.2)
    by_name = {group["params"][0][0]: group for group in groups}
    assert "inner.weight" not in by_name
    assert (by_name["empty"]["lr"], by_name["empty"]["weight_decay"]) == (0.1, 0.2)


def test_a_tensor_learning_rate_gives_each_group_its_own():
    groups = scaled_param_groups(Tiny(), gains_for(Tiny(), 2.0), lr=torch.tensor(0.5))
    rates = [group["lr"] for group in groups]
    assert all(isinstance(rate, torch.Tensor) and float(rate) == 1.0 for rate in rates)
    assert len({id(rate) for rate in rates}) == len(rates)


def test_biases_of_attention_and_parametrized_embeddings_do_not_decay():
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    kept = [name for name, _ in decay_groups(attention, 0.1)[1]["params"]]
    assert {"bias_k", "bias_v", "in_proj_bias", "out_proj.bias"} == set(kept)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Embedding(5, 3)), nn.Linear(3, 2)
    )
    groups = decay_groups(model, 0.1, decay_embeddings=False)
    assert [name for name, _ in groups[0]["params"]] == ["1.weight"]


class Vision(nn.Module):
    """What a vision transformer owns beside its layers, and maps that only look alike."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.anything = nn.Parameter(torch.zeros(1, 5, 6))
        self.table = nn.Parameter(torch.zeros(5, 6))
        self.experts = nn.Parameter(torch.zeros(2, 6, 6))
        self.patches = nn.Conv2d(3, 1, 2)
        self.one_output = nn.Linear(6, 1)
        self.pairs = nn.Bilinear(6, 6, 1)
        self.attention = nn.MultiheadAttention(6, 2)


def test_what_is_laid_over_the_batch_does_not_decay_whatever_its_name():
    model = Vision()
    groups = names(decay_groups(model, 0.1))
    assert groups[0.0][:2] == ["cls_token", "anything"]
    maps = ["table", "experts", "patches.weight", "one_output.weight", "pairs.weight"]
    assert groups[0.1] == [*maps, "attention.in_proj_weight", "attention.out_proj.weight"]
    found = [n for n, p, holders in trainable_parameters(model) if is_laid_over_batch(p, holders)]
    assert found == ["cls_token", "anything"]


def test_a_parametrized_map_of_one_output_decays():
    model = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 1, 2))
    direction = [n for n in names(decay_groups(model, 0.1))[0.1] if n.endswith("original1")]
    assert len(direction) == 1


def test_a_vision_transformer_of_transformers_keeps_its_token_and_its_positions():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = transformers.ViTForImageClassification(config)
    decayed, kept = (names(decay_groups(model, 0.1))[value] for value in (0.1, 0.0))
    assert [name for name in kept if "embeddings" in name] == [
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.bias",
    ]
    assert all(dict(model.named_parameters())[name].ndim in (2, 4) for name in decayed)
