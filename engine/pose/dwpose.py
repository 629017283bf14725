"""DWPose: persons by YOLOX, then 133 whole-body keypoints a person, read from SimCC rows.

    frame -> BGR -> letterbox -> YOLOX -> boxes
          -> warped crop 384 x 288 a box -> network -> peaks of SimCC rows -> picture pixels
          -> neck inserted, OpenPose order -> Keypoints

This is the recipe of the official motion capture. Source: docs/reference/pose.md 3.2 and 12.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.pose.arrays import Doubles, Floats, Frame, Frames
from engine.pose.boxes import (
    Detection,
    checked,
    decode_yolox,
    letterbox,
    whole,
    yolox_objects,
    yolox_persons,
)
from engine.pose.keypoints import Keypoints
from engine.pose.onnx import Net, OnnxNetwork

WIDTH, HEIGHT = 288, 384  # of the crop
POINTS = 133  # COCO whole body
_PADDING = 1.25
_MEAN = np.array([123.675, 116.28, 103.53])  # RGB statistics on BGR channels, as trained
_STD = np.array([58.395, 57.12, 57.375])
_SPLIT = 2.0  # SimCC bins a pixel
_VISIBLE = 0.3
_NECK, _SHOULDERS = 17, [5, 6]
# COCO order with the neck inserted -> OpenPose order; the points not named stay.
_OPENPOSE = [1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
_COCO = [17, 6, 8, 10, 7, 9, 12, 14, 16, 13, 15, 2, 1, 4, 3]
_BODY, _FACE = slice(0, 24), slice(24, 92)
_LEFT_HAND, _RIGHT_HAND = slice(92, 113), slice(113, 134)
_HIDDEN = -1.0


@dataclass(frozen=True, slots=True)
class DwPose:
    """`find` is YOLOX, `pose` the keypoint network; both are called with one picture at a time."""

    find: Net
    pose: Net

    def detect(self, frames: Frames) -> Iterator[Detection]:
        """Finds the persons of each frame ([H, W, 3] u8 RGB), best box first. Raises `BadMedia`."""
        return map(self._look, frames)

    def _look(self, frame: Frame) -> Detection:
        bgr = np.asarray(cv2.cvtColor(checked(frame), cv2.COLOR_RGB2BGR), np.uint8)
        height, width = bgr.shape[:2]
        picture, ratio = letterbox(bgr)
        boxes = yolox_persons(yolox_objects(*decode_yolox(self.find(picture)[0], ratio)))
        places = boxes if len(boxes) else [whole(height, width)]
        persons = [self._person(bgr, box) for box in places]
        points, scores = (np.stack(values) for values in zip(*persons))
        return Detection(keypoints(points, scores, height, width), boxes.astype(np.float32))

    def _person(self, bgr: Frame, box: Doubles) -> tuple[Doubles, Doubles]:
        centre, size = region(box)
        x, y = self.pose(to_input(crop(bgr, forward_matrix(centre, size))))
        points, scores = read_simcc(x, y)
        return openpose(to_picture(points, centre, size), scores)


def open_dwpose(yolox: Path, pose: Path, *, gpu: bool) -> DwPose:
    """Opens `yolox_l.onnx` and `dw-ll_ucoco_384.onnx`. Raises as `OnnxNetwork` does."""
    return DwPose(
        OnnxNetwork(yolox, (1, 3, 640, 640), [(1, 8400, 85)], gpu=gpu),
        OnnxNetwork(
            pose,
            (1, 3, HEIGHT, WIDTH),
            [(1, POINTS, int(WIDTH * _SPLIT)), (1, POINTS, int(HEIGHT * _SPLIT))],
            gpu=gpu,
        ),
    )


def region(box: Doubles) -> tuple[Doubles, Doubles]:
    """Centre and size (x, y) in pixels of what the network sees: the box padded, then 3 to 4."""
    centre = (box[:2] + box[2:]) * 0.5
    width, height = (box[2:] - box[:2]) * _PADDING
    aspect = WIDTH / HEIGHT
    if width > height * aspect:
        return centre, np.array([width, width / aspect])
    return centre, np.array([height * aspect, height])


def forward_matrix(centre: Doubles, size: Doubles) -> Doubles:
    """The matrix [2, 3] from picture to crop, on pixel indices: without a half-pixel shift."""
    sx, sy = np.array([WIDTH, HEIGHT]) / size
    return np.array([[sx, 0.0, WIDTH / 2 - centre[0] * sx], [0.0, sy, HEIGHT / 2 - centre[1] * sy]])


def crop(bgr: Frame, matrix: Doubles) -> Frame:
    """The crop [384, 288, 3] u8, black beyond the picture's borders."""
    picture = cv2.warpAffine(bgr, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
    return np.asarray(picture, np.uint8)


def to_input(part: Frame) -> Floats:
    """Crop [384, 288, 3] u8 BGR -> network input [1, 3, 384, 288] fp32."""
    normal = ((part - _MEAN) / _STD).astype(np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])


def read_simcc(x: Floats, y: Floats) -> tuple[Doubles, Floats]:
    """Rows [1, 133, 576] and [1, 133, 768] -> crop pixels [133, 2] and scores [133].

    The first maximum wins. A point whose score is not positive lies at (-0.5, -0.5).
    """
    score = np.minimum(x[0].max(1), y[0].max(1))
    bins = np.stack([x[0].argmax(1), y[0].argmax(1)], axis=1)
    return np.where(score[:, None] > 0, bins, -1) / _SPLIT, score


def to_picture(points: Doubles, centre: Doubles, size: Doubles) -> Doubles:
    """Crop pixels [133, 2] -> picture pixels."""
    return points / [WIDTH, HEIGHT] * size + centre - size / 2


def openpose(points: Doubles, scores: NDArray) -> tuple[Doubles, Doubles]:
    """133 points and scores -> 134: neck inserted, body in OpenPose order.

    0-17 body, 18-23 feet, 24-91 face, 92-112 the person's left hand, 113-133 the right.
    """
    neck = points[_SHOULDERS].mean(0)
    neck_score = float((scores[_SHOULDERS] > _VISIBLE).all())
    points = np.insert(points, _NECK, neck, axis=0)
    scores = np.insert(scores.astype(np.float64), _NECK, neck_score)
    ordered, ordered_scores = points.copy(), scores.copy()
    ordered[_OPENPOSE], ordered_scores[_OPENPOSE] = points[_COCO], scores[_COCO]
    return ordered, ordered_scores


def keypoints(points: Doubles, scores: Doubles, height: int, width: int) -> Keypoints:
    """Pixels [P, 134, 2] and scores [P, 134] of all persons in a frame -> shares of the picture.

    Faces and hands below the score are hidden; the body keeps its place and is marked.
    """
    shares = (points / [width, height]).astype(np.float32)
    parts = np.where(scores[:, :, None] < _VISIBLE, np.float32(_HIDDEN), shares)
    return Keypoints(
        body=shares[:, _BODY],
        visible=scores[:, _BODY] > _VISIBLE,
        faces=parts[:, _FACE],
        hands=np.stack([parts[:, _LEFT_HAND], parts[:, _RIGHT_HAND]], axis=1),
    )
