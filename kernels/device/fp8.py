"""8-bit codes inside a kernel, as kernels/fp8.py defines them."""

import triton
import triton.language as tl

# Four values of FP32 become four codes, rounded once, to nearest even. A cast of Triton 3.6 goes
# through FP16 toward zero on sm_89: what lies just above a tie becomes one, and the code too small.
TO_E4M3 = tl.constexpr("""{
.reg .b16 %pair<2>;
cvt.rn.satfinite.e4m3x2.f32 %pair0, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 %pair1, $4, $3;
mov.b32 $0, {%pair0, %pair1};
}""")


@triton.jit
def to_e4m3(x):
    """Returns x in E4M3: to nearest even, saturating, NaN stays NaN."""
    return tl.inline_asm_elementwise(
        TO_E4M3, "=r,r,r,r,r", [x], dtype=tl.float8e4nv, is_pure=True, pack=4
    )


@triton.jit
def to_8bit(x, dtype: tl.constexpr):
    """Rounds half to even. |x| is at most the limit of `dtype`, but for rounding."""
    if dtype == tl.int8:
        # 1.5 * 2^23 leaves the sum no room for a fraction: its low bits are the rounded integer.
        codes = (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        codes = to_e4m3(x)
    return codes


@triton.jit
def rotated(x, SIZE: tl.constexpr, DIGITS: tl.constexpr = 4):
    """Returns R x, x [SIZE] of whole groups of 4 ** DIGITS: over each base-4 digit of the place,
    half the sum of the four minus the value. It stays in registers and shuffles where a warp owns
    whole groups.
    """
    for digit in tl.static_range(DIGITS):
        y = tl.reshape(x, [SIZE // (4 * 4**digit), 4, 4**digit])
        y = 0.5 * tl.sum(y, axis=1, keep_dims=True) - y
        x = tl.reshape(y, [SIZE])
    return x


@triton.jit
def store_row(
    y, live, row, q_ptr, s_ptr,
    D: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Quantises one row of D values: y [BLOCK], 0 where not `live`.

    VECTOR is how many values are 16 bytes where y comes from, or 8 where it was rotated. All
    accesses of a kernel get one layout, and that of 16 codes a thread would tear the loads of y
    apart.
    """
    peak = tl.maximum(tl.max(tl.abs(y)), TINY)
    codes = to_8bit(y * (LIMIT / peak), q_ptr.dtype.element_ty)
    q_ptrs = tl.max_contiguous(q_ptr + row * D + tl.arange(0, y.shape[0]), [VECTOR])
    tl.store(q_ptrs, codes, mask=live)
    tl.store(s_ptr + row, peak / LIMIT)
