"""Whether the colours of a region are brought back, and how: one affine map of CIE LAB a region.

Limits and their sources: docs/reference/masks.md 5.4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.drift.look import Look, Triple, to_lab, to_rgb
from engine.drift.regions import Bytes, Scale, share_of
from engine.flow import DriftOutcome

LEAST = 1.5  # dE: less is left as it is
_FARTHEST = 12.0  # dE that a correction moves a mean by
_GAINS = 0.8, 1.25
_SHARE = 1.6  # times: a region that fills the frame otherwise shows other things


@dataclass(frozen=True, slots=True)
class Correction:
    """LAB becomes (LAB - mean) * gain + mean + shift."""

    mean: Triple  # of the region as it came
    gain: Triple
    shift: Triple


@dataclass(frozen=True, slots=True)
class Aim:
    """What a region shall look like."""

    mean: Triple
    spread: Triple | None  # None: the spread stays what it is
    look: Look | None  # of the stretch that it comes from; None: of the very frames at hand


def outcome_of(found: Look | None, aim: Aim | None, scale: Scale, *, is_cut: bool) -> DriftOutcome:
    """Says whether a region is to be corrected, and else why not.

    `is_cut`: something else is shown since the stretch that the aim is from.
    """
    if found is None:
        return "absent"
    if aim is None:
        return "new"
    if found.area < scale.least or (aim.look is not None and aim.look.area < scale.least):
        return "small"
    if aim.look is not None and is_cut:
        return "cut"
    if aim.look is not None and _times(found.share, aim.look.share) > _SHARE:
        return "share"
    return "corrected" if math.dist(found.mean, aim.mean) >= LEAST else "steady"


def correction_to(found: Look, aim: Aim) -> Correction:
    """Makes the map that takes a look to its aim, as far as the limits let it."""
    shift = aim.mean - found.mean
    shift = shift * min(1.0, _FARTHEST / float(np.linalg.norm(shift)))
    gain = np.ones(3)
    if aim.spread is not None:
        has_spread = found.spread > 0
        gain[has_spread] = (aim.spread[has_spread] / found.spread[has_spread]).clip(*_GAINS)
    return Correction(found.mean, gain, shift)


def correct(
    frame: Bytes, owners: Bytes, corrections: Mapping[int, Correction], scale: Scale
) -> Bytes:
    """Corrects the regions of a frame [H, W, 3] u8 whose pixels have `owners` [H, W].

    Pixels that no correction reaches keep their values.
    """
    lab = to_lab(frame)
    moved, reached = lab.copy(), np.zeros_like(owners)
    for owner, correction in corrections.items():
        share = share_of(owners, owner, scale)
        step = cv2.transform(lab, _step(correction))
        moved += cv2.multiply(step, cv2.merge([share] * 3), scale=1 / 255, dtype=cv2.CV_32F)
        reached |= share
    return np.asarray(cv2.copyTo(to_rgb(moved), reached, frame.copy()), np.uint8)


def _step(correction: Correction) -> NDArray[np.float64]:
    """What a correction adds to LAB, as a map of it [3, 4]: LAB * (gain - 1) + a constant."""
    less = correction.gain - 1
    return np.column_stack([np.diag(less), correction.shift - correction.mean * less])


def _times(one: float, other: float) -> float:
    return max(one, other) / min(one, other)
