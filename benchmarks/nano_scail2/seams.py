"""Measures if a clip of several segments jumps where one follows another.

The colours of a person's limbs have a middle in each frame, and a dance moves it by steps. A step
across a seam must not be much larger than those inside segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.nano.dance import Array
from benchmarks.nano.drawing import Look
from benchmarks.nano.judge import body_of
from benchmarks.nano_scail2.judge import empty_room
from benchmarks.nano_scail2.scenes import Frames, Mode, ScenePlan

ALLOWED = 1.5  # times the largest step inside a segment
LIMB_COLOURS = ("skin", "top", "trousers", "shoes")  # of a `Look`: hands, sleeves, legs and feet
OTHER_COLOURS = ("hair", "stripe")  # what else a person's pixel may be
LEAST = 12  # pixels of a colour, below which its middle says nothing


@dataclass(frozen=True, slots=True)
class Seams:
    """How a clip goes on where segments meet."""

    jump: float  # the largest step across a seam, in largest steps inside, of the worst colour
    rgb: float  # mean difference of neighbouring frames across seams, levels

    @property
    def smooth(self) -> bool:
        return self.jump <= ALLOWED


def seams(frames: Frames, starts: Sequence[int], planned: ScenePlan, mode: Mode) -> Seams:
    """Measures a clip [T, H, W, 3] of one person, in which pieces begin at frames `starts`."""
    steps = colour_steps(frames, planned, mode)  # [colours, T - 1]
    across = np.array(starts) - 1
    inside = np.setdiff1d(np.arange(len(frames) - 1), across)
    jumps = [
        float(np.nanmax(one[across]) / np.nanmax(one[inside]))
        for one in steps
        if np.isfinite(one[across]).any() and np.isfinite(one[inside]).any()
    ]
    off = frames[1:].astype(np.float64) - frames[:-1]
    return Seams(max(jumps), float(np.abs(off[across]).mean()))


def colour_steps(frames: Frames, planned: ScenePlan, mode: Mode) -> Array:
    """How far the middle of each limb colour moves from frame to frame, pixels: [colours, T - 1].

    NaN where a frame has too little of the colour.
    """
    body = body_of(frames, empty_room(planned, mode))
    kinds = nearest_colours(frames, planned.heroes[0])
    middles = np.full((len(LIMB_COLOURS), len(frames), 2), np.nan)
    for kind in range(len(LIMB_COLOURS)):
        for t, there in enumerate(body & (kinds == kind)):
            if np.count_nonzero(there) >= LEAST:
                middles[kind, t] = np.argwhere(there).mean(0)
    return np.linalg.norm(np.diff(middles, axis=1), axis=-1)


def nearest_colours(frames: Frames, look: Look) -> NDArray[np.int64]:
    """For each pixel the nearest of a person's colours: [T, H, W], counted as named above."""
    names = (*LIMB_COLOURS, *OTHER_COLOURS)
    tints = np.array([getattr(look, name) for name in names], np.float64)
    far = [np.square(frames - tint).sum(-1) for tint in tints]
    return np.argmin(far, axis=0)
