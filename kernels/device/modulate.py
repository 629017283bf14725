"""Device code of kernels/modulate.py: one program owns one row, from its loads to its codes."""

import triton
import triton.language as tl

from kernels.device.fp8 import rotated, store_row, to_8bit


@triton.jit
def modulate_kernel(
    x_ptr, shift_ptr, scale_ptr, q_ptr, s_ptr,
    D: tl.constexpr, EPS: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # widen before multiplying by D
    d = tl.arange(0, BLOCK_D)
    live = d < D
    x = tl.load(x_ptr + token * D + d, mask=live, other=0.0)
    shift = tl.load(shift_ptr + d, mask=live, other=0.0)
    scale = tl.load(scale_ptr + d, mask=live, other=0.0)
    centred = tl.where(live, x - tl.sum(x) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / D + EPS)
    y = centred * rstd * (1 + scale) + shift  # lanes that are not live stay 0
    store_row(y, live, token, q_ptr, s_ptr, D, LIMIT, TINY, VECTOR=4)


@triton.jit
def modulate_rotated_kernel(
    x_ptr, shift_ptr, scale_ptr, q_ptr, s_ptr,
    D: tl.constexpr, EPS: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Rotates each part of a row, whole groups, once it is modulated. 8 neighbours a lane make a
    group one warp's, so that its sums need no shared memory.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PART)
    PARTS: tl.constexpr = (D + PART - 1) // PART
    xs = ()
    total = tl.zeros([PART], tl.float32)
    for p in tl.static_range(PARTS):
        x = tl.load(x_ptr + token * D + p * PART + d, mask=p * PART + d < D, other=0.0)
        total += x
        xs = xs + (x,)  # noqa: RUF005 - Triton has no other way to write it
    mean = tl.sum(total) / D
    squares = tl.zeros([PART], tl.float32)
    for p in tl.static_range(PARTS):
        centred = tl.where(p * PART + d < D, xs[p] - mean, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares) / D + EPS)
    peaks = tl.full([PART], TINY, tl.float32)
    ys = ()
    for p in tl.static_range(PARTS):
        live = p * PART + d < D
        shift = tl.load(shift_ptr + p * PART + d, mask=live, other=0.0)
        scale = tl.load(scale_ptr + p * PART + d, mask=live, other=0.0)
        y = tl.where(live, xs[p] - mean, 0.0) * rstd * (1 + scale) + shift
        y = rotated(y, PART)
        peaks = tl.maximum(peaks, tl.abs(y))
        ys = ys + (y,)  # noqa: RUF005
    peak = tl.max(peaks)
    for p in tl.static_range(PARTS):
        codes = to_8bit(ys[p] * (LIMIT / peak), q_ptr.dtype.element_ty)
        q_ptrs = tl.max_contiguous(q_ptr + token * D + p * PART + d, [8])
        tl.store(q_ptrs, codes, mask=p * PART + d < D)
    tl.store(s_ptr + token, peak / LIMIT)


@triton.jit
def quantize_kernel(
    x_ptr, q_ptr, s_ptr,
    D: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    live = d < D
    x = tl.load(x_ptr + row * D + d, mask=live, other=0.0).to(tl.float32)
    if ROTATED:
        x = rotated(x, BLOCK_D)
    store_row(x, live, row, q_ptr, s_ptr, D, LIMIT, TINY, VECTOR=8)
