import copy
import io

import pytest
import torch
from torch import nn

from nomadam.optimizers.adam_mini import AdamMini, mini_groups

HEAD_DIM, WIDTH = 4, 8


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            # The loss does not depend on a bias of the keys: its gradient is rounding noise.
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=bias and name != "k_proj"))

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Named so that the adam_mini package finds the right blocks."""

    def __init__(self, bias=True):
        super().__init__()
        self.embed_tokens = nn.Embedding(13, WIDTH)
        self.attn = Attention(bias)
        self.norm = nn.LayerNorm(WIDTH, bias=bias)
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.lm_head = nn.Linear(WIDTH, 13, bias=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        x = x + self.attn(self.norm(x))
        return self.lm_head(x + torch.tanh(self.mlp(x)))


def loss_of(model, ids):
    output = model(ids)
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model, optimizer, steps, seed=3, vocabulary=13):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(vocabulary, (4, 6), generator=generator)
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()


def gpt2(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 13, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**sizes, **tokens, **changes})
    return transformers.GPT2LMHeadModel(config)


def blocks_of(groups):
    return {name: (g["output_dim"], g["blocks"]) for g in groups for name, _ in g["params"]}


def test_the_numbers_are_those_of_the_package_where_its_blocks_are_right():
    package = pytest.importorskip("adam_mini")
    torch.manual_seed(0)
    ours = Transformer()
    theirs = copy.deepcopy(ours)
    groups = mini_groups(ours, 0.1, head_dim=HEAD_DIM)
    train(ours, AdamMini(groups, lr=1e-2, betas=(0.8, 0.9)), 12)
    heads = WIDTH // HEAD_DIM
    official = package.Adam_mini(
        theirs.named_parameters(), 1e-2, (0.8, 0.9), 1e-8, 0.1, dim=WIDTH, n_heads=heads,
        verbose=False,
    )  # fmt: skip
    train(theirs, official, 12)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: n + m)


def test_the_package_does_not_find_the_heads_of_gpt2():
    package = pytest.importorskip("adam_mini")
    model = gpt2()
    optimizer = package.Adam_mini(
        model.named_parameters(), lr=1e-3, dim=8, n_heads=2, verbose=False
    )
    train(model, optimizer, 1)
    shapes = {
        group["name"]: optimizer.state[group["params"][0]]["vmean"].shape
        for group in optimizer.param_groups
        if group["name"].endswith(".weight")
    }
    assert shapes["transformer.h.0.attn.c_attn.weight"] == ()  # one block in all
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (8, 1)  # by input, not by output


def test_gpt2_is_partitioned_by_head_output_and_token():
    found = blocks_of(mini_groups(gpt2(), 0.1))
    layer = "transformer.h.0."
    assert found["transformer.wte.weight"] == (0, ((13, 1),))
    assert found["transformer.wpe.weight"] == (0, ((8, 1),))
    assert found[layer + "ln_1.weight"] == (0, ((1, 8),))
    assert found[layer + "attn.c_attn.weight"] == (1, ((4, 4), (8, 1)))
    assert found[layer + "attn.c_attn.bias"] == (0, ((24, 1),))
    assert found[layer + "attn.c_proj.weight"] == (1, ((8, 1),))
    assert found[layer + "mlp.c_fc.weight"] == (1, ((32, 1),))
    assert found[layer + "mlp.c_proj.weight"] == (1, ((8, 1),))


@pytest.mark.parametrize("head", [0, 1])
def test_a_block_of_gpt2s_attention_is_a_head_as_the_model_uses_it(head):
    model = gpt2()
    attention = model.transformer.h[0].attn
    other = 4 * (1 - head)
    with torch.no_grad():
        attention.c_proj.weight[other : other + 4] = 0.0  # nothing of the other head comes out
    optimizer = AdamMini(mini_groups(model, 0.0), lr=0.0)
    train(model.eval(), optimizer, 1)
    moved = optimizer.state[attention.c_attn.weight]["exp_avg_sq"].nonzero().flatten().tolist()
    values = [4 + 4 * head + row for row in range(4)]
    assert moved == [head, 2 + head, *values]


def test_a_transposed_fused_weight_moves_as_separate_matrices_do():
    torch.manual_seed(0)
    model = gpt2()
    weight = model.transformer.h[0].attn.c_attn.weight
    parts = {name: nn.Linear(8, 8, bias=False) for name in ("q_proj", "k_proj", "v_proj")}
    for layer, columns in zip(parts.values(), weight.detach().split(8, dim=1), strict=True):
        layer.weight = nn.Parameter(columns.T.clone())
    split = nn.ModuleDict(parts)
    fused = AdamMini(mini_groups(model, 0.1), lr=0.1)
    apart = AdamMini(mini_groups(split, 0.1, head_dim=4), lr=0.1)
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        for layer, columns in zip(parts.values(), weight.grad.split(8, dim=1), strict=True):
            layer.weight.grad = columns.T.contiguous()
        fused.step()
        apart.step()
    joined = torch.cat([layer.weight.T for layer in parts.values()], dim=1)
    torch.testing.assert_close(weight, joined)


def test_a_block_of_one_element_is_adam_and_one_block_is_not():
    torch.manual_seed(1)
    start = torch.randn(6)
    results = {}
    for blocks in (((6, 1),), ((1, 6),)):
        param = nn.Parameter(start.clone())
        optimizer = AdamMini(
            [{"params": [param], "blocks": blocks, "output_dim": 0}], lr=0.1, weight_decay=0.2
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            param.grad = torch.randn(6, generator=generator)
            optimizer.step()
        results[blocks] = param.detach()
    adam = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([adam], lr=0.1, weight_decay=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        adam.grad = torch.randn(6, generator=generator)
        optimizer.step()
    torch.testing.assert_close(results[((6, 1),)], adam.detach())
    assert (results[((1, 6),)] - adam.detach()).abs().max() > 1e-3


def test_grouped_queries_have_fewer_key_heads():
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8, False), "k_proj": nn.Linear(8, 4, False)})
    found = blocks_of(mini_groups(model, 0.1, head_dim=4))
    assert found == {"q_proj.weight": (0, ((2, 4),)), "k_proj.weight": (0, ((1, 4),))}


def test_torchs_attention_module_knows_its_heads():
    found = blocks_of(mini_groups(nn.TransformerEncoderLayer(8, 2, 16), 0.1))
    assert found["self_attn.in_proj_weight"] == (0, ((4, 4), (8, 1)))
    assert found["self_attn.out_proj.weight"] == (0, ((8, 1),))
    assert found["self_attn.in_proj_bias"] == (0, ((24, 1),))


def test_convolution_filters_are_one_block():
    found = blocks_of(mini_groups(nn.Conv2d(3, 5, 3), 0.1))
    assert found == {"weight": (0, ((1, 5),)), "bias": (0, ((5, 1),))}


def test_unknown_attention_layers_are_refused_until_declared():
    model = nn.ModuleDict({"attention": nn.ModuleDict({"mystery": nn.Linear(8, 8, False)})})
    with pytest.raises(ValueError, match=r"attention\.mystery\.weight.*blocks="):
        mini_groups(model, 0.1, head_dim=4)
    found = blocks_of(
        mini_groups(model, 0.1, head_dim=4, blocks={"attention.mystery.weight": "head"})
    )
    assert found == {"attention.mystery.weight": (0, ((2, 4),))}


def test_cross_attentions_key_and_value_are_not_taken_for_three():
    model = gpt2(add_cross_attention=True, n_embd=12, n_head=3)
    with pytest.raises(ValueError, match=r"crossattention\.c_attn\.weight"):
        mini_groups(model, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "head_dim"),
        ({"head_dim": 3}, "heads of 3"),
        ({"head_dim": 4, "blocks": {"nobody": "row"}}, "nobody"),
        ({"head_dim": 4, "blocks": {"q_proj.weight": "diagonal"}}, "diagonal"),
    ],
)
def test_partitions_that_cannot_be_right_are_errors(arguments, message):
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=message):
        mini_groups(model, 0.1, **arguments)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "blocks"),
        ({"blocks": ((3, 1),), "output_dim": 0}, "3 rows"),
        ({"blocks": ((2, 2),), "output_dim": 1}, "has 3"),
    ],
)
def test_blocks_must_fill_the_rows(group, message):
    with pytest.raises(ValueError, match=message):
        AdamMini([{"params": [nn.Parameter(torch.ones(4, 3))], **group}])


@pytest.mark.parametrize(
    "arguments", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"betas": (1.0, 0.9)}]
)
def test_numbers_out_of_range_are_errors(arguments):
    group = {"params": [nn.Parameter(torch.ones(4, 3))], "blocks": ((4, 1),), "output_dim": 0}
    with pytest.raises(ValueError):
        AdamMini([group], **arguments)


def test_save_load_continue_is_exact():
    torch.manual_seed(0)
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    optimizer = AdamMini(mini_groups(model, 0.1), lr=1e-2)
    train(model, optimizer, 3, seed=1)
    other = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = AdamMini(mini_groups(other, 0.1), lr=5.0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(model, optimizer, 3, seed=2)
    train(other, resumed, 3, seed=2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_counts_its_blocks_by_name_and_by_index():
    optimizer = AdamMini(mini_groups(Transformer(), 0.1, head_dim=4), lr=1e-2)
    counts = optimizer.num_blocks()
    assert counts["attn.q_proj.weight"] == 2
    assert counts["attn.v_proj.weight"] == 8
    assert counts["norm.weight"] == 1
    pair = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    unnamed = AdamMini([{"params": pair, "blocks": ((2, 2),), "output_dim": 0}])
    assert unnamed.num_blocks() == {0: 2, 1: 2}


def test_missing_gradients_leave_a_tensor_alone_and_closures_run_once():
    model = Transformer()
    before = copy.deepcopy(model.state_dict())
    optimizer = AdamMini(mini_groups(model, 0.5, head_dim=4), lr=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model.mlp(torch.ones(1, WIDTH)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert calls == [True]
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {"mlp.weight", "mlp.bias"}
