"""The work of a kernel, whatever the kernel: operations, bytes and exponentials for S tokens."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.config import HEAD_SIZE


@dataclass(frozen=True, slots=True)
class LaunchWork:
    """The work of one launch."""

    flop: float = 0.0
    moved: float = 0.0  # bytes: every input read once, every output written once
    again: float = 0.0  # bytes that our kernels move beyond that
    exponentials: float = 0.0
    bits: int = 8  # of the operands of its products
    # of kernels with a main loop:
    rows: float = 0.0  # of the result that tiles cover: tokens
    columns: int = 0  # features, or heads
    ending: float = 0.0  # bytes of `moved` that a program moves while it multiplies nothing


WorkOf = Callable[[float], LaunchWork]  # of S tokens


def product(n: int, k: int, written: int) -> WorkOf:
    """A product [S, k] x [k, n] of 8 bits that moves `written` bytes for each value."""
    ending = written * n
    return lambda s: LaunchWork(
        2 * s * n * k, s * k + n * k + ending * s, rows=s, columns=n, ending=ending * s
    )


def rows(width: int, nbytes: int, again: int = 0) -> WorkOf:
    """A pass over tokens that moves so many bytes for each value; ours moves some `again`."""
    return lambda s: LaunchWork(moved=nbytes * s * width, again=again * s * width)


def self_attention(dim: int) -> WorkOf:
    """Attention of all tokens to all, in 8 bits. It begins with q and ends with the result."""
    heads = dim // HEAD_SIZE
    return lambda s: LaunchWork(
        4 * s * s * dim, 5 * s * dim,
        exponentials=s * s * heads, rows=s, columns=heads, ending=3 * s * dim,
    )  # fmt: skip


def cross_attention(dim: int, keys: int) -> WorkOf:
    """Attention of all tokens to so many keys of text and picture, in 16 bits."""
    heads = dim // HEAD_SIZE
    return lambda s: LaunchWork(
        4 * s * keys * dim, 4 * s * dim + 8 * keys * dim,
        exponentials=s * keys * heads, bits=16, rows=s, columns=heads, ending=4 * s * dim,
    )  # fmt: skip
