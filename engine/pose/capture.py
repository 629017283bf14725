"""A dance video -> the skeleton that fits a picture: the two files meet here."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import BadMedia
from engine.flow import Check, Request, go_on
from engine.media.framing import Size, crop_clip, crop_frames
from engine.media.video import VideoInfo, frame_count, read_video
from engine.pose.extract import CapturedMotion, Dance, PoseExtractor, asking

_PART_BYTES = 2**22


def capture_skeleton(
    extractor: PoseExtractor,
    request: Request,
    video: VideoInfo,
    picture: Tensor,
    canvas: Size,
    check: Check = go_on,
) -> tuple[Tensor, float]:
    """The skeleton [T, *canvas, 3] u8 and its rate. Raises an `EngineError`.

    Dance and picture are cropped to the shape of the canvas before anybody is looked for, so that
    joints, keypoints and skeleton share one camera. `check` is asked per frame.
    """
    settings = request.settings
    scale = 2 if settings.recipe.half_render else 1
    size = canvas[0] * scale, canvas[1] * scale
    motion, fps = capture_motion(
        extractor, video, size, settings.fps, settings.frames, settings.persons, check
    )
    shown = crop_frames(picture[None], size)[0].numpy()
    skeleton = torch.empty(len(motion.joints), *canvas, 3, dtype=torch.uint8)
    frames = extractor.skeleton(motion, shown, *canvas, settings.align)
    for place, frame in zip(skeleton, asking(frames, check), strict=True):
        place.copy_(torch.from_numpy(frame))
    return skeleton, fps


def capture_motion(
    extractor: PoseExtractor,
    video: VideoInfo,
    size: Size,
    fps: float | None,
    frames: int | None,
    persons: int,
    check: Check = go_on,
) -> tuple[CapturedMotion, float]:
    """Joints and keypoints of a video cropped to `size`, and their rate. Raises an `EngineError`.

    The video is decoded only if this dance is not known yet.
    """
    count = frame_count(video, fps, frames)
    rate = fps or video.fps
    dance = Dance(_content(video.path, check), size, count, rate, persons)

    def read() -> NDArray[np.uint8]:
        return crop_clip(read_video(video, fps, count, check=check), count, size).numpy()

    return extractor.motion(dance, read, check), rate


def _content(video: Path, check: Check) -> str:
    content = hashlib.sha256()
    try:
        with video.open("rb") as file:
            while part := file.read(_PART_BYTES):
                check()
                content.update(part)
    except OSError as error:
        raise BadMedia(f"{video.name} cannot be read: {error.strerror}.") from error
    return content.hexdigest()
