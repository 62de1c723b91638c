"""One training by several processes, as torchrun and accelerate launch start them.

Each has its part of the rows of every batch. Gradients and losses are summed over the processes,
which then take the same steps, and what only one can do, such as writing, is done by the first.
"""

import datetime
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# While the first prepares data the others wait; that one has died is seen without a clock.
PATIENCE = datetime.timedelta(hours=12)
# To meet: machines of a cluster do not start together.
TO_MEET = datetime.timedelta(minutes=10)
# The variable that sets apart the meetings of processes that one launcher has started.
GROUP = "NOMADAM_GROUP"
BUCKET_BYTES = 2**25


def count() -> int:
    """How many processes train together: 1 without a launcher, which sets ``WORLD_SIZE``.

    Example:
        >>> count()
        1
    """
    return _number("WORLD_SIZE", "1", range(1, 2**31))


def index() -> int:
    """The number of this process among them, from 0.

    Raises:
        ValueError: for ``RANK`` or ``WORLD_SIZE`` that are no such numbers, as is ``RANK`` where it
            is not set and there are several processes.
    """
    return _number("RANK", "", range(count())) if count() > 1 else 0


def _number(name: str, default: str, allowed: range) -> int:
    text = os.environ.get(name, "").strip() or default
    if not text.isdecimal() or int(text) not in allowed:
        raise ValueError(
            f"{name} = {text!r}: must be a whole number from {allowed[0]} to {allowed[-1]}, as "
            "torchrun and accelerate launch set it; unset WORLD_SIZE to train by one process"
        )
    return int(text)


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return index() == 0


def restarts() -> int:
    """How often torchrun has started these processes again after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def refuse_several(what: str) -> None:
    """Raise a ValueError under a launcher of several processes.

    Args:
        what: what they can not do together.

    Example:
        >>> refuse_several("nomadam tune")
    """
    if count() > 1:
        raise ValueError(
            f"{what} is the work of one process, and there are WORLD_SIZE = {count()} of them; "
            "start it without torchrun or accelerate launch"
        )


def meeting_place(name: str) -> Any:
    """A store that all processes of a launcher write to and read, under a name of its own.

    Args:
        name: sets it apart from others of the same processes.

    Raises:
        RuntimeError: not all of them have come in time.
    """
    import torch.distributed as dist

    try:
        store = next(dist.rendezvous("env://", timeout=TO_MEET))[0]
    except dist.DistError as error:
        raise RuntimeError(
            f"process {index()} waited {TO_MEET} for all {count()} processes to come: {error}"
        ) from error
    # One launcher can keep what was written before it has started the processes again.
    return dist.PrefixStore(f"{name} {restarts()}", store)


def join(device: "torch.device") -> None:
    """Meet the other processes, where there are any and this one has not met them yet.

    Args:
        device: that they train on.
    """
    if count() == 1:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meeting_place(os.environ.get(GROUP, "training")),
            rank=index(),
            world_size=count(),
            timeout=PATIENCE,
        )


def leave() -> None:
    """Part from the other processes, all at once, before this one ends."""
    if count() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, those of the first one first.

    Example:
        >>> gathered([3])
        [3]
    """
    if count() == 1:
        return items
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    dist.all_gather_object(found, items)
    return [item for part in found for item in part]


def summed(value: float, device: "torch.device") -> float:
    """The sum of a number over the processes, which then decide alike."""
    if count() == 1:
        return value
    import torch
    import torch.distributed as dist

    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def own_seed(seed: int, step: int = 0) -> int:
    """A seed for what this process alone draws from a step on; of the first one the seed itself.

    Example:
        >>> own_seed(3)
        3
    """
    if is_first():
        return seed
    import numpy as np

    return int(np.random.SeedSequence([seed, index(), step]).generate_state(1)[0])


def own_rows(batch: Any) -> tuple[Any, float]:
    """The rows of a batch that are this process's, and the part of all rows that they are.

    Example:
        >>> import torch
        >>> rows, share = own_rows(torch.arange(4))
        >>> rows.tolist(), share
        ([0, 1, 2, 3], 1.0)
    """
    rows = batch[index() :: count()]
    return rows, len(rows) / len(batch)


def begin_alike(module: "torch.nn.Module") -> None:
    """Give every process the parameters and buffers of the first one."""
    if count() > 1:
        import torch.distributed as dist

        for tensor in (*module.parameters(), *module.buffers()):
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, src=0)
            tensor.detach().copy_(sent)


def sum_gradients(parameters: Iterable["torch.nn.Parameter"]) -> None:
    """Replace each gradient by its sum over the processes.

    A parameter without a gradient in some of them counts zero there; without one in all it has none
    afterwards. What is sent is laid out by the order of the parameters alone, so that a training
    that goes on adds in the order of one that was never stopped.

    Args:
        parameters: the same in every process.
    """
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    trained = [each for each in parameters if each.requires_grad]
    there = torch.tensor([each.grad is not None for each in trained], device=trained[0].device)
    there = there.to(torch.uint8)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    gradients = []
    for parameter, known in zip(trained, there.tolist(), strict=True):
        if known:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))


def _buckets(tensors: list["torch.Tensor"]) -> Iterator[list["torch.Tensor"]]:
    """Neighbours of one dtype, up to `BUCKET_BYTES` together or one larger tensor."""
    bucket, size = [], 0
    for tensor in tensors:
        full = size + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
