"""Device code of kernels/attention.py, which has the formulas and layouts."""

import triton
import triton.language as tl

from kernels.device.fp8 import to_e4m3

INTEGERS = tl.constexpr(1.5 * 2**23)  # FP32 from here on has steps of one: adding it rounds


@triton.jit
def _scaled_dot(a, b, total):
    """Returns total + a @ b as a block-scaled product whose scales are all one: twice as fast as a
    plain product where a GPU knows it, with the same result.
    """
    one: tl.constexpr = 127  # 2 ** (127 - 127), for each 32 values along K
    a_scale = tl.full([a.shape[0], a.shape[1] // 32], one, tl.uint8)
    b_scale = tl.full([b.shape[1], b.shape[0] // 32], one, tl.uint8)
    return tl.dot_scaled(a, a_scale, "e4m3", b, b_scale, "e4m3", total)


@triton.jit
def _logits(q, k, SUM: tl.constexpr):
    """Returns q [M, K] @ k [K, N], without their scales."""
    if q.dtype == tl.int8:
        logits = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
    elif SUM == "scaled":
        logits = _scaled_dot(q, k, tl.zeros([q.shape[0], k.shape[1]], tl.float32))
    else:
        logits = tl.dot(q, k)
    return logits


@triton.jit
def _add_values(total, p, v, KEY_GROUP: tl.constexpr, SUM: tl.constexpr):
    """Returns total + p @ v. p's keys take the order of v: registers are renamed, nothing moves."""
    pairs = tl.reshape(p, [p.shape[0], p.shape[1] // KEY_GROUP, 2, KEY_GROUP // 4, 2])
    p = tl.reshape(tl.permute(pairs, [0, 1, 3, 2, 4]), p.shape)
    if SUM == "int32":
        p8 = (p + INTEGERS).to(tl.int32, bitcast=True).to(tl.int8)  # the last byte
        total = tl.dot(p8, v, total, out_dtype=tl.int32)
    elif SUM == "scaled":
        total = _scaled_dot(to_e4m3(p), v, total)
    else:
        total = tl.dot(to_e4m3(p), v, total, out_dtype=total.dtype)
    return total


@triton.jit
def attention_kernel(
    q_ptr, qs_ptr, k_ptr, ks_ptr, vt_ptr, vs_ptr, out_ptr, TOKENS, KEYS, WIDTH,
    HEAD: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, KEY_GROUP: tl.constexpr,
    LOG2_P: tl.constexpr, REACH: tl.constexpr, SUM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(Q_BLOCK % BLOCK_Q == 0 and K_BLOCK % BLOCK_KEYS == 0 and TILES <= 2)
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    live = rows[:, None] < TOKENS
    keys = tl.arange(0, BLOCK_KEYS)
    d = tl.arange(0, HEAD)

    q = tl.load(q_ptr + head * TOKENS * HEAD + rows[:, None] * HEAD + d[None, :], live, other=0.0)
    qs = tl.load(qs_ptr + head * tl.cdiv(TOKENS, Q_BLOCK) + first // Q_BLOCK)
    k_ptrs = k_ptr + head * KEYS * HEAD + keys[None, :] * HEAD + d[:, None]  # [K, n]
    vt_ptrs = vt_ptr + head * KEYS * HEAD + d[None, :] * KEYS + keys[:, None]  # [n, K]
    ks_ptr += head * (KEYS // K_BLOCK)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # largest logit so far
    base = top  # of which the weights in `total` and `out` are powers
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    for start in tl.range(0, KEYS, BLOCK_KEYS * TILES):
        scale = tl.load(ks_ptr + start // K_BLOCK) * qs
        logits = _logits(q, tl.load(k_ptrs), SUM)
        here = tl.max(logits, 1) * scale
        if TILES == 2:  # two tiles share the work of moving `out` to the new maximum
            scale_2 = tl.load(ks_ptr + (start + BLOCK_KEYS) // K_BLOCK) * qs
            logits_2 = _logits(q, tl.load(k_ptrs + BLOCK_KEYS * HEAD), SUM)
            here = tl.maximum(here, tl.max(logits_2, 1) * scale_2)
        top = tl.maximum(top, here)
        last = base  # E4M3 is as exact for small p as for large: all can have one base
        base = tl.maximum(here, top - REACH) if SUM == "int32" else top
        move = tl.exp2(last - base)
        shift = (base - LOG2_P)[:, None]

        p = tl.exp2(logits * scale - shift)
        p_sum = tl.sum(p, 1)
        if SUM == "scaled":
            part = out * move[:, None]
        elif SUM == "int32":
            part = tl.zeros([BLOCK_Q, HEAD], tl.int32)
        else:  # sums of a few keys leave the tensor core before they meet the sum of all
            part = tl.zeros([BLOCK_Q, HEAD], tl.float16 if SUM == "fp16" else tl.float32)
        part = _add_values(part, p, tl.load(vt_ptrs), KEY_GROUP, SUM)
        if TILES == 2:
            p_2 = tl.exp2(logits_2 * scale_2 - shift)
            p_sum += tl.sum(p_2, 1)
            part = _add_values(part, p_2, tl.load(vt_ptrs + BLOCK_KEYS), KEY_GROUP, SUM)
        total = total * move + p_sum
        if SUM == "scaled":
            out = part
        else:  # a plain sum would be folded into the product's accumulator
            out = tl.fma(out, tl.broadcast_to(move[:, None], out.shape), part.to(tl.float32))
        k_ptrs += BLOCK_KEYS * TILES * HEAD
        vt_ptrs += BLOCK_KEYS * TILES

    total -= (KEYS - TOKENS).to(tl.float32) * tl.exp2(LOG2_P - base)  # padding has logit 0
    vs = tl.load(vs_ptr + head * HEAD + d)
    out = out * vs[None, :] / total[:, None]
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * WIDTH + head * HEAD + d[None, :]
    tl.store(out_ptrs, out.to(tl.bfloat16), live)
