"""Boxes x1, y1, x2, y2 in pixels: how much two of them share, and those of masks."""

import numpy as np

from engine.pose.arrays import Bools, Doubles


def overlap(a: Doubles, b: Doubles) -> float:
    """Intersection over union of two boxes [4]; 0 if one of them has no number in it."""
    if not (np.isfinite(a[:4]).all() and np.isfinite(b[:4]).all()):
        return 0.0
    shared = float(np.maximum(np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2]), 0).prod())
    joined = area(a) + area(b) - shared
    return shared / joined if joined > 0 else 0.0


def area(box: Doubles) -> float:
    return float(np.maximum(box[2:4] - box[:2], 0).prod())


def centre(box: Doubles) -> Doubles:
    """x and y [2]."""
    return (box[:2] + box[2:4]) / 2


def height(box: Doubles) -> float:
    return float(box[3] - box[1])


def widened(box: Doubles, share: float) -> Doubles:
    """The box with `share` of its sides more on each side."""
    more = share * (box[2:4] - box[:2])
    return np.concatenate([box[:2] - more, box[2:4] + more])


def box_of(mask: Bools) -> Doubles:
    """The box [4] around what is True in a mask [h, w]; NaN if nothing is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.full(4, np.nan)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
