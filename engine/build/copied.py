"""Takes the 8-bit codes of a file over as rows of a package, without rounding them once more.

    FP8       q = code, s = scale, which a row has for itself or shares with all
    MXFP8     s = 2^(e - 127) with the largest e of the row; codes of blocks with a smaller one move
              down by the difference of exponents, which rounds what becomes subnormal
    ConvRot   the file holds W H, the package W R, and R is H with its columns reversed: so each
              group of 256 codes is reversed, and its scale stays

docs/reference/formats.md 9.1. The multipliers of such inputs are 1.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from engine.models.formats.held import CodeKind, Codes, as_bytes
from kernels.fp8 import E4M3_MAX, GROUP, INT8_MAX, TINY, Rows

MX_GROUP = 32  # columns with one exponent
_MANTISSA_BITS = 23  # of fp32, whose exponent has the offset of E8M0
_LOST = 19  # places from which on 448 rounds to zero


def rows_of(codes: Codes) -> Rows:
    """Makes rows of a package of the codes of a file, whose values were found to be finite.

    A row of zeros gets the scale that quantising would give it.
    """
    rows = _ROWS[codes.kind](codes)
    smallest = TINY / (INT8_MAX if rows.rotated else E4M3_MAX)
    rows.s[rows.s == 0] = smallest
    return rows


def _fp8(codes: Codes) -> Rows:
    return Rows(codes.q, codes.s)


def _mxfp8(codes: Codes) -> Rows:
    largest = codes.s.amax(1, keepdim=True)
    places = (largest.int() - codes.s.int()).clamp_max_(_LOST)
    places[codes.s == 0] = _LOST  # the byte 0 means 0
    index = places.mul_(256).repeat_interleave(MX_GROUP, 1).add_(as_bytes(codes.q))
    moved = torch.from_numpy(np.take(_moved(), index.numpy(), mode="clip"))
    scale = (largest.int() << _MANTISSA_BITS).view(torch.float32).flatten()
    return Rows(moved.view(torch.float8_e4m3fn), scale)


def _convrot(codes: Codes) -> Rows:
    reversed_ = codes.q.unflatten(1, (-1, GROUP)).flip(2).flatten(1)
    return Rows(reversed_, codes.s, rotated=True)


@cache
def _moved() -> NDArray[np.uint8]:
    """The bytes of E4M3 codes whose values are divided by 2^place: [(_LOST + 1) * 256]."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    smaller = torch.stack([values * 2.0**-place for place in range(_LOST)])
    bytes_ = as_bytes(smaller.to(torch.float8_e4m3fn))
    return torch.cat([bytes_.flatten(), torch.zeros(256, dtype=torch.uint8)]).numpy()


_ROWS: Mapping[CodeKind, Callable[[Codes], Rows]] = {
    "fp8": _fp8,
    "mxfp8": _mxfp8,
    "convrot": _convrot,
}
