"""SMPL joints -> the thirteen coloured bones of each person (docs/reference/pose.md 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from engine.pose.arrays import Floats

SMPL_JOINTS = 24
FARTHEST = 1e6  # mm; a coordinate beyond a kilometre, infinite or NaN is no measurement

_ENDS = np.array([  # SMPL joints, in drawing order: where two bones tie, the earlier one shows
    (12, 17), (17, 19), (19, 21),  # right arm
    (12, 16), (16, 18), (18, 20),  # left arm
    (12, 2), (2, 5), (5, 8),  # right leg
    (12, 1), (1, 4), (4, 7),  # left leg
    (12, 15),  # head
])  # fmt: skip


def _material(colours: ArrayLike) -> Floats:
    """RGB 0..255 -> the colour that light falls on, 0.15..1."""
    return (np.asarray(colours, np.float64) / 300 + 0.15).astype(np.float32)


SINGLE = _material([
    (255, 0, 0), (255, 85, 0), (255, 170, 0),
    (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (180, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (150, 150, 150),
])  # fmt: skip
PASTEL = _material([
    (255, 150, 150), (255, 180, 140), (255, 215, 150),
    (180, 230, 240), (160, 200, 255), (100, 120, 255),
    (200, 255, 100), (100, 255, 100), (140, 255, 180),
    (120, 140, 255), (180, 90, 255), (190, 120, 255),
    (210, 210, 210),
])  # fmt: skip
SATURATED = _material([
    (255, 20, 20), (255, 60, 0), (255, 110, 0),
    (0, 230, 255), (0, 130, 255), (0, 70, 255),
    (160, 255, 40), (0, 255, 50), (0, 255, 100),
    (0, 0, 255), (80, 0, 255), (160, 0, 255),
    (130, 130, 130),
])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bones:
    """The capsules of one frame, in drawing order. Millimetres, camera space."""

    start: Floats  # [B, 3]
    end: Floats  # [B, 3]
    rgb: Floats  # [B, 3] 0..1


def palettes(persons: int) -> Sequence[Floats]:
    """A palette [13, 3] for each person: `SINGLE` for one, else pastel and saturated in turn."""
    return [SINGLE] if persons == 1 else [(PASTEL, SATURATED)[i % 2] for i in range(persons)]


def bones(joints: Floats, palettes: Sequence[Floats]) -> Bones:
    """The bones of one frame. joints [P, 24, 3] mm; palettes: one [13, 3] for each person.

    A bone is left out if either end is missing: x + y + z is exactly 0, or not a measurement.
    """
    known = np.all(np.abs(joints) < FARTHEST, axis=-1)  # [P, 24]; False for NaN
    safe = np.where(known[..., None], joints, 0).astype(np.float32)
    known &= (safe[..., 0] + safe[..., 1]) + safe[..., 2] != 0
    drawn = np.all(known[:, _ENDS], axis=-1)  # [P, 13]
    rgb = np.stack(palettes) if len(palettes) else np.zeros((0, len(_ENDS), 3), np.float32)
    return Bones(safe[:, _ENDS[:, 0]][drawn], safe[:, _ENDS[:, 1]][drawn], rgb[drawn])
