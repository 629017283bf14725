"""What a media file from outside must be before anybody opens it."""

import os
from pathlib import Path

from engine.errors import BadMedia

_MIB = 2**20
_STILL_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")


def check_file(path: Path, what: str, max_bytes: int) -> None:
    """Raise `BadMedia` unless `path` is an ordinary file with something in it, and not too much."""
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
        raise BadMedia(f"The {what} {path.name!r} cannot be opened: {error}.") from error
    if size == 0:
        raise BadMedia(f"{path.name} is empty; a {what} is expected.")
    if size > max_bytes:
        raise BadMedia(
            f"{path.name} has {size / _MIB:.1f} MiB; a {what} may have {max_bytes / _MIB:.1f} MiB."
        )


def content_kind(path: Path) -> str | None:
    """ "video" or "HEIC picture" where the first bytes say so, whatever the name says."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return None
    if head[4:8] == b"ftyp":
        return "HEIC picture" if head[8:12] in _STILL_BRANDS else "video"
    matroska = head.startswith(b"\x1aE\xdf\xa3")
    return "video" if matroska or (head[:4] == b"RIFF" and head[8:] == b"AVI ") else None
