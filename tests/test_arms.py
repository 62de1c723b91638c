"""The arms beside the baselines: each against its paper's recurrence, and what it does at edges."""

import copy
import io
import math

import pytest
import torch
from cases import equal, gradients, small_model, take, values
from reference import arms as reference
from reference import sgd_sai as sgd_sai_reference
from torch import nn
from torch.testing import assert_close

from nomadam import SGDSaI
from nomadam.optimizers.apollo_mini import ApolloMini, apollo_mini
from nomadam.optimizers.baselines import BASELINES, build_optimizer
from nomadam.optimizers.muon_sgd_sai import MuonSGDSaI
from nomadam.optimizers.roles import role_groups
from nomadam.optimizers.scale import Scale
from nomadam.optimizers.sgd_sai_controls import ShuffledSGDSaI, equal_gain

HEAD = "4.weight"


def make(name, model, **arguments):
    row = BASELINES[name]
    if "head" in row.arguments():
        arguments.setdefault("head", HEAD)
    arguments.setdefault("lr", row.default_lr)
    arguments.setdefault("weight_decay", row.default_weight_decay)
    return build_optimizer(name, model, **arguments)


def trained(name, steps, model=None, **arguments):
    model = model or small_model()
    optimizer = make(name, model, **arguments)
    for grads in steps:
        take(optimizer, list(model.parameters()), grads)
    return model, optimizer


def random_steps(number, seed=1):
    return gradients(list(small_model().parameters()), number, seed=seed)


def matrix(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def many(shape, steps, scale=1.0):
    return [scale * matrix(*shape, seed=10 + t) for t in range(steps)]


def follow(optimizer, param, grads):
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
        yield param.detach().double().clone()


def agree(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **(tolerance or {"rtol": 2e-5, "atol": 1e-6}))


# SCALE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("output_dim", "over"), [(0, 1), (-1, 0)])
@pytest.mark.parametrize("momentum", [None, 0.8])
def test_scale_is_the_papers(momentum, output_dim, over, dtype):
    param = nn.Parameter(matrix(6, 5).to(dtype))
    own = {"method": "column"} if momentum is None else {"method": "last", "momentum": momentum}
    group = {"params": [param], "output_dim": output_dim, **own}
    optimizer = Scale([group], lr=0.05, weight_decay=0.3)
    grads = many((6, 5), 8)
    for grad in grads:
        grad.select(over ^ 1, 2).zero_()  # a column without a gradient
    expected = reference.scale(
        matrix(6, 5).to(dtype).double(),
        grads,
        lr=0.05,
        weight_decay=0.3,
        over=over,
        momentum=momentum,
    )
    agree(follow(optimizer, param, grads), expected)


def test_scales_columns_belong_to_outputs_whatever_the_layout():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    linear, flipped = nn.Linear(5, 6, bias=False), transformers.pytorch_utils.Conv1D(6, 5)
    with torch.no_grad():
        flipped.weight.copy_(linear.weight.t())
    moved = []
    for layer in (linear, flipped):
        optimizer = build_optimizer("scale", layer, lr=0.1, weight_decay=0.1, head=())
        for grad in many((6, 5), 3):
            grad = grad.float()
            layer.weight.grad = grad if layer is linear else grad.t().contiguous()
            optimizer.step()
        moved.append(layer.weight.detach())
    assert_close(moved[0], moved[1].t())


def test_scale_normalises_a_filter_and_a_position_table_as_it_should():
    model = nn.ParameterDict({"positions": torch.zeros(1, 7, 4)})
    model.add_module("filter", nn.Conv2d(2, 3, 3, bias=False))
    start = model.filter.weight.detach().clone()
    optimizer = build_optimizer("scale", model, lr=1.0, weight_decay=0.0, head=())
    for param in model.parameters():
        param.grad = torch.randn_like(param) * 1e-5
    optimizer.step()
    by_filter = (model.filter.weight.detach() - start).square().mean((1, 2, 3))
    by_feature = model.positions.detach().square().mean((0, 1))
    assert_close(by_filter, torch.ones(3), rtol=1e-2, atol=0)
    assert_close(by_feature, torch.ones(4), rtol=1e-2, atol=0)


# APOLLO-Mini


def line(length, seed, index, draw):
    generator = torch.Generator().manual_seed((seed << 32) ^ (index << 16) ^ draw)
    return torch.randn(length, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_apollo_mini_is_the_papers(tall, scale):
    shape = (7, 4) if tall else (4, 7)
    grads = many(shape, 12, scale)
    grads[5] *= 100.0  # the limiter has something to do
    numbers = {"lr": 0.01, "weight_decay": 0.3}
    betas = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-12}
    param = nn.Parameter(matrix(*shape).float())
    vector = nn.Parameter(torch.zeros(3))
    groups = [
        {"params": [vector], "method": "adamw", "weight_decay": 0.3},
        {"params": [param], "method": "apollo", "weight_decay": 0.3},
    ]
    optimizer = apollo_mini(groups, 0.01, project_every=5, seed=3, **betas)
    turned = [g.t() if tall else g for g in grads]
    start = param.detach().double()
    expected = reference.apollo_mini(
        start.t() if tall else start,
        turned,
        line_at=lambda t: line(4, 3, 1, (t - 1) // 5),
        **numbers,
        **betas,
    )
    found = follow(optimizer, param, grads)
    agree((f.t() if tall else f for f in found), expected, rtol=1e-4, atol=1e-5)


def test_the_apollo_of_pytorch_optimizer_is_not_the_papers():
    """Why the row has its own: theirs moves along the projection, here a matrix of rank 1."""
    library = pytest.importorskip("pytorch_optimizer")
    theirs, ours = (nn.Parameter(torch.zeros(6, 9)) for _ in range(2))
    settings = {"rank": 1, "scale": 128.0, "update_proj_gap": 200, "projection_type": "random"}
    optimizer = library.APOLLO([{"params": [theirs], **settings}], lr=0.1, foreach=False)
    own = ApolloMini([{"params": [ours], "method": "apollo"}], lr=0.1, weight_decay=0.0)
    for param, each in ((theirs, optimizer), (ours, own)):
        param.grad = matrix(6, 9).float()
        each.step()
    assert torch.linalg.matrix_rank(theirs.detach()) == 1
    assert torch.linalg.matrix_rank(ours.detach()) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apollo_mini_goes_on_exactly_and_keeps_float32(dtype):
    param = nn.Parameter(matrix(4, 7).to(dtype))
    optimizer = ApolloMini([{"params": [param], "method": "apollo", "project_every": 3}], lr=1e-2)
    list(follow(optimizer, param, many((4, 7), 4)))
    other = nn.Parameter(param.detach().clone())
    resumed = ApolloMini([{"params": [other], "method": "apollo"}], lr=1.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[other]["exp_avg"].dtype == torch.float32
    later = many((4, 7), 4, scale=3.0)
    agree(follow(optimizer, param, later), follow(resumed, other, later), rtol=0, atol=0)


def test_a_matrix_without_a_gradient_stays_and_moves_afterwards():
    param = nn.Parameter(torch.ones(4, 7))
    optimizer = ApolloMini([{"params": [param], "method": "apollo"}], lr=1e-2, weight_decay=0.0)
    list(follow(optimizer, param, [torch.zeros(4, 7)] * 2))
    assert torch.equal(param.detach(), torch.ones(4, 7))
    list(follow(optimizer, param, many((4, 7), 1)))
    assert (param != 1).all() and param.isfinite().all()


# Scion


@pytest.mark.parametrize(
    ("shape", "norm", "radius", "head"),
    [((8, 4), "spectral", 50.0, ()), ((8, 4), "sign", 3000.0, "weight")],
)
@pytest.mark.parametrize("foreach", [False, True])
def test_scion_is_the_papers(shape, norm, radius, head, foreach):
    pytest.importorskip("pytorch_optimizer")
    layer = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = build_optimizer(
        "scion", layer, lr=1e-4, weight_decay=0.7, head=head, momentum=0.8, foreach=foreach
    )
    expected = reference.scion(
        layer.weight.detach().double(), many(shape, 6), lr=1e-4, weight_decay=0.7, norm=norm,
        radius=radius, momentum=0.8,
    )  # fmt: skip
    # The library's iterations are in bfloat16: a hundredth of a step of at most 7e-3 an element.
    tolerance = {"rtol": 0, "atol": 5e-4 if norm == "spectral" else 1e-6}
    agree(follow(optimizer, layer.weight, many(shape, 6)), expected, **tolerance)


def test_scion_moves_vectors_by_their_root_mean_square():
    pytest.importorskip("pytorch_optimizer")
    layer = nn.LayerNorm(9)
    optimizer = build_optimizer("scion", layer, lr=1e-3, weight_decay=0.7, head=())
    grads = many((9,), 4)
    expected = reference.scion(
        torch.ones(9).double(), grads, lr=1e-3, weight_decay=0.0, norm="rms", radius=50.0
    )
    agree(follow(optimizer, layer.weight, grads), expected)


def test_scions_radius_is_of_outputs_and_inputs_whatever_the_layout():
    pytest.importorskip("pytorch_optimizer")
    transformers = pytest.importorskip("transformers")
    sizes = []
    for layer in (nn.Linear(4, 16, bias=False), transformers.pytorch_utils.Conv1D(16, 4)):
        with torch.no_grad():
            layer.weight.zero_()
        optimizer = build_optimizer("scion", layer, lr=1e-3, weight_decay=0.0, head=())
        torch.manual_seed(0)
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
        sizes.append(torch.linalg.svdvals(layer.weight.detach()).mean().item())
    assert sizes == pytest.approx([0.05 * 2.0] * 2, rel=0.3)


# Muon with SGDSaI, and signs with SGDSaI


def test_muon_sgd_sai_is_torchs_muon_and_sgd_sai():
    steps = random_steps(6)
    ours, optimizer = trained("muon_sgd_sai", steps, lr=1e-3, weight_decay=0.1, sgd_sai_lr=2e-2)
    theirs = small_model()
    names = [n for n, _ in theirs.named_parameters()]
    hidden, rest = theirs[1].weight, [p for n, p in theirs.named_parameters() if n != "1.weight"]
    muon = torch.optim.Muon([hidden], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    tables = {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1 * 1e-3 / 2e-2}
    vectors = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}
    sgd_sai = SGDSaI([tables, vectors], lr=2e-2)
    for grads in steps:
        for param, grad in zip(theirs.parameters(), grads, strict=True):
            param.grad = grad.clone()
        muon.step()
        sgd_sai.step()
    assert equal(values(ours.parameters()), values(theirs.parameters()))
    assert set(optimizer.gains()) == set(names) - {"1.weight"}
    assert all(set(s) <= {"momentum_buffer", "gsnr"} for s in optimizer.state.values())


def test_a_closure_is_called_once_and_copies_go_on_alike():
    model, optimizer = trained("muon_sgd_sai", random_steps(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for one, each in ((model, optimizer), (twin, twin_optimizer)):
        calls = []

        def closure(one=one, calls=calls):
            calls.append(torch.is_grad_enabled())
            one.zero_grad()
            loss = one(torch.arange(8)).square().mean()
            loss.backward()
            return loss

        with torch.no_grad():
            assert float(each.step(closure)) > 0
        assert calls == [True]
    assert equal(values(model.parameters()), values(twin.parameters()))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "method"),
        ({"method": "adamw"}, "adamw"),
        ({"method": "muon", "gain": 2.0}, "gain"),
        ({"method": "sgd_sai", "normalize": True}, "normalize"),
        ({"method": "sgd_sai", "skip_nonfinite": True}, "skip_nonfinite"),
        ({"method": "sgd_sai", "momentum": 1.5}, "1.5"),
        ({"method": "muon", "lr": -1.0}, "-1.0"),
        ({"method": "muon", "params": [nn.Parameter(torch.ones(3))]}, r"\[3\]"),
    ],
)
def test_groups_of_muon_sgd_sai_that_make_no_sense_are_errors(group, message):
    with pytest.raises(ValueError, match=message):
        MuonSGDSaI([{"params": [nn.Parameter(torch.ones(3, 3))], **group}])
    optimizer = MuonSGDSaI([{"params": [nn.Parameter(torch.ones(3, 3))], "method": "muon"}])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))], **group})
    assert len(optimizer.param_groups) == 1


def test_its_gradients_can_be_released():
    from nomadam import release_gradients

    ends = []
    for release in (False, True):
        model = small_model()
        optimizer = make("muon_sgd_sai", model)
        handle = release_gradients(model, optimizer) if release else None
        for _ in range(4):
            nn.functional.cross_entropy(model(torch.arange(8)), torch.arange(8)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        ends.append(values(model.parameters()))
    assert equal(*ends)


def test_signs_beside_sgd_sai_are_the_two_references():
    steps = random_steps(6)
    steps[0][0] = None
    model, optimizer = trained(
        "sign_embedding_sgd_sai", steps, lr=1e-2, sign_lr=2e-3, weight_decay=0.5
    )
    for (name, param), start, grads in zip(
        model.named_parameters(), small_model().parameters(), zip(*steps, strict=True), strict=True
    ):
        decay = 0.5 if param.ndim == 2 else 0.0
        own = {"lr": 1e-2, "weight_decay": decay}
        if name != "1.weight":
            own = {"lr": 2e-3, "weight_decay": 5 * decay, "rule": 1.0, "sign": True}
        slow = sgd_sai_reference.SGDSaI(start, **own)
        for grad in grads:
            slow.step(grad)
        assert_close(param.detach().double(), slow.p, rtol=1e-5, atol=1e-6)
    assert {len(state) for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("name", ["muon_sgd_sai", "sign_embedding_sgd_sai"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "fast"])
def test_the_second_learning_rate_is_above_0(name, value):
    argument = {"muon_sgd_sai": "sgd_sai_lr", "sign_embedding_sgd_sai": "sign_lr"}[name]
    with pytest.raises(ValueError, match=argument):
        make(name, small_model(), **{argument: value})
    with pytest.raises(ValueError, match="lr must be"):
        make(name, small_model(), lr=-1.0)


# Controls


def test_shuffled_gains_are_the_measured_ones_on_other_blocks():
    steps = random_steps(3)
    _, plain = trained("sgd_sai", steps)
    orders = []
    for seed in (0, 0, 1, 2):
        _, shuffled = trained("sgd_sai_shuffled", steps, seed=seed)
        assert sorted(shuffled.gains().values()) == pytest.approx(sorted(plain.gains().values()))
        orders.append(tuple(shuffled.gains().values()))
    assert orders[0] == orders[1] and len(set(orders)) == 3


def test_shuffled_gains_stay_through_a_resume_and_a_late_block_has_its_own():
    steps = random_steps(4)
    for grads in steps[:2]:
        grads[1] = None
    model, optimizer = trained("sgd_sai_shuffled", steps[:1], seed=4)
    gains = optimizer.gains()
    other = copy.deepcopy(model)
    resumed = make("sgd_sai_shuffled", other, seed=5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, each in ((model, optimizer), (other, resumed)):
        for grads in steps[1:]:
            take(each, list(one.parameters()), grads)
        late = each.gains()["1.weight"]
        assert late == pytest.approx(sgd_sai_reference.gain(steps[2][1]), rel=1e-5)
        assert each.gains() == gains | {"1.weight": late}
    assert equal(values(model.parameters()), values(other.parameters()))


def test_shuffled_is_sgd_sai_with_these_gains():
    steps = random_steps(4)
    model, optimizer = trained("sgd_sai_shuffled", steps, seed=1)
    same, _ = trained("sgd_sai", steps, gain=optimizer.gains())
    agree(values(model.parameters()), values(same.parameters()))


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, True])
def test_a_seed_out_of_range_is_an_error(seed):
    with pytest.raises(ValueError, match="seed"):
        ShuffledSGDSaI([nn.Parameter(torch.ones(2))], seed=seed)
    with pytest.raises(ValueError, match="seed"):
        apollo_mini([{"params": [nn.Parameter(torch.ones(2, 2))], "method": "apollo"}], 0.1,
                    seed=seed)  # fmt: skip


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_equal_gains_are_one_number_and_sgdm_at_another_rate(decay):
    steps = random_steps(5)
    model, optimizer = trained("sgd_sai_equal", steps, lr=1e-2, weight_decay=decay)
    (number,) = set(optimizer.gains().values())
    logs = [0.5 * math.log(p.numel()) for p in model.parameters()]
    assert number == pytest.approx(math.exp(sum(logs) / len(logs)))
    rate = 1e-2 * number
    same, _ = trained("sgdm_decoupled", steps, lr=rate, weight_decay=decay / number)
    agree(values(model.parameters()), values(same.parameters()))
    with pytest.raises(ValueError, match="elements"):
        equal_gain([{"params": [torch.ones(0)]}])


def test_the_gains_of_the_other_rows():
    steps = random_steps(1)
    _, measured = trained("sgd_sai", steps)
    _, rooted = trained("sgd_sai_sqrt_numel", steps)
    model, normalized = trained("sgd_sai_normalized", steps)
    sizes = {name: p.numel() ** 0.5 for name, p in model.named_parameters()}
    assert rooted.gains() == pytest.approx(sizes)
    largest = max(measured.gains().values())
    expected = {name: gain / largest for name, gain in measured.gains().items()}
    assert normalized.gains() == pytest.approx(expected)


# Roles


def roles_of(model, **arguments):
    groups = role_groups(model, 0.1, **arguments)
    return {name: group["role"] for group in groups for name, _ in group["params"]}


def test_roles_by_type_and_the_output_layer_by_what_the_model_says():
    assert roles_of(small_model(), head=HEAD) == {
        "0.weight": "embedding",
        "1.weight": "hidden",
        "1.bias": "vector",
        "2.weight": "vector",
        "2.bias": "vector",
        "4.weight": "head",
        "4.bias": "vector",
    }
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    found = roles_of(transformers.ViTForImageClassification(config), convolutions="flatten")
    assert found["classifier.weight"] == "head"
    assert found["vit.embeddings.position_embeddings"] == "embedding"
    assert found["vit.embeddings.patch_embeddings.projection.weight"] == "hidden"


def test_a_tied_weight_is_the_output_layer():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    found = roles_of(transformers.GPT2LMHeadModel(config))
    assert found["transformer.wte.weight"] == "head"
    assert found["transformer.wpe.weight"] == "embedding"


def test_names_may_stand_in_one_text_with_commas():
    found = roles_of(small_model(), head="4.weight, 0.weight")
    assert found["0.weight"] == found["4.weight"] == "head"
    with pytest.raises(ValueError, match="nobody"):
        roles_of(small_model(), head="4.weight,nobody")
