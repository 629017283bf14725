"""Mask files of a job -> colours at the size of the result, and what had to be assumed.

A file says who is where. Which colour the background has is the mode's affair: one that is the
wrong way round is turned, and a note says so. Rules: docs/reference/masks.md 3 and 4.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadMedia, BadRequest
from engine.flow import Check, Mode, Warned, go_on
from engine.masks.cleaning import BACKGROUND, clean
from engine.masks.colours import BLACK, BLUE, PERSON_COLOURS, PERSONS, WHITE, paint, show_black
from engine.masks.loss import Loss
from engine.masks.stored import Stored, open_mask
from engine.media.framing import Size, crop_image, crop_nearest, image_to_network
from engine.media.video import VideoInfo, frame_count, shown_frames

# the background of a mode (docs/reference/masks.md 1.3)
DRIVING: dict[Mode, int] = {"animation": BLACK, "replacement": WHITE}
REFERENCE: dict[Mode, int] = {"animation": WHITE, "replacement": BLACK}

# what a picture without a mask is taken for, and the note
_WHOLE: dict[Mode, tuple[int, str]] = {
    "animation": (WHITE, "The picture has no mask: its background is taken over as it is."),
    "replacement": (
        BLUE,
        "The picture has no mask: all of it is taken as person 1 (blue). Give a mask, or a picture "
        "whose background is transparent.",
    ),
}

_ONLY_MOVING = "The mask of the video shows {}, which no picture has: check the colours."
_ONLY_SHOWN = "The masks of the pictures show {}, which the video has not: check the colours."

_AT_ONCE = 2**24  # pixels in work
_NAMES = {BLACK: "black", WHITE: "white"}
_ASPECT = 0.01  # by which the shape of a mask may differ from that of its picture
_OPAQUE = 128  # and above
_FORMS = "a video, a folder or ZIP of pictures, or an .npz of labels"
_COLOUR_OF_LABEL = torch.tensor([BACKGROUND, *PERSON_COLOURS], dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class DrivingMask:
    """Who is where in the driving video."""

    colours: Tensor  # [T, H, W, 3] u8, each 0 or 255
    persons: tuple[str, ...]  # the colours that it shows, person 1 first
    notes: tuple[str, ...]
    warned: tuple[Warned, ...] = ()  # of persons whom the crop cuts


@dataclass(frozen=True, slots=True)
class ReferenceMask:
    """Who is where in a picture, cropped as the picture is."""

    colours: Tensor  # [3, H, W] fp32, about -1..1
    persons: tuple[str, ...]
    notes: tuple[str, ...]
    numbers: Tensor  # [h, w] u8, of colours, at the picture's own size


def read_driving_mask(
    path: Path,
    video: VideoInfo,
    fps: float | None,
    count: int,
    size: Size,
    mode: Mode,
    check: Check = go_on,
    who: Sequence[int] = (),
) -> DrivingMask:
    """Reads the mask of a driving video, for the `count` frames that are shown of it at `fps`.

    The mask has as many frames as the video, or as the clip. `who` names the persons of the file,
    from 1, who shall be person 1, 2, ..; nobody else has a colour then. Raises `BadMedia` if it
    has another length or shape, is no mask, or if nobody is to be replaced, `BadRequest` if `who`
    names somebody whom it does not show, and what `check` raises.
    """
    stored = open_mask(path, check=check)
    _check_shape(stored, (video.height, video.width), video.path.name)
    wanted, notes = _chosen(stored, video, fps, count, check)
    shape = video.height, video.width
    loss = Loss(shape, size, len(wanted))
    numbers, frames = _numbers(stored, wanted, loss, check)
    persons = persons_of(numbers)
    lost = loss.warnings(persons)
    if who:
        persons = _recast(numbers, persons, who, stored.name)
    if not persons and mode == "replacement":
        raise BadMedia(
            f"{stored.name} shows nobody; who is to be replaced must be in a colour (the first "
            "blue), or white on black."
        )
    if not persons:
        notes += (f"{stored.name} shows nobody: all of the video is taken as background.",)
    notes += _place_background(numbers, DRIVING[mode], stored.name)
    for place, colours in zip(frames, numbers):
        place.copy_(paint(colours))
    return DrivingMask(frames, persons, notes, lost)


def absent_driving_mask(count: int, size: Size, mode: Mode) -> DrivingMask:
    """The mask of a driving video that comes without: black, which is all background.

    Raises `BadRequest` in replacement, where the mask says who is replaced.
    """
    if mode == "replacement":
        raise BadRequest(
            f"Replacement needs a mask of the video, which says who is replaced: {_FORMS}, "
            "with each person in a colour (the first blue) or white on black."
        )
    note = "The motion has no mask: all of it is taken as background without persons."
    return DrivingMask(torch.zeros(count, *size, 3, dtype=torch.uint8), (), (note,))


def read_reference_mask(
    path: Path | Stored | None,
    alpha: Tensor | None,
    picture: Size,
    size: Size,
    mode: Mode,
    check: Check = go_on,
) -> ReferenceMask:
    """Reads the mask of the reference, whose own size is `picture`; else takes its `alpha`.

    `alpha` [h, w] u8 is 255 where the picture is opaque. Without either, all of the picture is
    background to be seen in animation, and person 1 in replacement; a note says so. Raises
    `BadMedia` if the file is no mask of this picture, or shows nobody in replacement.
    """
    numbers, name, notes = _of_picture(path, alpha, picture, check)
    if numbers is None:
        colour, note = _WHOLE[mode]
        numbers, notes = torch.full(picture, colour, dtype=torch.uint8), (note,)
    elif mode == "replacement" and bool((numbers == WHITE).all()):
        numbers.fill_(BLUE)
        notes += (f"{name} is white everywhere: all of the picture is person 1 (blue).",)
    persons = persons_of(numbers)
    if mode == "replacement":
        if not persons:
            raise BadMedia(
                f"{name} shows nobody; the person of the picture must be in a colour (the first "
                "blue), or white on black."
            )
        notes += _place_background(numbers, REFERENCE[mode], name)
        return ReferenceMask(_to_network(numbers, size), persons, notes, numbers)
    numbers[numbers == BACKGROUND] = REFERENCE[mode]
    colours, is_black = _to_network(numbers, size), numbers == BLACK
    if is_black.any() and not (numbers == WHITE).any():
        colours = show_black(colours)
        notes += (_turned_note(name, is_black.float().mean().item(), BLACK),)
    if not persons and name:
        notes += (f"{name} shows nobody: all of the picture is taken as background.",)
    return ReferenceMask(colours, persons, notes, numbers)


def additional_mask(
    path: Path | None, alpha: Tensor | None, picture: Size, size: Size, check: Check = go_on
) -> ReferenceMask:
    """Reads the mask of an additional reference; else takes its `alpha`; else it is all white.

    Black and white stay as a colour file has them, for both are in use there; around a matte it is
    black. Raises `BadMedia` as `read_reference_mask`.
    """
    numbers, name, notes = _of_picture(path, alpha, picture, check)
    if numbers is None:
        numbers = torch.full(picture, WHITE, dtype=torch.uint8)
        notes = ("An additional picture has no mask: its background is taken over as it is.",)
    numbers[numbers == BACKGROUND] = BLACK
    if bool((numbers == BLACK).all()):
        notes += (f"{name} shows nobody and no background: nothing of it is to be seen.",)
    colours = _to_network(numbers, size)
    return ReferenceMask(colours, persons_of(numbers), notes, numbers)


def compare_persons(driving: DrivingMask, pictures: Sequence[ReferenceMask]) -> tuple[str, ...]:
    """Notes for colours that the driving mask or the pictures show and the other side does not."""
    moving, shown = set(driving.persons), {name for one in pictures for name in one.persons}
    if not moving or not shown:
        return ()
    notes = []
    for names, sides in ((moving - shown, _ONLY_MOVING), (shown - moving, _ONLY_SHOWN)):
        if names:
            told = " and ".join(name for name in PERSONS if name in names)
            notes.append(sides.format(told))
    return tuple(notes)


def _numbers(
    stored: Stored, wanted: Sequence[int], loss: Loss, check: Check
) -> tuple[Tensor, Tensor]:
    """The numbers of colours [T, H, W] u8, and memory for frames [T, H, W, 3] u8 of them.

    Colours are cleaned at the smaller of two sizes, the file's or the clip's: what compression
    blurs in a small file would be an area in a large one.
    """
    shape, size = loss.shape, loss.size
    count, is_small = len(wanted), stored.height * stored.width < size[0] * size[1]
    held = (stored.height, stored.width) if is_small else size
    frames = torch.empty(count, *held, *(() if stored.has_labels else (3,)), dtype=torch.uint8)
    shown = stored.frames(wanted, check)
    for number, (place, frame) in enumerate(zip(frames, shown, strict=True)):
        loss.look(number, frame)
        place.copy_(frame if is_small else crop_nearest(frame[None], shape, size)[0])
    if stored.has_labels:
        numbers = frames
        for place in numbers:
            place.copy_(_COLOUR_OF_LABEL[place.int()])
    else:
        numbers = clean(frames, stored.name, check)
    if is_small:
        numbers = crop_nearest(numbers, shape, size)
    if is_small or stored.has_labels:
        frames = torch.empty(count, *size, 3, dtype=torch.uint8)
    return numbers, frames


def _of_picture(
    path: Path | Stored | None, alpha: Tensor | None, picture: Size, check: Check
) -> tuple[Tensor | None, str, tuple[str, ...]]:
    """The numbers of colours [h, w] u8 at the size of the picture, the file's name, and notes."""
    if path is None:
        if alpha is None or bool((alpha >= _OPAQUE).all()):
            return None, "", ()
        numbers = torch.where(alpha >= _OPAQUE, BLUE, BACKGROUND).to(torch.uint8)
        is_cut_out = bool((numbers == BLUE).any())
        note = "The picture is transparent in part: what is opaque of it is person 1 (blue)."
        return numbers, "The picture", (note,) if is_cut_out else ()
    stored = path if isinstance(path, Stored) else open_mask(path, check=check)
    if stored.count != 1:
        raise BadMedia(f"{stored.name} has {stored.count} frames; the mask of a picture has one.")
    _check_shape(stored, picture, "the picture")
    frame = next(iter(stored.frames([0], check)))
    if stored.has_labels:
        numbers = _COLOUR_OF_LABEL[frame.int()]
    else:
        numbers = clean(frame[None], stored.name, check)[0]
    return crop_nearest(numbers[None], picture, picture)[0].clone(), stored.name, ()


def _check_shape(stored: Stored, shape: Size, owner: str) -> None:
    height, width = shape
    ratio = (stored.width * height) / (stored.height * width)
    if abs(ratio - 1) > _ASPECT:
        raise BadMedia(
            f"{stored.name} is {stored.width}x{stored.height} and {owner} {width}x{height}; a mask "
            "must have the shape of its picture. Make it from the uncropped one."
        )


def _chosen(
    stored: Stored, video: VideoInfo, fps: float | None, count: int, check: Check
) -> tuple[list[int], tuple[str, ...]]:
    """The frames of the mask for those of the clip. Raises `BadMedia` if the lengths do not fit."""
    held, limits = stored.count, replace(LIMITS, max_frames=sys.maxsize)
    told = f"{stored.name} {'is one picture' if held == 1 else f'has {held} frames'}"
    whole = frame_count(video, fps, limits=limits)  # of the clip, if all were shown
    for off in (0, 1):
        for frames, is_file in ((video.frames, True), (whole, False), (count, False)):
            if abs(held - frames) == off:
                wanted = shown_frames(video, fps, count, check) if is_file else range(count)
                repair = f"its last one {'is left out' if held > frames else 'is shown twice'}"
                notes = (f"{told} for {frames}: {repair}.",)
                return [min(number, held - 1) for number in wanted], notes if off else ()
    also = "" if whole == video.frames else f", or {whole} at {fps or video.fps:g} a second"
    raise BadMedia(
        f"{told} and {video.path.name} has {video.frames} frames{also}; a mask needs "
        "one for each frame of its video."
    )


def _place_background(numbers: Tensor, ground: int, name: str) -> tuple[str, ...]:
    """Gives all background, in `numbers`, the colour `ground`, and notes what was the other."""
    other = WHITE if ground == BLACK else BLACK
    turned = 0
    for some in numbers.view(-1).split(_AT_ONCE):
        is_other = some == other
        turned += int(is_other.sum())
        some[is_other | (some == BACKGROUND)] = ground
    if not turned:
        return ()
    return (_turned_note(name, turned / numbers.numel(), other),)


def _turned_note(name: str, share: float, was: int) -> str:
    is_now = _NAMES[WHITE if was == BLACK else BLACK]
    return (
        f"{name} has a {_NAMES[was]} background ({share:.0%} of it), where this mode has {is_now}: "
        "it was turned."
    )


def persons_of(numbers: Tensor) -> tuple[str, ...]:
    """The names of the persons' colours that are there."""
    counts = torch.zeros(BACKGROUND + 1, dtype=torch.int64)
    for some in numbers.view(-1).split(_AT_ONCE):
        counts += torch.bincount(some, minlength=BACKGROUND + 1)
    return tuple(name for name, colour in zip(PERSONS, PERSON_COLOURS) if counts[colour])


def _recast(
    numbers: Tensor, persons: tuple[str, ...], who: Sequence[int], name: str
) -> tuple[str, ...]:
    """Gives the persons of `who`, in `numbers`, the colours of person 1, 2, ..; others none.

    Returns the colours that are there then.
    """
    known = [PERSONS.index(person) + 1 for person in persons]
    for person in who:
        if person not in known:
            held = " and ".join(f"{one} ({PERSONS[one - 1]})" for one in known) or "nobody"
            raise BadRequest(f"who names person {person}; {name} shows {held}.")
    told = torch.arange(BACKGROUND + 1, dtype=torch.uint8)
    told[list(PERSON_COLOURS)] = BACKGROUND
    for colour, person in zip(PERSON_COLOURS, who):
        told[PERSON_COLOURS[person - 1]] = colour
    for some in numbers.view(-1).split(_AT_ONCE):
        some.copy_(told[some.int()])
    return PERSONS[: len(who)]


def _to_network(numbers: Tensor, size: Size) -> Tensor:
    """Paints and crops as a picture is: [h, w] u8 -> [3, H, W] fp32."""
    return crop_image(image_to_network(paint(numbers)), size)
