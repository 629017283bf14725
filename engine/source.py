"""A request -> its media at the size of the result: picture, skeleton, rate and sound."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadMedia
from engine.flow import Request, Source
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
from engine.media.video import frame_count, probe_video, read_video
from engine.pose.joints import JointClip, load_joints
from engine.pose.skeleton import draw_skeleton

# request, picture [h, w, 3] u8, size of the skeleton -> skeleton [T, *size, 3] u8 and its rate
MotionCapture = Callable[[Request, Tensor, Size], tuple[Tensor, float]]


def load_source(request: Request, capture: MotionCapture) -> Source:
    """Reads the files of a request and brings them to the size of the clip.

    `capture` turns a dance into a skeleton. Raises `BadMedia` and what `capture` raises.
    """
    picture = load_image(request.image)
    size = clip_size(request, picture)
    image = crop_image(image_to_network(picture), size)
    canvas = (size[0] // 2, size[1] // 2) if request.settings.recipe.half_render else size
    if request.kind == "pose":
        skeleton, fps = _read_skeleton(request, size)
    elif request.kind == "joints":
        skeleton, fps = _draw_joints(request, canvas)
    else:
        skeleton, fps = capture(request, picture, canvas)
    whole = trim_to_whole_latents(len(skeleton))
    has_sound = request.settings.audio and request.kind != "joints"
    return Source(image, skeleton[:whole], fps, request.motion if has_sound else None)


def clip_size(request: Request, picture: Tensor) -> Size:
    """The size of the clip for a picture [h, w, 3]. Raises `BadMedia` if it is too long for it."""
    wanted, (height, width) = request.settings, picture.shape[:2]
    if wanted.height is not None and wanted.width is not None:
        size = wanted.height, wanted.width
    else:
        size = target_size(height, width)
    return fitted_size(height, width, size) if wanted.fit == "resize" else size


def check_source(request: Request) -> None:
    """Checks a request's files before anything is loaded. Raises `BadMedia`."""
    clip_size(request, load_image(request.image))
    if request.kind == "joints":
        _joint_count(request, load_joints(request.motion))
    else:
        frame_count(probe_video(request.motion), request.settings.fps, request.settings.frames)


def _read_skeleton(request: Request, size: Size) -> tuple[Tensor, float]:
    info, fps = probe_video(request.motion), request.settings.fps
    count = frame_count(info, fps, request.settings.frames)
    return crop_clip(read_video(info, fps, count), count, size), fps or info.fps


def _draw_joints(request: Request, canvas: Size) -> tuple[Tensor, float]:
    clip = load_joints(request.motion)
    fps, count = request.settings.fps or clip.fps, _joint_count(request, clip)
    shown = np.minimum((np.arange(count) / fps * clip.fps + 1e-9).astype(int), len(clip.joints) - 1)
    frames = draw_skeleton(clip.joints[shown], *canvas)
    return torch.from_numpy(np.stack(list(frames))), fps


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
