"""A picture file as RGB pixels, upright and opaque, in the colours of sRGB.

Limits and costs are checked on the header, before a pixel is decoded. The kind of file is read from
its content, never from its name. Whatever a decoder raises is the file's fault: `BadMedia`.
"""

import logging
import mmap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from engine.config import LIMITS, Limits
from engine.errors import BadMedia, EngineError
from engine.media.files import check_file, content_kind, with_article
from engine.media.picture_colours import profile_of_cicp, profile_of_gamma, to_srgb
from engine.media.picture_cost import iter_boxes, refuse_costly

log = logging.getLogger(__name__)

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
_READABLE = "JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF"
_ORIENTATION = 0x0112  # in EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
_COLOUR_BOXES = 4096  # bytes of a PNG in which cICP is looked for: it comes before the pixels


def load_image(path: Path, limits: Limits = LIMITS) -> Tensor:
    """Reads RGB pixels [H, W, 3] u8, EXIF orientation applied, transparency laid on white.

    Greyscale, palette, 16-bit and CMYK pictures become RGB, colour profiles are converted to sRGB;
    of an animation, the first picture is taken. Raises `BadMedia` if the file is missing, too
    large, too small, too costly, damaged or no picture.
    """
    return torch.from_numpy(_read(path, limits)[0])


def load_layers(path: Path, limits: Limits = LIMITS) -> tuple[Tensor, Tensor | None]:
    """Reads what `load_image` does, and how opaque each pixel is, [H, W] u8.

    The second is None where all pixels are wholly opaque. Raises `BadMedia` as `load_image` does.
    """
    pixels, alpha = _read(path, limits)
    is_opaque = alpha is None or alpha.min() == 255
    return torch.from_numpy(pixels), None if is_opaque else torch.from_numpy(alpha)


def _read(path: Path, limits: Limits) -> tuple[np.ndarray, np.ndarray | None]:
    """The pixels [H, W, 3] u8 on white paper, and the opacity [H, W] u8 if the file tells it."""
    check_file(path, "picture", limits.max_image_bytes)
    try:
        refuse_costly(path)
        with Image.open(path, formats=_FORMATS) as picture:
            _check_size(path, picture.width, picture.height, limits)
            picture.load()
            upright = _upright(picture, path.name)
            profile = _profile(path, picture)
            colours = _colours(upright, picture)
            colours = to_srgb(colours, profile, path.name) if profile else colours
        has_alpha = colours.mode in ("LA", "RGBA")
        return _opaque(colours), np.array(colours.getchannel("A")) if has_alpha else None
    except EngineError:
        raise
    except UnidentifiedImageError as error:
        raise BadMedia(_not_read(path)) from error
    except Image.DecompressionBombError as error:
        raise BadMedia(
            f"{path.name} has too many pixels; a picture may have "
            f"{limits.max_image_pixels / 1e6:.1f} megapixels."
        ) from error
    except Exception as error:  # whatever foreign decoders make of a client's bytes
        raise BadMedia(
            f"{path.name} cannot be decoded, it is damaged or of a rare kind: {str(error)[:200]}. "
            "Open it elsewhere and save it again as PNG or JPEG."
        ) from error


def _not_read(path: Path) -> str:
    kind = content_kind(path) or "file of another kind"
    if kind.removesuffix(" picture") in _READABLE.replace(",", "").split():
        return (
            f"{path.name} begins as {with_article(kind)} and cannot be read, it is damaged or of a "
            "rare kind. Open it elsewhere and save it again as PNG or JPEG."
        )
    return f"{path.name} is {with_article(kind)}; a {_READABLE} picture is expected."


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


def _upright(picture: Image.Image, name: str) -> Image.Image:
    """The picture turned as its EXIF says. Pillow has turned a TIFF by then, and says so."""
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
        turn = _TURNS.get(orientation)
    except Exception as error:  # noqa: BLE001 - whatever a foreign parser makes of a client's bytes
        log.warning("%s: its EXIF is damaged and ignored: %s", name, str(error)[:200])
        return picture
    return picture if turn is None else picture.transpose(turn)


def _profile(path: Path, picture: Image.Image) -> bytes | None:
    """The colour profile of a picture, or one made of the numbers that stand for it."""
    codes = _cicp(path, picture.format)
    if codes is not None and (made := profile_of_cicp(*codes)) is not None:
        return made
    if held := picture.info.get("icc_profile"):
        return None if picture.mode == "LAB" else held  # those colours need no profile
    if picture.format == "PNG" and codes is None and "srgb" not in picture.info:
        return profile_of_gamma(picture.info.get("gamma"), picture.info.get("chromaticity"))
    return None


def _cicp(path: Path, kind: str | None) -> tuple[int, int] | None:
    """The codes of primaries and transfer in a PNG or AVIF, which Pillow does not tell."""
    if kind not in ("PNG", "AVIF"):
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if kind == "PNG":
            at = data.find(b"\0\0\0\x04cICP", 0, _COLOUR_BOXES)
            return None if at < 0 else (data[at + 8], data[at + 9])
        for names, start, end in iter_boxes(data):
            if names[-1] == b"colr" and data[start : start + 4] == b"nclx" and end - start >= 8:
                return (
                    int.from_bytes(data[start + 4 : start + 6], "big"),
                    int.from_bytes(data[start + 6 : start + 8], "big"),
                )
    return None


def _colours(picture: Image.Image, opened: Image.Image) -> Image.Image:
    """The picture in 8 bits as L, LA, RGB, RGBA or CMYK. `opened` is what the file says of it."""
    mode = picture.mode
    if mode.startswith("I"):
        return _grey_of_many_bits(picture, opened)
    if mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if mode == "1":
        picture = picture.convert("L")
    if mode == "La":
        return picture.convert("LA")
    if picture.has_transparency_data and mode != "LA":
        return picture.convert("LA" if mode in ("1", "L") else "RGBA")
    return picture if picture.mode in ("L", "LA", "RGB", "CMYK") else picture.convert("RGB")


def _grey_of_many_bits(picture: Image.Image, opened: Image.Image) -> Image.Image:
    """Scales greys to 8 bits; Pillow would clip them."""
    tags = getattr(opened, "tag_v2", {})  # of a TIFF
    if picture.mode == "I" and opened.format == "TIFF":
        raise ValueError("its pixels are signed or 32-bit integers of unknown range")
    bits = tags.get(_BITS, (16,))[0]
    codes = np.asarray(picture).astype(np.float64)
    grey = np.rint(np.clip(codes / (2**bits - 1), 0, 1) * 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    made = Image.fromarray(grey)
    clear = opened.info.get("transparency")
    if isinstance(clear, int):
        made.putalpha(Image.fromarray(np.where(codes == clear, 0, 255).astype(np.uint8)))
    return made


def _opaque(picture: Image.Image) -> np.ndarray:
    """The pixels [H, W, 3] u8 on white paper, writable."""
    if picture.mode in ("LA", "RGBA"):
        paper = Image.new("RGBA", picture.size, "white")
        paper.alpha_composite(picture.convert("RGBA"))
        picture = paper
    return np.array(picture.convert("RGB"))
