"""A vision transformer from scratch: the demonstration on digits, and the paper's own size."""

from nomadam.experiments.configuration import OptimizerChoice, Run
from nomadam.experiments.image_classification import ImageData, ViTModel
from nomadam.experiments.optimizer_choice import choose_optimizer, schedule_for
from nomadam.experiments.paper_grids import LEARNING_RATES as PAPER_LEARNING_RATES
from nomadam.experiments.paper_grids import decay_cells, grid_cell
from nomadam.experiments.photographs import PhotographData

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

# For Muon: which layer is the output, and that it takes each filter of the patches as a row.
SUITED = {"head": "classifier.weight", "convolutions": "flatten"}

# Of the grid of learning rate and decay, a factor of 4 apart around the rates above; SGD with
# decoupled decay reaches 8, which is 0.8 in torch's form.
DECAY_GRID = {
    "adamw": (1.25e-4, 5e-4, 2e-3, 8e-3, 3.2e-2),
    "sgdm_decoupled": (0.03125, 0.125, 0.5, 2.0, 8.0),
    "sgd_sai": (6.25e-4, 2.5e-3, 1e-2, 4e-2, 1.6e-1),
}

# Of the paper's grid of 12 cells; its learning rates are 1e-1 to 1e-4.
IMAGENET_DECAYS = (1e-2, 1e-3, 1e-4)

# The best cell of each in the paper, as (learning rate, decay) in torch's form; for SGD with
# decoupled decay, which it does not have, that of SGD with momentum.
IMAGENET_CELLS = {
    "adamw": (1e-3, 1e-2),
    "sgdm": (1e-1, 1e-4),
    "sgdm_decoupled": (1e-1, 1e-4),
    "sgd_sai": (1e-2, 1e-2),
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


def demo_grid() -> list[Run]:
    """The demonstration at five learning rates times three decays for each of three optimizers.

    Example:
        >>> len(demo_grid())
        45
    """
    return [
        _on_digits(choice, name="vit_classification.demo_grid")
        for optimizer, rates in DECAY_GRID.items()
        for choice in decay_cells(optimizer, rates)
    ]


def vit_s16_imagenet(optimizer: str = "sgd_sai") -> Run:
    """ViT-S/16 on ImageNet for 90 passes with the settings of the SGD-SaI paper: for GPUs.

    Crops of 224 pixels, RandAugment of two changes at magnitude 10, mixup 0.2, 1024 pictures a
    step, 10,000 warm-up steps and a cosine to 0, clip 1. Point it at a folder with
    ``train/CLASS/`` and ``val/CLASS/`` with ``--set data.source=FOLDER``. As in timm's model there
    are a class token and learned positions, where the recipe has a mean and fixed ones.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. Those of `IMAGENET_CELLS`
            have the paper's best cell, others the rate and decay of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Source: the recipe of arXiv 2205.01580.

    Example:
        >>> run = vit_s16_imagenet()
        >>> run.steps * run.batch_size // 1_281_167, run.optimizer.lr
        (90, 0.01)
    """
    cell = IMAGENET_CELLS.get(optimizer)
    choice = (
        choose_optimizer(optimizer, suited=SUITED) if cell is None else grid_cell(optimizer, *cell)
    )
    return _imagenet(choice, name="vit_classification.vit_s16_imagenet")


def vit_s16_imagenet_grid(optimizer: str = "sgd_sai") -> list[Run]:
    """ViT-S/16 on ImageNet at the paper's 12 cells of learning rate and decay.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. The cells are in torch's
            usual form, see `nomadam.experiments.paper_grids.grid_cell`.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> len(vit_s16_imagenet_grid("adamw"))
        12
    """
    return [
        _imagenet(
            grid_cell(optimizer, lr, decay, SUITED), name="vit_classification.vit_s16_imagenet_grid"
        )
        for lr in PAPER_LEARNING_RATES
        for decay in IMAGENET_DECAYS
    ]


def _small(optimizer: str, lr: float | None, *, name: str) -> Run:
    return _on_digits(choose_optimizer(optimizer, lr=lr, suited=SUITED), name=name)


def _on_digits(choice: OptimizerChoice, *, name: str) -> Run:
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
        optimizer=choice,
        schedule=schedule_for(choice.name, warmup_fraction=0.1),
        # About 40 passes over the training images.
        steps=1500,
        batch_size=32,
        evaluate_every=150,
        checkpoint_every=500,
    )


def _imagenet(choice: OptimizerChoice, *, name: str) -> Run:
    return Run(
        name=name,
        model=ViTModel(layers=12, heads=6, width=384, patch_size=16),
        data=PhotographData(source="ILSVRC/imagenet-1k"),
        optimizer=choice,
        schedule=schedule_for(choice.name, warmup_steps=10_000),
        # 90 passes of 1,281,167 pictures.
        steps=112_603,
        batch_size=1024,
        precision="bf16_autocast",
        evaluate_every=2500,
        checkpoint_every=2500,
    )
