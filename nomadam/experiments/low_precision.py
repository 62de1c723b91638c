"""What low precision costs in quality: the demonstrations with less of it, each with five seeds."""

from dataclasses import replace

from nomadam.experiments import gpt2_pretraining, vit_classification
from nomadam.experiments.configuration import Run, override

NUM_SEEDS = 5

# Half of the demonstration's. At its own rate the training is chaotic: whatever the change, the
# final loss moves by some per cent, so that five seeds could not tell what a rounding does.
VIT_LEARNING_RATE = 5e-3

# In each run a line: what differs from the demonstration in float32, which comes first and is
# the reference. With int8 momentum the parameters alone feel the rounding.
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
    """The GPT-2 demonstration with SGD-SaI at six precisions, five seeds each.

    Example:
        >>> len(gpt2_demo()), gpt2_demo()[0].optimizer == gpt2_pretraining.demo("sgd_sai").optimizer
        (30, True)
    """
    return _arms(gpt2_pretraining.demo("sgd_sai"), "low_precision.gpt2_demo")


def vit_demo() -> list[Run]:
    """The ViT demonstration with SGD-SaI at six precisions and half its rate, five seeds each.

    Example:
        >>> len(vit_demo()), {run.precision for run in vit_demo()} == {"fp32", "bf16"}
        (30, True)
    """
    base = override(vit_classification.demo("sgd_sai"), {"optimizer.lr": VIT_LEARNING_RATE})
    return _arms(base, "low_precision.vit_demo")


def _arms(base: Run, name: str) -> list[Run]:
    """Every arm at every seed; all arms of a seed come together, so that they can be paired."""
    return [
        replace(override(base, changes), name=name, seed=seed)
        for seed in range(NUM_SEEDS)
        for changes in ARMS
    ]
