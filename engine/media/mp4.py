"""Frames and sound into an MP4 file that every player shows in the right colours.

H.264, yuv420p, converted to and tagged as BT.709 limited range. Frames go to the encoder as they
come. The file is finished in a hidden folder beside its place and moved there whole, so that a
failure, an interrupt or a full disk leaves nothing half-written and the old file as it was.
"""

import contextlib
import signal
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import OutputError
from engine.flow import Check, Sound, go_on
from engine.media.ffmpeg import Ffmpeg, FfmpegFailed, ffmpeg, file_url, write_from
from engine.media.sound import sound_input, sound_output
from engine.media.video import exact_rate

_PRESET = "fast"
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BT709 = (
    "scale=in_range=pc:out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd,"
    "format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)


def encode_mp4(
    frames: Iterable[Tensor],
    fps: float,
    path: Path,
    audio: Sound | None = None,
    comment: str | None = None,
    crf: int = 19,
    check: Check = go_on,
) -> int:
    """Writes `frames`, chunks [n, H, W, 3] u8 with even H and W, and returns their number.

    `audio` goes with the frames, exactly as long as they last. Raises `OutputError` if the file
    cannot be written or no frame comes, and whatever `frames` and `check` raise.
    """
    rate = exact_rate(fps)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; a file name is expected.")
    with _folder_beside(path) as folder:
        silent, whole = Path(folder, "silent.mp4"), Path(folder, "whole.mp4")
        try:
            count = _encode(frames, rate, silent, crf, check)
            if not count:
                raise OutputError(f"There are no frames to write to {path.name}.")
            _join(silent, audio, count / rate, comment, whole, check)
        except FfmpegFailed as error:
            raise OutputError(f"{path.name} could not be written: {error.reason}.") from error
        try:
            whole.replace(path)
        except OSError as error:
            raise OutputError(f"{path} could not be written: {error.strerror}.") from error
    return count


def _folder_beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder on the disk of `path`, so that moving a file to `path` is one step.

    No signal ends the program between the folder's being there and its being known: it would stay.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        return tempfile.TemporaryDirectory(dir=path.parent, prefix=".encoding-")
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror}. Name a folder that is there and "
            "may be written to."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _encode(frames: Iterable[Tensor], rate: Fraction, path: Path, crf: int, check: Check) -> int:
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
                arguments = _arguments(size, rate, path, crf)
                run = stack.enter_context(ffmpeg(arguments, feed=True, check=check))
            assert chunk.shape[1:3] == size, (chunk.shape, size)
            write_from(run, chunk.contiguous().cpu().numpy().reshape(-1).data)
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


def _join(
    silent: Path,
    sound: Sound | None,
    seconds: Fraction,
    comment: str | None,
    path: Path,
    check: Check,
) -> None:
    """Writes the picture track as it is, the sound as long as it lasts, and the index in front."""
    arguments = ["-i", file_url(silent), *([] if sound is None else sound_input(sound))]
    arguments += ["-map", "0:v:0", "-c:v", "copy", "-map_metadata", "-1", "-map_chapters", "-1"]
    if sound is not None:
        arguments += sound_output(sound, seconds, place=1)
    if comment is not None:
        arguments += ["-metadata", f"comment={comment}"]
    arguments += ["-movflags", "+faststart", "-f", "mp4", "-y", file_url(path)]
    with ffmpeg(arguments, check=check) as run:
        run.finish()
