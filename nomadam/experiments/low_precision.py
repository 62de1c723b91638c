"""What low precision costs in quality: the demonstrations with less of it, paired by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from nomadam.experiments import gpt2_pretraining, vit_classification
from nomadam.experiments.configuration import Run, override

# The loss of the ViT, with 599 images to validate on, takes more seeds to tell half a per cent.
GPT2_SEEDS, VIT_SEEDS = 5, 20

# Half of the demonstration's. At its own rate the training is chaotic: whatever the change, the
# final loss moves by a per cent or more.
VIT_LEARNING_RATE = 5e-3

# What differs from the demonstration in float32, which comes first and is the reference. Int8
# momentum is always rounded stochastically: `rounding` is about the parameters there.
ARMS = (
    {},
    {"optimizer.arguments.momentum_dtype": "bfloat16"},
    {"optimizer.arguments.momentum_dtype": "int8"},
    *(
        {
            "precision": "bf16",
            "optimizer.arguments.momentum_dtype": "int8",
            "optimizer.arguments.rounding": rounding,
        }
        for rounding in ("stochastic", "kahan", "nearest")
    ),
)


def gpt2_demo() -> list[Run]:
    """The GPT-2 demonstration with SGD-SaI at six precisions, with five seeds each.

    Example:
        >>> len(gpt2_demo()), gpt2_demo()[0].optimizer == gpt2_pretraining.demo("sgd_sai").optimizer
        (30, True)
    """
    base = gpt2_pretraining.demo("sgd_sai")
    return _paired(replace(base, name="low_precision.gpt2_demo"), ARMS, GPT2_SEEDS)


def vit_demo() -> list[Run]:
    """The ViT demonstration with SGD-SaI at four precisions and half its rate, with 20 seeds each.

    Example:
        >>> len(vit_demo()), {run.precision for run in vit_demo()} == {"fp32", "bf16"}
        (80, True)
    """
    base = override(vit_classification.demo("sgd_sai"), {"optimizer.lr": VIT_LEARNING_RATE})
    return _paired(replace(base, name="low_precision.vit_demo"), ARMS[:4], VIT_SEEDS)


def _paired(base: Run, arms: Sequence[Mapping[str, str]], num_seeds: int) -> list[Run]:
    """Every arm at every seed; all arms of a seed come together, so that pairs end together."""
    return [
        replace(override(base, changes), seed=seed) for seed in range(num_seeds) for changes in arms
    ]
