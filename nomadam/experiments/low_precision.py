"""What low precision costs in quality: the demonstrations with less of it, paired by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from nomadam.experiments import gpt2_pretraining, vit_classification
from nomadam.experiments.configuration import Run, override

# So many that the intervals can tell half a per cent of the loss; the ViT has only 599 images to
# validate on.
GPT2_SEEDS, VIT_SEEDS, ROUNDING_SEEDS = 12, 20, 5

# Half of the demonstration's. At its own rate the training is chaotic: whatever the change, the
# final loss moves by a per cent or more.
VIT_LEARNING_RATE = 5e-3

# Int8 momentum is always rounded stochastically: `rounding` is about the parameters there.
PURE = {"precision": "bf16", "optimizer.arguments.momentum_dtype": "int8"}
ROUNDINGS = tuple(
    {**PURE, "optimizer.arguments.rounding": rounding}
    for rounding in ("stochastic", "kahan", "nearest")
)
# What differs from the demonstration in float32, which comes first and is the reference.
ARMS = (
    {},
    {"optimizer.arguments.momentum_dtype": "bfloat16"},
    {"optimizer.arguments.momentum_dtype": "int8"},
    ROUNDINGS[0],
)


def gpt2_demo() -> list[Run]:
    """The GPT-2 demonstration with SGD-SaI at four precisions, with 12 seeds each.

    Example:
        >>> len(gpt2_demo()), gpt2_demo()[0].optimizer == gpt2_pretraining.demo("sgd_sai").optimizer
        (48, True)
    """
    base = gpt2_pretraining.demo("sgd_sai")
    return _paired(replace(base, name="low_precision.gpt2_demo"), ARMS, GPT2_SEEDS)


def gpt2_demo_roundings() -> list[Run]:
    """The same in pure bfloat16 with 8-bit momentum, at three roundings, with 5 seeds each.

    Example:
        >>> len(gpt2_demo_roundings())
        15
    """
    base = gpt2_pretraining.demo("sgd_sai")
    named = replace(base, name="low_precision.gpt2_demo_roundings")
    return _paired(named, ROUNDINGS, ROUNDING_SEEDS)


def vit_demo() -> list[Run]:
    """The ViT demonstration with SGD-SaI at four precisions and half its rate, with 20 seeds each.

    Example:
        >>> len(vit_demo()), {run.precision for run in vit_demo()} == {"fp32", "bf16"}
        (80, True)
    """
    base = override(vit_classification.demo("sgd_sai"), {"optimizer.lr": VIT_LEARNING_RATE})
    return _paired(replace(base, name="low_precision.vit_demo"), ARMS, VIT_SEEDS)


def _paired(base: Run, arms: Sequence[Mapping[str, str]], num_seeds: int) -> list[Run]:
    """Every arm at every seed; all arms of a seed come together, so that pairs end together."""
    return [
        replace(override(base, changes), seed=seed) for seed in range(num_seeds) for changes in arms
    ]
