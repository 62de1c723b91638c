"""An optimizer and its schedule for a study: the study's own values, else those of its row."""

from collections.abc import Mapping
from typing import Any, cast

from nomadam.experiments.configuration import OptimizerChoice
from nomadam.experiments.fields import Scalar
from nomadam.experiments.schedule import Schedule, ScheduleName


def choose_optimizer(
    name: str,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    arguments: Mapping[str, Scalar] | None = None,
    suited: Mapping[str, Scalar] | None = None,
) -> OptimizerChoice:
    """The optimizer of this name, with the values of its row of the table where none are given.

    Args:
        name: of the table of baselines.
        lr: learning rate, at least 0; default None, the row's. A study that has a table of rates
            found by a grid passes ``RATES.get(name)``.
        weight_decay: at least 0; default None, the row's: a decay that is coupled wants another
            number than one that is not.
        arguments: the optimizer's further keyword arguments; default none.
        suited: arguments that suit the study's model, such as the name of its output layer, taken
            where the optimizer has them and left out where it does not; default none.

    Raises:
        ValueError: for a name that is not in the table, with the nearest names.
        TypeError: for an argument that the optimizer does not have.

    Example:
        >>> choose_optimizer("adamw", lr={"adamw": 2e-3}.get("adamw")).lr
        0.002
        >>> choose_optimizer("sgdm").weight_decay
        0.0001
        >>> suited = {"head": "head.weight"}
        >>> [choose_optimizer(name, suited=suited).arguments for name in ("muon", "adam")]
        [{'head': 'head.weight'}, {}]
    """
    row = _row(name, arguments or {})
    known = row.arguments()
    fitting = {key: value for key, value in (suited or {}).items() if key in known}
    return OptimizerChoice(
        name=name,
        lr=row.default_lr if lr is None else lr,
        weight_decay=row.default_weight_decay if weight_decay is None else weight_decay,
        arguments={**fitting, **(arguments or {})},
    )


def schedule_for(name: str, **fields: Any) -> Schedule:
    """The schedule that goes with an optimizer: a cosine, or constant where it is schedule-free.

    Args:
        name: of the table of baselines.
        **fields: of the `Schedule`, beside its name: ``warmup_fraction=0.1``.

    Raises:
        ValueError: for a name that is not in the table, and a field out of its range.

    Example:
        >>> schedule_for("adamw", warmup_steps=2000, final_fraction=0.1).name
        'cosine'
    """
    return Schedule(name=cast(ScheduleName, _row(name, {}).schedule), **fields)


def _row(name: str, arguments: Mapping[str, Scalar]) -> Any:
    # Imported here, since it loads torch.
    from nomadam.optimizers.baselines import find_baseline

    return find_baseline(name, arguments)
