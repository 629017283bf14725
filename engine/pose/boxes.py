"""Boxes of persons: the code around the two detector networks, YOLOX and YOLOv10.

    YOLOX    (DWPose)   letterboxed BGR 0..255 -> raw rows -> decoded boxes -> persons
    YOLOv10  (ViTPose)  stretched RGB 0..1     -> final rows -> one person

Boxes are x1, y1, x2, y2 in pixels of the picture and are never clipped to it. Source:
docs/reference/pose.md 3.2, 3.3 and 12.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.errors import BadMedia
from engine.pose.arrays import Doubles, Floats, Frame, Indices
from engine.pose.keypoints import Keypoints

SIDE = 640  # of the picture both networks take
_PAD = 114
_STRIDES = (8, 16, 32)
_PERSON = 0  # class
_YOLOX_SCORE, _YOLOX_IOU, _YOLOX_PERSON_SCORE = 0.1, 0.45, 0.3
_YOLO10_SCORE, _YOLO10_IOU = 0.05, 0.5
_MIN_SHARE = 0.4  # of the longest person's longer side
_MIN_PIXELS = 10


@dataclass(frozen=True, slots=True)
class Detection:
    """The answer of a 2D detector for one frame.

    Without a box the keypoints are still those of one person, looked for in the whole picture.
    """

    keypoints: Keypoints
    boxes: Floats  # [n, 4] x1, y1, x2, y2, best first; n = 0: nobody was found


def checked(frame: Frame) -> Frame:
    """The frame itself. Raises `BadMedia` unless it is an RGB picture of bytes."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise BadMedia(f"A frame is {frame.dtype} {list(frame.shape)}; expected uint8 [H, W, 3].")
    return frame


def nms(boxes: NDArray, scores: NDArray, limit: float, edge: float = 0.0) -> Indices:
    """The rows to keep, best first: a kept box removes every later one with IoU > `limit`.

    boxes [n, 4] x1, y1, x2, y2; scores [n]. Of equal scores the first row goes first. A removed
    box removes nothing. `edge` is added to every width and height. IoU 0/0 removes nothing.
    """
    x1, y1, x2, y2 = boxes.T
    areas = (x2 - x1 + edge) * (y2 - y1 + edge)
    waiting = np.argsort(-scores, kind="stable")
    kept: list[np.intp] = []
    while waiting.size:
        best, rest = waiting[0], waiting[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[rest]) - np.maximum(x1[best], x1[rest]) + edge
        height = np.minimum(y2[best], y2[rest]) - np.maximum(y1[best], y1[rest]) + edge
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = shared / (areas[best] + areas[rest] - shared)
        waiting = rest[~(iou.astype(np.float64) > limit)]
    return np.array(kept, dtype=np.intp)


def letterbox_size(height: int, width: int) -> tuple[int, int, float]:
    """Height and width of the picture inside the 640 x 640 square, and its ratio to the original.

    Truncation makes the long side 639 for some sizes, as in the official code.
    """
    ratio = min(SIDE / height, SIDE / width)
    return max(int(height * ratio), 1), max(int(width * ratio), 1), ratio


def letterbox(bgr: Frame) -> tuple[Floats, float]:
    """[H, W, 3] u8 BGR -> YOLOX input [1, 3, 640, 640] fp32 0..255, and the ratio."""
    height, width, ratio = letterbox_size(*bgr.shape[:2])
    square = np.full((SIDE, SIDE, 3), _PAD, np.uint8)
    square[:height, :width] = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(square.transpose(2, 0, 1)[None], np.float32), ratio


def decode_yolox(raw: Floats, ratio: float) -> tuple[Floats, Floats]:
    """Raw [1, 8400, 85] -> boxes [8400, 4] px of the picture and class scores [8400, 80]."""
    grid, stride = _anchors()
    rows = raw[0]
    centre = (rows[:, :2] + grid) * stride
    with np.errstate(over="ignore"):  # an absurd size becomes inf and is dropped later
        half = np.exp(rows[:, 2:4]) * stride / 2
    boxes = np.concatenate([centre - half, centre + half], axis=1) / ratio
    return np.asarray(boxes, np.float32), rows[:, 4:5] * rows[:, 5:]


def yolox_objects(boxes: Floats, scores: Floats) -> Doubles:
    """Objects of all classes [k, 6]: box, score, class; classes ascend, scores descend in each."""
    sane = np.isfinite(boxes).all(1)
    found = [np.empty((0, 6))]
    for kind in np.flatnonzero((scores > _YOLOX_SCORE).any(0)):
        rows = np.flatnonzero(sane & (scores[:, kind] > _YOLOX_SCORE))
        rows = rows[nms(boxes[rows], scores[rows, kind], _YOLOX_IOU, edge=1.0)]
        kinds = np.full((len(rows), 1), kind)
        found.append(np.concatenate([boxes[rows], scores[rows, kind, None], kinds], axis=1))
    return np.concatenate(found, dtype=np.float64)


def yolox_persons(objects: Doubles) -> Doubles:
    """Boxes [n, 4] of the persons among the objects, by descending score."""
    return objects[(objects[:, 5] == _PERSON) & (objects[:, 4] > _YOLOX_PERSON_SCORE), :4]


def stretch(picture: Floats) -> Floats:
    """[H, W, 3] fp32 0..1 RGB -> YOLOv10 input [1, 3, 640, 640]; the aspect is not kept."""
    square = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(square.transpose(2, 0, 1)[None], np.float32)


def yolo10_objects(rows: Floats, height: int, width: int) -> Doubles:
    """Network rows [n, 6] (box in the square, score, class) -> whole-pixel objects [k, 6].

    All classes suppress each other, so something else may delete a person: as upstream does.
    """
    rows = rows[np.isfinite(rows).all(1) & (rows[:, 4] > _YOLO10_SCORE)]
    scale = np.array([width / SIDE, height / SIDE], np.float32)
    corner, far = rows[:, :2] * scale, rows[:, 2:4] * scale
    # Corner and size are truncated toward zero, each by itself; the far corner follows.
    corner, size = np.trunc(corner).astype(np.float64), np.trunc(far - corner).astype(np.float64)
    objects = np.concatenate([corner, corner + size, rows[:, 4:]], axis=1, dtype=np.float64)
    return objects[nms(objects[:, :4], rows[:, 4], _YOLO10_IOU)]


def yolo10_person(objects: Doubles) -> Doubles | None:
    """Box and score [5] of the largest person, or None; one much shorter than the best is passed.

    In descending score a box takes over if its area is larger and its longer side at least 0.4 of
    the reference: the longest of all persons at first, then that of the box chosen last.
    """
    persons = objects[objects[:, 5] == _PERSON]
    sizes = persons[:, 2:4] - persons[:, :2]
    longest = sizes.max(initial=0.0)
    best, best_area = None, 0.0
    for person, size in zip(persons, sizes):
        if size.prod() > best_area and size.max() >= _MIN_SHARE * longest:
            best, best_area, longest = person[:5], size.prod(), size.max()
    return best


def usable(person: Doubles | None) -> Doubles | None:
    """The person, unless it is too small to look for keypoints in. No other one is tried."""
    if person is None or (person[2:4] - person[:2] < _MIN_PIXELS).any():
        return None
    return person


def whole(height: int, width: int) -> Doubles:
    """Box [4] of the whole picture, in which keypoints are looked for when nobody was found."""
    return np.array([0.0, 0.0, width, height])


@cache
def _anchors() -> tuple[Floats, Floats]:
    """Grid positions [8400, 2] as x, y and strides [8400, 1]: fine to coarse, row by row."""
    grids, strides = [], []
    for stride in _STRIDES:
        y, x = np.divmod(np.arange((SIDE // stride) ** 2), SIDE // stride)
        grids.append(np.stack([x, y], axis=1))
        strides.append(np.full((len(x), 1), stride))
    return np.concatenate(grids).astype(np.float32), np.concatenate(strides).astype(np.float32)
