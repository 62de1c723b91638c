"""The picture of docs/low_precision.md: what becomes of small updates in bfloat16.

Run: ``python benchmarks/rounding_picture.py``. A thousand weights start at 1 and descend a constant
gradient by 1e-3 a step, a quarter of the distance between neighbours of bfloat16 below 1; drawn is
their mean, and for stochastic rounding the range that holds 80 % of them.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from nomadam import SGDSaI
from nomadam.reports.drawing import COLORS, LINES, legend_above, save

STEPS, RATE = 400, 1e-3
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "rounding.png"
ARMS = (
    ("float32", torch.float32, "nearest"),
    ("bfloat16, nearest", torch.bfloat16, "nearest"),
    ("bfloat16, stochastic", torch.bfloat16, "stochastic"),
    ("bfloat16, kahan", torch.bfloat16, "kahan"),
)


def descend(dtype: torch.dtype, rounding: str) -> torch.Tensor:
    """The weights after each step, [steps + 1, weights]."""
    weights = torch.ones(1000, dtype=dtype, requires_grad=True)
    optimizer = SGDSaI([weights], lr=RATE, gain=1.0, weight_decay=0.0, rounding=rounding)
    weights.grad = torch.ones_like(weights)
    seen = [weights.detach().float().clone()]
    for _ in range(STEPS):
        optimizer.step()
        seen.append(weights.detach().float().clone())
    return torch.stack(seen)


def draw(figure: Any) -> None:
    """A line for each rounding."""
    axes = figure.subplots()
    for i, (label, dtype, rounding) in enumerate(ARMS):
        seen = descend(dtype, rounding)
        steps = range(STEPS + 1)
        mean = seen.mean(1).tolist()
        axes.plot(steps, mean, color=COLORS[i], linestyle=LINES[i], label=label)
        if rounding == "stochastic":
            low, high = seen.quantile(torch.tensor([0.1, 0.9]), dim=1).tolist()
            axes.fill_between(steps, low, high, color=COLORS[i], alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("weight")
    legend_above(figure, *axes.get_legend_handles_labels())


def main() -> None:
    """Writes the picture."""
    words = dict.fromkeys(("section", "title", "caption", "alt"), "")
    with tempfile.TemporaryDirectory() as place:
        picture = save(draw, Path(place), "rounding", height=3.6, **words)
        shutil.copy(picture.png, PICTURE)


if __name__ == "__main__":
    main()
