"""How clips of the usual sizes share a GPU: what `info` tells of a package's memory."""

import argparse
from collections.abc import Mapping

from engine.config import expandable_segments
from engine.errors import TooLarge
from engine.memory import USUAL_ENCODERS, ClipShape, Running, plan
from engine.package.manifest import Manifest

_SIZES = ((416, 672), (512, 896), (704, 1280))  # height, width
_FRAMES = 81


def gigabytes(text: str) -> int:
    """Parses GB as bytes, as an option's type."""
    try:
        nbytes = float(text) * 1e9
    except ValueError:
        nbytes = float("nan")
    if not 1e9 <= nbytes <= 1e12:
        raise argparse.ArgumentTypeError("gigabytes of GPU memory are expected, 1 to 1000")
    return int(nbytes)


def memory_plans(manifest: Manifest, free_bytes: int) -> Mapping[str, object]:
    """Plans a window of each usual size, for one prompt and for two, with the usual encoders and at
    the rates of a slow machine: what a worker measures may choose otherwise.
    """
    found: dict[str, object] = {}
    for height, width in _SIZES:
        for contexts in (1, 2):
            shape = ClipShape(height, width, _FRAMES, contexts)
            found[f"{width}x{height}x{_FRAMES}, cfg {contexts}"] = _told(
                manifest, shape, free_bytes
            )
    return found


def _told(manifest: Manifest, shape: ClipShape, free_bytes: int) -> Mapping[str, object]:
    running = Running(expandable=expandable_segments())
    try:
        found = plan(manifest, shape, USUAL_ENCODERS, free_bytes, running)
    except TooLarge as error:
        return {"refused": str(error)}
    return {
        "does": found.does,
        "peak_bytes": found.peak_bytes,
        "seconds": round(found.seconds, 1),
    }
