"""ResNet-18 from scratch over grids of learning rate and decay: digits, and CIFAR-10."""

from nomadam.experiments.configuration import OptimizerChoice, Run
from nomadam.experiments.image_classification import ConvolutionalModel, Family, ImageData
from nomadam.experiments.optimizer_choice import choose_optimizer, schedule_for
from nomadam.experiments.paper_grids import LEARNING_RATES as PAPER_LEARNING_RATES
from nomadam.experiments.paper_grids import decay_cells, grid_cell
from nomadam.experiments.photographs import CifarData
from nomadam.experiments.schedule import Schedule

# The optimizers of the grids on digits, with as many rates each, a factor of 4 apart; SGD with
# momentum is in EMA form, so its rates are 10 times torch's.
GRID = {
    "adamw": (2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2),
    "sgdm_decoupled": (0.015625, 0.0625, 0.25, 1.0, 4.0),
    "sgd_sai": (1.5625e-4, 6.25e-4, 2.5e-3, 1e-2, 4e-2),
}

# The middle of each grid; sgdm takes that of sgdm_decoupled.
LEARNING_RATES = {"adamw": 4e-3, "sgdm": 0.25, "sgdm_decoupled": 0.25, "sgd_sai": 2.5e-3}

# Muon takes each filter as a row of its matrix.
SUITED = {"convolutions": "flatten"}

FAMILIES: tuple[Family, ...] = ("resnet18", "vgg", "mobilenet")

# Of the paper's grid of 20 cells; its learning rates are 1e-1 to 1e-4.
CIFAR10_DECAYS = (0.5, 0.05, 0.005, 5e-4, 5e-5)

# The best cell of each in the paper, as (learning rate, decay) in torch's form; SGD with momentum
# has the usual one, for which the paper gives no cell.
CIFAR10_CELLS = {"sgd_sai": (1e-3, 0.5), "sgdm": (1e-1, 5e-4), "sgdm_decoupled": (1e-1, 5e-3)}


def demo(optimizer: str = "sgd_sai") -> Run:
    """A ResNet-18 of an eighth of its width on scikit-learn's digits: 10 seconds on a core.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. Those of
            `LEARNING_RATES` have the rate that stands there, others the rate of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> demo("adamw").optimizer.name
        'adamw'
    """
    choice = choose_optimizer(optimizer, lr=LEARNING_RATES.get(optimizer), suited=SUITED)
    return _small(choice, name="resnet18_grid.demo")


def demo_grid() -> list[Run]:
    """The demonstration at five learning rates times three decays for each of three optimizers.

    Example:
        >>> len(demo_grid())
        45
    """
    return [
        _small(choice, name="resnet18_grid.demo_grid")
        for optimizer, rates in GRID.items()
        for choice in decay_cells(optimizer, rates)
    ]


def families_grid() -> list[Run]:
    """Three families of networks on digits at five learning rates for each of three optimizers.

    A small form of the paper's check on the networks of NATS-Bench: how far the accuracy spreads
    over networks and rates.

    Example:
        >>> runs = families_grid()
        >>> len(runs), sorted({run.model.family for run in runs})
        (45, ['mobilenet', 'resnet18', 'vgg'])
    """
    return [
        _small(
            choose_optimizer(optimizer, lr=lr), name="resnet18_grid.families_grid", family=family
        )
        for family in FAMILIES
        for optimizer, rates in GRID.items()
        for lr in rates
    ]


def cifar10(optimizer: str = "sgd_sai") -> Run:
    """ResNet-18 on CIFAR-10 with the settings of the SGD-SaI paper: hours on a GPU.

    200 passes over the images, the rate a tenth after 80 and a hundredth after 160 of them, images
    cropped out of a frame of 4 pixels and mirrored. Point it at the folder of the python batches
    with ``--set data.source=FOLDER``. Norms and biases do not decay.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. Those of `CIFAR10_CELLS`
            have the paper's best cell, others the rate and decay of their row.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> run = cifar10()
        >>> run.steps * run.batch_size == 200 * 50_000, run.optimizer.weight_decay
        (True, 0.5)
    """
    cell = CIFAR10_CELLS.get(optimizer)
    if cell is None:
        choice = choose_optimizer(optimizer, suited=SUITED)
    else:
        choice = grid_cell(optimizer, *cell)
    return _cifar10(choice, name="resnet18_grid.cifar10")


def cifar10_grid(optimizer: str = "sgd_sai") -> list[Run]:
    """ResNet-18 on CIFAR-10 at the paper's 20 cells of learning rate and decay.

    Args:
        optimizer: a name of the table of baselines; default ``sgd_sai``. The cells are in torch's
            usual form, see `nomadam.experiments.paper_grids.grid_cell`.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> len(cifar10_grid("adamw"))
        20
    """
    return [
        _cifar10(grid_cell(optimizer, lr, decay, SUITED), name="resnet18_grid.cifar10_grid")
        for lr in PAPER_LEARNING_RATES
        for decay in CIFAR10_DECAYS
    ]


def _small(choice: OptimizerChoice, *, name: str, family: Family = "resnet18") -> Run:
    return Run(
        name=name,
        model=ConvolutionalModel(family=family, width=8, label_smoothing=0.1),
        # As for the ViT's demonstration: 1198 to train on and 599 to validate.
        data=ImageData(source="digits", validation_fraction=1 / 3, shift=0.125, rotation=10),
        optimizer=choice,
        schedule=_steps(choice.name),
        # 16 passes over the training images.
        steps=600,
        batch_size=32,
        clip_norm=None,
        evaluate_every=100,
        checkpoint_every=200,
    )


def _cifar10(choice: OptimizerChoice, *, name: str) -> Run:
    return Run(
        name=name,
        model=ConvolutionalModel(family="resnet18", width=64),
        data=CifarData(source="uoft-cs/cifar10", padding=4, mirror=True),
        optimizer=choice,
        schedule=_steps(choice.name),
        # 200 passes of 50,000 images.
        steps=78_125,
        batch_size=128,
        clip_norm=None,
        evaluate_every=1000,
        checkpoint_every=2000,
    )


def _steps(optimizer: str) -> Schedule:
    """A tenth after two fifths and after four fifths; constant where it is schedule-free."""
    schedule = schedule_for(optimizer, warmup_steps=0)
    if schedule.name == "constant":
        return schedule
    return Schedule(name="step", milestones=(0.4, 0.8), warmup_steps=0)
