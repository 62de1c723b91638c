"""Train deep networks with SGD instead of Adam, at a fraction of the memory."""

from nomadam.optimizers.param_groups import decay_groups, describe_groups, scaled_param_groups
from nomadam.optimizers.sgd_sai import SGDSaI

__all__ = ["SGDSaI", "decay_groups", "describe_groups", "scaled_param_groups"]
__version__ = "0.1.0"
