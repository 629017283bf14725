"""Persons cut out of a picture and put into the clip, each by an affine of its own, on black.

x' = s x + left, y' = s y + top, where a pixel's middle is at half. Persons that are far, whose foot
line is higher, come first and are covered by nearer ones. Source: docs/reference/masks.md 6.3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.masks.colours import BLACK
from engine.masks.placing import Placement
from engine.masks.tracks import Floats, box_of
from engine.media.framing import Size

_FINER = 4  # times: the finest canvas that is averaged down
_EDGE = 1  # own pixels of a cut-out's edge that are left out, for fringes of what was behind
_MARGIN = 4  # pixels around a person that the resize looks at

_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
Singles = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cut:
    """The picture and its mask as they are in the clip."""

    image: Tensor  # [3, H, W] fp32 in -1..1, black where nobody is
    numbers: Tensor  # [H, W] u8, of colours


def cut_out(
    picture: Tensor, numbers: Tensor, placed: Sequence[tuple[int, Placement]], size: Size
) -> Cut:
    """Places persons of a picture [h, w, 3] u8 whose mask has the colours `numbers` [h, w] u8.

    `placed` are colours and where they go, the farthest first. A person whose colour is not among
    them is not in the clip.
    """
    image = np.zeros((*size, 3), np.float32)
    shown = np.full(size, BLACK, np.uint8)
    for colour, place in placed:
        is_person = (numbers == colour).numpy()
        box = box_of(is_person)
        pixels, matte = _moved(picture.numpy(), is_person, box, place, size)
        is_there = matte >= 0.5
        shown[is_there] = colour
        image[is_there] = 0.0
        # the frame's own border is no edge of a person
        edge = _EDGE * max(1, round(place.scale))
        kept = cv2.erode(
            is_there.astype(np.uint8), _CROSS, iterations=edge, borderType=cv2.BORDER_REPLICATE
        )
        image[kept > 0] = pixels[kept > 0]
    values = torch.from_numpy(image).permute(2, 0, 1).contiguous() / 255 * 2 - 1
    return Cut(values, torch.from_numpy(shown))


def moved(frame: Tensor, place: Placement, size: Size) -> Tensor:
    """Moves a whole frame [h, w, 3] u8 to [H, W, 3] u8; black around it."""
    height, width = frame.shape[:2]
    whole = np.array([0.0, 0.0, width, height])
    is_there = np.ones((height, width), np.bool_)
    pixels, matte = _moved(frame.numpy(), is_there, whole, place, size)
    pixels[matte < 0.5] = 0
    return torch.from_numpy(pixels.round().astype(np.uint8))


def share_inside(is_person: NDArray[np.bool_], place: Placement, size: Size) -> float:
    """The share of a person's pixels [h, w] whose middle is inside of the clip."""
    rows, columns = np.nonzero(is_person)
    down, across = (
        place.scale * (rows + 0.5) + place.top,
        place.scale * (columns + 0.5) + place.left,
    )
    is_in = (down >= 0) & (down < size[0]) & (across >= 0) & (across < size[1])
    return float(is_in.mean()) if len(is_in) else 0.0


def _moved(
    picture: NDArray[np.uint8],
    is_person: NDArray[np.bool_],
    box: Floats,
    place: Placement,
    size: Size,
) -> tuple[Singles, Singles]:
    """The pixels in `box` [H, W, 3], 0 to 255, and how much of each is the person [H, W].

    Smaller: means over areas. Larger: bicubic. In between a canvas that is finer by a whole number
    is averaged, so that the place is exact below a pixel.
    """
    step = max(1, math.floor(1 / (place.scale * _FINER)))  # averaged before anything else
    left, top = (max(0, int(side) - _MARGIN * step) for side in box[:2])
    right, bottom = (int(side) + _MARGIN * step for side in box[2:])
    pixels = np.asarray(picture[top:bottom, left:right], np.float32)
    matte = np.asarray(is_person[top:bottom, left:right], np.float32)
    if step > 1:
        pixels, matte = _averaged(pixels, step), _averaged(matte, step)
    scale = place.scale * step
    finer = min(_FINER, math.ceil(1 / scale - 1e-9)) if scale < 1 else 1
    shift = finer * np.array([place.left + place.scale * left, place.top + place.scale * top])
    s = scale * finer
    # of pixels' middles, which OpenCV numbers from 0
    affine = np.array([[s, 0, shift[0] + s / 2 - 0.5], [0, s, shift[1] + s / 2 - 0.5]])
    canvas = size[1] * finer, size[0] * finer
    moved_pixels = cv2.warpAffine(
        pixels, affine, canvas, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    moved_matte = cv2.warpAffine(
        matte, affine, canvas, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
    )
    if finer > 1:
        area = cv2.INTER_AREA
        moved_pixels = cv2.resize(moved_pixels, (size[1], size[0]), interpolation=area)
        moved_matte = cv2.resize(moved_matte, (size[1], size[0]), interpolation=area)
    return np.asarray(moved_pixels, np.float32).clip(0, 255), np.asarray(moved_matte, np.float32)


def _averaged(values: Singles, step: int) -> Singles:
    """Means over squares of `step` pixels; the last ones repeat the edge."""
    down, across = (-side % step for side in values.shape[:2])
    padded = np.pad(values, [(0, down), (0, across), *[(0, 0)] * (values.ndim - 2)], mode="edge")
    wide = padded.shape[1] // step, padded.shape[0] // step
    return np.asarray(cv2.resize(padded, wide, interpolation=cv2.INTER_AREA), np.float32)
