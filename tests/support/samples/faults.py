"""Device functions with one fault each: what the proofs of a cubin have to find."""

import triton
import triton.language as tl


@triton.jit
def fill(x_ptr, VALUE, COUNT, BLOCK: tl.constexpr):
    """Has no fault."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.zeros([BLOCK], tl.float32) + VALUE, mask=at < COUNT)


@triton.jit
def spill(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Keeps all of x in registers until its sum is known, and spills."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x))


@triton.jit
def misspelt(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeroes([BLOCK], tl.float32))


@triton.jit
def multiply(
    a_ptr, b_ptr, c_ptr, K,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """c [BLOCK, BLOCK] = a [BLOCK, K] @ b [BLOCK, K] transposed, a loop with INT8 products.

    With SCALAR, neighbours of b are two bytes apart, and each is loaded alone.
    """
    m, k = tl.arange(0, BLOCK), tl.arange(0, STEP)
    apart = 2 if SCALAR else 1
    total = tl.zeros([BLOCK, BLOCK], tl.int32)
    for at in range(0, K, STEP):
        a = tl.load(a_ptr + m[:, None] * K + at + k[None, :])
        b = tl.load(b_ptr + (m[None, :] * K + at + k[:, None]) * apart)
        total += tl.dot(a, b, out_dtype=tl.int32)
    tl.store(c_ptr + m[:, None] * BLOCK + m[None, :], total)
