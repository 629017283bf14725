"""Device code of kernels/cross_attention.py, which has the formulas and layouts."""

import triton
import triton.language as tl


@triton.jit
def _attend(
    q, scale, k_ptr, v_ptr, bias_ptr, KEYS, WIDTH, HEAD: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """Returns softmax(q @ k * scale + bias) @ v over one context, [BLOCK_Q, HEAD] fp32."""
    BLOCK_Q: tl.constexpr = q.shape[0]
    keys = tl.arange(0, BLOCK_KEYS)
    d = tl.arange(0, HEAD)
    k_places = keys[None, :] * WIDTH + d[:, None]  # [K, n]; half the registers of pointers
    v_places = keys[:, None] * WIDTH + d[None, :]  # [n, K]

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    for start in tl.range(0, KEYS, BLOCK_KEYS):
        bias = tl.load(bias_ptr + start + keys)
        logits = tl.dot(q, tl.load(k_ptr + k_places)) * scale[:, None] + bias[None, :]
        new_top = tl.maximum(top, tl.max(logits, 1))  # the first tile has a key of finite bias
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(logits - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + v_places)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
        top = new_top
        k_ptr += BLOCK_KEYS * WIDTH
        v_ptr += BLOCK_KEYS * WIDTH
    return out * (1 / total)[:, None]


@triton.jit
def cross_attention_kernel(
    q_ptr, rms_inv_ptr, text_k_ptr, text_v_ptr, text_bias_ptr,
    vision_k_ptr, vision_v_ptr, vision_bias_ptr, out_ptr,
    TOKENS, TEXT_KEYS, VISION_KEYS, WIDTH,
    HEAD: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_Q
    column = tl.program_id(1) * HEAD
    tile = first.to(tl.int64) * WIDTH + column
    row = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, HEAD)

    token = tl.minimum(row, TOKENS - 1 - first)  # rows past the end repeat the last one
    q = tl.load(q_ptr + tile + (token[:, None] * WIDTH + d[None, :]))
    scale = tl.load(rms_inv_ptr + first + token) * LOGIT_SCALE
    text = _attend(
        q,
        scale,
        text_k_ptr + column,
        text_v_ptr + column,
        text_bias_ptr,
        TEXT_KEYS,
        WIDTH,
        HEAD,
        BLOCK_KEYS,
    ).to(tl.bfloat16)  # half the registers, for as long as the other loop runs
    vision = _attend(
        q, scale, vision_k_ptr + column, vision_v_ptr + column, vision_bias_ptr,
        VISION_KEYS, WIDTH, HEAD, BLOCK_KEYS,
    )  # fmt: skip
    out = (text.to(tl.float32) + vision).to(tl.bfloat16)
    live = row[:, None] < TOKENS - first
    tl.store(out_ptr + tile + (row[:, None] * WIDTH + d[None, :]), out, live)
