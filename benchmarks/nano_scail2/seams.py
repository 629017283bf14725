"""Measures if a clip of several segments jumps where one follows another.

The colours of a person's limbs have a middle in each frame, and a dance moves it by steps. A step
across a seam must not be much larger than those inside segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.nano.dance import Array
from benchmarks.nano.drawing import Look
from benchmarks.nano_scail2.judge import empty_room
from benchmarks.nano_scail2.scenes import Frames, Mode, ScenePlan

ALLOWED = 1.5  # times the largest step inside a segment
LIMB_COLOURS = ("skin", "top", "trousers", "shoes")  # of a `Look`: hands, sleeves, legs and feet
OTHER_COLOURS = ("hair", "stripe")  # what else a person's pixel may be
LEAST = 12.0  # pixels of a colour, below which its middle says nothing
FAINT = 24.0  # levels by which a pixel differs from the room where a person begins
LIKE = 24.0  # levels of a difference to a colour that counts as like it


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

    A pixel counts as far as it differs from the room and is like the colour, so that blurred edges
    do not flicker. NaN where a frame has too little of a colour.
    """
    room = empty_room(planned, mode)
    there = np.clip((np.abs(frames.astype(np.float64) - room).max(-1) - FAINT) / FAINT, 0, 1)
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]]
    middles = []
    for share in colour_shares(frames, planned.heroes[0]):
        weight = there * share
        total = weight.sum((1, 2))
        total[total < LEAST] = np.nan
        middle = [(weight * places).sum((1, 2)) / total for places in (rows, columns)]
        middles.append(np.stack(middle, axis=-1))
    return np.linalg.norm(np.diff(np.stack(middles), axis=1), axis=-1)


def colour_shares(frames: Frames, look: Look) -> Array:
    """How far each pixel is of each limb colour, 0..1: [colours, T, H, W], counted as above."""
    names = (*LIMB_COLOURS, *OTHER_COLOURS)
    tints = np.array([getattr(look, name) for name in names], np.float64)
    far = np.stack([np.square(frames - tint).sum(-1) for tint in tints])
    near = np.exp((far.min(0) - far) / (2 * LIKE**2))
    return (near / near.sum(0))[: len(LIMB_COLOURS)]
