"""Device code of attention and of a product as anyone writes them in Triton."""

import triton
import triton.language as tl


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, TOKENS, scale,
    HEAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """q, k [N, S, K], v [N, K, S] -> out [N, S, K]; S is a multiple of the tiles."""
    first = tl.program_id(1).to(tl.int64) * TOKENS * HEAD
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_KEYS)
    d = tl.arange(0, HEAD)
    q = tl.load(q_ptr + first + rows[:, None] * HEAD + d[None, :])
    k_ptrs = k_ptr + first + keys[None, :] * HEAD + d[:, None]
    v_ptrs = v_ptr + first + d[None, :] * TOKENS + keys[:, None]

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    for _ in tl.range(0, TOKENS, BLOCK_KEYS):
        logits = tl.dot(q, tl.load(k_ptrs))
        new_top = tl.maximum(top, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptrs)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
        top = new_top
        k_ptrs += BLOCK_KEYS * HEAD
        v_ptrs += BLOCK_KEYS
    out = out / total[:, None]
    out_ptrs = out_ptr + first + rows[:, None] * HEAD + d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty))


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a [M, K], b [K, N] -> out [M, N] fp16, summed in FP16; sizes are multiples of the tile."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * K + k[None, :]
    b_ptrs = b_ptr + k[:, None] * N + n[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float16)
    for _ in tl.range(0, K, BLOCK_K):
        total = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), total, out_dtype=tl.float16)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N
    tl.store(out_ptr + m[:, None] * N + n[None, :], total)
