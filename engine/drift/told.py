"""What is said of drift: the figures of a region, a line a segment, and a warning a clip.

Limits and their source: docs/reference/masks.md 5.3.
"""

from collections.abc import Mapping, Sequence

from engine.drift.correct import LEAST
from engine.drift.look import Look, chroma_ratio, delta_e
from engine.flow import DriftOutcome, RegionDrift, SegmentDrift

WARN, BAD = 3.0, 6.0  # dE
CHROMA = 0.92, 1.08

# Figures that say something of the colours in the clip, and why these were left as they are.
_WHY: Mapping[DriftOutcome, str] = {
    "anchor": "",
    "corrected": "That is after the correction, which has limits.",
    "steady": "",
    "share": "It fills the frame otherwise there, so it was not corrected.",
    "off": "It was not corrected, for drift is none; drift first corrects it.",
}


def figures_of(look: Look | None, measure: Look | None) -> tuple[float | None, float | None]:
    """Compares a region with what it is measured by: dE and the ratio of chroma, rounded."""
    if look is None or measure is None:
        return None, None
    ratio = chroma_ratio(look, measure)
    return round(delta_e(look, measure), 2), None if ratio is None else round(ratio, 3)


def line_of(one: SegmentDrift) -> str:
    """Writes the figures of a segment as a line of the log."""
    return f"drift of segment {one.segment}: " + "; ".join(map(_short, one.regions))


def told_of_drift(report: Sequence[SegmentDrift]) -> tuple[str, ...]:
    """Warns of the colours of a clip where they are off in it, by the worst place."""
    judged = [(one, region) for one in report for region in one.regions if region.outcome in _WHY]
    off = [(one, region) for one, region in judged if is_off(region)]
    if not off:
        return ()
    segment, worst = max(off, key=lambda pair: pair[1].delta_e_after or 0.0)
    distance = worst.delta_e_after or 0.0
    told = (
        f"Colours are {'far off' if distance > BAD else 'off'} in segment {segment.segment} "
        f"(frames {segment.frames[0] + 1} to {segment.frames[1]}): {worst.region} differs from the "
        f"{worst.against} by dE {distance:.1f}{_chroma(worst.chroma_after)}, one of {len(off)} of "
        f"{len(judged)} figures beyond dE {WARN:g} or chroma {CHROMA[0]} to {CHROMA[1]}."
    )
    return (f"{told} {_WHY[worst.outcome]}".strip(),)


def is_off(region: RegionDrift) -> bool:
    """Tells whether a region is to be warned of: as it is in the clip."""
    distance, ratio = region.delta_e_after, region.chroma_after
    if distance is None or distance < LEAST:  # of what is nearly grey a ratio says nothing
        return False
    return distance > WARN or (ratio is not None and not CHROMA[0] <= ratio <= CHROMA[1])


def _short(region: RegionDrift) -> str:
    if region.delta_e is None:
        return f"{region.region} {region.outcome}"
    came = f"{region.region} dE {region.delta_e:.2f}{_chroma(region.chroma)}"
    if region.outcome != "corrected":
        return f"{came} {region.outcome}"
    return f"{came}, corrected to {region.delta_e_after:.2f}{_chroma(region.chroma_after)}"


def _chroma(ratio: float | None) -> str:
    return "" if ratio is None else f" (chroma {ratio:.3f})"
