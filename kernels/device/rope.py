"""Device code of kernels/rope.py: a tile is a block of tokens of one head.

A program rotates several heads of its tokens: their tables, twice as many bytes as the head itself,
stay in registers, and the next head is on its way while one is rotated.
"""

import triton
import triton.language as tl

from kernels.device.fp8 import rotated, to_8bit


@triton.jit
def rms_inverse_kernel(
    x_ptr, inverse_ptr,
    ROW: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes 1 / rms of one slice of a token, whose row consists of slices of D values."""
    token = tl.program_id(0).to(tl.int64)  # widen before multiplying by ROW
    part = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + token * ROW + part * D + d, mask=d < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x) / D + EPS)
    tl.store(inverse_ptr + part.to(tl.int64) * tl.num_programs(0) + token, inverse)


@triton.jit
def load_tile(qkv_ptr, t, c, live, D: tl.constexpr):
    """Loads columns c of tokens t, [BLOCK, HEAD] fp32; zeros where not `live`."""
    offsets = t.to(tl.int64)[:, None] * (3 * D) + c[None, :]
    return tl.load(qkv_ptr + offsets, mask=live[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_table(table_ptr, t, live, HEAD: tl.constexpr):
    """Loads cos or sin of tokens t, [BLOCK, HEAD / 2]; zeros where not `live`."""
    at = t[:, None] * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, :]
    return tl.load(table_ptr + at, mask=live[:, None], other=0.0)


@triton.jit
def placed(x, inverse, weight, cos, sin):
    """Applies RMSNorm and RoPE to a tile [BLOCK, HEAD]; pairs lie side by side."""
    x = x * inverse[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    pairs = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(pairs, [x.shape[0], x.shape[1]])


@triton.jit
def mixed(x, DIGITS: tl.constexpr):
    """Applies R to groups of 4 ** DIGITS neighbours of a tile [BLOCK, HEAD]; 0: none."""
    if DIGITS:
        flat = tl.reshape(x, [x.shape[0] * x.shape[1]])
        x = tl.reshape(rotated(flat, x.shape[0] * x.shape[1], DIGITS), x.shape)
    return x


@triton.jit
def statistics_kernel(
    qkv_ptr, inverse_ptr, weight_ptr, cos_ptr, sin_ptr, sums_ptr, peaks_ptr, TOKENS,
    D: tl.constexpr, HEAD: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes the sum of the rotated k and the largest |v| of a block of tokens, per channel."""
    block = tl.program_id(0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    live = t < TOKENS
    inverse = tl.load(inverse_ptr + TOKENS + t, mask=live, other=0.0)  # after those of q
    cos = load_table(cos_ptr, t, live, HEAD)
    sin = load_table(sin_ptr, t, live, HEAD)
    for number in tl.range(HEADS, num_stages=STAGES):
        head = tl.program_id(1) * HEADS + number
        c = head * HEAD + tl.arange(0, HEAD)
        k = load_tile(qkv_ptr, t, D + c, live, D)
        k = placed(k, inverse, tl.load(weight_ptr + c), cos, sin)
        v = load_tile(qkv_ptr, t, 2 * D + c, live, D)
        tl.store(sums_ptr + block * D + c, tl.sum(k, axis=0))
        tl.store(peaks_ptr + block * D + c, tl.max(tl.abs(v), axis=0))


@triton.jit
def combine_kernel(
    sums_ptr, peaks_ptr, mean_ptr, vs_ptr, BLOCKS, TOKENS, v_limit,
    D: tl.constexpr, TINY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the mean of k and the scale of v, from what the blocks found."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    peak = tl.full([ROWS, COLUMNS], TINY, tl.float32)
    for row in range(0, BLOCKS, ROWS):
        block = row + tl.arange(0, ROWS)[:, None]
        live = block < BLOCKS
        total += tl.load(sums_ptr + block * D + c[None, :], mask=live, other=0.0)
        found = tl.load(peaks_ptr + block * D + c[None, :], mask=live, other=0.0)
        peak = tl.maximum(peak, found)
    tl.store(mean_ptr + c, tl.sum(total, axis=0) / TOKENS)
    tl.store(vs_ptr + c, tl.max(peak, axis=0) / v_limit)


@triton.jit
def queries_kernel(
    qkv_ptr, inverse_ptr, weight_ptr, cos_ptr, sin_ptr, q_ptr, s_ptr, TOKENS,
    D: tl.constexpr, HEAD: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr,
    FACTOR: tl.constexpr, DIGITS: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes codes and scales of a block of queries."""
    block = tl.program_id(0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    live = t < TOKENS
    inverse = tl.load(inverse_ptr + t, mask=live, other=0.0)
    cos = load_table(cos_ptr, t, live, HEAD)
    sin = load_table(sin_ptr, t, live, HEAD)
    for number in tl.range(HEADS, num_stages=STAGES):
        head = tl.program_id(1) * HEADS + number
        c = head * HEAD + tl.arange(0, HEAD)
        q = load_tile(qkv_ptr, t, c, live, D)
        q = mixed(placed(q, inverse, tl.load(weight_ptr + c), cos, sin), DIGITS)
        peak = tl.maximum(tl.max(tl.abs(q)), TINY)  # dead tokens are 0
        codes = to_8bit(q * (LIMIT / peak), q_ptr.dtype.element_ty)
        rows = head.to(tl.int64) * TOKENS + t
        at = rows[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
        # 8 codes from 8 values of 16 bits, lest the loads take the layout of 16
        q_ptrs = tl.max_contiguous(q_ptr + at, [1, 8])
        tl.store(q_ptrs, codes, mask=live[:, None])
        tl.store(s_ptr + head * tl.num_programs(0) + block, peak / LIMIT * FACTOR)


@triton.jit
def keys_kernel(
    qkv_ptr, inverse_ptr, weight_ptr, cos_ptr, sin_ptr, mean_ptr, k_ptr, s_ptr, TOKENS,
    D: tl.constexpr, HEAD: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes codes and scales of a block of keys; the blocks cover the padding, as codes of 0."""
    block = tl.program_id(0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    live = t < TOKENS
    inverse = tl.load(inverse_ptr + TOKENS + t, mask=live, other=0.0)  # after those of q
    cos = load_table(cos_ptr, t, live, HEAD)
    sin = load_table(sin_ptr, t, live, HEAD)
    for number in tl.range(HEADS, num_stages=STAGES):
        head = tl.program_id(1) * HEADS + number
        c = head * HEAD + tl.arange(0, HEAD)
        k = load_tile(qkv_ptr, t, D + c, live, D)
        k = placed(k, inverse, tl.load(weight_ptr + c), cos, sin)
        k = mixed(tl.where(live[:, None], k - tl.load(mean_ptr + c)[None, :], 0.0), DIGITS)
        peak = tl.maximum(tl.max(tl.abs(k)), TINY)
        codes = to_8bit(k * (LIMIT / peak), k_ptr.dtype.element_ty)
        tile = head.to(tl.int64) * tl.num_programs(0) + block
        at = tl.arange(0, BLOCK)[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
        tl.store(tl.max_contiguous(k_ptr + tile * (BLOCK * HEAD) + at, [1, 8]), codes)
        tl.store(s_ptr + tile, peak / LIMIT)


@triton.jit
def values_kernel(
    qkv_ptr, vs_ptr, vt_ptr, TOKENS,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a block of tokens of one head, transposed; loaded in `kernels.layout.KEY_ORDER`."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    key = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    t = block * BLOCK + key
    c = head * HEAD + tl.arange(0, HEAD)
    v = load_tile(qkv_ptr, t, 2 * D + c, t < TOKENS, D)
    codes = to_8bit(v * (1.0 / tl.load(vs_ptr + c))[None, :], vt_ptr.dtype.element_ty)
    keys = tl.num_programs(0) * BLOCK
    at = c.to(tl.int64)[:, None] * keys + (block * BLOCK + place)[None, :]
    tl.store(vt_ptr + at, tl.trans(codes))
