"""A block for the one-pass kernel of the CPU, the kernel on it, and the formulas in float64."""

import numpy as np
import torch

from nomadam.numerics.rounding import Draw
from nomadam.optimizers.sgd_sai_cpu import update_cpu
from nomadam.optimizers.sgd_sai_update import Options, Row

F32, BF16, F16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
TOP = 127.0**2
ROUNDING = {F32: 0.0, BF16: 2.0**-7, F16: 2.0**-11}  # relative, random for bfloat16
ARITHMETIC = 3 * 2.0**-23  # of a sum of two products in float32
OPTIONS = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}


def bits_of(draw, numel):
    """The contract in numpy: two key words from four, then a hash of the index in the block."""
    with np.errstate(over="ignore"):

        def mixed(h):
            h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
            h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
            return h ^ (h >> 16)

        keys = []
        for h in (0, 1):
            for word in (draw.seed & 0xFFFFFFFF, draw.seed >> 32, draw.block, draw.step):
                h = mixed(((h ^ word) + 0x9E3779B9) & 0xFFFFFFFF)
            keys.append(h)
        index = np.arange(draw.first, draw.first + numel, dtype=np.uint64)
        low, high = index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
        x = low + np.uint32(keys[0])
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x ^= np.uint32(keys[1]) + high * np.uint32(0x9E3779B9)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))


def to_bf16(values, half):
    """Float32 values to bfloat16, with a random half or to nearest."""
    if half is None:
        return values.to(BF16)
    words = values.numpy().view(np.uint32)
    cut = ((words + half.astype(np.uint32)) & np.uint32(0xFFFF0000)).view(np.float32)
    return torch.from_numpy(np.where(np.isfinite(values.numpy()), cut, values.numpy())).to(BF16)


def blocks_of(values):
    return [values[start : start + 128] for start in range(0, len(values), 128)]


def decoded(codes, scales):
    values = [c.double() * c.double().abs() for c in blocks_of(codes)]
    return torch.cat([v * float(s) / TOP for v, s in zip(values, scales, strict=True)])


def encoded(values, half):
    """Codes and scales of float64 values by the square law, in blocks of 128."""
    codes, scales = [], []
    for block, share in zip(blocks_of(values), blocks_of((half + 0.5) / 65536), strict=True):
        scale = float(block.abs().max().float())
        scale = 0.0 if scale < 2.0**-100 else scale
        scales.append(scale)
        if scale == 0.0 or not np.isfinite(scale):
            codes.append(np.zeros(len(block)))
            continue
        y = np.minimum(block.abs().numpy() * (TOP / scale), TOP)
        k = np.floor(np.sqrt(y))
        k = np.minimum(k + (y - k * k > share * (2 * k + 1)), 127)
        codes.append(np.sign(block.numpy()) * k)
    return torch.from_numpy(np.concatenate(codes)).to(INT8), torch.tensor(scales)


def row_of(numel, param=F32, grad=F32, momentum=F32, kahan=False, seed=0, first=0):
    """A block with everything that its update needs."""
    make = torch.Generator().manual_seed(seed)
    spread = torch.randn(numel, generator=make).exp()  # of magnitudes, in every block of 128

    def values():
        return torch.randn(numel, generator=make) * spread

    row = {"param": values().to(param), "grad": values().to(grad), "gain": 20.0}
    row |= {"momentum_buffer": None, "momentum_scale": None, "compensation": None}
    if momentum is INT8:
        row["momentum_buffer"] = torch.randint(-127, 128, (numel,), generator=make).to(INT8)
        row["momentum_scale"] = torch.rand(-(-numel // 128), generator=make) + 0.5
    elif momentum is not None:
        row["momentum_buffer"] = values().to(momentum)
    if kahan:
        row["compensation"] = (values() * 2.0**-9).to(BF16)
    row |= {"draw": Draw(seed + 5, 7, 3, first), "stochastic": not kahan}
    return row


def tolerance(dtype):
    return ROUNDING[dtype] + ARITHMETIC


def copy_of(row):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in row.items()}


def step(*rows, **options):
    """The kernel, on copies."""
    rows = [copy_of(row) for row in rows]
    update_cpu([Row(**row) for row in rows], Options(**(OPTIONS | options)))
    return rows if len(rows) > 1 else rows[0]


def expected(row, *, lr, momentum, weight_decay, nesterov=False, maximize=False, grad_scale=1.0):
    """New parameter and momentum in float64, and the size of the terms of both."""
    p = row["param"].double()
    if row["compensation"] is not None:
        p = p + row["compensation"].double()
    g = row["grad"].double() / float(grad_scale) * (-1 if maximize else 1)
    m, direction, largest = None, g, g.abs()
    if row["momentum_buffer"] is not None:
        codes = row["momentum_scale"] is not None
        old = row["momentum_buffer"]
        old = decoded(old, row["momentum_scale"]) if codes else old.double()
        m = momentum * old + (1 - momentum) * g
        direction = momentum * m + (1 - momentum) * g if nesterov else m
        largest = torch.maximum(old.abs(), g.abs())
    new = p * (1 - lr * weight_decay) - lr * row["gain"] * direction
    return new, m, p.abs() + lr * row["gain"] * largest, largest
