"""The colours that a video declares, and the filters that bring them to BT.709.

HDR (PQ and HLG) is mapped as BT.2408 places it: its reference white of 203 cd/m2 becomes white; up
to three quarters of that light is kept as it is, and highlights to 1000 cd/m2 share the rest.
"""

import struct
from dataclasses import dataclass

UNKNOWN = 2  # code points are those of ITU-T H.273
_PQ, _HLG = 16, 18
_BT709 = 1
_WIDE = {9: "bt2020", 11: "smpte431", 12: "smpte432"}  # BT.2020, DCI-P3, Display P3
_WHITE, _PEAK = 203, 1000  # cd/m2
_KEPT = 0.75

# One small frame as MP4: its box "colr" states what ffmpeg knows of the frame, in numbers.
DECLARED = (
    "-frames:v", "1", "-vf", "scale=64:64,format=yuv420p", "-c:v", "mpeg4", "-f", "mp4",
    "-movflags", "frag_keyframe+empty_moov+write_colr",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Colours:
    """Code points of ITU-T H.273."""

    primaries: int = UNKNOWN
    transfer: int = UNKNOWN
    matrix: int = UNKNOWN

    @property
    def is_hdr(self) -> bool:
        return self.transfer in (_PQ, _HLG)

    @property
    def is_wide(self) -> bool:
        return self.primaries in _WIDE


def declared(mp4: bytes) -> Colours:
    """Reads what a file made with `DECLARED` states; nothing where it states nothing."""
    _, box, rest = mp4.partition(b"colrnclx")
    return Colours(*struct.unpack(">HHH", rest[:6])) if box and len(rest) >= 6 else Colours()


def tone_map(colours: Colours) -> list[str]:
    """Filters from HDR in RGB to BT.709 in RGB."""
    primaries = _WIDE.get(colours.primaries, "bt709" if colours.primaries == _BT709 else "bt2020")
    # agamma=0: HLG is shown by its light as a whole and not colour by colour
    return [
        f"zscale=pin={primaries}:p=bt709:t=linear:npl={_WHITE}:agamma=0",
        "format=gbrpf32le",
        f"tonemap=mobius:param={_KEPT}:peak={_PEAK / _WHITE:.4f}:desat=0",
        "zscale=t=bt709",
    ]


def to_bt709(colours: Colours) -> list[str]:
    """Filters from a wide gamut in RGB to BT.709 in RGB; the curve stays as it is."""
    return [f"zscale=pin={_WIDE[colours.primaries]}:tin=bt709:p=bt709:t=bt709"]
