"""How many bytes there are and how many are held: what fits, what an optimizer keeps."""

import ctypes
import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nomadam.experiments.cost.contenders import Contender


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return free
    return min(free, max(limit - used, 0))


def predicted_bytes(numel: int, contenders: Sequence[Contender]) -> int:
    """Bytes that measuring some contenders in one process takes.

    Weights and gradients once for each dtype, everyone's state, and as a margin for what a step
    takes in between as much as the largest weights and half a GiB.

    Args:
        numel: number of parameters.
        contenders: that are measured together.
    """
    sizes = {each.weights.itemsize for each in contenders}
    states = sum(each.state_bytes for each in contenders)
    return int(numel * (2 * sum(sizes) + states + max(sizes))) + 2**29


def sessions_that_fit(
    numel: int, contenders: Sequence[Contender], available: int | None
) -> tuple[list[list[Contender]], dict[str, str]]:
    """Splits the contenders into as few sessions as memory allows.

    Args:
        numel: number of parameters.
        contenders: the reference first, which begins every session that has room for it.
        available: bytes; None counts as no limit.

    Returns:
        The sessions, those without the reference last, and the reason by name for each contender
        that does not even fit alone.
    """
    room = float("inf") if available is None else 0.9 * available

    def fit(group: list[Contender]) -> bool:
        return predicted_bytes(numel, group) <= room

    def pack(base: list[Contender], others: Sequence[Contender]) -> list[list[Contender]]:
        packed: list[list[Contender]] = []
        for each in others:
            if packed and fit([*packed[-1], each]):
                packed[-1].append(each)
            else:
                packed.append([*base, each])
        return packed

    reference, *others = contenders
    beside = [each for each in others if fit([reference, each])]
    alone = [each for each in others if each not in beside and fit([each])]
    sessions = pack([reference], beside) + pack([], alone)
    if fit([reference]) and not beside:
        sessions.insert(0, [reference])
    held = {each.name for session in sessions for each in session}
    reason = "needs {:.1f} GiB, {:.1f} GiB can be taken"
    skipped = {
        each.name: reason.format(predicted_bytes(numel, [each]) / 2**30, room / 2**30)
        for each in contenders
        if each.name not in held
    }
    return sessions, skipped


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors of an optimizer's state, shared ones once, quantized ones as stored.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(10))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> state_bytes(optimizer)
        40
    """
    found = {id(tensor): tensor for tensor in plain_tensors(optimizer.state)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, a tensor subclass as the tensors that it wraps."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()  # type: ignore[operator]
            for name in names:
                yield from plain_tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from plain_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from plain_tensors(item)


def release_memory(device: torch.device) -> None:
    """Gives freed memory back to the device or the system, so that the next to ask starts anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(trim := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what it freed
        trim.malloc_trim(0)
