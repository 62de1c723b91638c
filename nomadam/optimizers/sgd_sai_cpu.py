"""The update of SGD-SaI on the CPU in one pass over memory: a compiled loop over all tensors."""

import ctypes
import functools
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nomadam.numerics.blockwise import num_scales
from nomadam.numerics.cpp_library import NoCompilerError, load_cpp, torch_fork
from nomadam.optimizers.sgd_sai_update import Options, Row

_SOURCE = Path(__file__).with_suffix(".cpp")
# Laid out as `Row` and `Options` there.
_ROW = struct.Struct("@5Pd2Q2q2I4B4x")
_OPTIONS = struct.Struct("@3dq")
_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4}
_PLAIN = {Tensor, torch.nn.Parameter}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Dtypes of what `cpu_fits` is asked about, in its order.
_MIXES = {
    (param, grad, *momentum, compensation)
    for param in _FLOATS
    for grad in _FLOATS
    for momentum in [(None, None), *((m, None) for m in _FLOATS), (torch.int8, torch.float32)]
    for compensation in ([None, torch.bfloat16] if param == torch.bfloat16 else [None])
}


class Kernel(NamedTuple):
    """The compiled loop, and what starts torch's own threads on it (None: one thread).

    Attributes:
        step: ``(rows, num_rows, options, fork, num_threads)``, C types all of them.
        fork: the address of OpenMP's entry point in the library that torch has loaded.
    """

    step: Any
    fork: int | None


def cpu_kernel(warn: bool = True) -> Kernel | None:
    """The kernel, compiled or read from the cache when first asked for.

    Args:
        warn: warn, once a process, where it cannot be had.

    Returns:
        None without a working C++ compiler.
    """
    found = _kernel_or_reason()
    if isinstance(found, Kernel):
        return found
    if warn:
        _warn_once(found)
    return None


@functools.cache
def _kernel_or_reason() -> Kernel | str:
    try:
        step = load_cpp(_SOURCE).sgd_sai_step
    except NoCompilerError as error:
        return str(error)
    step.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p] + [ctypes.c_void_p] * 2
    step.restype = None
    return Kernel(step, torch_fork())


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        "SGDSaI's one-pass kernel for the CPU needs a C++ compiler, and steps take the slower "
        f"foreach path: install g++ or clang++ ({reason})",
        stacklevel=2,
    )


def cpu_fits(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernel can take a block: plain contiguous tensors, of dtypes that it knows.

    Args:
        tensors: parameter, gradient, momentum buffer, its scales and the compensation.

    Examples:
        >>> a = torch.zeros(3, 2)
        >>> cpu_fits([a, a, a.bfloat16(), None, None]), cpu_fits([a.t(), a.t(), None, None, None])
        (True, False)
    """
    mix = []
    for tensor in tensors:
        if tensor is None:
            mix.append(None)
        elif type(tensor) in _PLAIN and tensor.is_cpu and tensor.is_contiguous():
            mix.append(tensor.dtype)
        else:
            return False
    param, grad, momentum_buffer, scale, compensation = tensors
    assert param is not None and grad is not None
    shape = param.shape
    return (
        tuple(mix) in _MIXES
        and grad.shape == shape
        and not grad.is_neg()
        and (momentum_buffer is None or momentum_buffer.shape == shape)
        and (scale is None or scale.numel() == num_scales(param.numel()))
        and (compensation is None or compensation.shape == shape)
    )


def update_cpu(rows: Sequence[Row], options: Options) -> None:
    """The step of `update_forloop`, with the same arguments, for blocks that `cpu_fits` admits.

    One call works on all blocks at once, with as many threads as torch uses, and without the
    interpreter's lock. In float32; ``cpu_kernel()`` must not be None.
    """
    lr, momentum, weight_decay, nesterov, maximize, keep, grad_scale, sign = options
    assert not sign
    if keep is not None and not keep:
        return
    kernel = cpu_kernel()
    assert kernel is not None
    rate = float(lr)
    packed = bytearray()
    for param, grad, buffer, gain, scale, compensation, drawn, rounds in rows:
        seed, step, block, first = (0, 0, 0, 0) if drawn is None else drawn
        assert drawn is not None or scale is None
        packed += _ROW.pack(
            param.data_ptr(),
            grad.data_ptr(),
            0 if buffer is None else buffer.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if compensation is None else compensation.data_ptr(),
            -rate * float(gain),
            seed,
            first,
            param.numel(),
            0,
            int(step),
            block,
            _KINDS[param.dtype],
            _KINDS[grad.dtype],
            0 if buffer is None else _KINDS[buffer.dtype],
            rounds and drawn is not None,
        )
    factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    numbers = _OPTIONS.pack(
        1 - momentum, 1 - rate * weight_decay, -factor if maximize else factor, nesterov
    )
    table = (ctypes.c_char * len(packed)).from_buffer(packed)
    kernel.step(table, len(rows), numbers, kernel.fork, torch.get_num_threads())
    increment_version([t for row in rows for t in _written(row) if t is not None])


def _written(row: Row) -> tuple[Tensor | None, ...]:
    return row.param, row.momentum_buffer, row.momentum_scale, row.compensation
