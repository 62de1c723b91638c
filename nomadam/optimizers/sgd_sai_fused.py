"""The update of SGD-SaI in one pass over memory: which kernel takes which blocks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import _default_to_fused_or_foreach

from nomadam.numerics.sharded import local
from nomadam.optimizers.sgd_sai_blocks import Block
from nomadam.optimizers.sgd_sai_cpu import cpu_fits, cpu_kernel, update_cpu
from nomadam.optimizers.sgd_sai_triton import triton_available, triton_fits, update_triton
from nomadam.optimizers.sgd_sai_update import Options, Row, update_foreach, update_forloop

# On a CPU one pass pays from here on: below, a step is mostly Python, whichever path it takes. The
# other paths make temporaries of what is kept in low precision, and are many times slower there.
SMALLEST_ON_CPU = 10_000_000
SMALLEST_LOW_PRECISION_ON_CPU = 100_000


def one_pass_pays(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the one-pass kernels are the best choice for these groups of parameters.

    On CUDA always, where Triton is installed. On the CPU, where a C++ compiler is found (else with
    a warning), from 10 million elements on, or from 100 thousand where anything is kept in low
    precision. Not where every group says which path it takes.
    """
    if all(group["fused"] is not None or group["foreach"] is not None for group in groups):
        return False
    params = [param for group in groups for param in group["params"]]
    kinds = {param.device.type for param in params}
    if kinds == {"cuda"}:
        return triton_available()
    low = any(group["momentum_dtype"] in (torch.bfloat16, "int8") for group in groups)
    low = low or any(param.dtype in (torch.bfloat16, torch.float16) for param in params)
    smallest = SMALLEST_LOW_PRECISION_ON_CPU if low else SMALLEST_ON_CPU
    large = sum(param.numel() for param in params) >= smallest
    return kinds == {"cpu"} and large and cpu_kernel() is not None


def check_fused(group: Mapping[str, Any]) -> None:
    """Raises ValueError for ``fused=True`` where no kernel can be had."""
    for param in group["params"] if group["fused"] else []:
        kind = param.device.type
        if kind not in ("cpu", "cuda", "meta"):
            raise ValueError(
                f"fused=True needs parameters on CPU or CUDA, got {kind}: use fused=None"
            )
        if kind == "cuda" and not triton_available():
            raise ValueError("fused=True needs Triton on CUDA: pip install triton, or fused=None")


def path_for(blocks: Sequence[Block], one_pass: bool, compiling: bool) -> Callable[..., None]:
    """The path that the blocks of a group take, all the same one."""
    group = blocks[0].slot.group
    fused, foreach, differentiable = group["fused"], group["foreach"], group["differentiable"]
    if fused is None:
        fused = one_pass and foreach is None
    if fused and not compiling and not differentiable and group["direction"] != "sign":
        return update_fused
    if foreach is None:
        params = [local(block.slot.param) for block in blocks]
        _, foreach = _default_to_fused_or_foreach(params, differentiable)
    return update_foreach if foreach else update_forloop


def update_fused(rows: Iterable[Row], options: Options, limit: int | None = None) -> None:
    """The step of `update_forloop`, with the same arguments, in one pass over memory.

    One kernel on each device takes the blocks whose tensors are contiguous and of a dtype that it
    knows; `update_foreach` takes the others, and all on a device that has no kernel.
    """
    work: dict[Any, list[Row]] = {}
    for row in rows:
        work.setdefault(_kernel_for(row), []).append(row)
    for (kernel, device), taken in work.items():
        if kernel is None:
            update_foreach(taken, options, limit)
        else:
            kernel(taken, options.on(device))


def _kernel_for(row: Row) -> tuple[Any, Any]:
    """The kernel that takes a block, if any, and the device that is a call of its own."""
    param = row.param
    tensors = (param, row.grad, row.momentum_buffer, row.momentum_scale, row.compensation)
    if param.is_cpu and cpu_fits(tensors) and cpu_kernel() is not None:
        return update_cpu, param.device
    if param.is_cuda and triton_available() and triton_fits(tensors):
        return update_triton, param.device
    return None, None
