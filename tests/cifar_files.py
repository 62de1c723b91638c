"""Files in the format of CIFAR-10's python version, as Python 2 pickled them."""

import struct

import numpy as np

NAMES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def text(value):
    value = value.encode("latin1") if isinstance(value, str) else value
    return b"T" + struct.pack("<i", len(value)) + value


def integer(value):
    return b"J" + struct.pack("<i", value)


def python2_batch(images, labels, *, module=b"numpy.core.multiarray"):
    """A dict of str to a list of int and to an array, in the operations of Python 2's pickle."""
    kind = b"cnumpy\ndtype\n(" + text("u1") + integer(0) + integer(1) + b"tR"
    kind += b"(" + integer(3) + text("|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    array = b"c" + module + b"\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t"
    array += text("b") + b"tR(" + integer(1) + b"(" + integer(len(images)) + integer(3072) + b"t"
    array += kind + b"I00\n" + text(images.tobytes()) + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    entries = text("batch_label") + text("a batch") + text("labels") + numbers
    entries += text("data") + array
    return b"\x80\x02}(" + entries + b"u."


def write_cifar(folder, rows=6, seed=0):
    """Six files of so many random images each; returns all images and labels."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (6, rows, 3, 32, 32), dtype=np.uint8)
    labels = random.integers(0, 10, (6, rows))
    folder.mkdir(parents=True, exist_ok=True)
    for name, own_images, own_labels in zip(NAMES, images, labels, strict=True):
        (folder / name).write_bytes(python2_batch(own_images, own_labels.tolist()))
    return images.reshape(-1, 3, 32, 32), labels.reshape(-1)
