"""Reads the comment of a video file, which is text of a stranger until somebody has checked it."""

import re
from pathlib import Path

from engine.errors import BadMedia
from engine.flow import Check, go_on
from engine.media.ffmpeg import (
    LISTING_CPU_S,
    LISTING_MEMORY_BYTES,
    SAFE_INPUT,
    FfmpegFailed,
    ffmpeg,
    file_url,
    read_into,
)

COMMENT_BYTES = 128 * 1024  # no prompt that is taken comes near it
_ENTRY = re.compile(r"^comment=((?:[^\\\n]|\\.)*)$", re.MULTILINE | re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)  # of "=", ";", "#", "\\" and the end of a line


def read_comment(path: Path, name: str, check: Check = go_on) -> str | None:
    """Returns the comment of a video file, which sentences call `name`; None if it has none.

    Raises `BadMedia` for a file that is no video, and for one whose metadata is larger than
    `COMMENT_BYTES`.
    """
    arguments = [*SAFE_INPUT, "-i", file_url(path), "-f", "ffmetadata", "pipe:1"]
    listing = memoryview(bytearray(COMMENT_BYTES + 1))
    try:
        with ffmpeg(
            arguments, cpu_s=LISTING_CPU_S, memory_bytes=LISTING_MEMORY_BYTES, check=check
        ) as run:
            size = read_into(run, listing)
            if size > COMMENT_BYTES:
                raise BadMedia(f"{name} holds more text about itself than any clip has.")
            run.finish()
    except FfmpegFailed as error:
        raise BadMedia(f"{name} is no video that can be read: {error.reason}.") from error
    text = bytes(listing[:size]).decode("utf-8", "replace")
    found = _ENTRY.search(text)
    return None if found is None else _ESCAPED.sub(r"\1", found[1])
