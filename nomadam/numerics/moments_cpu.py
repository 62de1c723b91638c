"""The moments of tensors on the CPU in one read of memory: a compiled loop over all tensors."""

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nomadam.numerics.cpp_library import NoCompilerError, load_cpp, torch_fork

_SOURCE = Path(__file__).with_name("moments.cpp")
# Laid out as `Row` and `Found` there; elements of a chunk.
_ROW = struct.Struct("@P3q")
_FOUND = struct.Struct("@q3d")
_CHUNK = 2**15
_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
PLAIN = {Tensor, torch.nn.Parameter}


def cpu_measures(tensor: Tensor) -> bool:
    """Whether the loop can take a tensor: plain, dense in any order, of a dtype that it knows.

    Examples:
        >>> a = torch.zeros(3, 2)
        >>> cpu_measures(a.t()), cpu_measures(a[:, 0]), cpu_measures(a.double())
        (True, False, False)
    """
    if type(tensor) not in PLAIN or not tensor.is_cpu or tensor.dtype not in _KINDS:
        return False
    dense = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != dense:
                return False
            dense *= size
    return True


def raw_moments_cpu(tensors: Sequence[Tensor]) -> list[tuple[float, float, float]] | None:
    """Largest magnitude, mean and sum of squared deviations from it, of tensors none empty.

    In float64, with as many threads as torch uses, whose number does not change the result; without
    the interpreter's lock. Compiled or read from the cache when first called.

    Args:
        tensors: of which each is one that `cpu_measures`.

    Returns:
        one triple for each tensor; None without a working C++ compiler.
    """
    measure = _kernel()
    if measure is None:
        return None
    rows = bytearray()
    num_chunks = 0
    for tensor in tensors:
        numel = tensor.numel()
        rows += _ROW.pack(tensor.data_ptr(), numel, _KINDS[tensor.dtype], num_chunks)
        num_chunks += -(-numel // _CHUNK)
    found = ctypes.create_string_buffer(_FOUND.size * len(tensors))
    chunks = ctypes.create_string_buffer(_FOUND.size * num_chunks)
    threads = torch.get_num_threads()
    measure(bytes(rows), len(tensors), found, chunks, num_chunks, torch_fork(), threads)
    return [
        (largest, mean, deviations)
        for _, largest, mean, deviations in _FOUND.iter_unpack(found.raw)
    ]


@functools.cache
def _kernel() -> Any:
    try:
        measure = load_cpp(_SOURCE).measure
    except NoCompilerError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    measure.argtypes = [ctypes.c_char_p, number, pointer, pointer, number, pointer, number]
    measure.restype = None
    return measure
