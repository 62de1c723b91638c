"""One step of SGDSaI by its formulas, in numpy, beside one by the Triton kernel.

Under Triton's interpreter float32 is IEEE's, without fused operations: there the kernel has to
agree bit for bit. On a GPU the largest term's last place may differ.
"""

import os

import numpy as np
import torch

from nomadam.numerics.rounding import Draw
from nomadam.optimizers.sgd_sai_triton import update_triton
from nomadam.optimizers.sgd_sai_update import Options, Row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F32, BF16, F16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
KINDS = [(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, INT8), (F16, F16, F32)]
OPTIONS = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
TENSORS = ("param", "momentum_buffer", "momentum_scale", "compensation")
TOP = np.float32(127 * 127)


# ------------------------------------------------------------------------------- the reference


def bits_of(draw, numel):
    """Random bits by their definition, in integers of 64 bits."""
    mask = np.uint64(0xFFFFFFFF)

    def mixed(h):
        h ^= h >> np.uint64(16)
        h = h * np.uint64(0x85EBCA6B) & mask
        h ^= h >> np.uint64(13)
        h = h * np.uint64(0xC2B2AE35) & mask
        return h ^ (h >> np.uint64(16))

    keys = []
    for h in (0, 1):
        for word in (draw.seed % 2**32, draw.seed >> 32, draw.block, int(draw.step)):
            h = int(mixed(np.array(((h ^ word) + 0x9E3779B9) % 2**32, dtype=np.uint64)))
        keys.append(h)
    index = np.array([draw.first + i for i in range(numel)], dtype=np.uint64)
    x = ((index & mask) + np.uint64(keys[0])) & mask
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x85EBCA6B) & mask
    x ^= (np.uint64(keys[1]) + (index >> np.uint64(32)) * np.uint64(0x9E3779B9)) & mask
    x ^= x >> np.uint64(13)
    x = x * np.uint64(0xC2B2AE35) & mask
    return x ^ (x >> np.uint64(16))


def stored(values, dtype, half):
    """Float32 values in a dtype of storage: to nearest, or with a random half to bfloat16."""
    nearest = torch.from_numpy(values).to(dtype)
    if dtype != BF16 or half is None:
        return nearest
    words = (values.view(np.uint32) + half.astype(np.uint32)) & np.uint32(0xFFFF0000)
    rounded = torch.from_numpy(words.view(np.float32)).to(BF16)
    return torch.where(torch.from_numpy(np.isfinite(values)), rounded, nearest)


def decoded(codes, scales):
    """The values of 8-bit codes."""
    c = codes.numpy().astype(np.float32)
    return c * np.abs(c) * np.repeat(scales.numpy() / TOP, 128)[: len(c)]


def encoded(values, half):
    """Codes and scales, one block of 128 after the other."""
    codes, scales = [np.zeros(0)], []
    for start in range(0, len(values), 128):
        m, u = values[start : start + 128], (half[start : start + 128] + np.float32(0.5)) / 65536
        scale = np.abs(m).max()
        scale = np.float32(0) if scale < 2.0**-100 else scale
        y = np.zeros_like(m)
        if scale != 0 and np.isfinite(scale):
            y = np.minimum(np.abs(m) * (TOP / scale), TOP)
        k = np.floor(np.sqrt(y))
        up = y - k * k > u.astype(np.float32) * (2 * k + 1)
        codes.append(np.where(m < 0, -1, 1) * np.minimum(k + up, 127))
        scales.append(scale)
    return torch.from_numpy(np.concatenate(codes).astype(np.int8)), torch.from_numpy(
        np.array(scales, np.float32)
    )


def lerp(a, b, weight):
    weight = np.float32(weight)
    return a + weight * (b - a) if weight < 0.5 else b - (b - a) * (np.float32(1) - weight)


def follow(row, *, lr, momentum, weight_decay, nesterov=False, maximize=False, grad_scale=1.0):
    """One step of a row in numpy, in place; the arithmetic is float32, the numbers' float64."""
    p, g = row["param"].float().numpy(), row["grad"].float().numpy()
    old, numel = row["momentum_buffer"], len(p)
    draw, lr = row["draw"], float(lr)
    upper = lower = None
    if draw is not None:
        bits = bits_of(draw, numel)
        upper, lower = bits >> np.uint64(16), bits & np.uint64(0xFFFF)
    if row["compensation"] is not None:
        p = p + row["compensation"].float().numpy()
    g = g * (np.float32(1) / np.float32(grad_scale)) * np.float32(-1 if maximize else 1)
    d = g
    if old is not None:
        m = decoded(old, row["momentum_scale"]) if old.dtype == INT8 else old.float().numpy()
        m = lerp(m, g, 1 - momentum)
        d = lerp(g, m, momentum) if nesterov else m
        if old.dtype == INT8:
            row["momentum_buffer"], row["momentum_scale"] = encoded(m, lower)
        else:
            row["momentum_buffer"] = stored(m, old.dtype, lower if row["stochastic"] else None)
    p = p * np.float32(1 - lr * weight_decay) + np.float32(-lr * row["gain"]) * d
    dtype = row["param"].dtype
    row["param"] = stored(p, dtype, upper if row["stochastic"] else None)
    if row["compensation"] is not None:
        row["param"] = stored(p, dtype, None)
        row["compensation"] = stored(p - row["param"].float().numpy(), dtype, None)


# ------------------------------------------------------------------------------------- the rows


def row_of(numel, param=F32, grad=F32, momentum=F32, *, kahan=False, drawn=True, seed=0, first=0):
    """A block with all that its update needs, on the host."""
    make = torch.Generator().manual_seed(seed)
    spread = torch.randn(numel, generator=make).exp()  # of magnitudes, in every block of 128

    def values():
        return torch.randn(numel, generator=make) * spread

    row = {"param": values().to(param), "grad": values().to(grad), "gain": 20.0 + seed}
    row |= {"momentum_buffer": None, "momentum_scale": None, "compensation": None}
    if momentum == INT8:
        row["momentum_buffer"] = torch.randint(-127, 128, (numel,), generator=make).to(INT8)
        row["momentum_scale"] = torch.rand(-(-numel // 128), generator=make) + 0.5
    elif momentum is not None:
        row["momentum_buffer"] = values().to(momentum)
    if kahan:
        row["compensation"] = (values() * 2.0**-9).to(BF16)
    draw = Draw(2**40 + seed, 7, seed + 3, first) if drawn or momentum == INT8 else None
    return row | {"draw": draw, "stochastic": drawn and not kahan}


def copy_of(row, device=DEVICE):
    return {k: v.to(device, copy=True) if torch.is_tensor(v) else v for k, v in row.items()}


def launch(rows, update=update_triton, **options):
    """The kernel, or another path, in place."""
    update([Row(**row) for row in rows], Options(**(OPTIONS | options)))


def stepped(rows, **options):
    """The rows after a step by the kernel, on the host; the given ones stay as they are."""
    rows = [copy_of(row) for row in rows]
    launch(rows, **options)
    return [copy_of(row, "cpu") for row in rows]


def assert_same(got, wanted, before, exact=INTERPRETED):
    """Bit for bit under the interpreter; else to the last place of the largest term."""
    for name in TENSORS:
        a, b = got[name], wanted[name]
        if b is None:
            assert a is None
        elif exact:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
        elif b.dtype == INT8:
            assert ((a.int() - b.int()).abs() <= 1).all() and (a == b).float().mean() > 0.99
        else:
            size = torch.maximum(b.double().abs(), before[name].double().abs()) + 1.0
            allowed = size * (torch.finfo(b.dtype).eps + 8 * torch.finfo(F32).eps)
            assert torch.isnan(a).equal(torch.isnan(b)), name
            assert (((a - b).double().abs() <= allowed) | (a == b) | torch.isnan(b)).all(), name
            assert b.dtype == F32 or ((a == b) | torch.isnan(b)).float().mean() > 0.97, name


def check(rows, **options):
    """One step by the kernel against one by the formulas."""
    wanted = [copy_of(row, "cpu") for row in rows]
    options = OPTIONS | options
    for row in wanted:
        follow(row, **{k: v for k, v in options.items() if k != "keep"})
    on_device = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
    got = stepped(rows, **on_device)
    for a, b, row in zip(got, wanted, rows, strict=True):
        assert_same(a, b, row)
        assert a["grad"].equal(row["grad"]) or row["grad"].isnan().any()
    return got
