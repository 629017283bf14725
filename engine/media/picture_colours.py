"""Colours as a picture's profile means them, made sRGB.

A profile is an ICC profile in the file, or a few numbers that stand for one: CICP codes (ITU-T
H.273, in PNG and AVIF), or gamma and primaries (PNG). Of the numbers an ICC profile is made, so
that LittleCMS converts in every case.
"""

import io
import logging
import math
import struct
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

Primaries = tuple[float, ...]  # x and y of white, red, green, blue
SRGB: Primaries = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
PRIMARIES: dict[int, Primaries] = {
    1: SRGB,
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # DCI-P3
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # Display P3
}
_UNSAID = 2
# BT.709 and its likes are shown as sRGB is, as browsers do
_LIKE_SRGB = (1, _UNSAID, 6, 13, 14, 15)
_PQ, _HLG = 16, 18
_WHITE_NITS, _PEAK_NITS = 203.0, 1000.0  # of HDR: paper, and the brightest that is kept apart
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_CURVE_POINTS = 4096

Curve = Callable[[float], float]  # code 0..1 -> light 0..1


def to_srgb(picture: Image.Image, profile: bytes, name: str) -> Image.Image:
    """Converts a picture of mode L, LA, RGB, RGBA or CMYK to RGB or RGBA by an ICC profile.

    A profile that is damaged or of other colours is ignored, with a line in the log; the picture
    is then returned as it is.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        core = source.profile
        assert isinstance(core, ImageCms.core.CmsProfile)
        space = core.xcolor_space.strip()
        base = _colours(picture, space)
        if base is None:
            log.warning(
                "%s: its profile is for %s and its pixels are %s; it is ignored",
                name, space, picture.mode,
            )  # fmt: skip
            return picture
        made = ImageCms.profileToProfile(
            base, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except Exception as error:  # noqa: BLE001 - whatever a foreign parser makes of a client's bytes
        log.warning("%s: its colour profile is damaged and ignored: %s", name, str(error)[:200])
        return picture
    assert made is not None
    if picture.mode in ("LA", "RGBA"):
        made.putalpha(picture.getchannel("A"))
    return made


def _colours(picture: Image.Image, space: str) -> Image.Image | None:
    """The picture without transparency in the colours of a profile; None if they are others."""
    if space == "RGB" and picture.mode != "CMYK":
        return picture.convert("RGB")
    if space == "GRAY" and picture.mode in ("L", "LA"):
        return picture.getchannel("L")
    return picture if space == picture.mode == "CMYK" else None


def profile_of_cicp(primaries: int, transfer: int) -> bytes | None:
    """A profile for CICP codes; None where pixels are sRGB already, or the codes are unknown.

    HDR (PQ, HLG) is toned down to what sRGB can show.
    """
    points = SRGB if primaries == _UNSAID else PRIMARIES.get(primaries)
    curve = _curve_of_cicp(transfer)
    if points is None or curve is None or (points == SRGB and transfer in _LIKE_SRGB):
        return None
    return rgb_profile(points, curve)


def profile_of_gamma(gamma: float | None, chromaticity: Sequence[float] | None) -> bytes | None:
    """A profile for what a PNG's gAMA and cHRM say; None where that is sRGB or makes no sense."""
    points = SRGB if chromaticity is None else tuple(chromaticity)
    if len(points) != 8 or not all(0 < value < 1 for value in points[1::2]):
        return None
    exponent = 1 / 0.45455 if gamma is None else 1 / gamma if 0.1 < gamma < 10 else 0.0
    is_srgb_curve = abs(exponent - 2.2) < 0.05
    if not exponent or (is_srgb_curve and np.allclose(points, SRGB, atol=2e-3)):
        return None
    return rgb_profile(points, _srgb_light if is_srgb_curve else lambda code: code**exponent)


def rgb_profile(primaries: Primaries, curve: Curve) -> bytes:
    """Makes an ICC profile of version 2: three primaries and one curve."""
    columns = _to_pcs(primaries)
    light = [round(65535 * curve(n / (_CURVE_POINTS - 1))) for n in range(_CURVE_POINTS)]
    tone = b"curv\0\0\0\0" + struct.pack(f">I{_CURVE_POINTS}H", _CURVE_POINTS, *light)
    name = b"made of numbers\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": _xyz(_D50),
        **{tag: _xyz(columns[:, n]) for n, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone),
    }
    body, table, start = b"", b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4xI", start + len(body), 0x02400000) + b"mntrRGB XYZ "
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(_D50)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _to_pcs(primaries: Primaries) -> np.ndarray:
    """The colours of red, green and blue as XYZ columns, their white adapted to D50."""
    xy = np.array(primaries).reshape(4, 2)
    white, *points = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in xy)
    columns = np.stack(points, axis=1)
    columns = columns * np.linalg.solve(columns, white)
    cones = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
    return np.linalg.solve(_BRADFORD, cones @ _BRADFORD @ columns)


def _xyz(values: Sequence[float] | np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))


def _curve_of_cicp(transfer: int) -> Curve | None:
    if transfer in _LIKE_SRGB:
        return _srgb_light
    exponent = {4: 2.2, 5: 2.8, 8: 1.0, 17: 2.6}.get(transfer)
    if exponent is not None:
        return lambda code: code**exponent
    light = {_PQ: _pq_nits, _HLG: _hlg_nits}.get(transfer)
    return None if light is None else lambda code: _toned(light(code))


def _srgb_light(code: float) -> float:
    return code / 12.92 if code <= 0.04045 else ((code + 0.055) / 1.055) ** 2.4


def _pq_nits(code: float) -> float:
    """SMPTE ST 2084."""
    power = code ** (32 / 2523)
    return 10000 * (max(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (8192 / 1305)


def _hlg_nits(code: float) -> float:
    """BT.2100 on a display of `_PEAK_NITS`, whose system gamma is 1.2."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = code * code / 3 if code <= 0.5 else (math.exp((code - c) / a) + b) / 12
    return _PEAK_NITS * min(scene, 1.0) ** 1.2


def _toned(nits: float) -> float:
    """Reinhard's curve: the peak becomes 1."""
    light, peak = nits / _WHITE_NITS, _PEAK_NITS / _WHITE_NITS
    return min(light * (1 + light / peak**2) / (1 + light), 1.0)
