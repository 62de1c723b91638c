"""Tests of the Triton kernel that run on either machine, started by test_fused_triton.py.

On a GPU they run as they stand; elsewhere in a child process, under Triton's interpreter, in
smaller programs.
"""

import itertools

import numpy as np
import pytest
import torch
from one_pass_triton import (
    BF16,
    DEVICE,
    F16,
    F32,
    INT8,
    INTERPRETED,
    KINDS,
    OPTIONS,
    TENSORS,
    assert_same,
    check,
    copy_of,
    follow,
    launch,
    row_of,
    stepped,
)

from nomadam.numerics.rounding import Draw
from nomadam.optimizers import sgd_sai_triton
from nomadam.optimizers.sgd_sai_update import update_forloop

PROGRAM, TILE = (4096, 2048) if INTERPRETED else (sgd_sai_triton.PROGRAM, sgd_sai_triton.TILE)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch):
    monkeypatch.setattr(sgd_sai_triton, "PROGRAM", PROGRAM)
    monkeypatch.setattr(sgd_sai_triton, "TILE", TILE)
    monkeypatch.setattr(sgd_sai_triton, "_tables", {})
    monkeypatch.setattr(sgd_sai_triton, "_read_by_graphs", {})


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


def test_index_in_the_whole_block_beyond_32_bits():
    firsts = (2**32 - 300, 2**32 - 128, 2**32, 2**35 + 12345, 2**40 - 1)
    check([row_of(TILE + 300, BF16, BF16, BF16, seed=i, first=n) for i, n in enumerate(firsts)])


@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32 - 1])
def test_seeds_and_steps_of_any_size(step):
    rows = [row_of(128, BF16, BF16, BF16, seed=i) for i in range(5)]
    for row, seed in zip(rows, (0, 1, 2**32 - 1, 2**63, 2**64 - 1), strict=True):
        row["draw"] = Draw(seed, step, 2**20)
    check(rows)


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
