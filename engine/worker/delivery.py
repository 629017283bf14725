"""Puts a finished clip into the reply: as base64 if it fits, in a bucket, or encoded smaller.

The platform drops a reply that is too large and calls the job a success, so nothing over the
limit may be handed to it (docs/reference/runpod.md 0.10, B.2).
"""

import base64
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.errors import OutputError, ResultTooLarge
from engine.flow import Check
from engine.jobs.job import Bucket, Delivery
from engine.jobs.wire import INTERNET, Internet
from engine.media.ffmpeg import SAFE_INPUT, FfmpegFailed, ffmpeg, file_url
from engine.media.video import probe_video
from engine.worker.upload import upload

log = logging.getLogger(__name__)

RUN_BYTES, RUNSYNC_BYTES = 10_000_000, 20_000_000  # the limits of a reply, as JSON
BESIDE_BYTES = 200_000  # what a reply needs beside the clip
_SYNC = "sync-"  # begins the ids of jobs that came by /runsync

_AUDIO_BITS_S = 200_000  # the rate of the sound that `engine.media.mp4` writes
_AIM = 0.96  # share of the limit: two passes meet their rate within a few percent
_ATTEMPTS = 3
_LEAST_BITS_S = 20_000


@dataclass(frozen=True, slots=True)
class Delivered:
    """A clip as it stands in the reply."""

    key: Literal["video", "video_url"]
    value: str = field(repr=False)  # base64, or the address
    nbytes: int  # of the MP4 that was delivered
    warnings: tuple[str, ...] = ()


def clip_limit(job_id: str) -> int:
    """Returns the most bytes of an MP4 whose base64 fits the route that the job came by."""
    limit = RUNSYNC_BYTES if job_id.startswith(_SYNC) else RUN_BYTES
    return (limit - BESIDE_BYTES) // 4 * 3


def deliver(
    clip: Path,
    job_id: str,
    wanted: Delivery,
    bucket: Bucket | None,
    check: Check,
    beside_bytes: int = 0,
    network: Internet = INTERNET,
) -> Delivered:
    """Delivers `clip`, or a smaller one that is made beside it. `check` may raise to end the job.

    `beside_bytes` are those of other files in the reply.
    Raises `ResultTooLarge` if no reply can carry the clip, `OutputError` if it cannot be read.
    """
    limit, warnings = clip_limit(job_id) - beside_bytes, list[str]()
    size = _size(clip)
    if bucket is not None and (wanted == "url" or size > limit):
        try:
            url = upload(clip, bucket, job_id, check, network)
        except OutputError as error:
            log.warning("%s", error)
            warnings.append(f"{error} The clip is in the reply instead.")
        else:
            if wanted != "url":
                warnings.append(
                    f"The clip has {_mb(size)}, more than the {_mb(limit)} a reply can carry: it "
                    "is in the bucket."
                )
            return Delivered("video_url", url, size, tuple(warnings))
    if size > limit:
        clip = fit(clip, limit, check)
        warnings.append(
            f"The clip had {_mb(size)}, more than the {_mb(limit)} a reply can carry: it was "
            f"encoded again with less quality, in {_mb(_size(clip))}. A bucket would take it whole."
        )
    check()
    try:
        data = clip.read_bytes()
    except OSError as error:
        raise OutputError(f"The clip cannot be read: {error.strerror}.") from error
    return Delivered("video", base64.b64encode(data).decode(), len(data), tuple(warnings))


def fit(clip: Path, limit: int, check: Check) -> Path:
    """Encodes pictures and sound again, in at most `limit` bytes. Raises `ResultTooLarge`."""
    info = probe_video(clip, check=check)
    seconds = float(info.frames / info.rate)
    smaller = clip.with_name("smaller.mp4")
    audio = _AUDIO_BITS_S if info.has_audio else 0
    rate = max(8 * limit * _AIM / seconds - audio, _LEAST_BITS_S)
    for _ in range(_ATTEMPTS):
        _encode(clip, smaller, int(rate), check)
        size = _size(smaller)
        if size <= limit:
            return smaller
        rate = max(rate * limit / size * _AIM, _LEAST_BITS_S)
    raise ResultTooLarge(
        f"The clip has {_mb(_size(clip))} and cannot be encoded in the {_mb(limit)} that a reply "
        "can carry. Name a bucket (s3Config), or ask for a shorter or smaller clip."
    )


def _encode(clip: Path, smaller: Path, bits_s: int, check: Check) -> None:
    """Encodes H.264 in two passes at this rate; sound and metadata are copied."""
    passes = clip.with_name("passes")
    source = [*SAFE_INPUT, "-i", file_url(clip)]
    rate = ["-c:v", "libx264", "-preset", "fast", "-b:v", str(bits_s)]
    log_file = ["-passlogfile", str(passes)]
    try:
        first = [*source, "-an", *rate, "-pass", "1", *log_file]
        with ffmpeg([*first, "-f", "null", "-"], check=check) as run:
            run.finish()
        output = ["-map", "0:v:0", "-map", "0:a:0?", "-c:a", "copy", "-movflags", "+faststart"]
        second = [*source, *output, *rate, "-pass", "2", *log_file]
        with ffmpeg([*second, "-f", "mp4", "-y", file_url(smaller)], check=check) as run:
            run.finish()
    except FfmpegFailed as error:
        raise OutputError(f"The clip could not be encoded again: {error.reason}.") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise OutputError(f"The clip cannot be read: {error.strerror}.") from error


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
