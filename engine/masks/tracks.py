"""Where each person of a mask is in each frame: boxes, areas, and who overlaps whom later.

A box is x1, y1, x2, y2 in pixels, the last ones exclusive: its height is y2 - y1 and its foot line
y2. Source: docs/reference/masks.md 6.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.flow import Check, go_on
from engine.masks.colours import CLASSES, numbers_of

PRESENT = 0.0005  # of the frame: less of a person is nobody

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Tracks:
    """The persons of a mask of T frames of `size`."""

    size: tuple[int, int]  # H, W
    persons: tuple[str, ...]  # colours
    boxes: Floats  # [T, P, 4]; NaN where somebody is not seen
    areas: NDArray[np.int64]  # [T, P] pixels, those of who is not seen too
    overlaps: Floats  # [T, P, P] IoU of person i in frame t - 1 and j in frame t; 0 in frame 0

    @property
    def is_seen(self) -> NDArray[np.bool_]:  # [T, P]
        return ~np.isnan(self.boxes[..., 0])


def track(frames: Tensor, persons: Sequence[str], check: Check = go_on) -> Tracks:
    """Measures the persons of painted frames [T, H, W, 3] u8, each 0 or 255."""
    count, (height, width), people = len(frames), frames.shape[1:3], len(persons)
    colours = [CLASSES[name] for name in persons]
    boxes = np.full((count, people, 4), np.nan)
    areas = np.zeros((count, people), np.int64)
    overlaps = np.zeros((count, people, people))
    before: Bytes | None = None
    for number in range(count):
        check()
        now: Bytes = numbers_of(frames[number]).numpy()
        pairs = np.bincount((now if before is None else now + 8 * before).ravel(), minlength=64)
        shared = pairs.reshape(8, 8)[:, colours]  # [8, P]: colours before, persons now
        areas[number] = shared.sum(0)
        if before is not None and people:
            both = shared[colours]
            either = areas[number - 1][:, None] + areas[number] - both
            overlaps[number] = both / np.maximum(either, 1)
        for person, colour in enumerate(colours):
            if areas[number, person] >= PRESENT * height * width:
                boxes[number, person] = box_of(now == colour)
        before = now
    return Tracks((height, width), tuple(persons), boxes, areas, overlaps)


def box_of(is_person: NDArray[np.bool_]) -> Floats:
    """The box [4] around the pixels that are set; of none it is 0, 0, 0, 0."""
    left, top, width, height = cv2.boundingRect(is_person.astype(np.uint8))
    return np.array([left, top, left + width, top + height], np.float64)
