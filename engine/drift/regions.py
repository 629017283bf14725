"""Where the persons of a clip are, and where its background is, as drift is measured by.

Lengths hold for a short side of 512 pixels and go with it, areas with its square. Source:
docs/reference/masks.md 5.2.
"""

from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.masks.colours import PERSON_COLOURS

Bytes: TypeAlias = NDArray[np.uint8]

BACKGROUND = 0  # the owner of a pixel that is nobody's; person n owns those of person n
_SHORT_SIDE = 512
_INSIDE, _OUTSIDE, _BLEND = 3, 8, 6  # pixels
_LEAST_AREA = 2000

_OWNER = np.zeros(256, np.uint8)  # by the number of a colour
_OWNER[list(PERSON_COLOURS)] = np.arange(1, len(PERSON_COLOURS) + 1)
_NUMBER = np.array([[1, 2, 4]], np.float32)  # of a colour whose channels are 0 or 1


@dataclass(frozen=True, slots=True)
class Scale:
    """The lengths and areas for frames of one size, in pixels."""

    inside: int  # a person is measured so far within its mask
    outside: int  # the background so far from any
    blend: int  # corrections of neighbours are mixed over so many
    least: float  # in a frame: of less nothing is said

    @classmethod
    def of(cls, height: int, width: int) -> "Scale":
        share = min(height, width) / _SHORT_SIDE
        inside, outside, blend = (max(1, round(n * share)) for n in (_INSIDE, _OUTSIDE, _BLEND))
        return cls(inside, outside, blend, _LEAST_AREA * share**2)


def name_of(owner: int) -> str:
    """Names a region as reports do."""
    return "background" if owner == BACKGROUND else f"person {owner}"


def owners_of(mask: Bytes) -> Bytes:
    """Tells whose each pixel of a mask [H, W, 3] u8 is: [H, W] u8."""
    _, channels = cv2.threshold(mask, 127, 1, cv2.THRESH_BINARY)
    return _bytes(cv2.LUT(cv2.transform(channels, _NUMBER), _OWNER))


def regions_of(owners: Bytes, scale: Scale) -> dict[int, Bytes]:
    """Finds where each of the `owners` [H, W] is measured: [H, W] u8, 255 inside, by owner.

    A band along each outline is nobody's: there masks are off by a pixel or two.
    """
    counts = cv2.calcHist([owners], [0], None, [8], [0, 8]).ravel()
    found: dict[int, Bytes] = {}
    for person in range(1, len(counts)):
        if counts[person]:
            found[person] = _bytes(cv2.erode(_where(owners, person), _disc(scale.inside)))
    found[BACKGROUND] = _bytes(cv2.erode(_where(owners, BACKGROUND), _disc(scale.outside)))
    return found


def share_of(owners: Bytes, owner: int, scale: Scale) -> Bytes:
    """Weighs the correction of an owner in each pixel: [H, W] u8, 255 for all of it.

    It is a ramp across the outline; the shares of all owners are all of it together.
    """
    side = 2 * max(1, round(scale.blend / 2)) + 1
    return _bytes(cv2.blur(_where(owners, owner), (side, side)))


def _where(owners: Bytes, owner: int) -> Bytes:
    return (owners == owner).view(np.uint8) * np.uint8(255)


def _disc(radius: int) -> Bytes:
    side = 2 * radius + 1
    return _bytes(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))


def _bytes(values: np.ndarray) -> Bytes:
    return np.asarray(values, np.uint8)
