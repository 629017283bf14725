"""Film cuts: where a clip goes on with another picture, and nobody can be followed across.

Source: docs/reference/masks.md 7.6.
"""

from collections.abc import Sequence

import numpy as np

from engine.masks.tracklets import Chain
from engine.pose.arrays import Frame

_LEAST = 60  # levels that a pixel changes by, in the mean of the picture
_EVERY = 4  # pixel of a row and a column is looked at


def is_cut(before: Frame, after: Frame) -> bool:
    """Tells whether two neighbouring frames [H, W, 3] u8 are of different pictures."""
    a, b = (one[::_EVERY, ::_EVERY].astype(np.int16) for one in (before, after))
    return float(np.abs(a - b).mean()) > _LEAST


def all_new(pieces: Sequence[Chain]) -> list[int]:
    """Frames at which everybody of the frame before is gone and everybody is new."""
    found = []
    for now in sorted({piece.frames[0] for piece in pieces}):
        ending = any(piece.frames[-1] == now - 1 for piece in pieces)
        spanning = any(piece.frames[0] < now <= piece.frames[-1] for piece in pieces)
        if ending and not spanning:
            found.append(now)
    return found
