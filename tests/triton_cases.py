"""Tests of the Triton kernel that run on either machine, started by test_fused_triton.py.

On a GPU they run as they stand; elsewhere in a child process, under Triton's interpreter, whose
float32 is IEEE's without fused operations: there the kernel has to agree bit for bit with the
formulas in numpy. On a GPU the largest term's last place may differ.
"""

import itertools
import os

import numpy as np
import pytest
import torch

from nomadam.numerics.rounding import Draw
from nomadam.optimizers import sgd_sai_triton
from nomadam.optimizers.sgd_sai_triton import update_triton
from nomadam.optimizers.sgd_sai_update import update_forloop

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
PROGRAM, TILE = (4096, 2048) if INTERPRETED else (sgd_sai_triton.PROGRAM, sgd_sai_triton.TILE)
F32, BF16, F16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
KINDS = [(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, INT8), (F16, F16, F32)]
OPTIONS = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
TENSORS = ("param", "momentum_buffer", "momentum_scale", "compensation")
TOP = np.float32(127 * 127)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch):
    monkeypatch.setattr(sgd_sai_triton, "PROGRAM", PROGRAM)
    monkeypatch.setattr(sgd_sai_triton, "TILE", TILE)
    monkeypatch.setattr(sgd_sai_triton, "_tables", {})
    monkeypatch.setattr(sgd_sai_triton, "_read_by_graphs", {})


# ------------------------------------------------------------------------------- the reference


def bits_of(draw, numel):
    """Random bits by their definition, in integers of 64 bits."""
    mask = np.uint64(0xFFFFFFFF)

    def mixed(h):
        h ^= h >> np.uint64(16)
        h = h * np.uint64(0x85EBCA6B) & mask
        h ^= h >> np.uint64(13)
        h = h * np.uint64(0xC2B2AE35) & mask
        return h ^ (h >> np.uint64(16))

    keys = []
    for h in (0, 1):
        for word in (draw.seed % 2**32, draw.seed >> 32, draw.block, int(draw.step)):
            h = int(mixed(np.array(((h ^ word) + 0x9E3779B9) % 2**32, dtype=np.uint64)))
        keys.append(h)
    index = np.array([draw.first + i for i in range(numel)], dtype=np.uint64)
    x = ((index & mask) + np.uint64(keys[0])) & mask
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x85EBCA6B) & mask
    x ^= (np.uint64(keys[1]) + (index >> np.uint64(32)) * np.uint64(0x9E3779B9)) & mask
    x ^= x >> np.uint64(13)
    x = x * np.uint64(0xC2B2AE35) & mask
    return x ^ (x >> np.uint64(16))


def stored(values, dtype, half):
    """Float32 values in a dtype of storage: to nearest, or with a random half to bfloat16."""
    nearest = torch.from_numpy(values).to(dtype)
    if dtype != BF16 or half is None:
        return nearest
    words = (values.view(np.uint32) + half.astype(np.uint32)) & np.uint32(0xFFFF0000)
    rounded = torch.from_numpy(words.view(np.float32)).to(BF16)
    return torch.where(torch.from_numpy(np.isfinite(values)), rounded, nearest)


def decoded(codes, scales):
    """The values of 8-bit codes."""
    c = codes.numpy().astype(np.float32)
    return c * np.abs(c) * np.repeat(scales.numpy() / TOP, 128)[: len(c)]


def encoded(values, half):
    """Codes and scales, one block of 128 after the other."""
    codes, scales = [np.zeros(0)], []
    for start in range(0, len(values), 128):
        m, u = values[start : start + 128], (half[start : start + 128] + np.float32(0.5)) / 65536
        scale = np.abs(m).max()
        scale = np.float32(0) if scale < 2.0**-100 else scale
        y = np.zeros_like(m)
        if scale != 0 and np.isfinite(scale):
            y = np.minimum(np.abs(m) * (TOP / scale), TOP)
        k = np.floor(np.sqrt(y))
        up = y - k * k > u.astype(np.float32) * (2 * k + 1)
        codes.append(np.where(m < 0, -1, 1) * np.minimum(k + up, 127))
        scales.append(scale)
    return torch.from_numpy(np.concatenate(codes).astype(np.int8)), torch.from_numpy(
        np.array(scales, np.float32)
    )


def lerp(a, b, weight):
    weight = np.float32(weight)
    return a + weight * (b - a) if weight < 0.5 else b - (b - a) * (np.float32(1) - weight)


def follow(row, *, lr, momentum, weight_decay, nesterov=False, maximize=False, grad_scale=1.0):
    """One step of a row in numpy, in place; the arithmetic is float32, the numbers' float64."""
    p, g = row["param"].float().numpy(), row["grad"].float().numpy()
    old, numel = row["momentum_buffer"], len(p)
    draw, lr = row["draw"], float(lr)
    upper = lower = None
    if draw is not None:
        bits = bits_of(draw, numel)
        upper, lower = bits >> np.uint64(16), bits & np.uint64(0xFFFF)
    if row["compensation"] is not None:
        p = p + row["compensation"].float().numpy()
    g = g * (np.float32(1) / np.float32(grad_scale)) * np.float32(-1 if maximize else 1)
    d = g
    if old is not None:
        m = decoded(old, row["momentum_scale"]) if old.dtype == INT8 else old.float().numpy()
        m = lerp(m, g, 1 - momentum)
        d = lerp(g, m, momentum) if nesterov else m
        if old.dtype == INT8:
            row["momentum_buffer"], row["momentum_scale"] = encoded(m, lower)
        else:
            row["momentum_buffer"] = stored(m, old.dtype, lower if row["stochastic"] else None)
    p = p * np.float32(1 - lr * weight_decay) + np.float32(-lr * row["gain"]) * d
    dtype = row["param"].dtype
    row["param"] = stored(p, dtype, upper if row["stochastic"] else None)
    if row["compensation"] is not None:
        row["param"] = stored(p, dtype, None)
        row["compensation"] = stored(p - row["param"].float().numpy(), dtype, None)


# ------------------------------------------------------------------------------------- the rows


def row_of(numel, param=F32, grad=F32, momentum=F32, *, kahan=False, drawn=True, seed=0, first=0):
    """A block with all that its update needs, on the host."""
    make = torch.Generator().manual_seed(seed)
    spread = torch.randn(numel, generator=make).exp()  # of magnitudes, in every block of 128

    def values():
        return torch.randn(numel, generator=make) * spread

    row = {"param": values().to(param), "grad": values().to(grad), "gain": 20.0 + seed}
    row |= {"momentum_buffer": None, "momentum_scale": None, "compensation": None}
    if momentum == INT8:
        row["momentum_buffer"] = torch.randint(-127, 128, (numel,), generator=make).to(INT8)
        row["momentum_scale"] = torch.rand(-(-numel // 128), generator=make) + 0.5
    elif momentum is not None:
        row["momentum_buffer"] = values().to(momentum)
    if kahan:
        row["compensation"] = (values() * 2.0**-9).to(BF16)
    draw = Draw(2**40 + seed, 7, seed + 3, first) if drawn or momentum == INT8 else None
    return row | {"draw": draw, "stochastic": drawn and not kahan}


def copy_of(row, device=DEVICE):
    return {k: v.to(device, copy=True) if torch.is_tensor(v) else v for k, v in row.items()}


def launch(rows, update=update_triton, **options):
    """The kernel, or another path, in place."""
    column = {name: [row[name] for row in rows] for name in rows[0]}
    update(
        column["param"],
        column["grad"],
        column["momentum_buffer"],
        column["gain"],
        momentum_scales=column["momentum_scale"],
        compensations=column["compensation"],
        draws=column["draw"],
        stochastic=column["stochastic"],
        **(OPTIONS | options),
    )


def stepped(rows, **options):
    """The rows after a step by the kernel, on the host; the given ones stay as they are."""
    rows = [copy_of(row) for row in rows]
    launch(rows, **options)
    return [copy_of(row, "cpu") for row in rows]


def assert_same(got, wanted, before, exact=INTERPRETED):
    """Bit for bit under the interpreter; else to the last place of the largest term."""
    for name in TENSORS:
        a, b = got[name], wanted[name]
        if b is None:
            assert a is None
        elif exact:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
        elif b.dtype == INT8:
            assert ((a.int() - b.int()).abs() <= 1).all() and (a == b).float().mean() > 0.99
        else:
            size = torch.maximum(b.double().abs(), before[name].double().abs()) + 1.0
            allowed = size * (torch.finfo(b.dtype).eps + 8 * torch.finfo(F32).eps)
            assert torch.isnan(a).equal(torch.isnan(b)), name
            assert (((a - b).double().abs() <= allowed) | (a == b) | torch.isnan(b)).all(), name
            assert b.dtype == F32 or ((a == b) | torch.isnan(b)).float().mean() > 0.97, name


def check(rows, **options):
    """One step by the kernel against one by the formulas."""
    wanted = [copy_of(row, "cpu") for row in rows]
    options = OPTIONS | options
    for row in wanted:
        follow(row, **{k: v for k, v in options.items() if k != "keep"})
    on_device = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
    got = stepped(rows, **on_device)
    for a, b, row in zip(got, wanted, rows, strict=True):
        assert_same(a, b, row)
        assert a["grad"].equal(row["grad"]) or row["grad"].isnan().any()
    return got


# ------------------------------------------------------------------------------------ agreement


def test_every_mix_of_dtypes_in_one_launch():
    floats = (F32, BF16, F16)
    mixes = itertools.product(floats, floats, (F32, BF16, F16, INT8))
    check([row_of(150 + 7 * i, *mix, seed=i) for i, mix in enumerate(mixes)])


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_same_as_one_block_after_the_other(nesterov):
    rows = [row_of(1000, *kind, seed=i) for i, kind in enumerate(KINDS)]
    rows.append(row_of(1000, BF16, BF16, BF16, kahan=True, seed=9))
    got, wanted = stepped(rows, nesterov=nesterov), [copy_of(row) for row in rows]
    launch(wanted, update_forloop, nesterov=nesterov)
    for a, b, before in zip(got, wanted, rows, strict=True):
        assert_same(a, copy_of(b, "cpu"), before, exact=False)


@pytest.mark.parametrize("drawn", [True, False])
def test_every_mix_of_dtypes_without_momentum(drawn):
    mixes = itertools.product((F32, BF16, F16), repeat=2)
    rows = [row_of(100, *mix, None, drawn=drawn, seed=i) for i, mix in enumerate(mixes)]
    check(rows, momentum=0.0)
    check(rows, momentum=0.0, maximize=True, weight_decay=0.0)


def test_nearest_rounding_without_a_draw():
    kinds = [(BF16, BF16, BF16), (BF16, F32, F32), (F16, F16, BF16), (BF16, BF16, INT8)]
    rows = [row_of(300, *kind, drawn=False, seed=i) for i, kind in enumerate(kinds)]
    assert rows[0]["draw"] is None
    check(rows)


def test_a_draw_that_is_not_for_stochastic_rounding_draws_codes_alone():
    row = row_of(300, BF16, BF16, INT8) | {"stochastic": False}
    check([row])
    assert not stepped([row])[0]["param"].equal(stepped([row | {"stochastic": True}])[0]["param"])


@pytest.mark.parametrize("kind", [(F32, F32, F32), (BF16, BF16, INT8)], ids=str)
def test_tails_and_several_programs(kind):
    sizes = (1, 127, 128, 129, TILE - 1, TILE, TILE + 1, PROGRAM, PROGRAM + 1, 2 * PROGRAM + 300)
    sizes = (0, *sizes, 0)
    check([row_of(n, *kind, seed=i) for i, n in enumerate(sizes)])


def test_nothing_to_do():
    launch([copy_of(row_of(0)), copy_of(row_of(0, seed=1))])


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.3])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_and_nesterov(momentum, nesterov):
    rows = [row_of(200, F32, F32, F32), row_of(200, BF16, BF16, INT8, seed=1)]
    check(rows, momentum=momentum, nesterov=nesterov)


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"lr": torch.tensor(0.03)},
        {"lr": torch.tensor(0.03, dtype=torch.float64)},
        {"grad_scale": torch.tensor(65536.0)},
        {"grad_scale": torch.tensor([3.0])},
        {"keep": torch.tensor(True)},
        {"maximize": True, "nesterov": True, "grad_scale": torch.tensor(3.0), "lr": 0.3},
    ],
    ids=str,
)
def test_options(options):
    rows = [row_of(150, F32, F32, F32), row_of(150, BF16, F16, INT8, seed=1)]
    check([*rows, row_of(150, BF16, BF16, BF16, kahan=True, seed=2)], **options)


def test_numbers_are_combined_in_double_precision():
    row = row_of(64) | {"gain": 1 / 3}
    lr, decay = 0.3, 0.7
    assert np.float32(1 - lr * decay) != 1 - np.float32(lr) * np.float32(decay)
    assert np.float32(lr * row["gain"]) != np.float32(lr) * np.float32(row["gain"])
    for given in (lr, torch.tensor(lr, dtype=torch.float64)):
        check([row], lr=given, weight_decay=decay)


@pytest.mark.parametrize("momentum", [BF16, F32, INT8, None], ids=str)
def test_compensation(momentum):
    options = {"momentum": 0.0} if momentum is None else {}
    rows = [row_of(300, BF16, BF16, momentum, kahan=True)]
    for _ in range(5):
        rows = check(rows, lr=1e-5, **options)


def test_compensation_keeps_updates_that_bfloat16_loses():
    row = row_of(128, BF16, F32, None, kahan=True, drawn=False) | {"gain": 1.0}
    row["param"].fill_(1.0), row["compensation"].zero_(), row["grad"].fill_(-1.0)
    for _ in range(8):
        (row,) = stepped([row], lr=2.0**-10, momentum=0.0, weight_decay=0.0)
    assert (row["param"] == 1 + 2.0**-7).all() and (row["compensation"] == 0).all()


# -------------------------------------------------------------------- left alone, or not finite


def test_keep_false_changes_nothing():
    rows = [row_of(300, *kind, seed=i) for i, kind in enumerate(KINDS)]
    rows.append(row_of(300, BF16, BF16, BF16, kahan=True, seed=9))
    rows[0]["grad"][5] = torch.nan
    for row, got in zip(rows, stepped(rows, keep=torch.tensor(False, device=DEVICE)), strict=True):
        for name in TENSORS:
            assert got[name] is None if row[name] is None else got[name].equal(row[name])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_place(value):
    rows = [row_of(300, *kind, seed=i) for i, kind in enumerate(KINDS)]
    for row in rows:
        row["grad"][130] = value
    got = check(rows)
    finite = torch.arange(300) != 130
    for row in got:
        assert row["param"].isfinite().equal(finite)
    assert (got[2]["momentum_buffer"][128:256] == 0).all()
    assert got[2]["momentum_scale"].isfinite().tolist() == [True, False, True]
    again = check(got)[2]  # the whole block has lost its momentum by now
    assert again["momentum_scale"].isnan().tolist() == [False, True, False]
    assert again["param"][:128].isfinite().all() and again["param"][256:].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_of_all_ones_does_not_carry_into_a_number():
    rows = [row_of(130, BF16, F32, BF16), row_of(130, BF16, F32, BF16, kahan=True, seed=1)]
    for row in rows:
        row["grad"].view(torch.int32).fill_(0x7FFFFFFF)  # the NaN of CUDA's arithmetic
    for row in check(rows):
        assert row["param"].isnan().all() and row["momentum_buffer"].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_largest_values():
    rows = [row_of(200, BF16, BF16, BF16), row_of(200, F16, F32, F32), row_of(200, BF16, F32, INT8)]
    for row, largest in zip(rows, (3.38e38, 65504.0, 3.38e38), strict=True):
        row["param"].fill_(largest)
    rows[2]["grad"].fill_(1e38)
    check(rows, lr=1e-9)


def test_a_block_of_zeros_and_of_tiny_values_has_scale_zero():
    row = row_of(384, F32, F32, INT8) | {"gain": 1.0}
    row["grad"][:128] = 0.0
    row["grad"][128:256] = 1e-31
    row["momentum_buffer"].zero_()
    (got,) = check([row])
    assert got["momentum_scale"][:2].tolist() == [0.0, 0.0] and got["momentum_scale"][2] > 0
    assert (got["momentum_buffer"][:256] == 0).all()


# ------------------------------------------------------------------------------------ the draws


@pytest.mark.parametrize("first", [2**32 - 300, 2**32 - 128, 2**32, 2**35 + 12345, 2**40 - 1])
def test_index_in_the_whole_block_beyond_32_bits(first):
    check([row_of(TILE + 300, BF16, BF16, BF16, first=first)])


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32 - 1])
def test_seeds_and_steps_of_any_size(seed, step):
    row = row_of(128, BF16, BF16, BF16)
    check([row | {"draw": Draw(seed, step, 2**20)}])


def test_step_in_a_tensor_is_the_same_as_the_number():
    row = row_of(300, BF16, BF16, INT8)
    step = torch.tensor(7, device=DEVICE)
    (number,) = stepped([row])
    (tensor,) = stepped([row | {"draw": row["draw"]._replace(step=step)}])
    (on_host,) = stepped([row | {"draw": row["draw"]._replace(step=torch.tensor(7))}])
    for name in ("param", "momentum_buffer", "momentum_scale"):
        assert number[name].equal(tensor[name]) and number[name].equal(on_host[name])


def test_pieces_draw_the_bits_of_the_whole():
    whole = row_of(1000, BF16, BF16, INT8)
    pieces = []
    for start, stop in ((0, 384), (384, 512), (512, 1000)):
        piece = {**whole, "draw": whole["draw"]._replace(first=start)}
        for name in ("param", "grad", "momentum_buffer"):
            piece[name] = whole[name][start:stop]
        scales = slice(start // 128, -(-stop // 128))
        pieces.append(piece | {"momentum_scale": whole["momentum_scale"][scales]})
    (wanted,) = stepped([whole])
    got = stepped(pieces)
    for name in ("param", "momentum_buffer", "momentum_scale"):
        assert torch.cat([piece[name] for piece in got]).equal(wanted[name])


@pytest.mark.parametrize("kind", [(F32, F32, F32), (BF16, BF16, INT8)], ids=str)
def test_addresses_that_are_not_aligned(kind):
    row = row_of(PROGRAM + 200, *kind)
    moved = copy_of(row)
    for name in ("param", "grad", "momentum_buffer"):
        room = torch.zeros(len(row[name]) + 1, dtype=row[name].dtype, device=DEVICE)
        room[1:] = row[name]
        moved[name] = room[1:]
    launch([moved])
    (wanted,) = stepped([row])
    assert_same(copy_of(moved, "cpu"), wanted, row)


# ------------------------------------------------------------------------------------ the table


@pytest.fixture
def sent(monkeypatch):
    """The columns of every table that was sent."""
    calls, send = [], sgd_sai_triton._sent

    def record(last, columns, device):
        calls.append([i for i in range(12) if last is None or last.columns[i] != columns[i]])
        return send(last, columns, device)

    monkeypatch.setattr(sgd_sai_triton, "_sent", record)
    return calls


def kept_for_graphs():
    return list(sgd_sai_triton._read_by_graphs.values())


def both(rows, wanted, **options):
    """A step of both, compared."""
    before = [copy_of(row, "cpu") for row in rows]
    launch(rows, **options)
    for row, slow, old in zip(rows, wanted, before, strict=True):
        follow(slow, **(OPTIONS | options))
        assert_same(copy_of(row, "cpu"), slow, old)


def test_table_is_sent_again_only_when_it_changed(sent):
    rows = [row_of(200, *kind, seed=i) for i, kind in enumerate(KINDS)]
    rows, wanted = [copy_of(row) for row in rows], [copy_of(row, "cpu") for row in rows]
    both(rows, wanted)
    assert len(sent) == 1
    for row, slow in zip(rows, wanted, strict=True):  # the step is no part of it, nor is lr
        row["draw"] = slow["draw"] = row["draw"]._replace(step=8)
    both(rows, wanted, lr=0.5)
    both(rows, wanted, weight_decay=0.0, momentum=0.5)
    assert len(sent) == 1
    rows[1]["gain"] = wanted[1]["gain"] = torch.tensor(0.125)
    both(rows, wanted)
    both(rows, wanted)
    assert sent[1:] == [[8]]
    fresh = torch.randn(200).to(BF16)
    rows[2]["grad"], wanted[2]["grad"] = fresh.to(DEVICE, copy=True), fresh
    both(rows, wanted)
    both(rows, wanted)
    assert sent[2:] == [[1]]


def test_groups_in_turn_keep_their_tables(sent):
    groups = [[copy_of(row_of(100, seed=i))] for i in range(3)]
    for _ in range(3):
        for rows in groups:
            launch(rows)
    assert len(sent) == 3


def test_rows_that_stay_in_place_but_shrink(sent):
    room = row_of(PROGRAM + 500)
    rows = [copy_of(room), copy_of(row_of(100, seed=1))]
    launch(rows)
    for name in ("param", "grad", "momentum_buffer"):
        rows[0][name] = rows[0][name][:300]
    wanted = [copy_of(row, "cpu") for row in rows]
    both(rows, wanted)
    assert len(sent) == 2


def test_oldest_table_makes_room(sent, monkeypatch):
    monkeypatch.setattr(sgd_sai_triton, "MOST_TABLES", 2)
    groups = [[copy_of(row_of(100, seed=i))] for i in range(3)]
    for i in (0, 1, 0, 2, 0, 1):
        launch(groups[i])
    assert len(sent) == 4 and len(sgd_sai_triton._tables) == 2


def test_table_entered_by_kernels_is_the_one_that_is_sent():
    columns = [[7, 2**47 + 1, -(2**63)], [2**63 - 1, 0, 1], *([[0, 1, 2]] * 10)]
    device = torch.device(DEVICE)
    _, sent = sgd_sai_triton._sent(None, columns, device)
    _, entered = sgd_sai_triton._entered(None, columns, device)
    assert sent.equal(entered)
    last = sgd_sai_triton._Table(columns, sent.cpu(), sent, sent)
    changed = [columns[0], [5, 2**62 + 3, 2**53 + 1], *columns[2:]]
    _, entered = sgd_sai_triton._entered(last, changed, device)
    assert entered.tolist() == [list(row) for row in zip(*changed, strict=True)]
    assert sent.tolist() == [list(row) for row in zip(*columns, strict=True)]


def test_capture_enters_what_changed_and_leaves_the_kept_table_alone(sent, monkeypatch):
    rows = [row_of(200, *kind, seed=i) for i, kind in enumerate(KINDS)]
    rows, wanted = [copy_of(row) for row in rows], [copy_of(row, "cpu") for row in rows]
    both(rows, wanted)
    known = dict(sgd_sai_triton._tables)
    old = [row["grad"] for row in rows]
    with monkeypatch.context() as within:
        within.setattr(sgd_sai_triton, "_is_capturing", lambda device: True)
        for row, slow in zip(rows, wanted, strict=True):
            slow["grad"] = -slow["grad"]
            row["grad"] = slow["grad"].to(DEVICE, copy=True)
        both(rows, wanted)
        both(rows[:2], wanted[:2])  # not known before, so its table is the graph's own
    assert len(sent) == 1 and list(sgd_sai_triton._tables) == list(known)
    (table,) = known.values()
    assert kept_for_graphs() == [table] == list(sgd_sai_triton._tables.values())
    for row, slow, grad in zip(rows, wanted, old, strict=True):
        row["grad"], slow["grad"] = grad, grad.cpu()
    both(rows, wanted)
    assert len(sent) == 1


def test_autograd_sees_that_the_parameter_changed():
    row = copy_of(row_of(8))
    param = row["param"].requires_grad_()
    loss = (param * param).sum()
    with torch.no_grad():
        launch([row])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
