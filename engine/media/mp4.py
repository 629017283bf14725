"""Frames and sound into an MP4 file that every player shows in the right colours.

H.264, yuv420p, converted to and tagged as BT.709 limited range. Frames go to the encoder as they
come. The file is finished in a hidden folder beside its place and moved there whole, so that a
failure, an interrupt or a full disk leaves nothing half-written and the old file as it was.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadMedia, OutputError
from engine.media.ffmpeg import (
    SAFE_INPUT,
    Ffmpeg,
    FfmpegFailed,
    ffmpeg,
    file_url,
    list_streams,
)
from engine.media.files import check_file
from engine.media.video import exact_rate

log = logging.getLogger(__name__)

_PRESET = "fast"
_AUDIO_TIMEOUT_S = 60.0
_COPIED = ("aac", "mp3")  # what every player takes in an MP4 file
_COPIED_HZ = 16_000  # MP3 at less is not standard there
_IN_STEP_S = Fraction(1, 100)  # sound that starts this much early need not be cut
_BT709 = (
    "scale=in_range=pc:out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd,"
    "format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)


@dataclass(frozen=True, slots=True)
class _Sound:
    path: Path
    is_copied: bool
    packet_s: Fraction
    early_s: Fraction  # how long before the first frame of the same file it starts


def encode_mp4(
    frames: Iterable[Tensor],
    fps: float,
    path: Path,
    audio: Path | None = None,
    comment: str | None = None,
    crf: int = 19,
) -> int:
    """Writes `frames`, chunks [n, H, W, 3] u8 with even H and W, and returns their number.

    `audio`: a file whose first sound track, if it has one, goes with the frames, and is cut where
    they end. AAC and MP3 are copied. Raises `OutputError` if the file cannot be written or no
    frame comes, `BadMedia` if `audio` cannot be read, and whatever `frames` raises.
    """
    rate = exact_rate(fps)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; a file name is expected.")
    sound = None if audio is None else _sound(audio)
    with _folder_beside(path) as folder:
        silent, whole = Path(folder, "silent.mp4"), Path(folder, "whole.mp4")
        try:
            count = _encode(frames, rate, silent, crf)
            if not count:
                raise OutputError(f"There are no frames to write to {path.name}.")
            _join(silent, sound, count / rate, comment, whole)
        except FfmpegFailed as error:
            raise OutputError(f"{path.name} could not be written: {error.reason}.") from error
        try:
            whole.replace(path)
        except OSError as error:
            raise OutputError(f"{path} could not be written: {error.strerror}.") from error
    return count


def _folder_beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder on the disk of `path`, so that moving a file to `path` is one step."""
    try:
        return tempfile.TemporaryDirectory(dir=path.parent, prefix=".encoding-")
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror}. Name a folder that is there and "
            "may be written to."
        ) from error


def _encode(frames: Iterable[Tensor], rate: Fraction, path: Path, crf: int) -> int:
    """Writes the picture track alone, at the size of the first chunk, and counts its frames."""
    count, size = 0, (0, 0)
    with contextlib.ExitStack() as stack:
        run: Ffmpeg | None = None
        for chunk in frames:
            assert chunk.dtype == torch.uint8, chunk.dtype
            assert chunk.ndim == 4 and chunk.shape[3] == 3, chunk.shape
            if not len(chunk):
                continue
            if run is None:
                size = chunk.shape[1], chunk.shape[2]
                run = stack.enter_context(ffmpeg(_arguments(size, rate, path, crf), feed=True))
            assert chunk.shape[1:3] == size, (chunk.shape, size)
            _feed(run, chunk)
            count += len(chunk)
        if run is not None:
            run.finish()
    return count


def _arguments(size: tuple[int, int], rate: Fraction, path: Path, crf: int) -> list[str]:
    height, width = size
    if height % 2 or width % 2:
        raise OutputError(f"A clip of {width}x{height} cannot be H.264; its sides must be even.")
    return [
        "-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}",
        "-framerate", str(rate), "-i", "pipe:0",
        "-vf", _BT709, "-c:v", "libx264", "-preset", _PRESET, "-crf", str(crf),
        "-f", "mp4", "-y", file_url(path),
    ]  # fmt: skip


def _feed(run: Ffmpeg, chunk: Tensor) -> None:
    assert run.process.stdin is not None
    pixels = chunk.contiguous().cpu().numpy().reshape(-1).data
    try:
        while pixels:
            pixels = pixels[run.process.stdin.write(pixels) :]
    except BrokenPipeError as error:
        run.finish()  # raises what ffmpeg said
        raise FfmpegFailed("the encoder stopped taking frames") from error


def _join(
    silent: Path, sound: _Sound | None, seconds: Fraction, comment: str | None, path: Path
) -> None:
    """Writes the picture track as it is, the sound cut to it, and the index in front."""
    arguments = ["-i", file_url(silent)]
    if sound is not None:
        # Copied packets are whole: the last one starts early enough to end with the picture.
        limit = max(seconds - sound.packet_s, Fraction(0)) if sound.is_copied else seconds
        arguments += [*SAFE_INPUT, "-t", f"{float(limit + sound.early_s):.6f}"]
        arguments += ["-i", file_url(sound.path), "-map", "0:v:0", "-map", "1:a:0"]
        arguments += ["-c:a", "copy"] if sound.is_copied else ["-c:a", "aac", "-b:a", "192k"]
        if sound.early_s > _IN_STEP_S:
            early = f"{float(sound.early_s):.6f}"
            arguments += ["-af", f"atrim=start={early},asetpts=PTS-{early}/TB"]
    arguments += ["-c:v", "copy", "-map_metadata", "-1", "-map_chapters", "-1"]
    if comment is not None:
        arguments += ["-metadata", f"comment={comment}"]
    with ffmpeg([*arguments, "-movflags", "+faststart", "-f", "mp4", "-y", file_url(path)]) as run:
        run.finish()


def _sound(path: Path) -> _Sound | None:
    """The first sound track of a video or sound file; None if there is none.

    What cannot be decoded is refused here, before a clip is rendered for it.
    """
    check_file(path, "sound", LIMITS.max_video_bytes)
    source = [*SAFE_INPUT, "-i", file_url(path)]
    tracks = ["-map", "0:V:0?", "-map", "0:a:0?", "-c", "copy"]
    try:
        streams, _ = list_streams([*source, *tracks], _AUDIO_TIMEOUT_S)
        held = {stream.media: stream for stream in streams if stream.packets}
        if "audio" not in held:
            log.info("%s has no sound", path.name)
            return None
        audio = held["audio"]
        first = audio.packets[0]
        begins = held["video"].packets[0].start if "video" in held else first.start
        early = max(begins - first.start, Fraction(0))
        is_copied = (
            audio.codec in _COPIED and audio.sample_rate >= _COPIED_HZ and early <= _IN_STEP_S
        )
        if not is_copied:
            list_streams([*source, "-map", "0:a:0", "-frames:a", "1"], _AUDIO_TIMEOUT_S)
    except FfmpegFailed as error:
        reason = error.reason.replace(str(path.absolute()), path.name)
        raise BadMedia(f"The sound of {path.name} cannot be read: {reason}.") from error
    return _Sound(path, is_copied, max(packet.length for packet in audio.packets), early)
