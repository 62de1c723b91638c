"""Train deep networks with SGD instead of Adam, at a fraction of the memory."""

__version__ = "0.1.0"
