"""Which person of the motion is which of the picture: read, guessed, and looked at.

Persons are numbered by where they are first seen, then from left to right; two lists sorted alike
are matched in order. Rules: docs/reference/masks.md 6.5.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadRequest, NobodyFound
from engine.flow import Mode, Warned
from engine.masks.colours import CLASSES, PERSONS
from engine.masks.tracks import Floats, Tracks, box_of

_SPLIT = re.compile(r"[\s,;]+")


@dataclass(frozen=True, slots=True)
class Found:
    """Persons who were found, in the order in which they were."""

    boxes: Floats  # [P, 4] in the frame where each is first seen
    first: Sequence[int]  # those frames
    size: tuple[int, int]  # height and width of the frame


def read_who(text: str) -> tuple[int, ...]:
    """Reads persons as numbers or colours: "2,1" and "red,blue" are the same.

    The first is who becomes person 1. Raises `BadRequest`.
    """
    named = [part for part in _SPLIT.split(text.strip().lower()) if part]
    known = {name: place for place, name in enumerate(PERSONS, start=1)}
    known |= {str(place): place for place in known.values()}
    if not named or not set(named) <= set(known) or len(named) > LIMITS.max_identities:
        raise BadRequest(
            f"who is {text[:40]!r}; persons by number (1 to {LIMITS.max_identities}) or colour "
            f"({', '.join(PERSONS)}) are expected, such as 2,1."
        )
    who = tuple(known[one] for one in named)
    if len(set(who)) < len(who):
        raise BadRequest(f"who is {text[:40]!r}, which names a person twice.")
    return who


def by_appearance(found: Found) -> list[int]:
    """Sorts persons by the frame where they are first seen, then by the middle of their box."""
    middles = (found.boxes[:, 0] + found.boxes[:, 2]) / 2
    return sorted(
        range(len(found.boxes)), key=lambda person: (found.first[person], middles[person])
    )


def match(
    clip: Found, picture: Found, mode: Mode, overlaps: Floats | None = None
) -> tuple[tuple[int, ...], str | None]:
    """Says which persons of the clip, from 1 in order of appearance, are those of the picture.

    `overlaps` [P] are IoU of the clip's persons with that of the picture, scaled to the frame. Also
    a note where not all of the clip are needed. Raises `NobodyFound` if the clip has too few.
    """
    many, few = len(clip.boxes), len(picture.boxes)
    if few > LIMITS.max_identities:
        raise BadRequest(
            f"{few} persons are in the picture; at most {LIMITS.max_identities} are told apart. "
            "Ask for fewer persons."
        )
    if many < few or not few:
        raise NobodyFound(
            f"{many} persons were found in the video and {few} in the picture: give masks, or say "
            "with persons how many there are."
        )
    order = by_appearance(clip)
    if many == few:
        return tuple(range(1, many + 1)), None
    fate = "vanish" if mode == "animation" else "stay as they are"
    if few == 1 and mode == "replacement" and overlaps is not None:
        person = int(np.argmax(overlaps[order]))
        how = f"its place is most like the picture's, IoU {overlaps[order][person]:.2f}"
        return (person + 1,), _told([person + 1], many, fate, how)
    from scipy.optimize import linear_sum_assignment  # slow to import: only when used

    costs = _middles(picture)[by_appearance(picture)][:, None] - _middles(clip)[order][None]
    rows, columns = linear_sum_assignment((costs**2).sum(-1))
    who = [int(column) + 1 for _, column in sorted(zip(rows, columns))]
    return tuple(who), _told(who, many, fate, "they stand nearest to where the picture has them")


def other_order(tracks: Tracks, numbers: Tensor) -> tuple[Warned, ...]:
    """Warns if persons stand in another order in the picture than when they are first seen.

    It is no mistake in itself; but files that were sorted by size look so.
    """
    found: list[tuple[str, float, float]] = []
    for person, colour in enumerate(tracks.persons):
        is_person = (numbers == CLASSES[colour]).numpy()
        seen = np.flatnonzero(tracks.is_seen[:, person])
        if is_person.any() and not is_person.all() and len(seen) and seen[0] == 0:
            there, here = tracks.boxes[0, person], box_of(is_person)
            found.append((colour, float(there[0] + there[2]), float(here[0] + here[2])))
    changed = [
        (one[0], other[0])
        for one, other in combinations(found, 2)
        if (one[1] - other[1]) * (one[2] - other[2]) < 0
    ]
    if not changed:
        return ()
    one, other = changed[0]
    held = [name for name in PERSONS if name in tracks.persons]
    swap = {one: other, other: one}
    who = ",".join(str(PERSONS.index(swap.get(name, name)) + 1) for name in held)
    said = (
        f"The persons in {one} and {other} stand in another order in the picture than in frame 0 "
        f"of the video. If they are not to change sides, give who as {who}."
    )
    return (Warned("who", said, 0),)


def _middles(found: Found) -> Floats:
    """Middles of boxes as shares of the frame: [P, 2]."""
    height, width = found.size
    boxes = found.boxes
    across, down = (boxes[:, 0] + boxes[:, 2]) / 2 / width, (boxes[:, 1] + boxes[:, 3]) / 2 / height
    return np.stack([across, down], axis=1)


def _told(who: Sequence[int], many: int, fate: str, how: str) -> str:
    named = " and ".join(f"person {one}" for one in who)
    return (
        f"Of {many} persons of the video {named} (by first appearance, then from the left) become "
        f"those of the picture: {how}. The others {fate}. Say with who if others are meant."
    )
