"""A video file as RGB frames at a constant rate, a few at a time.

The timing of every frame is listed first, without decoding: so the rate is exact, a clip of
constant rate yields exactly its frames, and any other rate is met by choice of frames. Colours are
converted with the matrix and range that the stream declares; where it declares none, BT.601 limited
is taken, as the official script does. Rotation and the shape of pixels are honoured. High dynamic
range is not mapped.
"""

import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import LIMITS, Limits
from engine.errors import BadMedia
from engine.media.ffmpeg import (
    SAFE_INPUT,
    STRICT,
    FfmpegFailed,
    Packet,
    Stream,
    ffmpeg,
    file_url,
    list_streams,
    read_into,
)
from engine.media.files import check_file, content_kind

log = logging.getLogger(__name__)

CHUNK = 16  # frames handed out at once

_STALL_S = 60.0
_MAX_S = 600  # of a file: a dance is often cut from a longer one, but not from a film
_GRID = Fraction(1, 4)  # a frame may be this share of the interval off its place
_NTSC = Fraction(1000, 1001)
_CUT_SHORT = "File ended prematurely"  # said of a Matroska file, and not counted as a failure
_KINDS = "MP4, MOV, MKV, WebM, AVI, MPEG-TS or GIF"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The facts about a video that are known before it is decoded."""

    path: Path
    height: int  # upright, in square pixels
    width: int
    rate: Fraction  # frames per second; of a variable one, its usual rate
    is_constant: bool
    frames: int  # in the file
    duration_s: Fraction
    has_audio: bool

    @property
    def fps(self) -> float:
        return float(self.rate)


def exact_rate(fps: float) -> Fraction:
    """The rate meant by a decimal number: 23.976 -> 24000/1001, 12.5 -> 25/2."""
    ntsc = round(Fraction(fps) / _NTSC) * _NTSC
    if ntsc.denominator > 1 and abs(Fraction(fps) / ntsc - 1) < Fraction(2, 10_000):
        return ntsc
    return Fraction(fps).limit_denominator(1001)


def probe_video(path: Path, limits: Limits = LIMITS) -> VideoInfo:
    """Reads the facts about a video.

    Raises `BadMedia` if the file is missing, too large, damaged or holds no moving picture.
    """
    check_file(path, "video", limits.max_video_bytes)
    stored, shown, has_audio = _look_inside(path, limits)
    width = max(1, round(shown.width * shown.pixel_aspect))
    if min(width, shown.height) < limits.min_side:
        raise BadMedia(
            f"{path.name} is {width}x{shown.height}; "
            f"a video needs at least {limits.min_side} pixels a side."
        )
    frames = len(stored.packets)
    if frames > _MAX_S * limits.max_fps:
        raise BadMedia(f"{path.name} holds {frames} frames; cut it to the part that is meant.")
    rate, is_constant = _timing(stored.packets, 1 / shown.tick, limits)
    first, last = stored.packets[0], stored.packets[-1]
    spread = last.start - first.start + (last.length or 1 / rate)
    duration_s = frames / rate if is_constant else spread
    if duration_s > _MAX_S:
        raise BadMedia(
            f"{path.name} lasts {float(duration_s):.0f} s; a video may last {_MAX_S} s. "
            "Cut it to the part that is meant."
        )
    return VideoInfo(
        path=path,
        height=shown.height,
        width=width,
        rate=rate,
        is_constant=is_constant,
        frames=frames,
        duration_s=duration_s,
        has_audio=has_audio,
    )


def _look_inside(path: Path, limits: Limits) -> tuple[Stream, Stream, bool]:
    """The picture track as stored, its first frame as shown, and whether there is sound."""
    source = _source(path, limits)
    tracks = ["-map", "0:V:0?", "-map", "0:a:0?", "-c", "copy"]
    try:
        packed, said = list_streams([*source, *tracks], _STALL_S)
        if said == _CUT_SHORT:
            raise BadMedia(f"{path.name} is cut short; send the whole file.")
        held = {stream.media: stream for stream in packed}
        if "video" not in held:
            raise BadMedia(f"{path.name} holds sound but no picture; a video is expected.")
        _check_side(path, held["video"], limits)
        shown, _ = list_streams([*source, "-map", "0:V:0", "-frames:v", "1"], _STALL_S)
    except FfmpegFailed as error:
        known = content_kind(path) == "video"
        if error.reason.startswith("Codec "):
            found = "is an unusual"
        else:
            found = "is a damaged" if known else "is not a"
        raise _unreadable(path, found, error) from error
    if not held["video"].packets or not shown or not shown[0].packets:
        raise BadMedia(f"{path.name} holds no frame that can be decoded; a video is expected.")
    return held["video"], shown[0], "audio" in held


def frame_count(
    info: VideoInfo,
    fps: float | None = None,
    max_frames: int | None = None,
    limits: Limits = LIMITS,
) -> int:
    """The frames that `read_video` delivers: floor(duration * fps), at least 1, or `max_frames`.

    Raises `BadMedia` if that is more than a job may have.
    """
    count = info.frames
    if fps is not None or not info.is_constant:
        rate = info.rate if fps is None else exact_rate(fps)
        count = max(1, int(info.duration_s * rate))
    if max_frames is not None:
        count = min(count, max_frames)
    if count > limits.max_frames:
        raise BadMedia(
            f"{info.path.name} gives {count} frames; a clip may have {limits.max_frames}. "
            "Shorten it, lower the frame rate or ask for fewer frames."
        )
    return count


def read_video(
    info: VideoInfo, fps: float | None = None, max_frames: int | None = None, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Reads frames [n, H, W, 3] u8, n <= `chunk`, at `fps` (None: `info.rate`), chunk by chunk.

    Output frame i is the one on screen at i / fps. `frame_count` tells how many will come; fewer
    only where a clip was cut from another and its first frames cannot be decoded, which is logged.
    Raises `BadMedia` if the file is damaged.
    """
    wanted = frame_count(info, fps, max_frames)
    arguments = [
        STRICT, *_source(info.path, LIMITS), "-map", "0:V:0", "-vf", _filters(info, fps),
        "-frames:v", str(wanted), "-fps_mode", "passthrough", "-f", "rawvideo", "pipe:1",
    ]  # fmt: skip
    frame_bytes = info.height * info.width * 3
    delivered = 0
    try:
        with ffmpeg(arguments) as run:
            while delivered < wanted:
                buffer = np.empty(min(chunk, wanted - delivered) * frame_bytes, np.uint8)
                whole = read_into(run.process, buffer.data, _STALL_S) // frame_bytes
                if not whole:
                    break
                frames = torch.from_numpy(buffer[: whole * frame_bytes])
                delivered += whole
                yield frames.view(whole, info.height, info.width, 3)
            said = run.finish()
    except FfmpegFailed as error:
        raise _unreadable(info.path, "is a damaged", error) from error
    if not delivered:
        raise BadMedia(f"{info.path.name} holds no frame that can be decoded: {said}.")
    if delivered < wanted or said:
        log.warning("%s: %d of %d frames: %s", info.path.name, delivered, wanted, said)


def _source(path: Path, limits: Limits) -> list[str]:
    # The limit stops frames larger than the header said; `_check_side` refuses the header's size.
    pixels = 4 * limits.max_video_side**2
    return [*SAFE_INPUT, "-max_pixels", str(pixels), "-i", file_url(path)]


def _filters(info: VideoInfo, fps: float | None) -> str:
    filters = [
        f"scale={info.width}:{info.height}:flags=bicubic",
        "format=rgb24",
    ]
    if fps is None and info.is_constant:
        return ",".join(filters)
    rate = info.rate if fps is None else exact_rate(fps)
    choose = ["setpts=PTS-STARTPTS"]
    if info.is_constant:  # counting in frames undoes the rounding of the container's clock
        choose.append(f"settb=1/({info.rate})")
    choose.append(f"fps={rate}:round=up")  # up: a frame serves the times from its start on
    return ",".join([*choose, *filters])


def _timing(packets: Sequence[Packet], nominal: Fraction, limits: Limits) -> tuple[Fraction, bool]:
    """The rate, and whether every frame sits in its place on that grid."""
    starts = [packet.start for packet in packets]
    if len(starts) < 2 or starts[-1] == starts[0]:
        return (nominal if nominal <= limits.max_fps else Fraction(1)), len(starts) == 1
    intervals = [after - now for now, after in pairwise(starts)]
    middle = statistics.median(intervals)
    usual = [interval for interval in intervals if abs(interval - middle) <= middle / 4]
    measured = len(usual) / sum(usual, Fraction(0)) if middle else Fraction(0)
    for rate in (nominal, exact_rate(float(measured))):
        if 0 < rate <= limits.max_fps and _on_grid(starts, rate):
            return rate, True
    mean = (len(starts) - 1) / (starts[-1] - starts[0])
    rate = measured if 0 < measured <= limits.max_fps else mean
    return exact_rate(min(float(rate), limits.max_fps)), False


def _on_grid(starts: Sequence[Fraction], rate: Fraction) -> bool:
    return all(
        abs((start - starts[0]) * rate - place) <= _GRID for place, start in enumerate(starts)
    )


def _check_side(path: Path, stream: Stream, limits: Limits) -> None:
    if max(stream.width, stream.height) > limits.max_video_side:
        raise BadMedia(
            f"{path.name} is {stream.width}x{stream.height}; "
            f"a video may have {limits.max_video_side} pixels a side."
        )


def _unreadable(path: Path, found: str, error: FfmpegFailed) -> BadMedia:
    reason = error.reason.replace(str(path.absolute()), path.name)
    return BadMedia(f"{path.name} {found} video: {reason}. Expected {_KINDS}.")
