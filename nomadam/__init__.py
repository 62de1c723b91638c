"""Train deep networks with SGD instead of Adam, at a fraction of the memory."""

from nomadam.optimizers.sgd_sai import SGDSaI

__all__ = ["SGDSaI"]
__version__ = "0.1.0"
