"""All masks of a job, and its further pictures, at the size of the result.

From them follows where each person stands: `engine.masks.framed` measures and places.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from engine.errors import BadMedia, BadRequest
from engine.flow import Check, Mode, Request, RoleFrames, Standing, Warned, go_on
from engine.masks.colours import paint
from engine.masks.findings import findings
from engine.masks.framed import Framed, Shown, frame_persons, move_motion, other_shape
from engine.masks.looked import Look
from engine.masks.order import other_order
from engine.masks.reader import (
    DrivingMask,
    ReferenceMask,
    absent_driving_mask,
    additional_mask,
    compare_persons,
    read_driving_mask,
    read_reference_mask,
)
from engine.masks.saved import made_of, sha256_of
from engine.masks.stored import Stored, open_reference
from engine.masks.tracks import track
from engine.media.framing import Size, crop_image, image_to_network
from engine.media.picture import load_layers
from engine.media.video import VideoInfo


@dataclass(frozen=True, slots=True)
class Motion:
    """What drives a clip, as it is shown."""

    frames: Tensor  # [T, H, W, 3] u8, of the result's size
    fps: float
    video: VideoInfo | None  # None: drawn from joints
    shown_at: float | None  # the rate of `video` that was asked for; None: its own


@dataclass(frozen=True, slots=True)
class Picture:
    """The reference as it was read."""

    pixels: Tensor  # [h, w, 3] u8
    alpha: Tensor | None  # [h, w] u8

    @property
    def size(self) -> Size:
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True, slots=True)
class Cast:
    """Who is who in a job, where they stand, and what had to be assumed or looks wrong."""

    roles: RoleFrames
    notes: tuple[str, ...]
    placed: Tensor | None = None  # [3, H, W] fp32, the picture as the VAE sees it; None: as it is
    standing: tuple[Standing, ...] = ()
    warned: tuple[Warned, ...] = ()


def read_roles(
    request: Request,
    mode: Mode,
    motion: Motion,
    picture: Picture,
    check: Check = go_on,
    look: Look | None = None,
) -> Cast:
    """Reads who is who in a job. Where the motion is to stand elsewhere, its frames are moved.

    `look` finds joints, which tell how large somebody is of whom legs are missing. Raises
    `BadMedia`, `BadRequest`, `BadCheckpoint` for networks of `look`, and what `check` raises.
    """
    settings, size = request.settings, (motion.frames.shape[1], motion.frames.shape[2])
    if settings.framing == "driving" and mode == "replacement":
        raise BadRequest(
            "The framing driving moves the motion, whose surroundings are shown in replacement. "
            "Use auto, which places the picture, or as-is."
        )
    given, of_file = _of_picture(request, picture)
    reference = read_reference_mask(given, picture.alpha, picture.size, size, mode, check)
    driving = _driving(request, mode, motion, size, check)
    further, masks, notes = [], [reference], [*driving.notes, *of_file, *reference.notes]
    for one in request.references:
        pixels, alpha = load_layers(one.image)
        mask = additional_mask(one.mask, alpha, (pixels.shape[0], pixels.shape[1]), size, check)
        further.append((crop_image(image_to_network(pixels), size), mask.colours))
        masks.append(mask)
        notes += mask.notes
    notes += compare_persons(driving, masks)
    roles = RoleFrames(mode, reference.colours, driving.colours, tuple(further))
    cast = _framed(request, roles, driving, reference, motion, picture, check, look)
    said = dict.fromkeys([*notes, *(one.said for one in cast.warned)])
    return replace(cast, notes=tuple(said))


def _framed(
    request: Request,
    roles: RoleFrames,
    driving: DrivingMask,
    reference: ReferenceMask,
    motion: Motion,
    picture: Picture,
    check: Check,
    look: Look | None,
) -> Cast:
    """Measures, places and moves."""
    tracks = track(driving.colours, driving.persons, check)
    shown = Shown(picture.pixels, reference.numbers, motion.frames, driving.colours, tracks)
    framed = frame_persons(shown, roles.mode, request.settings.framing, look, check)
    warned = [
        *driving.warned,
        *(() if motion.video is None else _of_video(motion.video, picture)),
        *findings(tracks, motion.frames, motion.fps),
        *other_order(tracks, reference.numbers),
        *framed.warned,
    ]
    if framed.motion is not None:
        move_motion(motion.frames, driving.colours, framed.motion, check)
    placed, roles = _cut(framed, roles)
    return Cast(roles, (), placed, framed.standing, tuple(warned))


def _cut(framed: Framed, roles: RoleFrames) -> tuple[Tensor | None, RoleFrames]:
    """The picture as it was cut out, and its mask in the same place."""
    if framed.cut is None:
        return None, roles
    colours = image_to_network(paint(framed.cut.numbers))
    return framed.cut.image, replace(roles, reference=colours)


def _of_video(video: VideoInfo, picture: Picture) -> Iterator[Warned]:
    yield from other_shape(picture.size, (video.height, video.width))


def _of_picture(request: Request, picture: Picture) -> tuple[Path | Stored | None, tuple[str, ...]]:
    """The mask of the picture: its own file, or what lies in a file of made masks; and a note.

    Raises `BadMedia` if that was made of a picture of another size.
    """
    if request.reference_mask is not None or request.mask is None:
        return request.reference_mask, ()
    stored = open_reference(request.mask)
    if stored is None or made_of(request.mask) in ("", sha256_of(request.image)):
        return stored, ()
    if (stored.height, stored.width) != picture.size:
        raise BadMedia(
            f"{request.mask.name} was made for another picture, of {stored.width}x{stored.height}. "
            "Give the mask of this one too, or make both anew."
        )
    note = f"{request.mask.name} was made for another picture file of the same size."
    return stored, (note,)


def _driving(request: Request, mode: Mode, motion: Motion, size: Size, check: Check) -> DrivingMask:
    count, who = len(motion.frames), request.settings.who
    if request.mask is None:
        if who:
            raise BadRequest("who says who of a mask is whom; there is no mask. Give one.")
        return absent_driving_mask(count, size, mode)
    if motion.video is None:
        raise BadRequest("A mask goes with a video of the motion; joints have none. Leave it out.")
    found = read_driving_mask(
        request.mask, motion.video, motion.shown_at, count, size, mode, check, who
    )
    if len(found.colours) != count:
        raise BadMedia(
            f"{request.mask.name} gives {len(found.colours)} frames for {count} of the motion."
        )
    return found
