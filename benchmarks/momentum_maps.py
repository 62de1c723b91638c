"""Which 8-bit map keeps the loss: momentum stored in one after every step of a short training.

Momentum is kept in float32 and, after each step, replaced by what a map would have given back:
that is a training whose momentum lies in that map. For each map: the relative error of one round
trip on the momentum of the GPT-2 demonstration; the validation loss of the ViT demonstration over
five seeds against float32; and how much is left of a momentum whose gradient has ended, after
200 steps at a coefficient of 0.9 beside an element that keeps the scale up (it should be nothing).

Run: ``python benchmarks/momentum_maps.py [--seeds 5] [--steps 600] [--out FILE]``. Of torchao,
where it is installed, its table of values is measured with its own rounding.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nomadam.experiments import gpt2_pretraining, vit_classification
from nomadam.experiments.configuration import Run
from nomadam.numerics.blockwise import dequantize, quantize
from nomadam.numerics.rounding import Draw, low_half, random_bits
from nomadam.optimizers.baselines import build_optimizer

SMALLEST = 4096
Map = Callable[[Tensor, Tensor], Tensor]  # values, random numbers in (0, 1) -> values


def square_law(values: Tensor, uniform: Tensor) -> Tensor:
    """The map of the library: codes of a square law, 128 elements a scale, chosen at random."""
    half = (uniform * 65536).to(torch.int32).clamp_(max=65535)
    return dequantize(*quantize(values, half))


def square_law_nearest(values: Tensor, _: Tensor) -> Tensor:
    """The same codes, the nearer one."""
    return dequantize(*quantize(values))


def linear(values: Tensor, uniform: Tensor) -> Tensor:
    """Evenly spaced codes, 128 elements a scale, chosen at random."""
    return in_blocks(values, 128, lambda x: (127 * x + uniform.view_as(x)).floor() / 127)


def linear_nearest(values: Tensor, _: Tensor) -> Tensor:
    """Evenly spaced codes, 128 elements a scale, the nearer one."""
    return in_blocks(values, 128, lambda x: (127 * x).round() / 127)


def dynamic_nearest(values: Tensor, _: Tensor) -> Tensor:
    """The table of torchao with its rounding, 256 elements a scale as it has them."""
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    table = dynamic_table()
    return in_blocks(values, 256, lambda x: table[quantize_8bit_with_qmap(x, table).long()])


def dynamic(values: Tensor, uniform: Tensor) -> Tensor:
    """The same table, 256 elements a scale, chosen at random between neighbours."""
    table = dynamic_table()

    def rounded(x: Tensor) -> Tensor:
        low = (torch.bucketize(x, table, right=True) - 1).clamp_(0, len(table) - 2)
        share = (x - table[low]) / (table[low + 1] - table[low])
        return table[low + (share > uniform.view_as(x))]

    return in_blocks(values, 256, rounded)


def dynamic_table() -> Tensor:
    """The values of torchao between -1 and 1, many of them near 0."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed=True))


def in_blocks(values: Tensor, size: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Divides each block by its largest magnitude, rounds, and multiplies again."""
    blocks = values.reshape(-1, size)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (rounded(blocks / scale) * scale).view(values.shape)


MAPS: dict[str, Map] = {
    "square law, stochastic": square_law,
    "square law, nearest": square_law_nearest,
    "linear, stochastic": linear,
    "linear, nearest": linear_nearest,
    "dynamic (torchao), stochastic": dynamic,
    "dynamic (torchao), nearest": dynamic_nearest,
}


def train(run: Run, seed: int, kept_in: Map | None) -> tuple[float, torch.optim.Optimizer]:
    """The validation loss at the end, and the optimizer with its momentum."""
    dataset = run.data.load()
    torch.manual_seed(seed)
    module = run.model.build(**run.data.shape(dataset))
    choice = run.optimizer
    optimizer = build_optimizer(
        choice.name, module, lr=choice.lr, weight_decay=choice.weight_decay, fused=False
    )

    def store(*_: object) -> None:
        for block, state in enumerate(optimizer.state.values()):
            m = state["momentum_buffer"]
            if kept_in is not None and m.numel() >= SMALLEST and m.numel() % 256 == 0:
                bits = low_half(random_bits(Draw(seed, store.step, block), m.shape, m.device))
                m.copy_(kept_in(m, (bits + 0.5) / 65536))
        store.step += 1

    store.step = 0
    optimizer.register_step_post_hook(store)
    for step in range(1, run.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = choice.lr * run.schedule.factor(step, run.steps)
        batch = run.data.train_batch(
            dataset, seed=seed, step=step, micro=0, batch_size=run.batch_size
        )
        optimizer.zero_grad()
        run.model.loss(module, batch).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    module.eval()
    batches = run.data.validation_batches(
        dataset, batch_size=run.batch_size, max_batches=run.evaluation_batches
    )
    with torch.no_grad():
        losses = [(run.model.loss(module, batch).item(), len(batch)) for batch in batches]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses), optimizer


def left_of_an_ended_gradient(kept_in: Map) -> float:
    """Mean magnitude after 200 steps of momenta that began at 1 to 3 % of the scale."""
    m = torch.linspace(0.01, 0.03, 256).repeat(64, 1)
    for step in range(200):
        m *= 0.9
        m[:, ::128] = 1.0
        uniform = (low_half(random_bits(Draw(0, step, 0), m.shape, m.device)) + 0.5) / 65536
        m = kept_in(m, uniform)
    m[:, ::128] = 0.0
    return m.abs().mean().item()


def measure(seeds: int, steps: int) -> dict[str, dict[str, float | None]]:
    """A row for each map."""
    from dataclasses import replace

    gpt = replace(gpt2_pretraining.demo("sgd_sai"), steps=50)
    _, optimizer = train(gpt, 0, None)
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    momenta = [m for m in momenta if m.numel() >= SMALLEST and m.numel() % 256 == 0]
    vit = replace(vit_classification.demo("sgd_sai"), steps=steps)
    exact = [train(vit, seed, None)[0] for seed in range(seeds)]
    rows: dict[str, dict[str, float | None]] = {}
    for name, kept_in in MAPS.items():
        try:
            uniform = [torch.rand_like(m) for m in momenta]
            back = [kept_in(m, u) for m, u in zip(momenta, uniform, strict=True)]
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        wrong = sum(((a - b) ** 2).sum().item() for a, b in zip(back, momenta, strict=True))
        all_of_it = sum((m**2).sum().item() for m in momenta)
        losses = [train(vit, seed, kept_in)[0] for seed in range(seeds)]
        gaps = [100 * (a / b - 1) for a, b in zip(losses, exact, strict=True)]
        rows[name] = {
            "relative_error": (wrong / all_of_it) ** 0.5,
            "loss_change_percent": statistics.mean(gaps),
            "loss_change_sd": statistics.stdev(gaps) if seeds > 1 else None,
            "left_after_200_steps": left_of_an_ended_gradient(kept_in),
        }
        print(name, rows[name], flush=True)
    return rows


def main() -> None:
    """Prints a row for each map, and with ``--out`` writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args.seeds, args.steps)
    if args.out:
        record = {
            "what": "8-bit maps for momentum",
            "device": "cpu",
            "dtype": "float32",
            "seeds": args.seeds,
            "vit_steps": args.steps,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "command": f"python benchmarks/momentum_maps.py --seeds {args.seeds} "
            f"--steps {args.steps}",
            "results": rows,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
