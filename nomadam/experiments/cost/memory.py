"""The memory of each optimizer: bytes of state, and what a step takes beside it."""

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nomadam.experiments.cost.bytes_held import (
    available_bytes,
    plain_tensors,
    release_memory,
    sessions_that_fit,
    state_bytes,
)
from nomadam.experiments.cost.contenders import Contender
from nomadam.experiments.cost.models import Tensors, in_memory
from nomadam.experiments.cost.timing import Tell, quiet, reason_of, silent
from nomadam.experiments.resources import memory_mb, peak_memory_mb, reset_peak_memory


class LivePeak(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make and that are alive at one time.

    Memory that an operator or a compiled kernel takes inside is not seen.

    Args:
        existing: tensors that were there before, and do not count.

    Attributes:
        peak: the most bytes so far.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        """Begins at zero."""
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage().data_ptr() for t in existing if t.numel()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operator and counts what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            pointer, size = storage.data_ptr(), storage.nbytes()
            if size and pointer not in self._seen:
                self._seen.add(pointer)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, pointer, size)
        return out

    def _free(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self.now -= size


def measure_memory(
    make: Callable[[], Tensors],
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Bytes a parameter of each contender, one after another.

    Args:
        make: one of `nomadam.experiments.cost.models.MODELS`.
        contenders: which.
        device: where to measure.
        tell: takes a line of progress.

    Returns:
        ``num_params``, ``num_tensors``, ``rows`` by name and ``skipped``: reason by name. A row
        has, in bytes a parameter: ``weights``, ``gradient``, ``state``; ``extra_live``, the most
        that a later step's operators hold beside it at one time (CPU; None elsewhere or where it
        can not be counted); ``extra``, the peak of the process (CUDA: of the allocator) over what
        it held before that step.
    """
    with torch.device("meta"):
        shapes = make()
    numel, rows, skipped = shapes.numel, {}, {}
    for each in contenders:
        release_memory(device)
        sessions, too_large = sessions_that_fit(numel, [each], available_bytes(device))
        skipped |= too_large
        if not sessions:
            continue
        try:
            rows[each.name] = _measure(each, make, device)
        except Exception as error:
            skipped[each.name] = reason_of(error)
        tell(f"{each.name}: {skipped.get(each.name, 'measured')}")
    count = len(list(shapes.parameters()))
    return {"num_params": numel, "num_tensors": count, "rows": rows, "skipped": skipped}


def _measure(contender: Contender, make: Callable[[], Tensors], device: torch.device) -> Any:
    module = in_memory(make, device, contender.weights)
    with quiet():
        optimizer = contender.make(module)
        optimizer.step()
        optimizer.step()
    size = contender.weights.itemsize
    return {
        "label": contender.label,
        "weights": size,
        "gradient": size,
        "state": state_bytes(optimizer) / module.numel,
        "extra": _per_param(extra_bytes(optimizer, device), module),
        "extra_live": _per_param(extra_live_bytes(optimizer, module, device), module),
    }


def _per_param(value: float | None, module: Tensors) -> float | None:
    return None if value is None else value / module.numel


def extra_bytes(optimizer: Optimizer, device: torch.device) -> float | None:
    """The peak of the process, or of the GPU's allocator, in a step over what was held before."""
    release_memory(device)
    before = memory_mb(device)
    reset_peak_memory(device)
    with quiet():
        optimizer.step()
    peak = peak_memory_mb(device)
    return None if before is None or peak is None else max(0.0, (peak - before) * 1e6)


def extra_live_bytes(optimizer: Optimizer, module: Tensors, device: torch.device) -> float | None:
    """What `LivePeak` sees of a step; None where a compiled step can not be watched."""
    if device.type != "cpu":
        return None
    tensors = [t for p in module.parameters() for t in (p, p.grad) if t is not None]
    gc.collect()
    try:
        with LivePeak([*tensors, *plain_tensors(optimizer.state)]) as memory, quiet():
            optimizer.step()
    except Exception:
        return None
    return float(memory.peak)
