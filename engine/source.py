"""A request -> its media at the size of the result: picture, skeleton, rate and sound."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadMedia
from engine.flow import Check, Request, Sound, Source, go_on
from engine.media.framing import (
    Size,
    crop_clip,
    crop_image,
    fitted_size,
    image_to_network,
    target_size,
    trim_to_whole_latents,
)
from engine.media.picture import load_image
from engine.media.sound import find_sound
from engine.media.video import VideoInfo, frame_count, probe_video, read_video
from engine.pose.joints import JointClip, load_joints
from engine.pose.skeleton import draw_skeleton

# request, its video, picture [h, w, 3] u8, size of the skeleton, whom to ask -> skeleton
# [T, *size, 3] u8 and its rate
MotionCapture = Callable[[Request, VideoInfo, Tensor, Size, Check], tuple[Tensor, float]]

log = logging.getLogger(__name__)


def load_source(request: Request, capture: MotionCapture, check: Check = go_on) -> Source:
    """Reads the files of a request and brings them to the size of the clip.

    `capture` turns a dance into a skeleton. Sound that cannot be read is a note, and costs nothing
    but itself. Raises `BadMedia`, and what `capture` and `check` raise.
    """
    picture = load_image(request.image)
    size = clip_size(request, picture)
    image = crop_image(image_to_network(picture), size)
    canvas = (size[0] // 2, size[1] // 2) if request.settings.recipe.half_render else size
    sound, notes = None, ()
    if request.kind == "joints":
        skeleton, fps = _draw_joints(request, canvas, check)
    else:
        video = probe_video(request.motion, check=check)
        sound, notes = _look_at_sound(request, video, check)
        if request.kind == "pose":
            skeleton, fps = _read_skeleton(request, video, size, check)
        else:
            skeleton, fps = capture(request, video, picture, canvas, check)
    whole = trim_to_whole_latents(len(skeleton))
    return Source(image, skeleton[:whole], fps, sound, notes)


def clip_size(request: Request, picture: Tensor) -> Size:
    """The size of the clip for a picture [h, w, 3]. Raises `BadMedia` if it is too long for it."""
    wanted, (height, width) = request.settings, picture.shape[:2]
    if wanted.height is not None and wanted.width is not None:
        size = wanted.height, wanted.width
    else:
        size = target_size(height, width)
    return fitted_size(height, width, size) if wanted.fit == "resize" else size


def check_source(request: Request) -> None:
    """Checks a request's files before anything is loaded, and logs what a clip will lack.

    Raises `BadMedia`.
    """
    clip_size(request, load_image(request.image))
    if request.kind == "joints":
        _joint_count(request, load_joints(request.motion))
    else:
        video = probe_video(request.motion)
        frame_count(video, request.settings.fps, request.settings.frames)
        for note in _look_at_sound(request, video, go_on)[1]:
            log.warning("%s", note)


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


def _read_skeleton(
    request: Request, video: VideoInfo, size: Size, check: Check
) -> tuple[Tensor, float]:
    fps = request.settings.fps
    count = frame_count(video, fps, request.settings.frames)
    return crop_clip(read_video(video, fps, count, check=check), count, size), fps or video.fps


def _draw_joints(request: Request, canvas: Size, check: Check) -> tuple[Tensor, float]:
    clip = load_joints(request.motion)
    fps, count = request.settings.fps or clip.fps, _joint_count(request, clip)
    shown = np.minimum((np.arange(count) / fps * clip.fps + 1e-9).astype(int), len(clip.joints) - 1)
    skeleton = torch.empty(count, *canvas, 3, dtype=torch.uint8)
    frames = draw_skeleton(clip.joints[shown], *canvas, check=check)
    for place, frame in zip(skeleton, frames, strict=True):
        place.copy_(torch.from_numpy(frame))
    return skeleton, fps


def _joint_count(request: Request, clip: JointClip) -> int:
    """The number of frames to draw: as many as the clip lasts at the rate of the result."""
    fps = request.settings.fps or clip.fps
    count = max(1, int(len(clip.joints) / clip.fps * fps + 1e-9))
    if (most := request.settings.frames) is not None:
        count = min(count, most)
    if count > LIMITS.max_frames:
        raise BadMedia(
            f"{request.motion.name} gives {count} frames; a clip may have {LIMITS.max_frames}. "
            "Shorten it, lower the frame rate or ask for fewer frames."
        )
    return count
