"""SGDSaI's update on CUDA and ROCm: one Triton launch over many tensors."""

import functools
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nomadam.numerics.rounding import MASK
from nomadam.optimizers.sgd_sai_update import Options, Row

# Elements that one program updates, and how many of them at a time.
PROGRAM, TILE = 8192, 2048

# Dtypes by their number in the kernel, for parameters and gradients, and for momentum.
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOMENTA = {**FLOATS, torch.int8: 3, None: 4}

# Columns of the kernel's table that are needed here, too.
PARAM, NUMEL, FIRST_PROGRAM = 0, 5, 7

# So many tables are kept, those used last.
MOST_TABLES = 2**14


class _Table(NamedTuple):
    """What the kernel knows of the rows of a call."""

    columns: list[list[int]]
    host: Tensor  # int64 [rows, columns]
    rows: Tensor  # the same on the device
    rows_of_programs: Tensor  # int32, the row of each program


_dispatch = attrgetter("__torch_dispatch__")
_tables: dict[Any, _Table] = {}
_read_by_graphs: dict[int, _Table] = {}


@functools.cache
def triton_available() -> bool:
    """Whether Triton is installed.

    Examples:
        >>> triton_available() in (True, False)
        True
    """
    return find_spec("triton") is not None


def triton_fits(tensors: Sequence[Tensor | None]) -> bool:
    """Whether `update_triton` can take a row.

    Args:
        tensors: of the row: parameter, gradient, momentum, its scales, compensation; ``None`` for
            what it lacks.

    Returns:
        True for plain contiguous tensors of one CUDA (or ROCm) device that has bfloat16, the
        parameter and the gradient in float32, bfloat16 or float16, the momentum in these or int8.

    Examples:
        >>> triton_fits([torch.zeros(3), torch.zeros(3), None, None, None])
        False
    """
    param, grad, momentum_buffer = tensors[:3]
    assert param is not None and grad is not None
    return (
        param.device.type == "cuda"
        and _is_recent(param.device)
        and all(t is None or (_is_plain(t) and t.device == param.device) for t in tensors)
        and param.dtype in FLOATS
        and grad.dtype in FLOATS
        and (None if momentum_buffer is None else momentum_buffer.dtype) in MOMENTA
    )


@functools.cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _is_plain(tensor: Tensor) -> bool:
    """Memory as it stands, in row-major order, and nothing that stands for other tensors."""
    plain = _dispatch(type(tensor)) is _dispatch(Tensor)
    return plain and tensor.is_contiguous() and not tensor.is_neg()


def update_triton(rows: Sequence[Row], options: Options) -> None:
    """The step of `update_forloop`, with the same arguments, in one launch.

    The kernel finds the tensors and the gains in a table on the device, which is kept, and sent
    again, without waiting, only when something in it changed: a gradient in new memory, a gain. A
    ``lr``, and a step of the draws, that is a tensor of the device is read there, so that a
    captured CUDA graph follows it. A step can be captured once one was taken, and the kernel
    compiled; gradients that the graph itself allocates are entered in a table by the graph.

    Args:
        rows: that `triton_fits`, all on one device, their draws all of one step.
        options: of all rows.
    """
    if not rows:
        return
    params, grads, momentum_buffers, gains, *others = zip(*rows, strict=True)
    momentum_scales, compensations, draws, _ = others
    kinds = [_kind(row) for row in rows]
    numels = [p.numel() for p in params]
    *first_programs, num_programs = accumulate((-(-n // PROGRAM) for n in numels), initial=0)
    if num_programs == 0:
        return
    columns = [
        *map(_addresses, (params, grads, momentum_buffers, momentum_scales, compensations)),
        numels,
        kinds,
        first_programs,
        array("q", array("d", map(float, gains)).tobytes()).tolist(),
        [0 if draw is None else _signed(draw.seed, 64) for draw in draws],
        [0 if draw is None else draw.block for draw in draws],
        [0 if draw is None else draw.first for draw in draws],
    ]
    steps = [draw.step for draw in draws if draw is not None]
    assert all(s is steps[0] or (isinstance(s, int) and s == steps[0]) for s in steps)
    device = params[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        table = _table(device, columns, num_programs)
        _launch(table, sorted(set(kinds)), steps[0] if steps else 0, options)
    written = [*params, *momentum_buffers, *momentum_scales, *compensations]
    torch.autograd.graph.increment_version([t for t in written if t is not None])


def _launch(table: _Table, kinds: list[int], step: int | Tensor, options: Options) -> None:
    from nomadam.optimizers.sgd_sai_triton_kernels import update_rows

    kernel: Any = update_rows
    lr, momentum, weight_decay, nesterov, maximize, keep, grad_scale, sign = options
    assert not sign
    device = table.rows.device
    lr_number, lr_tensor = _number(lr, device)
    step_number, step_tensor = _number(step, device)
    near_buffer, near_grad = 1 - momentum < 0.5, momentum < 0.5
    compiled: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}
    if torch.version.hip:
        compiled["num_warps"] = 4  # of twice the threads
    elif any(kind >> 4 & 7 == MOMENTA[torch.int8] for kind in kinds):
        compiled["maxnreg"] = 64  # left alone, 8 bits take registers of half the threads
    kernel[(len(table.rows_of_programs),)](
        table.rows,
        table.rows_of_programs,
        float(lr_number),
        lr_tensor,
        _signed(step_number & MASK, 32),
        step_tensor,
        float(momentum),
        float(weight_decay),
        None if keep is None else keep.to(device).view(torch.uint8),
        None if grad_scale is None else grad_scale.to(device),
        kinds=sum(kind << 9 * i for i, kind in enumerate(kinds)),
        num_kinds=len(kinds),
        flags=nesterov | maximize << 1 | near_buffer << 2 | near_grad << 3,
        block=PROGRAM,
        tile=TILE,
        **compiled,
    )


def _kind(row: Row) -> int:
    """The kernel's number for the dtypes and the rounding of a row."""
    p_dtype, g_dtype = row.param.dtype, row.grad.dtype
    m_dtype = None if row.momentum_buffer is None else row.momentum_buffer.dtype
    assert row.draw is not None or m_dtype != torch.int8
    draws = row.stochastic and row.draw is not None and torch.bfloat16 in (p_dtype, m_dtype)
    stored = FLOATS[p_dtype] | FLOATS[g_dtype] << 2 | MOMENTA[m_dtype] << 4
    return stored | (row.compensation is not None) << 7 | draws << 8


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _signed(word: int, bits: int) -> int:
    return word - (word >> bits - 1 << bits)


def _number(value: Any, device: torch.device) -> tuple[Any, Tensor | None]:
    """A number for the launch, or else a tensor for the kernel to read on its device."""
    if isinstance(value, Tensor) and (value.device.type != "cpu" or device.type == "cpu"):
        return 0, value.to(device)
    return value.item() if isinstance(value, Tensor) else value, None


def _table(device: torch.device, columns: list[list[int]], num_programs: int) -> _Table:
    """The table with these columns: that of the last call for the same parameters, or a new one."""
    key = (device, tuple(columns[PARAM]))
    last = _tables.pop(key, None)
    capturing = _is_capturing(device)
    table = last
    if table is None or columns != table.columns:
        make = _entered if capturing else _sent
        host, rows = make(last, columns, device)
        rows_of_programs = None if last is None else last.rows_of_programs
        if last is None or columns[NUMEL] != last.columns[NUMEL]:
            programs = torch.arange(num_programs, device=device)
            starts = rows[:, FIRST_PROGRAM].contiguous()
            rows_of_programs = torch.searchsorted(starts, programs, right=True, out_int32=True) - 1
        assert rows_of_programs is not None
        table = _Table(columns, host, rows, rows_of_programs)
    # In a capture nothing is done yet: what the graph makes is its own, and what it reads stays.
    kept = last if capturing else table
    if kept is not None:
        _tables[key] = kept
    if capturing and kept is not None:
        _read_by_graphs[id(kept)] = kept
    if device.type == "cuda" and not capturing:
        for tensor in (table.rows, table.rows_of_programs):
            tensor.record_stream(torch.cuda.current_stream())
    if len(_tables) > MOST_TABLES:
        _tables.pop(next(iter(_tables)))
    return table


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _changed(last: _Table | None, columns: list[list[int]]) -> list[int]:
    return [i for i, c in enumerate(columns) if last is None or c != last.columns[i]]


def _sent(
    last: _Table | None, columns: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The table on the host and on the device, copied there without waiting."""
    shape = (len(columns[PARAM]), len(columns))
    host = torch.empty(shape, dtype=torch.int64) if last is None else last.host
    for i in _changed(last, columns):
        host[:, i] = torch.tensor(columns[i])
    if device.type == "cuda":
        return host, host.pin_memory().to(device, non_blocking=True)
    return host, host.to(device, copy=True)


def _entered(
    last: _Table | None, columns: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The same by kernels, which a graph repeats: it holds their arguments, not memory of ours."""
    if last is None:
        rows = torch.zeros(len(columns[PARAM]), len(columns), dtype=torch.int64, device=device)
    else:
        rows = last.rows.clone()
    for i in _changed(last, columns):
        torch._foreach_add_(list(rows[:, i].zero_().unbind()), columns[i])
    return rows.new_empty(0, device="cpu"), rows
