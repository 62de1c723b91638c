"""Memory of each optimizer on GPT-2 small: bytes of state, and the peak of a step above it.

Each optimizer runs in a process of its own. ``state`` adds up every tensor in ``optimizer.state``;
``first step`` and ``later step`` are the peak of the process (on CUDA: the allocator) over what it
held before that step, so the first one contains the state that it makes.
Run: ``python benchmarks/memory.py [--layers 12] [--width 768] [--device cpu] [--out FILE]``.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import nomadam
from nomadam.experiments.language_model import GPT2Model
from nomadam.experiments.resources import (
    memory_mb,
    optimizer_state_bytes,
    peak_memory_mb,
    reset_peak_memory,
)
from nomadam.optimizers.baselines import BASELINES, build_optimizer


def measure(name: str, args: argparse.Namespace) -> dict[str, float | None]:
    """Bytes a parameter of one optimizer, in this process."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    heads = max(args.width // 64, 1)
    model = GPT2Model(layers=args.layers, heads=heads, width=args.width)
    module = model.build(vocab_size=args.vocabulary, context=args.context).to(device)
    row = BASELINES[name]
    optimizer = build_optimizer(name, module, lr=row.default_lr * 1e-3, weight_decay=0.0)
    switch = getattr(optimizer, "train", None)
    if callable(switch):
        switch()
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    numel = sum(p.numel() for p in module.parameters())
    peaks = []
    for _ in range(2):
        before = memory_mb(device)
        reset_peak_memory(device)
        optimizer.step()
        peak = peak_memory_mb(device)
        peaks.append(None if before is None or peak is None else (peak - before) * 1e6 / numel)
    return {
        "num_params": numel,
        "state": optimizer_state_bytes(optimizer) / numel,
        "documented": row.state_bytes(module) / numel,
        "first_step": peaks[0],
        "later_step": peaks[1],
    }


def main() -> None:
    """Prints a table in bytes a parameter, and with ``--out`` writes the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=sorted(BASELINES), help="one optimizer, as JSON")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    results = {}
    print("bytes a parameter, float32")
    print(f"{'optimizer':22} {'state':>7} {'documented':>11} {'first step':>11} {'later step':>11}")
    for name in BASELINES:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", name],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{name:22} {done.stderr.strip().splitlines()[-1]}")
            continue
        row = results[name] = json.loads(done.stdout.splitlines()[-1])
        cells = [row[key] for key in ("state", "documented", "first_step", "later_step")]
        cells = ["n/a" if cell is None else f"{cell:.3f}" for cell in cells]
        print(f"{name:22} {cells[0]:>7} {cells[1]:>11} {cells[2]:>11} {cells[3]:>11}")
    if args.out:
        record = {
            "what": "optimizer memory in bytes a parameter, float32",
            "device": args.device,
            "torch": torch.__version__,
            "nomadam": nomadam.__version__,
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
