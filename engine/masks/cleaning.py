"""Decoded frames of a mask file -> the number of a colour for each pixel.

Files blur colours where they meet: above 225 nearly nothing is left of an edge, and what is there
is partly in nobody's colour. So it is found out first which colours a clip shows in areas, and
every pixel then has the nearest of those. A grey file is a matte of one person. Rules and figures:
docs/reference/masks.md 3.1 and 3.2.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import BadMedia
from engine.flow import Check, go_on
from engine.masks.colours import BLUE, WHITE

BACKGROUND = 8  # the number of a pixel whose file leaves it to us how background is painted

_ON_BIT = 7  # of a channel: above 127 it is on
_SPREAD = 40  # between the channels of a pixel: above, it has a colour
_FAR = 60  # levels between a pixel and its colour
_MOST_FAR = 0.05  # of all pixels; a mask that was compressed hard has 0.0075, a photograph 0.89
_MOST_GREY = 0.5  # of the pixels of a matte, whose edges may be soft
# for a short side of 512
_SHORT_SIDE, _ERODED, _LEAST_AREA = 512, 5, 16
_LEAST_ERODED, _LEAST_PIXELS = 3, 4  # of the smallest: a chroma sample covers 2x2 at any size

_COLOURS = np.array([[255 * (n >> bit & 1) for bit in range(3)] for n in range(8)], np.int32)

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large an area must be at one size, to be meant."""

    eroded: int  # pixels a side of the square that it is eroded by
    least: int  # pixels that must be left of it in some frame

    @classmethod
    def of(cls, height: int, width: int) -> "Scale":
        share = min(height, width) / _SHORT_SIDE
        eroded = 2 * round((_ERODED * share - 1) / 2) + 1  # odd
        return cls(
            eroded=max(_LEAST_ERODED, eroded),
            least=max(_LEAST_PIXELS, round(_LEAST_AREA * share**2)),
        )


def clean(frames: Tensor, name: str, check: Check = go_on) -> Tensor:
    """Finds the colour of each pixel: [T, H, W, 3] u8 -> [T, H, W] u8, 0 to 7 or `BACKGROUND`.

    A grey file gives blue and `BACKGROUND`; if it is white all over, white. `name` is what
    sentences call the file. Raises `BadMedia` for what is no mask, such as a photograph.
    """
    pictures: Bytes = frames.numpy()
    scale = Scale.of(*pictures.shape[1:3])
    if not _has_colours(pictures, scale, check):
        return torch.from_numpy(_matte(pictures, name, scale, check))
    colours = np.stack([_rounded(picture) for picture in pictures])
    present = areas(colours, scale, check)
    if not present:
        raise BadMedia(
            f"{name} shows no area of a mask's colours, only lines or dots: "
            "paint each person as a whole."
        )
    far = 0
    for picture, rounded in zip(pictures, colours):
        check()
        far += _keep(present, picture, rounded)
    if far > _MOST_FAR * colours.size:
        raise BadMedia(
            f"{name} is no mask: {far / colours.size:.0%} of its pixels are in none of a mask's "
            "colours (black, white, blue, red, green, magenta, cyan, yellow). Give a picture or "
            "video where each person is painted in one of them, or a black and white matte."
        )
    return torch.from_numpy(colours)


def has_palette(pixels: Bytes) -> bool:
    """Tells whether pixels [n, 3] u8 have colours, and nearly all of them those of a mask."""
    if not len(pixels) or (pixels.max(1) - pixels.min(1)).max() <= _SPREAD:
        return False
    off = np.minimum(pixels, 255 - pixels).astype(np.int32)
    return bool(((off**2).sum(1) > _FAR**2).mean() <= _MOST_FAR)


def areas(colours: Bytes, scale: Scale, check: Check = go_on) -> list[int]:
    """The numbers 0 to 7 that fill an area in some frame of [T, H, W] u8, ascending."""
    square = np.ones((scale.eroded, scale.eroded), np.uint8)
    missing, present = set(range(8)), []
    for picture in colours:
        check()
        counts = cv2.calcHist([picture], [0], None, [8], [0, 8]).ravel()
        for colour in [colour for colour in missing if counts[colour] >= scale.least]:
            left = cv2.erode((picture == colour).astype(np.uint8), square)
            if np.count_nonzero(left) >= scale.least:
                missing.remove(colour)
                present.append(colour)
    return sorted(present)


def _rounded(picture: Bytes) -> Bytes:
    """The nearest of all eight colours for each pixel: [H, W, 3] u8 -> [H, W] u8."""
    red, green, blue = (plane >> _ON_BIT for plane in _planes(picture))
    return (red | green << 1 | blue << 2).astype(np.uint8, copy=False)


def _planes(picture: Bytes) -> list[Bytes]:
    return [np.asarray(plane, np.uint8) for plane in cv2.split(picture)]


def _keep(present: list[int], picture: Bytes, colours: Bytes) -> int:
    """Gives pixels of other colours the nearest of the present ones, in `colours`.

    Returns how many pixels are far from the colour that they have then.
    """
    is_other = np.ones(8, bool)
    is_other[present] = False
    others = is_other[colours]
    values = picture[others].astype(np.int32)  # [n, 3]
    squares = ((values[:, None] - _COLOURS[present]) ** 2).sum(-1)  # [n, colours]
    colours[others] = np.array(present, np.uint8)[squares.argmin(1)]
    far = np.count_nonzero(squares.min(1) > _FAR**2)
    # the rest have the nearest of all: only where a channel is off by this much can they be far
    off = np.minimum(picture, 255 - picture)
    red, green, blue = _planes(off)
    is_doubtful = np.maximum(np.maximum(red, green), blue) > _FAR / 3**0.5
    doubtful = off[is_doubtful & ~others].astype(np.int32)
    return int(far + np.count_nonzero((doubtful**2).sum(-1) > _FAR**2))


def _has_colours(pictures: Bytes, scale: Scale, check: Check) -> bool:
    """Tells whether some frame has as many pixels with a colour as an area must have."""
    for picture in pictures:
        check()
        red, green, blue = _planes(picture)
        most, least = np.maximum(red, green), np.minimum(red, green)
        spread = np.maximum(most, blue) - np.minimum(least, blue)
        if np.count_nonzero(spread > _SPREAD) >= scale.least:
            return True
    return False


def _matte(pictures: Bytes, name: str, scale: Scale, check: Check) -> Bytes:
    """Reads greys: half and above is person 1, the rest background."""
    colours, between, is_dark = np.empty(pictures.shape[:3], np.uint8), 0, False
    edge = _FAR / 3**0.5
    for place, picture in enumerate(pictures):
        check()
        grey = picture[..., 1]
        is_on = grey >= 128
        colours[place] = np.where(is_on, BLUE, BACKGROUND)
        between += int(np.count_nonzero((grey > edge) & (grey < 255 - edge)))
        is_dark = is_dark or np.count_nonzero(~is_on) >= scale.least
    if between > _MOST_GREY * colours.size:
        raise BadMedia(
            f"{name} is no matte: {between / colours.size:.0%} of its pixels are neither black nor "
            "white. Give one that is white where the person is and black elsewhere."
        )
    if not is_dark:
        colours.fill(WHITE)
    return colours
