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


WorkOf = Callable[[float], LaunchWork]  # of S tokens


def product(n: int, k: int, written: int) -> WorkOf:
    """A product [S, k] x [k, n] of 8 bits that writes `written` bytes for each value."""
    return lambda s: LaunchWork(2 * s * n * k, s * k + n * k + written * s * n)


def rows(width: int, nbytes: int, again: int = 0) -> WorkOf:
    """A pass over tokens that moves so many bytes for each value; ours moves some `again`."""
    return lambda s: LaunchWork(moved=nbytes * s * width, again=again * s * width)


def self_attention(dim: int) -> WorkOf:
    """Attention of all tokens to all, in 8 bits."""
    return lambda s: LaunchWork(4 * s * s * dim, 5 * s * dim, exponentials=s * s * dim / HEAD_SIZE)


def cross_attention(dim: int, keys: int) -> WorkOf:
    """Attention of all tokens to so many keys of text and picture, in 16 bits."""
    return lambda s: LaunchWork(
        4 * s * keys * dim, 4 * s * dim + 8 * keys * dim, 0.0, s * keys * dim / HEAD_SIZE, 16
    )
