"""Time of one optimizer step on the tensors of GPT-2 small, as ratios taken in one run.

Every round steps each optimizer once, in turn, so that a change of the machine's speed meets all of
them; what is printed is the median over the rounds of the time and of its ratio to torch's fused
AdamW. Run: ``python benchmarks/step_time.py [--layers 12] [--width 768] [--rounds 30]``.
"""

import argparse
import contextlib
import importlib
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import nomadam

REFERENCE = "torch AdamW fused"


def shapes(layers: int, width: int, vocabulary: int, context: int) -> list[tuple[int, ...]]:
    """Shapes of GPT-2's tensors with a tied head: 148 of them at 12 layers."""
    block = [
        *[(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


def contenders() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """What is timed, by name; the packages that are not installed are left out."""
    sgd = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-2}
    found = {
        REFERENCE: lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
        "torch AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-5, foreach=True),
        "torch SGD fused": lambda p: torch.optim.SGD(p, fused=True, **sgd),
        "torch SGD foreach": lambda p: torch.optim.SGD(p, foreach=True, **sgd),
        "SGDSaI for-loop": lambda p: nomadam.SGDSaI(p, lr=1e-6, foreach=False),
        "SGDSaI foreach": lambda p: nomadam.SGDSaI(p, lr=1e-6, foreach=True),
    }
    for package, name in (("sgd_sai", "SGD_sai"), ("pytorch_optimizer", "SGDSaI")):
        with contextlib.suppress(ImportError):
            rival = getattr(importlib.import_module(package), name)
            found[f"{package} {name}"] = lambda p, rival=rival: rival(p, lr=1e-6)
    return found


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds and ratios over the rounds, and the time of the first step."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    sizes = shapes(args.layers, args.width, args.vocabulary, args.context)
    grads = [torch.randn(size, generator=generator).to(device) for size in sizes]
    optimizers = {}
    for name, make in contenders().items():
        params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizers[name] = make(params)
    firsts = {name: timed_step(o, device) for name, o in optimizers.items()}
    rounds = []
    for i in range(args.rounds + 3):
        times = {name: timed_step(o, device) for name, o in optimizers.items()}
        if i >= 3:
            rounds.append(times)
        print(f"\rround {i + 1} of {args.rounds + 3}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {
        name: {
            "step_ms": statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(r[name] / r[REFERENCE] for r in rounds),
            "first_step_ms": firsts[name],
        }
        for name in optimizers
    }


def timed_step(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Milliseconds of one step; what a rival prints is thrown away."""
    with contextlib.redirect_stdout(io.StringIO()):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Prints a table, and with ``--out`` writes the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = measure(args)
    numel = sum(torch.Size(s).numel() for s in
                shapes(args.layers, args.width, args.vocabulary, args.context))  # fmt: skip
    print(
        f"{numel / 1e6:.1f} M parameters, float32, {args.device}, {torch.get_num_threads()} threads"
    )
    print(f"{'optimizer':28} {'step ms':>9} {'/ AdamW fused':>14} {'first step ms':>14}")
    for name, row in sorted(results.items(), key=lambda item: item[1]["ratio"]):
        print(f"{name:28} {row['step_ms']:9.1f} {row['ratio']:14.2f} {row['first_step_ms']:14.1f}")
    if args.out:
        record = {
            "what": "optimizer step time, float32",
            "num_params": numel,
            "rounds": args.rounds,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "nomadam": nomadam.__version__,
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
