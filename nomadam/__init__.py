"""Train deep networks with SGD instead of Adam, at a fraction of the memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomadam.diagnostics.gsnr import measure_gains
    from nomadam.optimizers.from_adamw import from_adamw
    from nomadam.optimizers.gain_files import load_gains, save_gains
    from nomadam.optimizers.gradient_release import release_gradients
    from nomadam.optimizers.param_groups import decay_groups, describe_groups, scaled_param_groups
    from nomadam.optimizers.sgd_sai import SGDSaI
    from nomadam.optimizers.sgd_sai_exchange import sgd_state_dict

__all__ = [
    "SGDSaI",
    "decay_groups",
    "describe_groups",
    "from_adamw",
    "load_gains",
    "measure_gains",
    "release_gradients",
    "save_gains",
    "scaled_param_groups",
    "sgd_state_dict",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads a public name, and torch with it, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nomadam.diagnostics import gsnr
    from nomadam.optimizers import (
        from_adamw,
        gain_files,
        gradient_release,
        param_groups,
        sgd_sai,
        sgd_sai_exchange,
    )

    homes = {
        "SGDSaI": sgd_sai,
        "from_adamw": from_adamw,
        "load_gains": gain_files,
        "measure_gains": gsnr,
        "release_gradients": gradient_release,
        "save_gains": gain_files,
        "sgd_state_dict": sgd_sai_exchange,
    }
    value = getattr(homes.get(name, param_groups), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
