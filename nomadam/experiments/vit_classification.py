"""A vision transformer from scratch: the demonstration on scikit-learn's digits."""

from nomadam.experiments.configuration import Run
from nomadam.experiments.image_classification import ImageData, ViTModel
from nomadam.experiments.optimizer_choice import choose_optimizer, schedule_for

# The optimizers that the demonstration sets beside one another; the first is the reference.
COMPARED = ("adamw", "sgdm", "sgd_sai")

# Each is the best of its row in GRID by validation loss; sgdm in EMA form, so 10 times torch's.
LEARNING_RATES = {"adamw": 2e-3, "sgdm": 0.5, "sgd_sai": 1e-2}

# As many values for each optimizer, a factor of 2 apart.
GRID = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "sgdm": (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0),
    "sgd_sai": (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
}


def demo(optimizer: str = "sgd_sai") -> Run:
    """A ViT with 0.1 million parameters on scikit-learn's digits: half a minute on a core.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. Those of
            `LEARNING_RATES` have the rate found by the grid, others the rate of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> demo("adamw").optimizer.name
        'adamw'
    """
    return _small(optimizer, LEARNING_RATES.get(optimizer), name="vit_classification.demo")


def demo_learning_rates() -> list[Run]:
    """The demonstration at six learning rates for each of its three optimizers.

    Example:
        >>> len(demo_learning_rates())
        18
    """
    return [
        _small(optimizer, lr, name="vit_classification.demo_learning_rates")
        for optimizer in COMPARED
        for lr in GRID[optimizer]
    ]


def _small(optimizer: str, lr: float | None, *, name: str) -> Run:
    return Run(
        name=name,
        # At so small a width an initial deviation of 0.02 would cost hundreds of steps.
        model=ViTModel(
            layers=2,
            heads=4,
            width=64,
            patch_size=2,
            initializer_range=0.08,
            label_smoothing=0.1,
        ),
        # Every third image is held out: 1198 to train on and 599 to validate.
        data=ImageData(source="digits", validation_fraction=1 / 3, shift=0.125, rotation=10),
        optimizer=choose_optimizer(optimizer, lr=lr),
        schedule=schedule_for(optimizer, warmup_fraction=0.1),
        # About 40 passes over the training images.
        steps=1500,
        batch_size=32,
        evaluate_every=150,
        checkpoint_every=500,
    )
