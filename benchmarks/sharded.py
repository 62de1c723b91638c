"""Steps of sharded tensors: against plain ones on one process, and on 1, 2 and 4 processes.

The processes share this machine's cores and talk over gloo, so that the times tell the cost of
sharding, not its gain. Bytes are counted, not estimated.
Run: ``python benchmarks/sharded.py [--shapes gpt2_small] [--rounds 20] [--out FOLDER]``.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from results_file import arguments, say, write
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nomadam import SGDSaI
from nomadam.experiments.cost.models import MODELS, in_memory
from nomadam.experiments.cost.sharding import STORAGES, bytes_held, gain_bytes
from nomadam.experiments.cost.timing import in_turn, quartiles
from nomadam.numerics.sharded import local
from nomadam.terminal import show_table

WORLDS = (1, 2, 4)
OPTIONS: dict[str, dict[str, Any]] = {"float32": {}, "int8": {"momentum_dtype": "int8"}}
STORED = {"float32": STORAGES[1], "int8": STORAGES[2]}


def sharded(shapes: str) -> list[nn.Parameter]:
    """Parameters of a model with their gradients, cut in rows over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for whole in in_memory(MODELS[shapes], torch.device("cpu")).parameters():
        param = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        param.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        found.append(param)
    return found


def milliseconds(optimizer: SGDSaI) -> float:
    """Of one step."""
    start = time.perf_counter()
    optimizer.step()
    return 1e3 * (time.perf_counter() - start)


def overhead(shapes: str, rounds: int) -> dict[str, Any]:
    """Sharded tensors on one process against plain ones: the quotient in each round."""
    plain = list(in_memory(MODELS[shapes], torch.device("cpu")).parameters())
    found = {}
    for name, options in OPTIONS.items():
        pair = {
            "plain": SGDSaI(plain, fused=True, **options),
            "sharded": SGDSaI(sharded(shapes), fused=True, **options),
        }
        for optimizer in pair.values():
            optimizer.step(), optimizer.step()
        times = in_turn({key: partial(milliseconds, made) for key, made in pair.items()}, rounds)
        found[name] = {
            "plain_ms": quartiles([each["plain"] for each in times]),
            "sharded_ms": quartiles([each["sharded"] for each in times]),
            "ratio": quartiles([each["sharded"] / each["plain"] for each in times]),
        }
    return found


def steps(shapes: str, rounds: int) -> dict[str, Any]:
    """What this process holds, receives and takes, for each way of storing momentum."""
    params, found = sharded(shapes), {}
    received: list[int] = []
    gather = dist.all_gather_into_tensor

    def counted(output: torch.Tensor, *rest: Any, **more: Any) -> Any:
        received.append(output.nbytes)
        return gather(output, *rest, **more)

    dist.all_gather_into_tensor = counted
    for name, options in OPTIONS.items():
        optimizer = SGDSaI(params, fused=True, **options)
        received.clear()
        first = milliseconds(optimizer)
        measured = sum(received)
        times = []
        for _ in range(rounds):
            dist.barrier()
            times.append(milliseconds(optimizer))
        assert sum(received) == measured  # nothing once all are measured
        state = [kept for each in optimizer.state.values() for kept in each.values()]
        held = sum(local(kept).nbytes for kept in state if kept.ndim)
        held += sum(local(p).nbytes + local(p.grad).nbytes for p in params)
        found[name] = {
            "first_ms": first,
            "step_ms": quartiles(times),
            "gain_bytes": measured,
            "held_bytes": held,
        }
    return found


def one_of_many(rank: int, world: int, store: str, shapes: str, rounds: int) -> None:
    """A process; the first one writes down what it found."""
    torch.set_num_threads(1)
    files = dist.FileStore(f"{store}/store", world)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=world)
    found = {"steps": steps(shapes, rounds)}
    if world == 1:
        found["overhead"] = overhead(shapes, rounds)
    if rank == 0:
        torch.save(found, f"{store}/found.pt")
    dist.destroy_process_group()


def measure(shapes: str, rounds: int) -> dict[str, Any]:
    """All numbers of processes, beside what the model of the cost says."""
    whole = in_memory(MODELS[shapes], torch.device("cpu"))
    blocks, rows, ratio = len(list(whole.parameters())), [], {}
    for world in WORLDS:
        say(f"{shapes}: {world} processes")
        with tempfile.TemporaryDirectory() as store:
            multiprocessing.spawn(one_of_many, (world, store, shapes, rounds), nprocs=world)
            found = torch.load(Path(store) / "found.pt", weights_only=True)
        ratio |= found.get("overhead", {})
        for name, row in found["steps"].items():
            predicted = {
                "predicted_gain_bytes": gain_bytes(blocks, world),
                "predicted_held_bytes": bytes_held(whole, STORED[name], world),
            }
            rows.append({"world": world, "momentum": name, **row, **predicted})
    return {"num_params": whole.numel, "num_tensors": blocks, "overhead": ratio, "rows": rows}


def main() -> None:
    """Prints what was found, and with ``--out`` writes it as JSON."""
    parser = arguments(__doc__, shapes=["gpt2_small"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    args.device = "cpu"  # gloo's
    content = {}
    for shapes in args.shapes:
        content[shapes] = measure(shapes, args.rounds)
        for name, row in content[shapes]["overhead"].items():
            print(f"{shapes}, {name}: sharded / plain {row['ratio']['median']:.3f}")
        heads = ["processes", "momentum", "step, ms", "held, bytes", "of the model", "for gains"]
        cells = [
            [
                str(row["world"]),
                row["momentum"],
                f"{row['step_ms']['median']:.2f}",
                f"{row['held_bytes']:,}",
                f"{row['predicted_held_bytes']:,}",
                f"{row['gain_bytes']:,}",
            ]
            for row in content[shapes]["rows"]
        ]
        show_table(heads, cells)
    write("sharded", args, {"rounds": args.rounds, "shapes": content})


if __name__ == "__main__":
    main()
