"""How large a person of the picture becomes in the clip, and where: the rule of framing.

    s = h(driver) / h(person) * min(1.2, max(1, 0.30 H / h(driver)))
    tx, ty: box centres meet across, foot lines meet down

Heights are those of boxes where both stand in the picture as a whole; else of what joints tell of
both: torso, shoulders or head. Nothing tells then that a person is not to be placed. Formula and
figures: docs/reference/masks.md 6.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.masks.tracks import Floats

LEAST_SHARE, MOST_HELP = 0.30, 1.2  # of the height of the clip, below which persons are enlarged
HEIGHT_FRAMES = 16  # of a motion that are looked at, at most

_BORDER = 1.5  # pixels off the lower edge, at least, of somebody whose feet are in the picture
_CROUCH = 0.85  # of the standing height: who is lower than that crouches
_BROAD = 0.4  # width by height of a box that may be one of somebody who crouches or is hidden
_GROWS = 1.1  # times its first height: somebody who may stand up
_NOSE, _NECK, _SHOULDERS, _HIPS, _EYES = 0, 1, (2, 5), (8, 11), (14, 15)
_KNEES, _ANKLES = (9, 12), (10, 13)
_TORSO_FRAMES, _HEIGHT_QUANTILE = 8, 0.9


@dataclass(frozen=True, slots=True)
class Body:
    """A person who is measured: its box in a picture, and joints in it if somebody saw them."""

    box: Floats  # [4] x1, y1, x2, y2
    height: float  # of the picture, whose lower edge cuts legs
    joints: Floats | None = None  # [n, 18, 2] as OpenPose orders them, NaN unseen; first: the box's

    @property
    def tall(self) -> float:
        return float(self.box[3] - self.box[1])

    @property
    def has_feet(self) -> bool:
        """Whether it stands in the picture with its feet."""
        is_off = bool(self.box[3] <= self.height - _BORDER)
        if self.joints is None or not self.is_found:
            return is_off
        return is_off and bool(np.isfinite(self.joints[0][list(_ANKLES), 0]).all())

    @property
    def is_found(self) -> bool:
        """Whether joints were seen where its box is."""
        return self.joints is not None and bool(np.isfinite(self.joints[0]).any())

    @property
    def has_face(self) -> bool:
        """Whether nose and an eye were seen."""
        if self.joints is None:
            return False
        seen = np.isfinite(self.joints[0, :, 0])
        return bool(seen[_NOSE] and seen[list(_EYES)].any())


@dataclass(frozen=True, slots=True)
class Placement:
    """A pixel x, y of the picture is at scale * x + left, scale * y + top of the clip."""

    scale: float
    left: float
    top: float
    by: str  # what of both was compared


def frames_asked(driver: Body, person: Body, boxes: Floats) -> int:
    """Counts the frames of the driver in which joints may change its placement; 0: none can.

    `boxes` [n, 4] are those of the driver from its first frame on, NaN where it is not seen. Where
    both stand off the lower edge only a crouch or hidden ankles could, and boxes that are narrow
    and do not grow speak against both.
    """
    if not (driver.has_feet and person.has_feet):
        return _TORSO_FRAMES
    grown = float(np.nanmax(boxes[:HEIGHT_FRAMES, 3] - boxes[:HEIGHT_FRAMES, 1]))
    is_narrow = all(body.box[2] - body.box[0] <= _BROAD * body.tall for body in (driver, person))
    return 0 if is_narrow and grown <= _GROWS * driver.tall else HEIGHT_FRAMES


Measure = Callable[[Floats], Floats]  # joints [n, 18, 2] -> lengths [n] pixels, NaN unknown


def placement(driver: Body, person: Body) -> Placement | None:
    """Places a person of the picture where the driver is; None if nothing tells the size.

    `driver` is measured in the clip, `person` in the picture's own pixels.
    """
    found = _ratio(driver, person)
    if found is None:
        return None
    ratio, by = found
    tall = driver.tall if by == "height" else ratio * person.tall
    scale = ratio * min(MOST_HELP, max(1.0, LEAST_SHARE * driver.height / tall))
    if driver.has_feet and person.has_feet:
        anchors = _foot(driver.box), _foot(person.box)
    else:
        necks = _point(driver, _NECK), _point(person, _NECK)
        anchors = necks if np.isfinite(necks).all() else (_head(driver.box), _head(person.box))
    left, top = anchors[0] - scale * anchors[1]
    return Placement(scale, float(left), float(top), by)


def _ratio(driver: Body, person: Body) -> tuple[float, str] | None:
    """How much larger the driver is, and by what that was told."""
    if driver.has_feet and person.has_feet:
        if (standing := _crouching(driver, person)) is not None:
            return standing, "limbs"
        return driver.tall / person.tall, "height"
    if driver.joints is None or person.joints is None:
        return None
    for by, measure in _MEASURES:
        seen = measure(driver.joints[:_TORSO_FRAMES])
        own = measure(person.joints[:1])[0]
        if np.isfinite(seen).any() and np.isfinite(own) and own > 0:
            return float(np.nanmax(seen) / own), by
    return None


def _crouching(driver: Body, person: Body) -> float | None:
    """How much larger a driver is who crouches at first, by the lengths of limbs; else None."""
    if driver.joints is None or person.joints is None:
        return None
    lengths = _limbs(driver.joints[:HEIGHT_FRAMES])
    own = _limbs(person.joints[:1])[0]
    if not np.isfinite(lengths).any() or not np.isfinite(own) or own <= 0:
        return None
    standing = float(np.quantile(lengths[np.isfinite(lengths)], _HEIGHT_QUANTILE))
    now, ankles = driver.joints[0], driver.joints[0][list(_ANKLES), 1]
    if not np.isfinite(now[_NOSE, 1]) or ankles.max() - now[_NOSE, 1] >= _CROUCH * standing:
        return None
    return standing / own


def _torso(joints: Floats) -> Floats:
    return _length(joints[:, _NECK] - joints[:, list(_HIPS)].mean(1))


def _across(joints: Floats) -> Floats:
    return _length(joints[:, _SHOULDERS[0]] - joints[:, _SHOULDERS[1]])


def _face(joints: Floats) -> Floats:
    return _length(joints[:, _NOSE] - joints[:, _NECK])


def _limbs(joints: Floats) -> Floats:
    """Head to neck, torso and the longer leg: a height that no pose changes."""
    hips, knees, ankles = (joints[:, list(part)] for part in (_HIPS, _KNEES, _ANKLES))
    legs = _length(hips - knees) + _length(knees - ankles)  # [n, 2]
    return _face(joints) + _torso(joints) + np.fmax(legs[:, 0], legs[:, 1])


_MEASURES: Sequence[tuple[str, Measure]] = (
    ("torso", _torso),
    ("shoulders", _across),
    ("head", _face),
)


def _length(vectors: Floats) -> Floats:
    return np.sqrt((vectors**2).sum(-1))


def _foot(box: Floats) -> Floats:
    return np.array([(box[0] + box[2]) / 2, box[3]])


def _head(box: Floats) -> Floats:
    return np.array([(box[0] + box[2]) / 2, box[1]])


def _point(body: Body, joint: int) -> Floats:
    return np.full(2, np.nan) if body.joints is None else body.joints[0, joint]
