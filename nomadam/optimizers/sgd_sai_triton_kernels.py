# type: ignore
"""The Triton kernel of SGDSaI's update: one launch for tensors of any number, sizes and dtypes.

The tensors are rows of a table on the device. Each program updates up to ``block`` elements of one
row. Which row is looked up, and where in it follows from the row's first program. Whole tiles of
rows that lie at 16-byte addresses are read and written in vectors, what is left with a mask.

Types are not checked here: what a checker reads as Python is compiled by other rules.
"""

import triton
import triton.language as tl

# The columns of the table, int64: addresses, 0 for what a row lacks, then numbers. The gain is the
# bits of a float64.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
SCALES = tl.constexpr(3)
COMPENSATION = tl.constexpr(4)
NUMEL = tl.constexpr(5)
KIND = tl.constexpr(6)
FIRST_PROGRAM = tl.constexpr(7)
GAIN = tl.constexpr(8)
SEED = tl.constexpr(9)
DRAW_BLOCK = tl.constexpr(10)
FIRST = tl.constexpr(11)
COLUMNS = tl.constexpr(12)

# The kind of a row, 9 bits: 2 for the parameter's dtype (float32, bfloat16, float16), 2 for the
# gradient's, 3 for the momentum's (int8 and none besides), whether compensated, whether stochastic.
INT8 = tl.constexpr(3)
NO_MOMENTUM = tl.constexpr(4)

# Those of numerics/rounding.py and numerics/blockwise.py; float32 at exponent 23 counts in ones.
FIRST_FACTOR = tl.constexpr(0x85EBCA6B)
SECOND_FACTOR = tl.constexpr(0xC2B2AE35)
STRIDE = tl.constexpr(0x9E3779B9)
SCALED_TOGETHER = tl.constexpr(128)
TOP = tl.constexpr(16129.0)
SMALLEST_SCALE = tl.constexpr(2.0**-100)
BITS_OF_INFINITY = tl.constexpr(0x7F800000)
BITS_OF_2_TO_23 = tl.constexpr(0x4B000000)


@triton.jit(
    do_not_specialize=["step"],
    do_not_specialize_on_alignment=["lr_tensor", "step_tensor", "keep", "grad_scale"],
)
def update_rows(
    table,
    rows_of_programs,
    lr: tl.float64,
    lr_tensor,
    step: tl.int32,
    step_tensor,
    momentum: tl.float64,
    weight_decay: tl.float64,
    keep,
    grad_scale,
    kinds: tl.constexpr,
    num_kinds: tl.constexpr,
    flags: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
):
    """One step of every row of the table.

    Args:
        table: int64 [rows, COLUMNS].
        rows_of_programs: int32, the row of each program.
        lr: learning rate, where ``lr_tensor`` is None; the tensor is on the device.
        lr_tensor: the same, or None.
        step: of the draws, its low 32 bits, where ``step_tensor`` is None.
        step_tensor: the same on the device, or None.
        momentum: coefficient of the moving average.
        weight_decay: decoupled decay coefficient.
        keep: uint8 on the device, 0 to change nothing, or None.
        grad_scale: what gradients are divided by, on the device, or None.
        kinds: those of the rows, one after the other from the lowest bits on.
        num_kinds: how many.
        flags: a bit for nesterov, maximize, and whether 1 - momentum and momentum, the weights of
            lerp, are below 1/2.
        block: elements of a program, a multiple of ``tile``.
        tile: elements at a time, a power of 2 from 2048 on.
    """
    if keep is not None:
        if tl.load(keep) == 0:
            return
    program = tl.program_id(0)
    row = table + tl.load(rows_of_programs + program).to(tl.int64) * COLUMNS
    numel = tl.load(row + NUMEL)
    begin = (program - tl.load(row + FIRST_PROGRAM)) * block
    end = tl.minimum(begin + block, numel)
    param, grad = tl.load(row + PARAM), tl.load(row + GRAD)
    momentum_buffer, compensation = tl.load(row + MOMENTUM), tl.load(row + COMPENSATION)
    aligned = ((param | grad | momentum_buffer | compensation) & 15) == 0
    first = tl.load(row + FIRST)
    one_word = (first + begin) >> 32 == (first + end - 1) >> 32
    middle = tl.where(aligned & one_word, begin + (end - begin) // tile * tile, begin)
    if step_tensor is not None:
        step = tl.load(step_tensor)
    k0, k1 = _key_word(0, row, step), _key_word(1, row, step)
    numbers = _numbers(row, lr, lr_tensor, momentum, weight_decay, grad_scale)
    kind = tl.load(row + KIND)
    for i in tl.static_range(num_kinds):
        if kind == kinds >> 9 * i & 511:
            _update_span(
                (param, grad, momentum_buffer, tl.load(row + SCALES), compensation),
                (numel, begin, middle, end),
                numbers,
                (k0, k1, first),
                kinds >> 9 * i & 511,
                flags,
                tile,
            )


@triton.jit
def _numbers(row, lr, lr_tensor, momentum, weight_decay, grad_scale):
    """Factors of a row in float32, combined in float64 and rounded once, as a host does.

    Of the gradient; of lerp, both; of the parameter and of the direction.
    """
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(tl.float64)
    else:
        lr = tl.full((), lr, tl.float64)
    momentum = tl.full((), momentum, tl.float64)
    decay = 1 - lr * tl.full((), weight_decay, tl.float64)
    rate = -lr * tl.load(row + GAIN).to(tl.float64, bitcast=True)
    factor = tl.full((), 1, tl.float32)
    if grad_scale is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale).to(tl.float32))
    share, momentum = (1 - momentum).to(tl.float32), momentum.to(tl.float32)
    return factor, share, momentum, decay.to(tl.float32), rate.to(tl.float32)


@triton.jit
def _update_span(
    tensors, span, numbers, draw, kind: tl.constexpr, flags: tl.constexpr, tile: tl.constexpr
):
    """The elements of one program: whole tiles up to ``span[2]``, then with a mask."""
    for start in range(span[1], span[2], tile):
        _update_tile(tensors, span[0], start, numbers, draw, kind, flags, True, tile)
    # In quarters: if both loops had one shape, the compiler would lay them out alike.
    for start in range(span[2], span[3], tile // 4):
        _update_tile(tensors, span[0], start, numbers, draw, kind, flags, False, tile // 4)


@triton.jit
def _update_tile(
    tensors,
    numel,
    start,
    numbers,
    draw,
    kind: tl.constexpr,
    flags: tl.constexpr,
    whole: tl.constexpr,
    tile: tl.constexpr,
):
    """One step of ``tile`` elements from ``start`` on; ``whole``: all there, and aligned."""
    p_type: tl.constexpr = kind & 3
    g_type: tl.constexpr = kind >> 2 & 3
    m_type: tl.constexpr = kind >> 4 & 7
    compensated: tl.constexpr = kind >> 7 & 1
    stochastic: tl.constexpr = kind >> 8 & 1
    # As many elements a thread in every tensor, or results change threads on their way out.
    vector: tl.constexpr = 4 if p_type * g_type * m_type == 0 else 8
    columns: tl.constexpr = SCALED_TOGETHER if m_type == INT8 else 64 * vector
    lines = tl.arange(0, tile // columns)
    offsets = lines[:, None] * columns + tl.arange(0, columns)[None, :]
    inside = offsets < numel - start

    p_at = _pointers(tensors[0], p_type, start, whole * vector) + offsets
    g_at = _pointers(tensors[1], g_type, start, whole * vector) + offsets
    p = _load(p_at, inside, whole).to(tl.float32)
    g = _load(g_at, inside, whole).to(tl.float32)
    if m_type != NO_MOMENTUM:
        m_at = _pointers(tensors[2], m_type, start, whole * vector) + offsets
        m = _load(m_at, inside, whole).to(tl.float32)
    if m_type == INT8:
        scales_at = _pointers(tensors[3], 0, start // columns, 0) + lines
        has_scale = lines * columns < numel - start
        scale = _load(scales_at, has_scale, whole)
        m = m * tl.abs(m) * tl.div_rn(scale, TOP)[:, None]
    if compensated:
        c_at = _pointers(tensors[4], p_type, start, whole * vector) + offsets
        p += _load(c_at, inside, whole).to(tl.float32)
    bits = tl.zeros_like(offsets).to(tl.uint32)
    if stochastic or m_type == INT8:
        bits = _random_bits(draw[0], draw[1], draw[2] + start, offsets, whole)

    g *= numbers[0]
    if flags & 2:
        g = -g
    d = g
    if m_type != NO_MOMENTUM:
        m = _lerp(m, g, numbers[1], flags >> 2 & 1)
        d = m
        if flags & 1:
            d = _lerp(g, m, numbers[2], flags >> 3 & 1)
        if m_type == INT8:
            m, scale = _encoded(m, bits & 0xFFFF)
            _store(scales_at, scale, has_scale, whole)
        else:
            m = _rounded(m, bits & 0xFFFF, m_type, stochastic)
        _store(m_at, m, inside, whole)
    p = p * numbers[3] + numbers[4] * d
    if compensated:
        rounded = _rounded(p, bits, p_type, False)
        rest = p - rounded.to(tl.float32)
        _store(c_at, _rounded(rest, bits, p_type, False), inside, whole)
    else:
        rounded = _rounded(p, bits >> 16, p_type, stochastic)
    _store(p_at, rounded, inside, whole)


@triton.jit
def _pointers(address, type: tl.constexpr, start, vector: tl.constexpr):
    """Where the element ``start`` lies; ``vector``: how many can be moved at a time, 0 unknown."""
    dtype: tl.constexpr = (
        (tl.float32 if type == 0 else tl.bfloat16)
        if type < 2
        else (tl.float16 if type == 2 else tl.int8)
    )
    pointer = address.to(tl.pointer_type(dtype))
    if vector:
        pointer = tl.multiple_of(pointer, vector * (4 if type == 0 else (1 if type == INT8 else 2)))
    return pointer + start


@triton.jit
def _load(pointers, inside, whole: tl.constexpr):
    if whole:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def _store(pointers, values, inside, whole: tl.constexpr):
    if whole:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=inside)


@triton.jit
def _lerp(a, b, weight, light: tl.constexpr):
    """torch.lerp, which has two formulas so as to end at b; ``light``: the weight is below 1/2."""
    if light:
        return a + weight * (b - a)
    else:
        return b - (b - a) * (1 - weight)


@triton.jit
def _encoded(m, half):
    """`quantize` of rows of 128: int8 codes and their scales."""
    largest = tl.max((tl.abs(m)).to(tl.int32, bitcast=True), axis=1)  # as ints NaN is the largest
    scale = largest.to(tl.float32, bitcast=True)
    scale = tl.where(scale < SMALLEST_SCALE, 0.0, scale)
    usable = (scale > 0) & (largest < BITS_OF_INFINITY)
    per_unit = tl.div_rn(TOP, tl.where(usable, scale, 1.0))
    y = tl.minimum(tl.abs(m) * per_unit[:, None], tl.where(usable, TOP, 0.0)[:, None])
    k = tl.sqrt(y).to(tl.int32)
    low = k.to(tl.float32)
    # The half in the mantissa of 2^23 makes 2^23 + half: an exact conversion without its cost.
    half = (half | BITS_OF_2_TO_23).to(tl.float32, bitcast=True) - (2.0**23 - 0.5)
    k += (y - low * low > half * (low * 2.0**-15 + 2.0**-16)).to(tl.int32)
    return tl.where(m < 0, -k, k).to(tl.int8), scale


@triton.jit
def _rounded(values, half, type: tl.constexpr, stochastic: tl.constexpr):
    """Float32 in a dtype of storage; bfloat16 in integers, as the interpreter would cut it off."""
    if type == 0:
        return values
    elif type == 2:
        return values.to(tl.float16)
    else:
        words = values.to(tl.uint32, bitcast=True)
        if not stochastic:
            half = 0x7FFF + (words >> 16 & 1)  # to nearest, ties to even
        words += tl.where(values == values, half, 0)  # no carry out of a NaN
        return (words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _random_bits(k0, k1, start, offsets, whole: tl.constexpr):
    """`random_bits` of the elements at ``start`` + offsets of the whole block."""
    if whole:  # all in one word of the index
        x = (start.to(tl.uint32) + k0) + offsets.to(tl.uint32)
        high = start >> 32
    else:
        index = start + offsets
        x = index.to(tl.uint32) + k0
        high = index >> 32
    x ^= x >> 16
    x *= FIRST_FACTOR
    x ^= k1 + high.to(tl.uint32) * STRIDE
    x ^= x >> 13
    x *= SECOND_FACTOR
    return x ^ (x >> 16)


@triton.jit
def _key_word(which: tl.constexpr, row, step):
    """The first (0) or second (1) word of the `key` of a row's draw."""
    seed = tl.load(row + SEED)
    h = _mixed(tl.full((), which, tl.uint32) ^ seed.to(tl.uint32))
    h = _mixed(h ^ (seed >> 32).to(tl.uint32))
    h = _mixed(h ^ tl.load(row + DRAW_BLOCK).to(tl.uint32))
    return _mixed(h ^ step.to(tl.uint32))


@triton.jit
def _mixed(h):
    h += STRIDE
    h ^= h >> 16
    h *= FIRST_FACTOR
    h ^= h >> 13
    h *= SECOND_FACTOR
    return h ^ (h >> 16)
