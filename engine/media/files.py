"""Checks of a media file from outside, made before anybody opens it."""

import os
from pathlib import Path

from engine.errors import BadMedia

_MIB = 2**20
_PICTURE_NAMES = {"heic": "HEIC picture", "avif": "AVIF picture"}
_MOVING = ("mp4", "mov", "mkv", "avi")

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\x1aE\xdf\xa3", "mkv"),  # WebM too
    (b"\x1f\x8b", "gz"),
    (b"PK\x03\x04", "npz"),  # and every other ZIP file
)

HEAD_BYTES = 32  # what `sniff` looks at


def check_file(path: Path, what: str, max_bytes: int) -> None:
    """Raises `BadMedia` unless `path` is an ordinary file that is neither empty nor too large."""
    try:
        if path.is_dir():
            raise BadMedia(f"{path.name} is a folder; a {what} file is expected.")
        if not path.exists():
            raise BadMedia(f"There is no {what} {path.name}.")
        if not path.is_file():
            raise BadMedia(f"{path.name} is a device or a pipe; a {what} file is expected.")
        if not os.access(path, os.R_OK):
            raise BadMedia(f"{path.name} cannot be read: its permissions forbid it.")
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadMedia(f"The {what} {path.name!r} cannot be opened: {reason}.") from error
    if size == 0:
        raise BadMedia(f"{path.name} is empty; a {what} is expected.")
    if size > max_bytes:
        raise BadMedia(
            f"{path.name} has {size / _MIB:.1f} MiB; a {what} may have {max_bytes / _MIB:.1f} MiB."
        )


def sniff(head: bytes) -> str | None:
    """The usual suffix of a file that begins with `head`, or None if nothing here begins so."""
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in (b"heic", b"heix", b"mif1", b"msf1"):
            return "heic"
        return "avif" if brand in (b"avif", b"avis") else "mov" if brand == b"qt  " else "mp4"
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # older files, which do not say what they are
        return "mov"
    if head[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(head[8:12])
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "html"
    return next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), None)


def content_kind(path: Path) -> str | None:
    """The kind that the first bytes tell, such as "video" or "HEIC picture"; None if unknown."""
    try:
        with path.open("rb") as file:
            suffix = sniff(file.read(HEAD_BYTES))
    except OSError:
        return None
    return "video" if suffix in _MOVING else _PICTURE_NAMES.get(suffix or "")
