"""What of a motion a person should look at before a clip is rendered: frame, figure, cure.

Persons who are small, away, or change their order; masks that jump or may be swapped; film cuts.
Limits: docs/reference/masks.md 6.4.
"""

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.flow import Warned
from engine.masks.cuts import is_cut
from engine.masks.tracks import Tracks

_SHORT_SIDE = 512  # at which lengths are counted
_LEAST_AREA, _LEAST_TALL = 0.01, 96  # of the frame; pixels
_MOST_ABSENT = 0.1  # of the frames
_MOST_CHANGE = 2.0  # times the area, from a frame to the next
_STAYS, _TAKES = 0.3, 0.5  # IoU with its own mask of the frame before, and with another's
_ORDER_S = 1.0


def findings(tracks: Tracks, frames: Tensor, fps: float) -> tuple[Warned, ...]:
    """Looks at the persons of a motion [T, H, W, 3] u8 in its own colours, and at its cuts."""
    cuts = cuts_of(tracks, frames)
    found = [_cut(cuts, fps)] if cuts else []
    for person in range(len(tracks.persons)):
        found += _small(tracks, person)
        found += _away(tracks, person, fps)
        found += _jumps(tracks, person, cuts)
    found += _swaps(tracks, cuts)
    found += _order(tracks, fps, cuts)
    return tuple(found)


def cuts_of(tracks: Tracks, frames: Tensor) -> list[int]:
    """Numbers the first frames after film cuts: the picture changes, or all persons do."""
    begins = np.array([False, *(is_cut(*pair) for pair in pairwise(frames.numpy()))])
    if len(tracks.persons) > 1:
        before, now = tracks.is_seen[:-1], tracks.is_seen[1:]
        begins[1:] |= before.any(1) & now.any(1) & ~(before & now).any(1)
    return [int(number) for number in np.flatnonzero(begins)]


def _cut(cuts: list[int], fps: float) -> Warned:
    times = ", ".join(f"{number} ({number / fps:.1f} s)" for number in cuts[:5])
    more = f" and {len(cuts) - 5} more" if len(cuts) > 5 else ""
    return Warned(
        "cut",
        f"There seems to be a film cut at frame {times}{more}: persons may be mixed up there. "
        "Look at the masks, or make a clip of each scene.",
        cuts[0],
    )


def _small(tracks: Tracks, person: int) -> Iterator[Warned]:
    seen = np.flatnonzero(tracks.is_seen[:, person])
    if not len(seen):
        return
    height, width = tracks.size
    unit = min(height, width) / _SHORT_SIDE
    share = float(np.median(tracks.areas[seen, person])) / (height * width)
    tall = float(np.median(tracks.boxes[seen, person, 3] - tracks.boxes[seen, person, 1]))
    if share >= _LEAST_AREA and tall >= _LEAST_TALL * unit:
        return
    yield Warned(
        "small",
        f"The person in {tracks.persons[person]} is small in the video: {tall:.0f} pixels high, "
        f"{share:.1%} of the frame; {_LEAST_TALL * unit:.0f} pixels and {_LEAST_AREA:.0%} are "
        "advised. Cut the video closer, or render a larger clip.",
        int(seen[0]),
    )


def _away(tracks: Tracks, person: int, fps: float) -> Iterator[Warned]:
    is_seen = tracks.is_seen[:, person]
    share = 1 - is_seen.mean()
    if share <= _MOST_ABSENT:
        return
    spans = [f"{first} to {last}" for first, last in _spans(~is_seen)]
    more = f" and {len(spans) - 4} times more" if len(spans) > 4 else ""
    yield Warned(
        "absent",
        f"The person in {tracks.persons[person]} is not seen in {share:.0%} of the frames "
        f"({', '.join(spans[:4])}{more}): who comes and goes often looks wrong. Cut the video to "
        "where everybody is.",
        int(np.flatnonzero(~is_seen)[0]),
    )


def _jumps(tracks: Tracks, person: int, cuts: list[int]) -> Iterator[Warned]:
    is_seen, areas = tracks.is_seen[:, person], tracks.areas[:, person]
    both = is_seen[1:] & is_seen[:-1]
    ratio = np.ones(len(areas))
    larger = np.maximum(areas[1:], areas[:-1]) / np.maximum(np.minimum(areas[1:], areas[:-1]), 1)
    ratio[1:][both] = larger[both]
    ratio[cuts] = 1
    frames = np.flatnonzero(ratio > _MOST_CHANGE)
    if len(frames):
        most = int(ratio.argmax())
        yield Warned(
            "jump",
            f"The mask of the person in {tracks.persons[person]} changes its area "
            f"{ratio[most]:.1f} times from frame {most - 1} to {most}{_times(frames)}: look at it, "
            "and correct it if a part is missing.",
            int(frames[0]),
        )


def _swaps(tracks: Tracks, cuts: list[int]) -> Iterator[Warned]:
    for one, other in combinations(range(len(tracks.persons)), 2):
        now = tracks.overlaps
        lost = (now[:, one, one] < _STAYS) | (now[:, other, other] < _STAYS)
        taken = (now[:, one, other] >= _TAKES) | (now[:, other, one] >= _TAKES)
        is_swap = lost & taken
        is_swap[cuts] = False
        frames = np.flatnonzero(is_swap)
        if len(frames):
            yield Warned(
                "swap",
                f"The persons in {_both(tracks, one, other)} may be swapped at frame "
                f"{frames[0]}{_times(frames)}: look at the masks there, and correct them.",
                int(frames[0]),
            )


def _order(tracks: Tracks, fps: float, cuts: list[int]) -> Iterator[Warned]:
    centres = (tracks.boxes[..., 0] + tracks.boxes[..., 2]) / 2  # [T, P]
    later = max(1, round(_ORDER_S * fps))
    for one, other in combinations(range(len(tracks.persons)), 2):
        side = np.sign(centres[:, one] - centres[:, other])
        side = side[~np.isnan(side)]
        numbers = np.flatnonzero(~np.isnan(centres[:, one] - centres[:, other]))
        changes = numbers[1:][(side[1:] != side[:-1]) & (np.diff(numbers) <= later)]
        changes = np.setdiff1d(changes, cuts)
        if len(changes):
            yield Warned(
                "order",
                f"The persons in {_both(tracks, one, other)} change sides at frame "
                f"{changes[0]}{_times(changes)}: where persons cross they are often mixed up. Look "
                "at the masks there.",
                int(changes[0]),
            )


def _spans(is_true: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last numbers of runs of what is true."""
    edges = np.diff(np.concatenate([[0], is_true.astype(np.int8), [0]]))
    firsts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return [(int(first), int(end) - 1) for first, end in zip(firsts, ends)]


def _times(frames: NDArray[np.intp]) -> str:
    return f", and {len(frames) - 1} times more" if len(frames) > 1 else ""


def _both(tracks: Tracks, one: int, other: int) -> str:
    return f"{tracks.persons[one]} and {tracks.persons[other]}"
