"""How the persons of the picture stand in the clip: measured, placed in replacement, and warned of.

    auto      replacement: each person is cut out and placed where who is replaced stands
              animation: the picture stays as it is; how sizes differ is told
    as-is     the picture stays as it is in both modes
    driving   animation: the motion is moved to where the person of the picture stands

Source: docs/reference/masks.md 6.3 and 6.4.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from engine.errors import MissingModel
from engine.flow import Check, Framing, Mode, Standing, Warned, go_on
from engine.masks.colours import CLASSES, numbers_of, paint
from engine.masks.cutting import Cut, cut_out, moved, share_inside
from engine.masks.looked import Look, Looked, masks_of
from engine.masks.placing import Body, Placement, frames_asked, placement
from engine.masks.reader import DRIVING
from engine.masks.tracks import Tracks, box_of
from engine.media.framing import Size, covering_size

_LEAST_RATIO, _MOST_RATIO = 0.8, 1.25
_MOST_SCALE = 2.0
_MOST_CROPPED = 0.02  # of a person
_MOST_SHAPE = 0.35  # of the logarithm of the ratio of two shapes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shown:
    """The picture of a job with its mask, and the motion with its own."""

    picture: Tensor  # [h, w, 3] u8
    numbers: Tensor  # [h, w] u8, of colours
    frames: Tensor  # [T, H, W, 3] u8
    masks: Tensor  # [T, H, W, 3] u8, painted
    tracks: Tracks


@dataclass(frozen=True, slots=True)
class Framed:
    """What became of picture and motion."""

    standing: tuple[Standing, ...]
    warned: tuple[Warned, ...]
    cut: Cut | None = None  # None: the picture stays as it is
    motion: Placement | None = None  # how the motion is moved; None: it stays


@dataclass(frozen=True, slots=True)
class _Pair:
    """A person of the picture, and who drives it."""

    colour: str
    frame: int
    driver: Body  # in the clip
    person: Body  # in the picture's own pixels
    place: Placement
    lacks: str = ""  # what joints could not be looked for without


def frame_persons(
    shown: Shown, mode: Mode, framing: Framing, look: Look | None = None, check: Check = go_on
) -> Framed:
    """Places or measures the persons who are in the masks of both, the picture and the motion.

    `look` is asked for joints only where they may change what comes out; without its networks the
    warning of missing legs names them. Raises `BadCheckpoint`, and what `check` raises.
    """
    is_placed = mode == "replacement" and framing == "auto"
    is_moved = mode == "animation" and framing == "driving"
    pairs = _pairs(shown, _as_is(shown))
    if not pairs:
        return Framed((), ())
    if look is not None:
        pairs = _seen(pairs, shown, look, check, finds_crouch=is_placed or is_moved)
    warned = [one for pair in pairs for one in (*_legs(pair, shown), *_face(pair))]
    cut, motion = None, None
    if is_placed:
        # far to near: who stands higher is farther
        pairs = sorted((_placed(pair) for pair in pairs), key=lambda pair: pair.driver.box[3])
        colours = [(CLASSES[pair.colour], pair.place) for pair in pairs]
        cut = cut_out(shown.picture, shown.numbers, colours, shown.tracks.size)
        warned += [one for pair in pairs for one in _enlarged(pair)]
    elif is_moved:
        motion = _motion(max(pairs, key=lambda pair: pair.driver.tall))
    else:
        warned += [one for pair in pairs for one in _sizes(pair, mode, shown.tracks.size)]
    standing = [_standing(pair, shown, motion) for pair in pairs]
    warned += [one for pair in standing for one in _cropped(pair)]
    return Framed(tuple(standing), tuple(warned), cut, motion)


def other_shape(picture: Size, motion: Size) -> tuple[Warned, ...]:
    """Warns of a picture whose shape is far from that of the motion. Sizes are height and width."""
    off = math.log(picture[1] / picture[0]) - math.log(motion[1] / motion[0])
    if abs(off) <= _MOST_SHAPE:
        return ()
    said = (
        f"The picture is {picture[1]}x{picture[0]} and the video {motion[1]}x{motion[0]}: much of "
        "one of them is cut off or missing. Crop them to about the same shape."
    )
    return (Warned("shape", said),)


def move_motion(frames: Tensor, masks: Tensor, to: Placement, check: Check = go_on) -> None:
    """Moves a motion [T, H, W, 3] u8 and its masks, in place; it is black around them."""
    size = frames.shape[1], frames.shape[2]
    affine = np.array([
        [to.scale, 0, to.left + to.scale / 2 - 0.5], [0, to.scale, to.top + to.scale / 2 - 0.5],
    ])  # fmt: skip
    for frame, mask in zip(frames, masks, strict=True):
        check()
        frame.copy_(moved(frame, to, size))
        numbers = cv2.warpAffine(
            numbers_of(mask).numpy(), affine, (size[1], size[0]), flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_CONSTANT, borderValue=DRIVING["animation"],
        )  # fmt: skip
        mask.copy_(paint(torch.from_numpy(np.asarray(numbers, np.uint8))))


def _as_is(shown: Shown) -> Placement:
    """Where the picture is when it covers the clip and is cropped."""
    height, width = shown.picture.shape[:2]
    size = shown.tracks.size
    tall, wide = covering_size(height, width, size)
    scale = (tall / height + wide / width) / 2  # they differ by a rounded pixel
    return Placement(scale, -((wide - size[1]) // 2), -((tall - size[0]) // 2), "as it is")


def _pairs(shown: Shown, as_is: Placement) -> list[_Pair]:
    found: list[_Pair] = []
    for person, colour in enumerate(shown.tracks.persons):
        is_person = (shown.numbers == CLASSES[colour]).numpy()
        frame = _first(shown.tracks, person)
        if frame is None or not is_person.any() or is_person.all():
            continue
        driver = Body(shown.tracks.boxes[frame, person], shown.tracks.size[0])
        body = Body(box_of(is_person), shown.picture.shape[0])
        found.append(_Pair(colour, frame, driver, body, as_is))
    return found


def _seen(
    pairs: list[_Pair], shown: Shown, look: Look, check: Check, *, finds_crouch: bool
) -> list[_Pair]:
    """Looks for the joints of those of whom they are needed.

    Of somebody who is not found in the picture the motion is not looked at: nothing compares.
    """
    picture = Looked(look, shown.picture[None], check)
    motion = Looked(look, shown.frames, check)
    found: list[_Pair] = []
    for pair in pairs:
        driver, person = pair.driver, pair.person
        boxes = shown.tracks.boxes[pair.frame :, shown.tracks.persons.index(pair.colour)]
        count = frames_asked(driver, person, boxes)
        if not count or (driver.has_feet and person.has_feet and not finds_crouch):
            found.append(pair)
            continue
        try:
            person = replace(person, joints=picture.joints(pair.colour, [shown.numbers]))
            if person.is_found:
                masks = masks_of(shown.masks[pair.frame : pair.frame + count])
                joints = motion.joints(pair.colour, masks, pair.frame)
                driver = replace(driver, joints=joints)
            found.append(replace(pair, driver=driver, person=person))
        except MissingModel as error:
            log.info("nobody looks whether the person in %s crouches: %s", pair.colour, error)
            found.append(replace(pair, lacks=str(error)))
    return found


def _first(tracks: Tracks, person: int) -> int | None:
    """The first frame that shows somebody, who is not just coming in from a side then."""
    seen = np.flatnonzero(tracks.is_seen[:, person])
    if not len(seen):
        return None
    boxes = tracks.boxes[seen, person]
    is_off = (boxes[:, 0] > 0) & (boxes[:, 2] < tracks.size[1])
    return int(seen[is_off.argmax()]) if seen[0] > 0 and is_off.any() else int(seen[0])


def _placed(pair: _Pair) -> _Pair:
    place = placement(pair.driver, pair.person)
    return pair if place is None else replace(pair, place=place)


def _motion(pair: _Pair) -> Placement | None:
    """How the motion goes to where the picture has the person."""
    own, to = pair.person, pair.place
    box = to.scale * own.box + [to.left, to.top, to.left, to.top]
    joints = None if own.joints is None else to.scale * own.joints + [to.left, to.top]
    there = placement(pair.driver, Body(box, pair.driver.height, joints))
    if there is None:
        return None
    back = 1 / there.scale
    return Placement(back, -back * there.left, -back * there.top, there.by)


def _standing(pair: _Pair, shown: Shown, motion: Placement | None) -> Standing:
    place, own = pair.place, pair.person
    scale, top = (1.0, 0.0) if motion is None else (motion.scale, motion.top)
    is_person = (shown.numbers == CLASSES[pair.colour]).numpy()
    return Standing(
        person=pair.colour,
        frame=pair.frame,
        scale=place.scale,
        left=place.left,
        top=place.top,
        height=place.scale * own.tall,
        foot_line=place.scale * float(own.box[3]) + place.top,
        motion_height=scale * pair.driver.tall,
        motion_foot_line=scale * float(pair.driver.box[3]) + top,
        cropped=1 - share_inside(is_person, place, shown.tracks.size),
    )


# --- warnings


def _sizes(pair: _Pair, mode: Mode, size: Size) -> Sequence[Warned]:
    """Warns if the picture, as it is, has the person at another size than the motion."""
    down = pair.place.scale * pair.person.box[[1, 3]] + pair.place.top
    tall = float(np.diff(down.clip(0, size[0]))[0])
    ratio = tall / pair.driver.tall
    if _LEAST_RATIO <= ratio <= _MOST_RATIO:
        return ()
    cure = {
        "replacement": "--framing auto places it",
        "animation": "crop or widen the picture until both are of a size, or --framing driving "
        "moves the motion",
    }[mode]
    said = (
        f"The person in {pair.colour} is {tall:.0f} pixels high in the picture and "
        f"{pair.driver.tall:.0f} in frame {pair.frame} of the video, {ratio:.2f} times: {cure}."
    )
    return (Warned("size", said, pair.frame),)


def _legs(pair: _Pair, shown: Shown) -> Sequence[Warned]:
    """Warns if one of both is cut by the lower edge, or both where nobody tells their size."""
    driver, person = pair.driver.has_feet, pair.person.has_feet
    if driver and person:
        return ()
    if driver or person:
        lacks = f"the picture, and has them in frame {pair.frame} of the video"
        if person:
            lacks = f"frame {pair.frame} of the video, and has them in the picture"
        said = f"The person in {pair.colour} has no feet in {lacks}"
    else:
        said = f"The person in {pair.colour} has no feet in picture and video"
    if placement(pair.driver, pair.person) is None:
        joints = f" Joints would tell. {pair.lacks}" if pair.lacks else ""
        return (
            Warned(
                "legs",
                f"{said}: nothing tells how large it must be, and it stays as it is. Give a "
                f"picture and a video that show the same of a person.{joints}",
                pair.frame,
            ),
        )
    if not driver and not person:
        return ()
    cure = "Give a picture and a video that show the same of a person"
    return (Warned("legs", f"{said}: what is not shown is made up. {cure}.", pair.frame),)


def _face(pair: _Pair) -> Sequence[Warned]:
    """Warns if who was found in the picture does not show a face."""
    if not pair.person.is_found or pair.person.has_face:
        return ()
    said = (
        f"No face is seen of the person in {pair.colour} in the picture, and the clip makes one "
        "up. Give a picture of the face."
    )
    return (Warned("face", said),)


def _enlarged(pair: _Pair) -> Sequence[Warned]:
    if pair.place.scale <= _MOST_SCALE:
        return ()
    said = (
        f"The person in {pair.colour} is {pair.person.tall:.0f} pixels high in the picture and is "
        f"enlarged {pair.place.scale:.1f} times: it will look soft. Give a larger picture."
    )
    return (Warned("enlarged", said, pair.frame),)


def _cropped(pair: Standing) -> Sequence[Warned]:
    if pair.cropped <= _MOST_CROPPED:
        return ()
    said = (
        f"{pair.cropped:.0%} of the person in {pair.person} of the picture lies outside of the "
        "clip and is cut off: leave more room around it, or ask for a size of another shape."
    )
    return (Warned("crop", said, pair.frame),)
