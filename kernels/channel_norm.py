"""Norm over channels and SiLU, written where a causal convolution in time reads.

    x = x + branch + bias                                   residual form: x changes in place
    x' = x + bias                                           plain form: x stays as it is
    y = silu(x / max(|x|, 1e-12) * sqrt(C) * gamma)         |x|: length of a position's channels
    window = history | y;  history = the last two frames of the window

A convolution over time wants the two frames before its own in front of them. Here they come from
the history and what the next call needs goes there, in the pass that makes y: nothing is joined or
copied elsewhere, and all convolutions of a network can share the memory of one window. The bias is
that of the convolution which made x or branch: added here it costs no pass of its own.

Shapes    x, branch [n, h, w, C];  bias, gamma [C] fp32
          -> window [2 + n, h, w, C], history [2, h, w, C];  all but the vectors in one float type
Numerics  fp32 between load and store; a residual sum is rounded before its norm is taken
Traffic   frames of h w C values: 2 n + 6 in the plain form, 4 n + 6 in the residual form
"""

import math
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arch import ARCHS
from kernels.signature import Axis, require
from kernels.spec import Bank, KernelError, KernelSpec, Tuning

SHORTEST = 1e-12  # a shorter length counts as this
PAST = 2  # frames that a convolution over three sees before its own
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_TILE = 4096  # values that a program works on

# x, branch or None, bias, gamma, window, history
ChannelNorm: TypeAlias = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], None]


def channel_norm_reference(
    x: Tensor, branch: Tensor | None, bias: Tensor, gamma: Tensor, window: Tensor, history: Tensor
) -> None:
    """The definition, in plain PyTorch, for fp32 too. Changes x if there is a branch."""
    root = math.sqrt(x.shape[-1])
    # One frame at a time: what is computed in fp32 is then no larger than a frame.
    for number, (frame, place) in enumerate(zip(x, window[PAST:], strict=True)):
        value = frame + bias if branch is None else frame + branch[number].float() + bias
        if branch is not None:
            value = frame.copy_(value).float()
        length = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
        unit = value * (root / length.clamp_min_(SHORTEST))
        place.copy_(F.silu(unit.mul_(gamma), inplace=True))
    carry(window, history)


def carry(window: Tensor, history: Tensor) -> None:
    """Puts the past before a window's new frames, and keeps its last two frames for the next."""
    window[:PAST] = history
    history.copy_(window[-PAST:])


def channel_norm(
    bank: Bank,
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor,
    gamma: Tensor,
    window: Tensor,
    history: Tensor,
) -> None:
    """Does what the reference does, for bf16 and fp16. Raises `KernelError` for other types and
    wrong shapes.
    """
    require("channel_norm", "x", x, (Axis("n"), Axis("h"), Axis("w"), Axis("C")))
    frames, height, width, channels = x.shape
    spec = channel_norm_spec(channels, x.dtype, has_branch=branch is not None)
    if branch is not None:
        require(spec.name, "branch", branch, x.shape, x.dtype)
    require(spec.name, "bias", bias, (channels,), torch.float32)
    require(spec.name, "gamma", gamma, (channels,), torch.float32)
    require(spec.name, "window", window, (PAST + frames, *x.shape[1:]), x.dtype)
    require(spec.name, "history", history, (PAST, *x.shape[1:]), x.dtype)
    positions = height * width
    grid = -(-positions // bank.tuning(spec).blocks["ROWS"]), frames
    inputs = (x,) if branch is None else (x, branch)
    bank.launch(spec, grid, *inputs, bias, gamma, window, history, positions)


@cache
def channel_norm_spec(channels: int, dtype: torch.dtype, *, has_branch: bool) -> KernelSpec:
    if dtype not in TYPES:
        raise KernelError(f"channel_norm is made for {' and '.join(map(str, TYPES))}, not {dtype}")
    kind, form = TYPES[dtype], "residual_norm" if has_branch else "norm"
    inputs = f"*{kind} *{kind}" if has_branch else f"*{kind}"
    block = 1 << (channels - 1).bit_length()
    blocks = {"ROWS": max(1, _TILE // block), "BLOCK_C": block}
    return KernelSpec(
        name=f"channel_{form}.{kind}_{channels}",
        device=f"channel_norm:channel_{form}_kernel",
        signature=f"{inputs} *fp32 *fp32 *{kind} *{kind} i32",
        constants={"C": channels, "ROOT": math.sqrt(channels), "SHORTEST": SHORTEST},
        tuning={arch: Tuning(4, 1, blocks, arch.toolkits[0]) for arch in ARCHS},
    )


# The kernels of the video VAE's decoder.
CHANNEL_NORM = {
    (channels, dtype, has_branch): channel_norm_spec(channels, dtype, has_branch=has_branch)
    for channels in (96, 192, 384)
    for dtype in TYPES
    for has_branch in (False, True)
}
