"""What the network said -> labels: short gaps filled, entrances and exits told.

Rules: docs/reference/masks.md 7.6.
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from engine.flow import Check, go_on
from engine.masks.events import Event
from engine.masks.follow import Followed
from engine.masks.painter import paint_labels
from engine.media.framing import Size
from engine.pose.arrays import Bools

MOST_GAP = 2  # frames that are filled
_SAME = 0.5  # IoU of a mask before and after a gap
_ABSENT = -32.0  # logit of nobody's being there; finite, for it is interpolated


def paint_all(
    followed: Followed, size: Size, grow: int = 0, check: Check = go_on
) -> tuple[NDArray[np.uint8], Bools]:
    """Paints all frames: labels [T, *size] u8, person n has n + 1, and who is there [T, P]."""
    there = _there(followed)
    for person in range(there.shape[1]):
        _fill(followed.logits[:, person], there[:, person])
        followed.events += _absences(there[:, person], person)
    labels = np.zeros((followed.frames, *size), np.uint8)
    for frame, place in enumerate(labels):
        check()
        if not there[frame].any():
            continue
        logits = torch.from_numpy(followed.logits[frame]).float()
        logits[torch.from_numpy(~there[frame])] = _ABSENT
        place[:] = paint_labels(logits, size, grow).numpy()
    return labels, there


def _there(followed: Followed) -> Bools:
    return np.array(
        [
            [followed.is_there(frame, person) for person in range(followed.persons)]
            for frame in range(followed.frames)
        ],
        bool,
    ).reshape(followed.frames, followed.persons)


def _fill(logits: NDArray[np.float16], there: Bools) -> None:
    """Fills short gaps of one person, in place: logits [T, h, w], there [T]."""
    for first, stop in _runs(~there):
        if first == 0 or stop == len(there) or stop - first > MOST_GAP:
            continue
        before, after = logits[first - 1] > 0, logits[stop] > 0
        joined = np.count_nonzero(before | after)
        if np.count_nonzero(before & after) < _SAME * joined:
            continue
        logits[first:stop] = (_signed(before) + _signed(after)) / 2
        there[first:stop] = True


def _signed(mask: Bools) -> NDArray[np.float32]:
    """How far each pixel is from the edge: above 0 inside, below outside."""
    inside, outside = (
        np.asarray(
            cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE),
            np.float32,
        )
        for part in (mask, ~mask)
    )
    return np.clip(inside - outside, -32, 32)


def _absences(there: Bools, person: int) -> list[Event]:
    """A note for each entrance and exit, and each absence: they make artefacts."""
    if not there.any():
        return []
    found = []
    for first, stop in _runs(~there):
        if first == 0:
            what = f"enters at frame {stop}"
        elif stop == len(there):
            what = f"leaves at frame {first}"
        else:
            what = f"is not seen in frames {first} to {stop - 1}"
        said = f"{{0}} {what}: look at the clip around it."
        found.append(Event("absent", said, (person,), stop if first == 0 else first))
    return found


def _runs(flags: Bools) -> list[tuple[int, int]]:
    """First and stop of each run of True."""
    edges = np.flatnonzero(np.diff(flags.astype(int), prepend=0, append=0))
    return [(int(first), int(stop)) for first, stop in edges.reshape(-1, 2)]
