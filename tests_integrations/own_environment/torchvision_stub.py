"""Stands for torchvision, which timm imports, but does not need for its models and optimizers."""

import enum
import sys
import types

from torch import nn

MODULES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".utils")


class Absent(nn.Module):
    """What is asked for by name at import, to be subclassed or tested against, and never made."""

    def __init__(self, *_, **__):
        raise NotImplementedError("this is not torchvision, but stands for it in a test")


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def put_in_place():
    """Makes `import torchvision` find the stub, in this process."""
    for name in MODULES:
        module = types.ModuleType("torchvision" + name)
        module.__path__ = []
        module.__getattr__ = absent
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name].InterpolationMode = InterpolationMode


def absent(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent
