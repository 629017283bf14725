"""Golden data of segments: where the plans of long clips lie, for a number of frames each.

A file maps the number of frames to plans by name; a segment is [start, end), and of `cover` also
the length it is denoised with and the frames dropped from its front.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

from engine.denoise.segments import PLANS, Segment, plan
from engine.errors import BadCheckpoint
from engine.flow import SegmentPlan
from engine.golden.check import Check


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    """True for an entry for a number of frames, in it one for a plan: "81.cover"."""
    return any(
        frames.isdecimal() and rule in PLANS
        for frames, _, rule in (name.partition(".") for name in names)
    )


def checks(path: Path) -> Iterator[Check]:
    """Checks each plan. Raises `BadCheckpoint` for a file that holds something else."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        cases = [
            (int(frames), name, stored) for frames in held for name, stored in held[frames].items()
        ]
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise BadCheckpoint(f"{path.name} is not a list of plans: {error!r}") from error
    for frames, name, stored in cases:
        check = f"{path.name}: {frames} frames: {name}"
        known = next((known for known in get_args(SegmentPlan) if known == name), None)
        if known is None:
            yield Check(f"{check}: no such plan here", None, None, None)
            continue
        made = [_row(segment) for segment in plan(known, frames)]
        differs = float(not _agree(made, stored))
        yield Check(check, differs, 0, not differs)


def _row(segment: Segment) -> list[int]:
    return [segment.start, segment.end, segment.frames, segment.history_frames]


def _agree(made: list[list[int]], stored: object) -> bool:
    """True if all that is stored of each segment is what was made."""
    if not isinstance(stored, list) or len(stored) != len(made):
        return False
    return all(
        isinstance(row, list) and len(row) in (2, 4) and row == mine[: len(row)]
        for mine, row in zip(made, stored, strict=True)
    )
