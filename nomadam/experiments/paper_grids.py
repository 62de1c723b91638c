"""Cells of grids of learning rate and decay: the paper's, in units used here, and small ones."""

from collections.abc import Mapping, Sequence

from nomadam.experiments.configuration import OptimizerChoice
from nomadam.experiments.fields import Scalar
from nomadam.experiments.optimizer_choice import choose_optimizer

LEARNING_RATES = (1e-1, 1e-2, 1e-3, 1e-4)
# At a momentum of 0.9 a rate of torch's SGD is a tenth of the same rate in EMA form.
EMA_FORM = 10.0
DECAY_FACTORS = (0.1, 1.0, 10.0)
# Of the weights, by which a step at the middle of a grid shrinks them.
STEP_DECAY = 1e-4


def grid_cell(
    optimizer: str, lr: float, weight_decay: float, suited: Mapping[str, Scalar] | None = None
) -> OptimizerChoice:
    """The optimizer at a cell of a grid that is written in torch's usual form.

    The momentum of ``sgdm`` and ``sgdm_decoupled`` is an average here (dampening = momentum =
    0.9), which makes steps a tenth as long: their rate is 10 times that of the cell. The decay of
    ``sgdm`` enters the gradient and stays; that of ``sgdm_decoupled`` is a tenth, so that a step
    takes the cell's lr · weight_decay of the weights. Others have the cell as it stands.

    Args:
        optimizer: a name of the table of baselines.
        lr: of the cell, at least 0.
        weight_decay: of the cell, at least 0.
        suited: as `choose_optimizer` takes it; default none.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> for name in ("sgd_sai", "sgdm", "sgdm_decoupled"):
        ...     choice = grid_cell(name, 1e-1, 5e-3)
        ...     print(choice.lr, choice.weight_decay)
        0.1 0.005
        1.0 0.005
        1.0 0.0005
    """
    if optimizer in ("sgdm", "sgdm_decoupled"):
        lr *= EMA_FORM
    if optimizer == "sgdm_decoupled":
        weight_decay /= EMA_FORM
    return choose_optimizer(optimizer, lr=lr, weight_decay=weight_decay, suited=suited)


def decay_cells(optimizer: str, learning_rates: Sequence[float]) -> list[OptimizerChoice]:
    """The optimizer at each rate with three decays, a factor of 10 apart.

    At the middle rate and decay a step takes a 1e-4th of the weights, whatever the optimizer, so
    that grids around the rates of different optimizers have decays of the same strength.

    Args:
        optimizer: a name of the table of baselines.
        learning_rates: as the optimizer takes them, in order, each above 0.

    Raises:
        ValueError: for an optimizer that is not in the table, with the nearest names.

    Example:
        >>> [choice.weight_decay for choice in decay_cells("sgd_sai", [1e-2])]
        [0.001, 0.01, 0.1]
    """
    middle = STEP_DECAY / learning_rates[len(learning_rates) // 2]
    return [
        choose_optimizer(optimizer, lr=lr, weight_decay=float(f"{factor * middle:.6g}"))
        for lr in learning_rates
        for factor in DECAY_FACTORS
    ]
