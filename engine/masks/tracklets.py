"""Boxes found frame by frame, in any order -> the same person in one chain.

It is the tracking of motion capture with boxes for joints: a person is expected to move on as
before, all persons and boxes of a frame are paired at once, and tracklets are joined across
absences where place, time and height allow it. Lengths are in heights of the body, for pixels say
nothing. Formulas: docs/reference/masks.md 7.5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.masks.rectangles import centre, height, overlap
from engine.pose.arrays import Doubles
from engine.pose.tracking import AGILITY, FORGET_S, REACH, SIZE_NOISE, SIZE_RATIO, linked, pairs

NOISE, SPEED = 0.06, 0.6  # heights of the body, and heights a second of time unseen


@dataclass(frozen=True, slots=True)
class Chain:
    """One person as the detector saw them. n frames, ascending."""

    frames: tuple[int, ...]
    boxes: Doubles  # [n, 4] x1, y1, x2, y2
    scores: Doubles  # [n]

    def at(self, frame: int) -> Doubles | None:
        """The box [4] of a frame, or None."""
        place = int(np.searchsorted(self.frames, frame))
        is_there = place < len(self.frames) and self.frames[place] == frame
        return self.boxes[place] if is_there else None

    def score(self, frame: int) -> float:
        """0 where the detector did not see the person."""
        place = int(np.searchsorted(self.frames, frame))
        is_there = place < len(self.frames) and self.frames[place] == frame
        return float(self.scores[place]) if is_there else 0.0


@dataclass(slots=True)
class _Piece:
    """One person while in sight. Grows frame by frame."""

    frames: list[int]
    seen: list[Doubles]  # [5] each
    motion: Doubles = field(default_factory=lambda: np.zeros(2))  # of the centre, a frame


def tracklets(boxes: Sequence[Doubles], fps: float, first: int = 0) -> list[Chain]:
    """Everybody's appearances in a shot: boxes [n, 5] of each frame, the first of number `first`.

    An absence of up to half a second does not end one.
    """
    memory = max(round(FORGET_S * fps), 1)
    ended: list[_Piece] = []
    live: list[_Piece] = []
    for now, found in enumerate(map(_usable, boxes), first):
        ended += [one for one in live if now - one.frames[-1] > memory + 1]
        live = [one for one in live if now - one.frames[-1] <= memory + 1]
        costs = np.full((len(live), len(found)), np.inf)
        for i, one in enumerate(live):
            wait = now - one.frames[-1]
            costs[i] = [_cost(one.seen[-1], box, wait * one.motion, wait / fps) for box in found]
        paired = pairs(costs, [_edge((now - one.frames[-1]) / fps) for one in live])
        for i, k in paired:
            _extend(live[i], found[k], now)
        taken = {k for _, k in paired}
        live += [_Piece([now], [box]) for k, box in enumerate(found) if k not in taken]
    return [_chain([piece]) for piece in ended + live]


def joined(pieces: Sequence[Chain], fps: float) -> list[Chain]:
    """Joins tracklets of a shot into persons, across any absence that is believed."""
    costs = np.full((len(pieces), len(pieces)), np.inf)
    for i, a in enumerate(pieces):
        for k, b in enumerate(pieces):
            wait = b.frames[0] - a.frames[-1]
            if wait > 0:
                costs[i, k] = _cost(a.boxes[-1], b.boxes[0], np.zeros(2), wait / fps)
    return [
        Chain(
            tuple(frame for number in chain for frame in pieces[number].frames),
            np.concatenate([pieces[number].boxes for number in chain]),
            np.concatenate([pieces[number].scores for number in chain]),
        )
        for chain in linked(costs)
    ]


def _usable(boxes: Doubles) -> list[Doubles]:
    rows = np.asarray(boxes, np.float64).reshape(-1, 5)
    return [row for row in rows if np.isfinite(row).all() and (row[2:4] > row[:2]).all()]


def _cost(last: Doubles, box: Doubles, moved: Doubles, seconds: float) -> float:
    """The cost of taking a box for the person of the `last` one; inf: not believed."""
    h1, h2 = height(last), height(box)
    size = abs(math.log(h1 / h2))
    spread = NOISE + SPEED * seconds
    off = math.dist(centre(box), centre(last) + moved) / math.sqrt(h1 * h2) / spread
    if off > REACH or size > math.log(SIZE_RATIO):
        return math.inf
    expected = np.concatenate([last[:2] + moved, last[2:4] + moved])
    return (
        off**2 / 2
        + 2 * math.log(spread / NOISE)
        + 1
        - overlap(expected, box)
        + (size / SIZE_NOISE) ** 2 / 2
    )


def _edge(seconds: float) -> float:
    """The cost of a pair that is just believed."""
    spread = NOISE + SPEED * seconds
    size = math.log(SIZE_RATIO) / SIZE_NOISE
    return REACH**2 / 2 + 2 * math.log(spread / NOISE) + 1 + size**2 / 2


def _extend(one: _Piece, box: Doubles, now: int) -> None:
    moved = (centre(box) - centre(one.seen[-1])) / (now - one.frames[-1])
    one.motion += (moved - one.motion) * (AGILITY if len(one.frames) > 1 else 1.0)
    one.frames.append(now)
    one.seen.append(box)


def _chain(pieces: Sequence[_Piece]) -> Chain:
    rows = np.stack([box for piece in pieces for box in piece.seen])
    frames = tuple(frame for piece in pieces for frame in piece.frames)
    return Chain(frames, rows[:, :4], rows[:, 4])
