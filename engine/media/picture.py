"""A picture file as RGB pixels, upright and opaque.

The limits are checked on the header, before a pixel is decoded. The kind of file is read from its
content, never from its name. Colour profiles are not applied, as in the official script.
"""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from engine.config import LIMITS, Limits
from engine.errors import BadMedia
from engine.media.files import check_file, content_kind

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
_READABLE = "JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF"
# Each scan of a JPEG goes over the whole picture, and a few bytes are enough for one.
_MAX_SCANS = 100
_SCAN, _END, _WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
# Pillow's decoders raise these on damaged files. OSError covers a file that is cut short.
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def load_image(path: Path, limits: Limits = LIMITS) -> Tensor:
    """Reads RGB pixels [H, W, 3] u8, EXIF orientation applied, transparency laid on white.

    Greyscale, palette, 16-bit and CMYK pictures become RGB; of an animation, the first picture is
    taken. Raises `BadMedia` if the file is missing, too large, too small, damaged or no picture.
    """
    check_file(path, "picture", limits.max_image_bytes)
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            _check_size(path, picture.width, picture.height, limits)
            if picture.format in ("JPEG", "MPO"):
                _check_scans(path)
            pixels = _rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as error:
        found = content_kind(path) or "file of another kind"
        raise BadMedia(f"{path.name} is a {found}; a {_READABLE} picture is expected.") from error
    except _DAMAGE as error:
        raise BadMedia(
            f"{path.name} cannot be decoded, it is damaged or of a rare kind: {error}. "
            "Open it elsewhere and save it again as PNG or JPEG."
        ) from error
    return torch.from_numpy(pixels)


def _check_size(path: Path, width: int, height: int, limits: Limits) -> None:
    if min(width, height) < limits.min_side:
        raise BadMedia(
            f"{path.name} is {width}x{height}; a picture needs {limits.min_side} pixels a side."
        )
    if width * height > limits.max_image_pixels:
        raise BadMedia(
            f"{path.name} is {width}x{height}, {width * height / 1e6:.1f} megapixels; "
            f"a picture may have {limits.max_image_pixels / 1e6:.1f}."
        )


def _check_scans(path: Path) -> None:
    """Counts scans from marker to marker as decoders do, so that other bytes do not count."""
    data = path.read_bytes()
    place = scans = 0
    while marker := _MARKER.search(data, place):
        code, place = marker[1][0], marker.end()
        if code == _END:
            return
        scans += code == _SCAN
        if scans > _MAX_SCANS:
            raise BadMedia(f"{path.name} is a JPEG of more than {_MAX_SCANS} scans; save it again.")
        if code not in _WITHOUT_LENGTH:
            place += int.from_bytes(data[place : place + 2], "big")


def _rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """The pixels [H, W, 3], writable."""
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip, not scale, to 8
        grey = np.clip(np.asarray(picture).astype(np.float64) / 257, 0, 255)
        return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, "white")
        paper.alpha_composite(picture.convert("RGBA"))
        picture = paper
    return np.array(picture.convert("RGB"))
