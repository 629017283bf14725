"""All masks of a job, and its further pictures, at the size of the result."""

from torch import Tensor

from engine.errors import BadMedia, BadRequest
from engine.flow import Check, Mode, Request, RoleFrames, go_on
from engine.masks.reader import (
    DrivingMask,
    absent_driving_mask,
    additional_mask,
    compare_persons,
    read_driving_mask,
    read_reference_mask,
)
from engine.media.framing import Size, crop_image, image_to_network
from engine.media.picture import load_layers
from engine.media.video import VideoInfo


def read_roles(
    request: Request,
    mode: Mode,
    video: VideoInfo | None,
    fps: float | None,
    count: int,
    picture: tuple[Size, Tensor | None],
    size: Size,
    check: Check = go_on,
) -> tuple[RoleFrames, tuple[str, ...]]:
    """Reads who is who in a job, for `count` frames of `size`, and what had to be assumed.

    `video` is that of the motion, None where it is of joints; `fps` the rate that it is shown at,
    None its own. `picture` are the own size of the reference and its alpha [h, w] u8, if it has
    one. Raises `BadMedia`, `BadRequest`, and what `check` raises.
    """
    reference = read_reference_mask(
        request.reference_mask, picture[1], picture[0], size, mode, check
    )
    driving = _driving(request, mode, video, fps, count, size, check)
    further, masks, notes = [], [reference], [*driving.notes, *reference.notes]
    for one in request.references:
        pixels, alpha = load_layers(one.image)
        mask = additional_mask(one.mask, alpha, (pixels.shape[0], pixels.shape[1]), size, check)
        further.append((crop_image(image_to_network(pixels), size), mask.colours))
        masks.append(mask)
        notes += mask.notes
    notes += compare_persons(driving, masks)
    roles = RoleFrames(mode, reference.colours, driving.colours, tuple(further))
    return roles, tuple(dict.fromkeys(notes))


def _driving(
    request: Request,
    mode: Mode,
    video: VideoInfo | None,
    fps: float | None,
    count: int,
    size: Size,
    check: Check,
) -> DrivingMask:
    if request.mask is None:
        return absent_driving_mask(count, size, mode)
    if video is None:
        raise BadRequest("A mask goes with a video of the motion; joints have none. Leave it out.")
    found = read_driving_mask(request.mask, video, fps, count, size, mode, check)
    if len(found.colours) != count:
        raise BadMedia(
            f"{request.mask.name} gives {len(found.colours)} frames for {count} of the motion."
        )
    return found
