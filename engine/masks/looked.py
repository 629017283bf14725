"""Joints of the persons of a mask, by a detector of 2D keypoints that is asked when one is needed.

A detection belongs to a person whose mask its box and its points lie on. Limits:
docs/reference/masks.md 6.3.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.flow import Check
from engine.masks.colours import CLASSES, numbers_of
from engine.masks.tracks import Floats, box_of
from engine.pose.arrays import Frame, Frames
from engine.pose.boxes import Detection

# frames [H, W, 3] u8 of one clip, in order -> what is seen in each; raises `MissingModel` at once
Look: TypeAlias = Callable[[Frames], Iterator[Detection]]

JOINTS = 18  # as OpenPose orders them
_LEAST_IOU = 0.3  # of the boxes of detection and mask
_LEAST_SHARE = 0.5  # of the points that are seen, on the mask


class Looked:
    """The frames [T, H, W, 3] u8 of a clip or a picture, each looked at once, when first asked."""

    def __init__(self, look: Look, frames: Tensor, check: Check) -> None:
        self._look, self._frames, self._check = look, frames, check
        self._found: dict[int, Detection] = {}

    def joints(self, colour: str, numbers: Sequence[Tensor], first: int = 0) -> Floats:
        """Finds the joints [n, 18, 2] in pixels of the person of a colour, NaN unseen.

        `numbers` [n] of [H, W] u8 are the masks from frame `first` on. Raises `MissingModel`,
        `BadCheckpoint`, and what `check` raises.
        """
        masks = [(one == CLASSES[colour]).numpy() for one in numbers]
        found = self._at(range(first, first + len(masks)))
        return np.stack([joints_of(*pair) for pair in zip(found, masks, strict=True)])

    def _at(self, span: range) -> list[Detection]:
        fresh = [number for number in span if number not in self._found]
        if fresh:
            self._found |= zip(fresh, self._look(map(self._frame, fresh)), strict=True)
        return [self._found[number] for number in span]

    def _frame(self, number: int) -> Frame:
        self._check()
        return self._frames[number].numpy()


def masks_of(painted: Tensor) -> list[Tensor]:
    """Painted frames [n, H, W, 3] u8 -> numbers of their colours, [n] of [H, W] u8."""
    return [numbers_of(frame) for frame in painted]


def joints_of(detection: Detection, is_person: NDArray[np.bool_]) -> Floats:
    """Joints [18, 2] in pixels of the person of a mask [H, W]; all NaN if nobody lies on it.

    A joint outside of the picture is a guess, and unseen.
    """
    height, width = is_person.shape
    nobody = np.full((JOINTS, 2), np.nan)
    if not is_person.any() or not len(detection.boxes):
        return nobody
    points = detection.keypoints.body[:, :JOINTS].astype(np.float64) * [width, height]
    is_in = ((points >= 0) & (points < [width, height])).all(-1)
    seen = detection.keypoints.visible[:, :JOINTS] & is_in  # [P, 18]
    columns, rows = np.moveaxis(np.where(seen[..., None], points, 0).astype(int), -1, 0)
    on_mask = (seen & is_person[rows, columns]).sum(1) / np.maximum(seen.sum(1), 1)
    overlap = _iou(detection.boxes.astype(np.float64), box_of(is_person))
    fits = np.where((overlap >= _LEAST_IOU) & (on_mask >= _LEAST_SHARE), overlap * on_mask, 0)
    best = int(fits.argmax())
    return np.where(seen[best][:, None], points[best], np.nan) if fits[best] > 0 else nobody


def _iou(boxes: Floats, box: Floats) -> Floats:
    """The overlaps [n] of boxes [n, 4] with a box [4]."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = (high - low).clip(0).prod(1)
    return shared / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - shared)
