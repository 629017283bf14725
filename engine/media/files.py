"""Checks of a media file from outside, made before anybody opens it."""

import os
from pathlib import Path

from engine.errors import BadMedia

_MIB = 2**20
_MOVING = ("mp4", "mov", "mkv", "avi")
# what jobs may not bring, by how files begin and as sentences call them
_OTHERS = (
    (b"II*\0", "TIFF picture"),
    (b"MM\0*", "TIFF picture"),
    (b"II+\0", "TIFF picture"),
    (b"MM\0+", "TIFF picture"),
    (b"BM", "BMP picture"),
    (b"\xff\x0a", "JPEG XL picture"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL picture"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "JPEG 2000 picture"),
    (b"8BPS", "Photoshop document"),
    (b"\0\0\1\0", "icon"),
    (b"qoif", "QOI picture"),
    (b"v/1\x01", "OpenEXR picture"),
    (b"#?RADIANCE", "Radiance HDR picture"),
    (b"DDS ", "DDS texture"),
    (b"gimp xcf", "GIMP document"),
    (b"%PDF", "PDF document"),
    (b"%!PS", "PostScript document"),
    (b"II\xbc\x01", "JPEG XR picture"),
    (b"BPG\xfb", "BPG picture"),
    (b"FUJIFILMCCD-RAW", "raw photograph"),
    (b"IIRO", "raw photograph"),
    (b"IIU\0", "raw photograph"),
    (b"ID3", "sound file"),
    (b"OggS", "sound file"),
    (b"fLaC", "sound file"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_FTYP_OTHERS = {
    b"crx ": "raw photograph",
    b"jxl ": "JPEG XL picture",
    b"jp2 ": "JPEG 2000 picture",
    b"avci": "HEIF picture",
    b"avcs": "HEIF picture",
    b"M4A ": "sound file",
}
_STILL_BRANDS = (b"mif1", b"mif2", b"miaf", b"msf1")  # pictures of whatever codec

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\x1aE\xdf\xa3", "mkv"),  # WebM too
    (b"\x1f\x8b", "gz"),
    (b"PK\x03\x04", "npz"),  # and every other ZIP file
)

_NAMES = dict.fromkeys(_MOVING, "video") | {
    "heic": "HEIC picture",
    "avif": "AVIF picture",
    "webp": "WebP picture",
    "png": "PNG picture",
    "jpg": "JPEG picture",
    "gif": "GIF picture",
    "html": "page of the web",
    "gz": "compressed file",
    "npz": "ZIP archive",
}
_READ_AS_WORDS = ("HEIC", "HEIF", "JPEG", "GIF", "GIMP", "TIFF")  # not letter by letter

HEAD_BYTES = 256  # what `sniff` looks at: all brands that an AVIF file is compatible with


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
        return _of_brands(head)
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # older files, which do not say what they are
        return "mov"
    if head[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(head[8:12])
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "html"
    return next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), None)


def _of_brands(head: bytes) -> str:
    """The suffix for the brands of a container, the first of which is only the foremost."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    major, others = head[8:12], [head[at : at + 4] for at in range(16, end, 4)]
    if major in (b"avif", b"avis"):
        return "avif"
    if major in _STILL_BRANDS:
        return "avif" if b"avif" in others or b"avis" in others else "heic"
    if major in _HEIC_BRANDS:
        return "heic"
    return "mov" if major == b"qt  " else "mp4"


def content_kind(path: Path) -> str | None:
    """The kind that the first bytes tell, such as "video" or "HEIC picture"; None if unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None
    if head[4:8] == b"ftyp" and head[8:12] in _FTYP_OTHERS:
        return _FTYP_OTHERS[head[8:12]]
    if (suffix := sniff(head)) in _NAMES:
        return _NAMES[suffix]
    if head[:1] == head[188:189] == b"G" or head[4:5] == head[196:197] == b"G":
        return "video"  # MPEG-TS: packets of 188 bytes, or of 192 with a time before each
    known = next((name for magic, name in _OTHERS if head.startswith(magic)), None)
    return known or _markup(head)


def _markup(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<") and (b"<svg" in text or b"<!DOCTYPE svg" in text):
        return "SVG drawing"
    return "XML document, such as an SVG drawing" if text.startswith(b"<?xml") else None


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun, by its sound: an AVIF picture, a HEIC picture, an MP4 file.

    A word in capitals is spelled out if it begins with a letter that it is never read with.
    """
    word = noun.split()[0]
    is_spelled = word.isupper() and word not in _READ_AS_WORDS
    return (
        f"an {noun}" if word[0] in ("AEFHILMNORSX" if is_spelled else "aeioAEIO") else f"a {noun}"
    )
