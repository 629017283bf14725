"""Device code of kernels/modulate.py: one program owns one row, from its loads to its codes."""

import triton
import triton.language as tl

from kernels.device.fp8 import store_row


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
def quantize_kernel(
    x_ptr, q_ptr, s_ptr,
    D: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    live = d < D
    x = tl.load(x_ptr + row * D + d, mask=live, other=0.0).to(tl.float32)
    store_row(x, live, row, q_ptr, s_ptr, D, LIMIT, TINY, VECTOR=8)
