"""Device functions that do one thing each, for the tests of the interpreter."""

import triton
import triton.language as tl

from kernels.device.fp8 import to_e4m3


@triton.jit
def convert(x_ptr, y_ptr, COUNT, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < COUNT, other=0.0)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=at < COUNT)


@triton.jit
def to_codes(x_ptr, y_ptr, COUNT, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < COUNT, other=0.0)
    tl.store(y_ptr + at, to_e4m3(x), mask=at < COUNT)


@triton.jit
def add_and_compare(x_ptr, y_ptr, sum_ptr, less_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(sum_ptr + at, x + y)
    tl.store(less_ptr + at, (x < y).to(tl.int32))


@triton.jit
def product(
    a_ptr, b_ptr, c_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] @ b [N, K] transposed."""
    k = tl.arange(0, K)
    a = tl.load(a_ptr + tl.arange(0, M)[:, None] * K + k[None, :])
    b = tl.load(b_ptr + tl.arange(0, N)[None, :] * K + k[:, None])
    if TOTAL == "int32":
        c = tl.dot(a, b, out_dtype=tl.int32)
    elif TOTAL == "fp16":
        c = tl.dot(a, b, out_dtype=tl.float16)
    else:
        c = tl.dot(a, b)
    tl.store(c_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], c)


@triton.jit
def scaled_product(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] @ b [N, K] transposed, a scale byte for each 32 values along K."""
    m, n, k, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[None, :] * K + k[:, None])
    a_scale = tl.load(a_scale_ptr + m[:, None] * (K // 32) + g[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * (K // 32) + g[None, :])
    c = tl.dot_scaled(a, a_scale, "e4m3", b, b_scale, "e4m3")
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


@triton.jit
def careless(x_ptr, y_ptr, OFFSET, BLOCK: tl.constexpr):
    """Reads `OFFSET` further than it writes, and leaves masked values to chance."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at + OFFSET, mask=at < BLOCK // 2))


@triton.jit
def fused(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.fma(tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at))
    tl.store(out_ptr + at, total)
