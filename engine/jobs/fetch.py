"""Fetches a medium of a job, from an address, base64 or an input folder, into a file of the job.

What a stranger sends must be small enough, and must begin like a picture or a video whatever name
or header came with it, before it is left where decoders find it (docs/reference/runpod.md F.9).
Where it comes from is checked by `addresses` and `download` for addresses, and here for folders.
"""

import binascii
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from engine.config import LIMITS, Limits
from engine.errors import BadMedia, BadRequest, OutputError
from engine.flow import Check, go_on
from engine.jobs.download import TOTAL_S, download, too_large
from engine.jobs.wire import INTERNET, Internet
from engine.media.files import HEAD_BYTES, sniff

_PIECE = 1 << 20
_DATA_PREFIX = 400  # "data:image/png;base64," and room for the name of a file
_BLANKS = 1000  # so many characters are looked at for a beginning
_LINE_ROOM = 16  # one in so many characters of base64 may belong to a line break
_PATH_CHARS = 4096
# Base64 is checked here: the decoder skips what it does not know, and takes extra "=" even where
# it is strict.
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*")
_OF_ADDRESSES = bytes.maketrans(b"-_", b"+/")  # the alphabet for addresses to the usual one

# The kinds of file that a job may send, by suffix. The command line takes more: it reads files that
# its user owns.
_TAKEN = {
    "mask": ("png", "jpg", "webp", "avif", "mp4", "mov", "mkv", "gif", "npz"),
    "picture": ("png", "jpg", "webp", "gif", "avif"),
    "video": ("mp4", "mov", "mkv", "gif"),
    "joints": ("npz",),
}
_EXPECTED = {
    "mask": "a picture, a video, a ZIP of pictures or an .npz file of masks",
    "picture": "a JPEG, PNG, WebP, GIF or AVIF picture",
    "video": "an MP4, MOV, MKV, WebM or GIF video",
    "joints": "an .npz file of joints",
}
_LONG = ("video", "mask")  # may have as many bytes as a video
_FOUND = {
    **dict.fromkeys(("png", "jpg", "webp", "avif"), "a picture"),
    **dict.fromkeys(("mp4", "mov", "mkv"), "a video"),
    "heic": "a HEIC picture",
    "avi": "an AVI video",
    "gz": "packed with gzip",
    "npz": "a ZIP or .npz file",
    "html": "a web page and not the file itself",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The file that a field of a job must bring, and the folder that it goes to."""

    field: str  # its name in the job, "image_url"; also the name of the file
    kind: Literal["picture", "video", "joints", "mask"]
    folder: Path  # belongs to this job alone
    limits: Limits = LIMITS

    @property
    def max_bytes(self) -> int:
        limits = self.limits
        return limits.max_video_bytes if self.kind in _LONG else limits.max_image_bytes


def fetch_url(
    text: object,
    wanted: Wanted,
    network: Internet = INTERNET,
    timeout_s: float = TOTAL_S,
    check: Check = go_on,
) -> Path:
    """Downloads the file at an http or https address. `check` may raise to end the job.

    Raises `BadRequest` for an address that is not asked, `BadMedia` for what came of asking, and
    `OutputError` if the folder cannot be written to, which the next two raise too.
    """
    pieces = download(text, wanted.field, wanted.max_bytes, network, timeout_s, check)
    with closing(pieces):
        return _store(wanted, pieces)


def fetch_base64(text: object, wanted: Wanted) -> Path:
    """Decodes the file in base64, with or without "data:...;base64," before it.

    Blanks and line breaks, the alphabet for addresses and missing padding are taken. Raises
    `BadRequest` if it is not base64, `BadMedia` if it is too long or no such file.
    """
    field = wanted.field
    packed = _text(text, field, "base64")
    most = 4 * (wanted.max_bytes // 3 + 1)
    if len(packed) > most + most // _LINE_ROOM + _DATA_PREFIX:
        raise too_large(field, wanted.max_bytes)
    if packed[:_BLANKS].lstrip()[:5].lower() == "data:":
        head, comma, rest = packed.lstrip().partition(",")
        head = "".join(head[:_DATA_PREFIX].split())
        if not comma or not head.lower().endswith(";base64"):
            raise BadRequest(f'{field} begins with "data:" but not with a type and ";base64,".')
        packed = rest if "%" not in rest else unquote(rest)  # as in any other address
    if not packed.isascii():
        raise BadRequest(f"{field} is not base64: it has characters beyond ASCII.")
    letters = packed.encode("ascii").translate(None, b" \t\r\n\v\f")
    if b"+" not in letters and b"/" not in letters:
        letters = letters.translate(_OF_ADDRESSES)
    bare = letters.rstrip(b"=")
    if (
        len(bare) % 4 == 1
        or len(letters) - len(bare) > -len(bare) % 4
        or not _BASE64.fullmatch(bare)
    ):
        raise BadRequest(f"{field} is not base64, or cut short; encode it again.")
    return _store(wanted, [binascii.a2b_base64(bare + b"=" * (-len(bare) % 4))])


def fetch_path(name: object, wanted: Wanted, roots: Sequence[Path]) -> Path:
    """Copies a file from below one of `roots`, named from the top of the disk or from a root.

    Links are followed first, and must end below a root. Raises `BadRequest`, in one sentence, for
    every other place, whether something is there or not; `BadMedia` for what is no such file.
    """
    given = _text(name, wanted.field, "the name of a file")
    for root in roots if len(given) <= _PATH_CHARS else ():
        base = os.path.realpath(root)
        try:
            end = os.path.realpath(Path(base, given), strict=True)
        except (OSError, ValueError):  # ValueError: a NUL, or half of a surrogate pair
            continue
        if Path(end).is_relative_to(base):
            return _copy(Path(base), Path(end).relative_to(base).parts, wanted)
    raise BadRequest(
        f"{wanted.field} names no file in an input folder of this worker; put the file there, or "
        "send it as an address or in base64."
    )


def _text(value: object, field: str, expected: str) -> str:
    if not isinstance(value, str):
        found = "nothing" if value is None else f"of the type {type(value).__name__}"
        raise BadRequest(f"{field} is {found}; {expected} is expected, as a string.")
    if not value or value.isspace():
        raise BadRequest(f"{field} is empty; {expected} is expected.")
    return value


def _copy(root: Path, parts: Sequence[str], wanted: Wanted) -> Path:
    try:
        source = _open_below(root, parts)
    except OSError as error:
        raise BadMedia(f"{wanted.field} cannot be read: {error.strerror}.") from error
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise BadMedia(f"{wanted.field} is a folder, a device or a pipe, and not a file.")
        if status.st_size > wanted.max_bytes:
            raise too_large(wanted.field, wanted.max_bytes)
        return _store(wanted, _contents(source, wanted.field))
    finally:
        os.close(source)


def _contents(source: int, field: str) -> Iterator[bytes]:
    try:
        while piece := os.read(source, _PIECE):
            yield piece
    except OSError as error:
        raise BadMedia(f"{field} cannot be read: {error.strerror}.") from error


def _open_below(root: Path, parts: Sequence[str]) -> int:
    """Walks down without following links, so that none put there since the check leads out."""
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Opened without waiting: a pipe that nobody writes to must not stop the worker.
        last = parts[-1] if parts else "."
        return os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def _store(wanted: Wanted, pieces: Iterable[bytes]) -> Path:
    """Writes a file that is whole and of the right kind, or none."""
    part = wanted.folder / f"{wanted.field}.part"
    size, head = 0, b""
    try:
        with part.open("xb") as file:
            for piece in pieces:
                size += len(piece)
                if size > wanted.max_bytes:
                    raise too_large(wanted.field, wanted.max_bytes)
                if len(head) < HEAD_BYTES:
                    head += piece[:HEAD_BYTES]
                    if len(head) >= HEAD_BYTES:
                        _suffix(head, wanted)
                file.write(piece)
        return part.rename(part.with_suffix(f".{_suffix(head, wanted)}"))
    except OSError as error:
        raise OutputError(f"{wanted.field} cannot be stored here: {error.strerror}.") from error
    finally:
        part.unlink(missing_ok=True)


def _suffix(head: bytes, wanted: Wanted) -> str:
    """Finds the suffix by the content. Raises `BadMedia` for a kind that is not taken."""
    if not head:
        raise BadMedia(f"{wanted.field} is empty; {_EXPECTED[wanted.kind]} is expected.")
    suffix = sniff(head)
    if suffix is None or suffix not in _TAKEN[wanted.kind]:
        found = _FOUND.get(suffix or "", "a file of another kind")
        raise BadMedia(f"{wanted.field} is {found}; {_EXPECTED[wanted.kind]} is expected.")
    return suffix
