"""2D keypoints -> eyes, brows, mouth, hands and cheek sticks, drawn over the skeleton with OpenCV.

The drawing is equal to the official one to the bit, including what looks accidental: points in the
first row or column are not drawn, persons are added modulo 256. Source: docs/reference/pose.md 7
and 11.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.pose.arrays import Bools, Floats, Frame
from engine.pose.keypoints import Keypoints

Pixel = tuple[int, int]
Rgb = tuple[int, int, int]

# Ends in OpenPose order, and 0.6 of the colour: the official program darkens sticks afterwards.
_CHEEK_STICKS: tuple[tuple[int, int, Rgb], ...] = (
    (0, 14, (51, 0, 153)),
    (14, 16, (102, 0, 153)),
    (0, 15, (153, 0, 153)),
    (15, 17, (153, 0, 102)),
)
_CHEEK_DOTS: dict[int, Rgb] = {
    0: (255, 0, 0),
    14: (170, 0, 255),
    15: (255, 0, 255),
    16: (255, 0, 170),
    17: (255, 0, 85),
}
_STICK_HALF_WIDTH = 4
_HAND_LINES = [  # five fingers of four links; each starts at the wrist, point 0
    (4 * finger + link if link else 0, 4 * finger + link + 1)
    for finger in range(5)
    for link in range(4)
]
_HAND_COLOURS: tuple[Rgb, ...] = (  # once round the colour circle
    (255, 0, 0), (255, 77, 0), (255, 153, 0), (255, 229, 0),
    (204, 255, 0), (128, 255, 0), (51, 255, 0), (0, 255, 25),
    (0, 255, 102), (0, 255, 179), (0, 255, 255), (0, 178, 255),
    (0, 102, 255), (0, 25, 255), (51, 0, 255), (128, 0, 255),
    (204, 0, 255), (255, 0, 230), (255, 0, 153), (255, 0, 77),
)  # fmt: skip
_HAND_DOT: Rgb = (0, 0, 255)
_FACE_DOTS = (*range(17, 27), *range(36, 68))  # brows, eyes and mouth; not jaw and nose
_WHITE: Rgb = (255, 255, 255)
_FAR = 1e6  # pixels; a point beyond, infinite or NaN is no measurement


def overlay(keypoints: Keypoints, height: int, width: int) -> Frame:
    """The 2D parts of all persons on black, RGB [H, W, 3] u8."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for person in range(len(keypoints.body)):
        layer = np.zeros_like(canvas) if person else canvas
        _draw_person(layer, keypoints, person)
        if person:
            canvas += layer  # wraps, as the official sum of u8 pictures does
    return canvas


def composite(rgb: Frame, canvas: Frame) -> Frame:
    """A copy of the skeleton frame [H, W, 3] with the canvas over it, wherever that is not 0.

    Channel by channel: a blue dot keeps the red and green of the bone below it.
    """
    frame = np.array(rgb, order="C")
    rows = np.flatnonzero(canvas.reshape(len(canvas), -1).any(axis=1))
    if len(rows):
        part = slice(rows[0], rows[-1] + 1)
        np.copyto(frame[part], canvas[part], where=canvas[part] != 0)
    return frame


def _draw_person(layer: Frame, keypoints: Keypoints, person: int) -> None:
    height, width = layer.shape[:2]
    thin = min(max(min(height, width) // 300, 1), 2)  # line width and dot radius
    size = np.array([width, height], np.float32)
    _draw_cheeks(layer, keypoints.body[person] * size, keypoints.visible[person])
    for hand in keypoints.hands[person]:
        _draw_hand(layer, _drawable(hand * size), thin)
    face = _drawable(keypoints.faces[person] * size)
    for i in _FACE_DOTS:
        if i in face:
            cv2.circle(layer, face[i], thin, _WHITE, cv2.FILLED)


def _draw_cheeks(layer: Frame, body: Floats, visible: Bools) -> None:
    """Draws sticks and dots of the face; body [18 or 24, 2] is in pixels, not rounded."""
    shown = visible & np.all(np.abs(body) < _FAR, axis=-1)
    for first, second, colour in _CHEEK_STICKS:
        if shown[first] and shown[second]:
            cv2.fillConvexPoly(layer, _stick(body[first], body[second]), colour)
    for i, colour in _CHEEK_DOTS.items():
        if shown[i]:
            cv2.circle(layer, _pixel(body[i]), 4, colour, cv2.FILLED)


def _stick(first: Floats, second: Floats) -> NDArray[np.int32]:
    """The polygon of a slim ellipse between two points; float32, then truncated."""
    x, y = first - second
    half_length = int((x**2 + y**2) ** 0.5 / 2)
    angle = int(math.degrees(math.atan2(y, x)))
    axes = (half_length, _STICK_HALF_WIDTH)
    middle = _pixel((first + second) / np.float32(2))
    return np.array(cv2.ellipse2Poly(middle, axes, angle, 0, 360, 1))


def _draw_hand(layer: Frame, hand: dict[int, Pixel], thin: int) -> None:
    for (first, second), colour in zip(_HAND_LINES, _HAND_COLOURS):
        if first in hand and second in hand:
            cv2.line(layer, hand[first], hand[second], colour, thin)
    for pixel in hand.values():
        cv2.circle(layer, pixel, thin, _HAND_DOT, cv2.FILLED)


def _drawable(points: Floats) -> dict[int, Pixel]:
    """The points [N, 2], in pixels, that lie right of the first column and below the first row."""
    shown = np.all((points >= 1) & (points < _FAR), axis=-1)
    return {int(i): _pixel(points[i]) for i in np.flatnonzero(shown)}


def _pixel(point: Floats) -> Pixel:
    return int(point[0]), int(point[1])
