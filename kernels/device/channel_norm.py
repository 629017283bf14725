"""Device code of kernels/channel_norm.py: a program owns some positions of one frame.

It reads and writes the history of the same positions, and no other program touches them.
"""

import triton
import triton.language as tl


@triton.jit
def tile(frame, positions, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns offsets of this program's values in a frame, and which exist: [ROWS, BLOCK_C]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    start = tl.cast(frame, tl.int64) * positions * C
    return start + row[:, None] * C + c[None, :], (row < positions)[:, None] & (c < C)[None, :]


@triton.jit
def write_window(
    x, gamma_ptr, window_ptr, history_ptr, positions,
    C: tl.constexpr, ROOT: tl.constexpr, SHORTEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes norm and SiLU of x [ROWS, BLOCK_C] fp32, 0 where no value is; then the history."""
    frame = tl.program_id(1)
    frames = tl.num_programs(1)
    c = tl.arange(0, BLOCK_C)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0)
    length = tl.sqrt(tl.sum(x * x, axis=1))
    length = tl.maximum(length, SHORTEST, propagate_nan=tl.PropagateNan.ALL)
    y = x * (ROOT / length)[:, None] * gamma[None, :]
    y = (y / (1 + tl.exp(-y))).to(window_ptr.dtype.element_ty)
    at, live = tile(frame + 2, positions, C, ROWS, BLOCK_C)
    tl.store(window_ptr + at, y, mask=live)
    slot = frame + 2 - frames
    if slot >= 0:  # one of the last two frames
        at, live = tile(slot, positions, C, ROWS, BLOCK_C)
        past = tl.load(history_ptr + at, mask=live, other=0.0)
        tl.store(window_ptr + at, past, mask=live)
        tl.store(history_ptr + at, y, mask=live)
        if frames == 1:  # the older frame of the history is nobody else's
            at, live = tile(0, positions, C, ROWS, BLOCK_C)
            oldest = tl.load(history_ptr + at, mask=live, other=0.0)
            tl.store(window_ptr + at, oldest, mask=live)
            tl.store(history_ptr + at, past, mask=live)


@triton.jit
def channel_norm_kernel(
    x_ptr, bias_ptr, gamma_ptr, window_ptr, history_ptr, positions,
    C: tl.constexpr, ROOT: tl.constexpr, SHORTEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    at, live = tile(tl.program_id(1), positions, C, ROWS, BLOCK_C)
    c = tl.arange(0, BLOCK_C)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0)
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias[None, :]
    write_window(x, gamma_ptr, window_ptr, history_ptr, positions, C, ROOT, SHORTEST, ROWS, BLOCK_C)


@triton.jit
def channel_residual_norm_kernel(
    x_ptr, branch_ptr, bias_ptr, gamma_ptr, window_ptr, history_ptr, positions,
    C: tl.constexpr, ROOT: tl.constexpr, SHORTEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    at, live = tile(tl.program_id(1), positions, C, ROWS, BLOCK_C)
    c = tl.arange(0, BLOCK_C)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0)
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + at, mask=live, other=0.0).to(tl.float32)
    rounded = (x + branch + bias[None, :]).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + at, rounded, mask=live)
    write_window(
        rounded.to(tl.float32), gamma_ptr, window_ptr, history_ptr, positions,
        C, ROOT, SHORTEST, ROWS, BLOCK_C,
    )  # fmt: skip
