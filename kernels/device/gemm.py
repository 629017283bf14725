"""Device code of kernels/gemm.py: a program multiplies one tile, then ends it in its own way."""

import triton
import triton.language as tl


@triton.jit
def tile_corner(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Returns the first row and column of this program's tile. Programs that run at the same time
    share the rows of GROUP_M tiles and neighbouring columns: both operands come from the L2 cache.
    """
    program = tl.program_id(0)
    columns = N // BLOCK_N
    group = program // (GROUP_M * columns)
    inside = program % (GROUP_M * columns)
    first = group * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    return (first + inside % rows) * BLOCK_M, inside // rows * BLOCK_N


@triton.jit
def product(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, M, K, row, column,
    MMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns the tile of A @ B^T at (row, column) with its scales: [BLOCK_M, BLOCK_N] fp32."""
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)  # past the end: the last row again
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # 64 bits to the tile, 32 inside it: half the address arithmetic of the loop
    a_ptrs = a_ptr + row.to(tl.int64) * K + (m[:, None] * K + k[None, :])
    b_ptrs = b_ptr + column.to(tl.int64) * K + (n[None, :] * K + k[:, None])
    a_ones = tl.full([BLOCK_M, BLOCK_K // 32], 127, tl.uint8)  # exponents: 2^(127 - 127)
    b_ones = tl.full([BLOCK_N, BLOCK_K // 32], 127, tl.uint8)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if MMA == "int8" else tl.float32)
    for _ in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs)
        b = tl.load(b_ptrs)
        if MMA == "int8":
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        elif MMA == "scaled":
            total = tl.dot_scaled(a, a_ones, "e4m3", b, b_ones, "e4m3", total)
        else:
            total = tl.dot(a, b, total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    a_scale = tl.load(a_scale_ptr + row + m)
    b_scale = tl.load(b_scale_ptr + column + n)
    return total.to(tl.float32) * a_scale[:, None] * b_scale[None, :]


@triton.jit
def halves(y):
    """Returns the left and the right columns. Nothing moves: every thread has values of both."""
    return tl.split(y.reshape(y.shape[0], 2, y.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def store(y, out_ptr, M, N, row, column):
    m = tl.arange(0, y.shape[0])
    n = tl.arange(0, y.shape[1])
    out_ptrs = out_ptr + row.to(tl.int64) * N + column + (m[:, None] * N + n[None, :])
    tl.store(out_ptrs, y.to(tl.bfloat16), mask=m[:, None] < M - row)


@triton.jit
def add(y, bias_ptr, gate_ptr, x_ptr, M, N, row, column):
    m = tl.arange(0, y.shape[0])
    n = tl.arange(0, y.shape[1])
    y += tl.load(bias_ptr + column + n)[None, :]
    y *= tl.load(gate_ptr + column + n)[None, :]
    x_ptrs = x_ptr + row.to(tl.int64) * N + column + (m[:, None] * N + n[None, :])
    live = m[:, None] < M - row
    tl.store(x_ptrs, tl.load(x_ptrs, mask=live, other=0.0) + y, mask=live)


@triton.jit
def gemm_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, bias_ptr, out_ptr, M, N, K,
    MMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, column = tile_corner(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    y = product(
        a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, M, K, row, column, MMA, BLOCK_M, BLOCK_N, BLOCK_K
    )
    parts = halves(y)
    for i in tl.static_range(2):
        at = column + i * (BLOCK_N // 2)
        y = parts[i] + tl.load(bias_ptr + at + tl.arange(0, BLOCK_N // 2))[None, :]
        store(y, out_ptr, M, N, row, at)


@triton.jit
def gemm_gelu_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, bias_ptr, multiplier_ptr, out_ptr, M, N, K,
    MMA: tl.constexpr, GELU_LINEAR: tl.constexpr, GELU_CUBIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, column = tile_corner(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    y = product(
        a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, M, K, row, column, MMA, BLOCK_M, BLOCK_N, BLOCK_K
    )
    parts = halves(y)
    for i in tl.static_range(2):
        at = column + i * (BLOCK_N // 2)
        n = tl.arange(0, BLOCK_N // 2)
        y = parts[i] + tl.load(bias_ptr + at + n)[None, :]
        y = y / (1 + tl.exp2(y * (GELU_LINEAR + GELU_CUBIC * y * y)))
        store(y * tl.load(multiplier_ptr + at + n)[None, :], out_ptr, M, N, row, at)


@triton.jit
def gemm_residual_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, bias_ptr, gate_ptr, x_ptr, M, N, K,
    MMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, column = tile_corner(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    y = product(
        a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, M, K, row, column, MMA, BLOCK_M, BLOCK_N, BLOCK_K
    )
    # all of x would not fit into registers beside all of y
    left, right = halves(y)
    parts = halves(left) + halves(right)
    for i in tl.static_range(4):
        add(parts[i], bias_ptr, gate_ptr, x_ptr, M, N, row, column + i * (BLOCK_N // 4))
