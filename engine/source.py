"""A request -> its media at the size of the result: picture, skeleton, rate and sound."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import LIMITS
from engine.denoise.segments import segments_of
from engine.errors import BadMedia
from engine.flow import Check, Request, Sound, Source, Standing, Warned, go_on
from engine.masks.looked import Look
from engine.masks.making import Segment, Wanted
from engine.masks.reader import DRIVING
from engine.masks.roles import Motion, Picture, read_roles
from engine.masks.saved import save_masks
from engine.media.framing import (
    Size,
    crop_clip,
    crop_image,
    fitted_size,
    image_to_network,
    target_size,
    trim_to_whole_latents,
)
from engine.media.picture import load_image, load_layers
from engine.media.sound import find_sound
from engine.media.video import VideoInfo, frame_count, probe_video, read_video
from engine.pose.joints import JointClip, load_joints
from engine.pose.skeleton import draw_skeleton

# request, its video, picture [h, w, 3] u8, size of the skeleton, whom to ask -> skeleton
# [T, *size, 3] u8 and its rate
MotionCapture = Callable[[Request, VideoInfo, Tensor, Size, Check], tuple[Tensor, float]]

FASTEST = 30  # frames a second of what drives a clip
MADE = "masks.npz"  # the name of masks that were made for a clip
_SAID = 4  # of the warnings that a refusal repeats
_SLACK = Fraction(1, 50)  # of that: clocks of cameras drift, and 30.02 is 30

log = logging.getLogger(__name__)


def load_source(
    request: Request, capture: MotionCapture, check: Check = go_on, look: Look | None = None
) -> Source:
    """Reads the files of a request and brings them to the size of the clip.

    `capture` turns a dance into a skeleton; a model that takes masks sees the dance itself, and
    `look` finds joints in it where a mask does not tell how large somebody is. Sound that cannot be
    read is a note, and costs nothing but itself. Raises `BadMedia`, and what `capture` and `check`
    raise.
    """
    picture, alpha = load_layers(request.image)
    video = None if request.kind == "joints" else probe_video(request.motion, check=check)
    size, wanted = clip_size(request, picture, video), request.settings
    image = crop_image(image_to_network(picture), size)
    canvas = (size[0] // 2, size[1] // 2) if wanted.recipe.half_render else size
    sound, notes = None, ()
    if video is None:
        joints = load_joints(request.motion)
        shown_at, notes = _rate(request, Fraction(joints.fps))
        skeleton, fps = _draw_joints(request, joints, shown_at or joints.fps, canvas, check)
    else:
        sound, notes = _look_at_sound(request, video, check)
        shown_at, of_rate = _rate(request, video.rate)
        notes += of_rate
        if request.kind == "pose" or wanted.mode is not None:
            skeleton, fps = _read_frames(request, video, shown_at, size, check)
        else:
            skeleton, fps = capture(request, video, picture, canvas, check)
    if wanted.mode is None:
        whole = trim_to_whole_latents(len(skeleton))
        return Source(image, skeleton[:whole], fps, sound, notes)
    moving, still = Motion(skeleton, fps, video, shown_at), Picture(picture, alpha)
    cast = read_roles(request, wanted.mode, moving, still, check, look)
    notes = (*notes, *_left_out(request, len(skeleton)), *cast.notes)
    if wanted.strict and notes:
        raise BadMedia(_strictly(notes))
    return Source(
        image, skeleton, fps, sound, notes, cast.roles, cast.placed, cast.standing, cast.warned
    )


def clip_size(request: Request, picture: Tensor, video: VideoInfo | None = None) -> Size:
    """The size of the clip for a picture [h, w, 3].

    In replacement it is the surroundings of the `video` that are shown, so its shape decides.
    Raises `BadMedia` if that is too long for a clip.
    """
    wanted, (height, width) = request.settings, picture.shape[:2]
    if wanted.mode == "replacement" and video is not None:
        height, width = video.height, video.width
    if wanted.height is not None and wanted.width is not None:
        size = wanted.height, wanted.width
    else:
        size = target_size(height, width)
    return fitted_size(height, width, size) if wanted.fit == "resize" else size


def wanted_masks(
    request: Request, persons: int | None = None, grow: int = 0, *, is_patient: bool = False
) -> Wanted:
    """Says of which media of a request masks are wanted. Raises `BadMedia` as `load_source` does.

    `persons`, `grow` and `is_patient` are as in `Wanted`.
    """
    video = probe_video(request.motion)
    settings = request.settings
    return Wanted(
        image=request.image,
        video=video,
        shown_at=_rate(request, video.rate)[0],
        frames=settings.frames,
        size=clip_size(request, load_image(request.image), video),
        mode=settings.mode or "animation",
        reference=request.reference_mask,
        persons=persons,
        who=settings.who,
        grow=grow,
        is_patient=is_patient,
    )


def with_masks(
    request: Request,
    segment: Segment,
    folder: Path,
    persons: int | None = None,
    check: Check = go_on,
) -> tuple[Request, tuple[Warned, ...]]:
    """Makes the masks of a request that has none, and keeps them in `folder` as `MADE`.

    Raises what `segment` and `save_masks` raise.
    """
    wanted = wanted_masks(request, persons)
    made = segment(wanted, check)
    kept = folder / MADE
    save_masks(kept, made, DRIVING[wanted.mode])
    settings = replace(request.settings, who=())  # they have their places
    return replace(request, mask=kept, settings=settings), made.warned


def check_source(request: Request, look: Look | None = None) -> Source | None:
    """Checks a request's files before anything is loaded, and logs what a clip will lack. Returns
    the media where it had to read all of them: those of a model that takes masks.

    `look` is as in `load_source`. Raises `BadMedia`, and `BadRequest` for masks that do not go with
    the rest.
    """
    if request.settings.mode is not None:
        source = load_source(request, _nobody, look=look)
        for note in source.notes:
            log.warning("%s", note)
        for standing in source.standing:
            log.info("%s", told(standing))
        return source
    picture = load_image(request.image)
    video = None if request.kind == "joints" else probe_video(request.motion)
    clip_size(request, picture, video)
    if video is None:
        joints = load_joints(request.motion)
        _joint_count(request, joints, request.settings.fps or joints.fps)
        return None
    frame_count(video, request.settings.fps, request.settings.frames)
    for note in _look_at_sound(request, video, go_on)[1]:
        log.warning("%s", note)
    return None


def told(standing: Standing) -> str:
    """Says where a person of the picture stands in the clip."""
    cropped = f", {standing.cropped:.0%} of it outside" if standing.cropped >= 0.005 else ""
    return (
        f"The person in {standing.person}: scale {standing.scale:.3f}, {standing.height:.0f} "
        f"pixels high, foot line {standing.foot_line:.0f}{cropped}; in frame {standing.frame} of "
        f"the video {standing.motion_height:.0f} pixels high, foot line "
        f"{standing.motion_foot_line:.0f}."
    )


def _strictly(notes: Sequence[str]) -> str:
    """The refusal of a job whose warnings are errors."""
    more = f" And {len(notes) - _SAID} more." if len(notes) > _SAID else ""
    return f"Strict: a warning is an error here. {' '.join(notes[:_SAID])}{more}"


def _nobody(*_: object) -> tuple[Tensor, float]:
    raise AssertionError("a model that takes masks sees the dance itself")


def _rate(request: Request, rate: Fraction) -> tuple[float | None, tuple[str, ...]]:
    """The rate at which a motion of `rate` is shown, None its own, and a note of frames that are
    left out: a model that sees the dance itself was trained on no more than 30 a second.
    """
    fps = request.settings.fps
    every = math.ceil(rate / FASTEST - _SLACK)
    if fps is not None or request.settings.mode is None or every <= 1:
        return fps, ()
    nth = {2: "second", 3: "third"}.get(every, f"{every}th")
    name = request.motion.name
    note = f"{name} has {float(rate):g} frames a second: every {nth} is shown."
    return float(rate / every), (note,)


def _left_out(request: Request, count: int) -> tuple[str, ...]:
    """A note if the segments of a clip of `count` frames do not reach its end."""
    settings = request.settings
    kept = segments_of(settings, count)[-1].end
    if kept == count:
        return ()
    return (
        f"Segments {settings.segments} leave out the last {count - kept} of {count} frames; even "
        "keeps all.",
    )


def _look_at_sound(
    request: Request, video: VideoInfo, check: Check
) -> tuple[Sound | None, tuple[str, ...]]:
    """The sound of the video if the clip is to have it, and a note if it cannot be read."""
    if not request.settings.audio:
        return None, ()
    try:
        return find_sound(video.path, video.start_s, video.duration_s, check), ()
    except BadMedia as error:
        note = f"{error} The clip has no sound."
        log.info("%s", note)
        return None, (note,)


def _read_frames(
    request: Request, video: VideoInfo, fps: float | None, size: Size, check: Check
) -> tuple[Tensor, float]:
    count = frame_count(video, fps, request.settings.frames)
    return crop_clip(read_video(video, fps, count, check=check), count, size), fps or video.fps


def _draw_joints(
    request: Request, clip: JointClip, fps: float, canvas: Size, check: Check
) -> tuple[Tensor, float]:
    count = _joint_count(request, clip, fps)
    shown = np.minimum((np.arange(count) / fps * clip.fps + 1e-9).astype(int), len(clip.joints) - 1)
    skeleton = torch.empty(count, *canvas, 3, dtype=torch.uint8)
    frames = draw_skeleton(clip.joints[shown], *canvas, check=check)
    for place, frame in zip(skeleton, frames, strict=True):
        place.copy_(torch.from_numpy(frame))
    return skeleton, fps


def _joint_count(request: Request, clip: JointClip, fps: float) -> int:
    """The number of frames to draw: as many as the clip lasts at `fps`, the rate of the result."""
    count = max(1, int(len(clip.joints) / clip.fps * fps + 1e-9))
    if (most := request.settings.frames) is not None:
        count = min(count, most)
    if count > LIMITS.max_frames:
        raise BadMedia(
            f"{request.motion.name} gives {count} frames; a clip may have {LIMITS.max_frames}. "
            "Shorten it, lower the frame rate or ask for fewer frames."
        )
    return count
