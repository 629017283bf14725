"""A video file as RGB frames at a constant rate, a few at a time.

The timing of every frame is listed first, without decoding: so the rate is exact, a clip of
constant rate yields exactly its frames, and any other rate is met by choice of frames. Colours are
converted with the matrix and range that the stream declares; where it declares none, BT.601 limited
is taken, as the official script does. High dynamic range and wide gamuts become BT.709. Rotation
and the shape of pixels are honoured, interlaced frames are de-interlaced, and a picture that
changes its shape is refused.
"""

import logging
import statistics
from bisect import bisect_right
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
from engine.flow import Check, go_on
from engine.media.ffmpeg import (
    MEMORY_BYTES,
    SAFE_INPUT,
    STRICT,
    FfmpegFailed,
    Packet,
    Stream,
    clock_zero,
    ffmpeg,
    file_url,
    list_streams,
    read_into,
)
from engine.media.files import check_file, content_kind
from engine.media.video_colours import DECLARED, UNKNOWN, Colours, declared, to_bt709, tone_map

log = logging.getLogger(__name__)

CHUNK = 16  # frames handed out at once

# The default track, or the first; `V` passes over the cover of a song.
_TRACKS = ("0:V:disp:default:0", "0:V:0")
# Copies packets. Their order of decoding is made up, for that of a clip which was cut from another
# may go backwards: an even number, odd where a file gives no time of showing and this is it.
_PLACES = (
    "-c", "copy", "-bsf",
    "setts=pts=if(eq(PTS\\,NOPTS)\\,DTS\\,PTS):dts=2*N+eq(PTS\\,NOPTS)-2000000000000000",
)  # fmt: skip
_FIRST_CPU_S = 60  # until the first frame is there
_RESHAPED = "Error when evaluating the expression"  # said of the width in `_upright`
_MAX_S = 600  # of a file: a dance is often cut from a longer one, but not from a film
_GRID = Fraction(1, 4)  # a frame may be this share of the interval off its place
_NTSC = Fraction(1000, 1001)
_CUT_SHORT = "File ended prematurely"  # said of a Matroska file, and not counted as a failure
_NO_HEADER = "Could not write header"  # said of a track that is announced and never comes
_CHANGED = "CRC mismatch"  # said of FFV1, which makes up what was there and goes on
_KINDS = "MP4, MOV, MKV, WebM, AVI, MPEG-TS or GIF"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The facts about a video that are known before it is decoded."""

    path: Path
    track: str  # as ffmpeg's `-map` takes it
    height: int  # upright, in square pixels
    width: int
    columns: int  # upright, in its own pixels; of as many rows
    rate: Fraction  # frames per second; of a variable one, its usual rate
    is_constant: bool
    frames: int  # in the file, from the first that can be decoded
    start_s: Fraction  # of that one, on the clock of the file
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


def probe_video(path: Path, limits: Limits = LIMITS, check: Check = go_on) -> VideoInfo:
    """Reads the facts about a video.

    Raises `BadMedia` if the file is missing, too large, damaged or holds no moving picture.
    """
    check_file(path, "video", limits.max_video_bytes)
    found = _look_inside(path, limits, check)
    shown, first, packets = found.shown, found.first, found.packets
    width = max(1, round(shown.width * shown.pixel_aspect))
    if min(width, shown.height) < limits.min_side:
        raise BadMedia(
            f"{path.name} is {width}x{shown.height}; "
            f"a video needs at least {limits.min_side} pixels a side."
        )
    frames = len(packets)
    if frames > _MAX_S * limits.max_fps:
        raise BadMedia(f"{path.name} holds {frames} frames; cut it to the part that is meant.")
    spread = packets[-1].start - packets[0].start + packets[-1].length
    _check_length(path, spread)
    rate, is_constant = _timing(packets, 1 / shown.tick, limits)
    duration_s = frames / rate if is_constant else spread + (0 if packets[-1].length else 1 / rate)
    _check_length(path, duration_s)
    return VideoInfo(
        path=path,
        track=found.track,
        height=shown.height,
        width=width,
        columns=shown.width,
        rate=rate,
        is_constant=is_constant,
        frames=frames,
        start_s=found.zero_s + (packets[0].start if _is_guess(packets[0]) else first),
        duration_s=duration_s,
        has_audio=found.has_audio,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What two short runs of ffmpeg tell about a file."""

    track: str
    packets: list[Packet]  # of the pictures that can be decoded
    shown: Stream  # as decoded
    first: Fraction  # the time of the first decoded picture
    zero_s: Fraction  # on the clock of the file: from here the times above are counted
    has_audio: bool


def _look_inside(path: Path, limits: Limits, check: Check) -> _Found:
    source = _source(path, limits)
    try:
        has_audio = _has_audio(source, check)
        for track in _TRACKS:
            packed, said = list_streams([*source, "-map", track, *_PLACES], check=check)
            if said == _CUT_SHORT:
                raise BadMedia(f"{path.name} is cut short; send the whole file.")
            if packed:
                break
        else:
            what = "sound but no picture" if has_audio else "no picture"
            raise BadMedia(f"{path.name} holds {what}; a video is expected.")
        stored = packed[0]
        if not stored.packets:
            raise BadMedia(f"{path.name} is a damaged video: no frame of it can be read.")
        _check_side(path, stored, limits)
        zero_s = clock_zero(source, track, stored, check) if has_audio else Fraction(0)
        # once in units of a frame at its nominal rate, once on the clock of the file
        one = ["-threads", "1", *source, "-map", track, "-frames:v", "1"]
        memory_bytes = _memory_bytes(stored.width, stored.height)
        nominal, _ = list_streams(one, _FIRST_CPU_S, memory_bytes, check)
        one += ["-enc_time_base", "demux"]
        decoded, _ = list_streams(one, _FIRST_CPU_S, memory_bytes, check)
    except FfmpegFailed as error:
        known = content_kind(path) == "video"
        if error.reason.startswith("Codec "):
            found = "is an unusual"
        else:
            found = "is a damaged" if known else "is not a"
        raise _unreadable(path, found, error) from error
    if not nominal or not decoded or not decoded[0].packets:
        raise BadMedia(f"{path.name} holds no frame that can be decoded; a video is expected.")
    if nominal[0].tick <= 0:
        raise BadMedia(f"{path.name} is a damaged video: its frames have no rate.")
    first = decoded[0].packets[0].start
    # What was cut from another clip may begin with frames that lack what they are coded by.
    packets = [p for p in stored.packets if _is_guess(p) or p.start > first - decoded[0].tick]
    return _Found(track, packets or stored.packets, nominal[0], first, zero_s, has_audio)


def _has_audio(source: list[str], check: Check) -> bool:
    arguments = [*source, "-map", "0:a:0", "-c", "copy", "-frames:a", "1"]
    try:
        return bool(list_streams(arguments, check=check)[0])
    except FfmpegFailed as error:
        if error.reason.startswith(_NO_HEADER):
            return True  # a track of nothing; the pictures are as good
        raise


def _is_guess(packet: Packet) -> bool:
    """Whether the file gives no time of showing, and what is known is that of decoding."""
    return packet.place % 2 == 1  # as `_PLACES` made it


def _check_length(path: Path, seconds: Fraction) -> None:
    if seconds > _MAX_S:
        raise BadMedia(
            f"{path.name} lasts {float(seconds):.0f} s; a video may last {_MAX_S} s. "
            "Cut it to the part that is meant."
        )


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


def shown_frames(
    info: VideoInfo,
    fps: float | None = None,
    max_frames: int | None = None,
    check: Check = go_on,
) -> list[int]:
    """Numbers the frames of the file, from 0, that `read_video` delivers for the same arguments.

    A video of variable rate is listed once more for it. Raises as `frame_count` and `probe_video`.
    """
    wanted = frame_count(info, fps, max_frames)
    if fps is None and info.is_constant:
        return list(range(wanted))
    rate = info.rate if fps is None else exact_rate(fps)
    moments = [place / rate for place in range(wanted)]
    if info.is_constant:
        return [int(moment * info.rate) for moment in moments]
    packets = _look_inside(info.path, LIMITS, check).packets
    starts = [packet.start - packets[0].start for packet in packets]
    return [bisect_right(starts, moment) - 1 for moment in moments]


def read_video(
    info: VideoInfo,
    fps: float | None = None,
    max_frames: int | None = None,
    chunk: int = CHUNK,
    check: Check = go_on,
    limits: Limits = LIMITS,
) -> Iterator[Tensor]:
    """Reads frames [n, H, W, 3] u8, n <= `chunk`, at `fps` (None: `info.rate`), chunk by chunk.

    Output frame i is the one on screen at i / fps. `frame_count` tells how many will come; fewer
    only where frames in the midst of a clip cannot be decoded, which is logged. Raises `BadMedia`
    if the file is damaged or its picture changes its shape, and what `check` raises.
    """
    wanted = frame_count(info, fps, max_frames, limits)
    frame_bytes = info.height * info.width * 3
    delivered = 0
    try:
        filters = [*_upright(info), *_choice(info, fps), *_picture(info, _colours(info, check))]
        arguments = [
            STRICT, "-reinit_filter", "0", *_source(info.path, LIMITS), "-map", info.track,
            "-vf", ",".join(filters), "-filter_threads", "8", "-frames:v", str(wanted),
            "-fps_mode", "passthrough", "-f", "rawvideo", "pipe:1",
        ]  # fmt: skip
        memory_bytes = _memory_bytes(info.width, info.height)
        with ffmpeg(arguments, memory_bytes=memory_bytes, check=check) as run:
            while delivered < wanted:
                buffer = np.empty(min(chunk, wanted - delivered) * frame_bytes, np.uint8)
                whole = read_into(run, buffer.data) // frame_bytes
                if not whole:
                    break
                frames = torch.from_numpy(buffer[: whole * frame_bytes])
                delivered += whole
                yield frames.view(whole, info.height, info.width, 3)
            said = run.finish()
    except FfmpegFailed as error:
        if _RESHAPED in error.reason:
            raise BadMedia(
                f"{info.path.name} changes the size or shape of its picture midway; one of a "
                "single size is expected. Cut it at the change, or encode it again."
            ) from error
        raise _unreadable(info.path, "is a damaged", error) from error
    if _CHANGED in said:
        raise BadMedia(
            f"{info.path.name} is a damaged video: what is stored and its checksum differ. Send "
            "the file anew."
        )
    if not delivered:
        raise BadMedia(f"{info.path.name} holds no frame that can be decoded: {said}.")
    if delivered < wanted or said:
        level = logging.WARNING if delivered < wanted else logging.INFO
        log.log(level, "%s: %d of %d frames: %s", info.path.name, delivered, wanted, said)


def _source(path: Path, limits: Limits) -> list[str]:
    # The limit stops frames larger than the header said; `_check_side` refuses the header's size.
    pixels = 4 * limits.max_video_side**2
    return [*SAFE_INPUT, "-max_pixels", str(pixels), "-i", file_url(path)]


def _choice(info: VideoInfo, fps: float | None) -> list[str]:
    """The filters that choose the frame on screen at each moment of the result."""
    if fps is None and info.is_constant:
        return []
    rate = info.rate if fps is None else exact_rate(fps)
    choose = ["setpts=PTS-STARTPTS"]
    if info.is_constant:  # counting in frames undoes the rounding of the container's clock
        choose.append(f"settb=1/({info.rate})")
    # up: a frame serves the times from its start on
    return [*choose, f"fps={rate}:round=up"]


def _upright(info: VideoInfo) -> list[str]:
    """The filters that hand on whole frames of the size that the first one has, or end in an error.

    These see every change of a stream, for the filters are never made anew: that would lose frames.
    """
    same = f"eq(iw,{info.columns})*eq(ih,{info.height})"
    return [
        f"scale=w='if({same},iw,nan)':h=ih:eval=frame",
        "bwdif=mode=send_frame:deint=interlaced",  # a frame that is not interlaced stays
    ]


def _picture(info: VideoInfo, colours: Colours) -> list[str]:
    """The filters that make a frame RGB of BT.709 in square pixels."""
    size = f"scale={info.width}:{info.height}:flags=bicubic"
    if colours.is_hdr:
        matrix = "" if colours.matrix != UNKNOWN else ":in_color_matrix=bt2020"
        return [f"{size}{matrix}", "format=gbrp16le", *tone_map(colours), "format=rgb24"]
    if colours.is_wide:
        return [size, "format=gbrp16le", *to_bt709(colours), "format=rgb24"]
    return [size, "format=rgb24"]


def _colours(info: VideoInfo, check: Check) -> Colours:
    """The colours that the first frame declares."""
    arguments = [*_source(info.path, LIMITS), "-map", info.track, *DECLARED, "pipe:1"]
    memory_bytes = _memory_bytes(info.width, info.height)
    with ffmpeg(arguments, cpu_s=_FIRST_CPU_S, memory_bytes=memory_bytes, check=check) as run:
        file = bytearray(1 << 16)  # it has some hundred bytes
        size = read_into(run, memoryview(file))
        run.finish()
    return declared(bytes(file[:size]))


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


def _memory_bytes(width: int, height: int) -> int:
    """What decoding may take: all that it may for the largest frames, a part of it for small."""
    share = width * height / LIMITS.max_video_side**2
    return int(MEMORY_BYTES / 3 * (1 + 2 * min(share, 1)))


def _check_side(path: Path, stream: Stream, limits: Limits) -> None:
    if max(stream.width, stream.height) > limits.max_video_side:
        raise BadMedia(
            f"{path.name} is {stream.width}x{stream.height}; "
            f"a video may have {limits.max_video_side} pixels a side."
        )


def _unreadable(path: Path, found: str, error: FfmpegFailed) -> BadMedia:
    reason = error.reason.replace(str(path.absolute()), path.name)
    return BadMedia(f"{path.name} {found} video: {reason}. Expected {_KINDS}.")
