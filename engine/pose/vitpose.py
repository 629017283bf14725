"""ViTPose: one person by YOLOv10, then 133 whole-body keypoints, read from heat maps.

    frame -> stretched square -> YOLOv10 -> one box
          -> 3 to 4 crop through whole pixels, 256 x 192 -> network -> heat maps [133, 64, 48]
          -> peaks, refined below a cell (DARK) -> picture pixels -> OpenPose body -> Keypoints

This is the recipe of the ComfyUI worker. Face and hand points are drawn whatever their score.
Source: docs/reference/pose.md 3.3 and 12.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from engine.pose.arrays import Doubles, Floats, Frame, Frames
from engine.pose.boxes import (
    Detection,
    checked,
    stretch,
    usable,
    whole,
    yolo10_objects,
    yolo10_person,
)
from engine.pose.keypoints import Keypoints
from engine.pose.onnx import Net, OnnxNetwork

WIDTH, HEIGHT = 192, 256  # of the crop
MAP_WIDTH, MAP_HEIGHT = 48, 64
POINTS = 133  # COCO whole body
_PADDING = 1.25
_UNIT = 200.0  # pixels in one unit of scale
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_BLUR, _FLOOR = 11, 1e-10
_VISIBLE = 0.3
# Each body point is the mean of two; the last two of the 20 (toes) are dropped.
_BODY_A = [0, 6, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 17, 20]
_BODY_B = [0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 18, 21]
_DRAWN = 18
_FACE, _LEFT_HAND, _RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)


@dataclass(frozen=True, slots=True)
class VitPose:
    """`find` is YOLOv10, `pose` the keypoint network; both are called with one picture."""

    find: Net
    pose: Net

    def detect(self, frames: Frames) -> Iterator[Detection]:
        """Finds the largest person of each frame ([H, W, 3] u8 RGB). Raises `BadMedia`.

        The frames are those of one clip, in order: a lost body is taken from the frame before.
        """
        last: Floats | None = None
        for frame in frames:
            picture = to_unit(checked(frame))
            height, width = picture.shape[:2]
            rows = self.find(stretch(picture))[0][0]
            person = usable(yolo10_person(yolo10_objects(rows, height, width)))
            box = whole(height, width) if person is None else person[:4]
            centre, scale = region(box)
            heat = self.pose(to_input(crop(picture, *corners(centre, scale))))[0][0]
            points = locate(heat, centre, scale)
            last = body(points, last, height, width)
            boxes = np.array([box] if person is not None else np.empty((0, 4)), np.float32)
            yield Detection(keypoints(last, points, height, width), boxes)


def open_vitpose(yolo: Path, pose: Path, *, gpu: bool) -> VitPose:
    """Opens `yolov10m.onnx` and a whole-body ViTPose. Raises as `OnnxNetwork` does."""
    maps = (1, POINTS, MAP_HEIGHT, MAP_WIDTH)
    return VitPose(
        OnnxNetwork(yolo, (1, 3, 640, 640), [(1, None, 6)], gpu=gpu),
        OnnxNetwork(pose, (1, 3, HEIGHT, WIDTH), [maps], gpu=gpu),
    )


def to_unit(frame: Frame) -> Floats:
    """Bytes -> fp32 0..1: the picture is resized for both networks after this step."""
    return np.asarray(frame / np.float32(255), np.float32)


def region(box: Doubles) -> tuple[Doubles, Doubles]:
    """Centre [2] px and scale [2] (px / 200) of what the network sees."""
    width, height = box[2:4] - box[:2]
    aspect = HEIGHT / WIDTH
    size = max(width * aspect, height)
    return (box[:2] + box[2:4]) / 2, np.array([size / aspect, size]) / _UNIT * _PADDING


def corners(centre: Doubles, scale: Doubles) -> tuple[tuple[int, int], tuple[int, int]]:
    """Upper left and lower right corner (x, y) of the crop, in whole pixels.

    Ties at half a pixel are frequent, so the official order of float64 operations is kept:
    crop corners through the inverse of a 3 x 3 matrix, then Python's rounding.
    """
    height = _UNIT * max(scale)
    width = height / (HEIGHT / WIDTH)
    forward = np.eye(3)
    forward[0] = WIDTH / width, 0, WIDTH * (-float(centre[0]) / width + 0.5)
    forward[1] = 0, HEIGHT / height, HEIGHT * (-float(centre[1]) / height + 0.5)
    inverse = np.linalg.inv(forward)
    x1, y1 = (round(float(value)) for value in (inverse @ [0.0, 0.0, 1.0])[:2])
    x2, y2 = (round(float(value)) for value in (inverse @ [WIDTH, HEIGHT, 1.0])[:2])
    return (x1, y1), (x2, y2)


def crop(picture: Floats, upper: tuple[int, int], lower: tuple[int, int]) -> Floats:
    """Cuts [256, 192, 3] out of a picture [H, W, 3] fp32; black beyond its borders."""
    (x1, y1), (x2, y2) = upper, lower
    height, width = picture.shape[:2]
    part = np.zeros((y2 - y1, x2 - x1, 3), np.float32)
    inside = picture[max(y1, 0) : max(min(y2, height), 0), max(x1, 0) : max(min(x2, width), 0)]
    top, left = max(-y1, 0), max(-x1, 0)
    part[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    resized = cv2.resize(part, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, np.float32)


def to_input(part: Floats) -> Floats:
    """Crop [256, 192, 3] fp32 0..1 RGB -> network input [1, 3, 256, 192]."""
    return np.ascontiguousarray(((part - _MEAN) / _STD).transpose(2, 0, 1)[None])


def peaks(heat: Floats) -> tuple[Floats, Floats]:
    """Maps [133, 64, 48] -> first maximum (x, y) [133, 2], (-1, -1) if <= 0, and its value."""
    flat = heat.reshape(len(heat), -1)
    y, x = np.divmod(flat.argmax(1), MAP_WIDTH)
    highest = flat.max(1)
    cells = np.where(highest[:, None] > 0, np.stack([x, y], axis=1), -1)
    return cells.astype(np.float32), highest


def refine(heat: Floats, cells: Floats, highest: Floats) -> Floats:
    """Peaks [133, 2] moved by one Newton step on the log of the blurred map.

    Only peaks two cells or more inside the map move; a singular Hessian moves nothing.
    """
    x, y = cells.astype(np.int64).T
    inner = (x > 1) & (x < MAP_WIDTH - 2) & (y > 1) & (y < MAP_HEIGHT - 2)
    rows = np.flatnonzero(inner)
    if not rows.size:
        return cells
    x, y = x[rows], y[rows]
    smooth = _blurred(heat[rows], highest[rows])

    def at(right: int, down: int) -> Floats:
        around = smooth[np.arange(len(rows)), y + down, x + right]
        return np.log(np.maximum(around, np.float32(_FLOOR)))

    dx, dy = 0.5 * (at(1, 0) - at(-1, 0)), 0.5 * (at(0, 1) - at(0, -1))
    dxx = 0.25 * (at(2, 0) - 2 * at(0, 0) + at(-2, 0))
    dyy = 0.25 * (at(0, 2) - 2 * at(0, 0) + at(0, -2))
    dxy = 0.25 * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1))
    regular = dxx * dyy - dxy**2 != 0
    hessian = np.stack([dxx, dxy, dxy, dyy], axis=1).reshape(-1, 2, 2)[regular]
    slope = np.stack([dx, dy], axis=1)[regular, :, None]
    moved = cells.copy()
    moved[rows[regular]] -= (np.linalg.inv(hessian) @ slope)[:, :, 0]
    return moved


def locate(heat: Floats, centre: Doubles, scale: Doubles) -> Floats:
    """Maps [133, 64, 48] -> [133, 3]: picture pixels x, y and probability (the raw maximum)."""
    cells, highest = peaks(heat)
    return to_picture(refine(heat, cells, highest), highest, centre, scale)


def to_picture(cells: Floats, highest: Floats, centre: Doubles, scale: Doubles) -> Floats:
    """Map cells [133, 2] -> picture pixels and probability [133, 3], by the unrounded crop."""
    size = _UNIT * scale
    pixels = cells * (size / [MAP_WIDTH, MAP_HEIGHT]) + centre - size / 2
    return np.concatenate([pixels, highest[:, None]], axis=1).astype(np.float32)


def body(points: Floats, last: Floats | None, height: int, width: int) -> Floats:
    """The 20 body points [20, 3]: x, y as shares of the picture, and score.

    If every one has a negative coordinate, the body of the frame before is taken.
    """
    shares = points / np.array([width, height, 1], np.float32)
    mean = np.asarray((shares[_BODY_A] + shares[_BODY_B]) / 2, np.float32)
    if last is not None and (mean[:, :2].min(1) < 0).all():
        return last
    return mean


def keypoints(body20: Floats, points: Floats, height: int, width: int) -> Keypoints:
    """Body [20, 3] (shares) and points [133, 3] (pixels) of one person -> `Keypoints`, P = 1."""
    shares = (points[:, :2] / np.array([width, height], np.float32))[None]
    return Keypoints(
        body=body20[None, :_DRAWN, :2],
        visible=body20[None, :_DRAWN, 2] > _VISIBLE,
        faces=shares[:, _FACE],
        hands=np.stack([shares[:, _LEFT_HAND], shares[:, _RIGHT_HAND]], axis=1),
    )


def _blurred(heat: Floats, highest: Floats) -> Floats:
    """Maps [n, 64, 48] after a Gaussian blur that keeps the height of each maximum."""
    edge = _BLUR // 2
    inside = slice(edge, -edge)
    padded = np.pad(heat, ((0, 0), (edge, edge), (edge, edge)))
    smooth = [cv2.GaussianBlur(wide, (_BLUR, _BLUR), 0)[inside, inside] for wide in padded]
    stack = np.stack(smooth).astype(np.float32, copy=False)
    return stack * (highest / stack.max((1, 2)))[:, None, None]
