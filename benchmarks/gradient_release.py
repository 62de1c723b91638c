"""Peak memory of a training step of GPT-2 small, with gradient release and without.

``weights`` and ``state`` are what lies there between the steps. The two columns after them are what
a step takes beside it at its peak, which is gradients and activations: as the tensors of the
operators, counted one by one (CPU), and as the peak of the process (on CUDA: of the allocator).
All in bytes a parameter, each line in a process of its own. Run:
``python benchmarks/gradient_release.py [--tokens 128] [--device cuda] [--out FOLDER]``.
"""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results_file import say, write

from nomadam.experiments.cost.bytes_held import plain_tensors, release_memory
from nomadam.experiments.cost.memory import LivePeak
from nomadam.experiments.language_model import GPT2Model
from nomadam.experiments.resources import (
    memory_mb,
    optimizer_state_bytes,
    peak_memory_mb,
    reset_peak_memory,
    synchronize,
)
from nomadam.optimizers.gradient_release import release_gradients
from nomadam.optimizers.sgd_sai import SGDSaI
from nomadam.profile_command import device_of
from nomadam.terminal import show_table

SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16, int8 momentum": (torch.bfloat16, {"momentum_dtype": "int8"}),
}


def measure(setting: str, released: bool, args: argparse.Namespace) -> dict[str, float | None]:
    """Bytes a parameter and milliseconds a step of one setting, in this process."""
    device = device_of(args.device)
    torch.manual_seed(0)
    model = GPT2Model(layers=args.layers, heads=max(args.width // 64, 1), width=args.width)
    dtype, options = SETTINGS[setting]
    module = model.build(vocab_size=args.vocabulary, context=args.tokens).to(device, dtype)
    optimizer = SGDSaI(module.named_parameters(), lr=1e-4, **options)
    if released:
        release_gradients(module, optimizer)
    batch = torch.randint(args.vocabulary, (1, args.tokens + 1), device=device)

    def step() -> float:
        start = time.perf_counter()
        model.loss(module, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    step()
    times = [step() for _ in range(args.steps)]
    release_memory(device)
    before = memory_mb(device)
    reset_peak_memory(device)
    step()
    peak = peak_memory_mb(device)
    params = list(module.parameters())
    numel = sum(p.numel() for p in params)
    gc.collect()
    there = [batch, *module.buffers(), *params, *plain_tensors(optimizer.state)]
    live = LivePeak(there) if device.type == "cpu" else None
    with live or contextlib.nullcontext():
        step()
    return {
        "num_params": numel,
        "largest_block": max(p.nbytes for p in params) / numel,
        "weights": sum(p.nbytes for p in params) / numel,
        "state": optimizer_state_bytes(optimizer) / numel,
        "extra_live": None if live is None else live.peak / numel,
        "extra": None if before is None or peak is None else (peak - before) * 1e6 / numel,
        "step_ms": statistics.median(times),
    }


def main() -> None:
    """Prints a table, and with ``--out`` writes the same as JSON."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--device", default="auto", help="cpu or cuda; default the best there is")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=128, help="in the one row of the batch")
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--out", type=Path, help="folder to write the JSON to; default none")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # in the processes
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only[0], args.only[1] == "released", args)))
        return
    rows, lines = {}, []
    for setting in SETTINGS:
        for kind in ("ordinary", "released"):
            command = [sys.executable, __file__, *sys.argv[1:], "--only", setting, kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = rows[f"{setting}, {kind}"] = json.loads(done.stdout.splitlines()[-1])
            say(f"{setting}, {kind}: measured")
            names = ("weights", "state", "extra_live", "extra")
            cells = ["-" if row[name] is None else f"{row[name]:.2f}" for name in names]
            lines.append([f"{setting}, {kind}", *cells, f"{row['step_ms']:.0f}"])
    heads = ["bytes a parameter", "weights", "state", "peak beside them,\ntensors"]
    show_table([*heads, "peak beside them,\nprocess", "forward, backward\nand step, ms"], lines)
    shape = {name: getattr(args, name) for name in ("layers", "width", "vocabulary", "tokens")}
    write("gradient_release", args, {"shape": shape, "rows": rows})


if __name__ == "__main__":
    main()
