"""Who becomes whom: persons of the video in order, and their partners in the picture.

Both are sorted by the frame first seen, then by the centre of the box from left to right, and
person n of the video takes the looks of person n of the picture. Rules: docs/reference/masks.md
7.7.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import LIMITS
from engine.errors import BadRequest
from engine.masks.colours import PERSONS
from engine.masks.events import Event
from engine.media.framing import Size
from engine.pose.arrays import Doubles
from engine.pose.tracking import pairs

NOBODY = 0  # the partner of a person who gets no colour
_NEVER = 1e3  # cost of a person without a partner: above that of every pair


@dataclass(frozen=True, slots=True)
class Places:
    """Where the persons of a video or a picture are when they are first seen. P persons."""

    frames: tuple[int, ...]  # [P] in which each is first seen
    centres: Doubles  # [P, 2] x, y of the box there
    size: Size  # of the frame


def sorted_persons(places: Places) -> list[int]:
    """The numbers of persons from 0, in order; one who is never seen has no place."""
    return sorted(
        range(len(places.frames)), key=lambda n: (places.frames[n], places.centres[n][0], n)
    )


def parse_who(text: str) -> tuple[int, ...]:
    """Reads `2,1`, or names of colours: whose looks the first, second, .. person takes.

    0 or `none` is nobody's. Raises `BadRequest` for what is no list of persons.
    """
    numbers = []
    for word in (part.strip().lower() for part in text.split(",")):
        if word in PERSONS:
            numbers.append(PERSONS.index(word) + 1)
        elif word == "none":
            numbers.append(NOBODY)
        elif word.isdecimal() and len(word) < 3:
            numbers.append(int(word))
        else:
            raise BadRequest(
                f"Who is {text[:80]!r}; numbers as 2,1 or colours as red,blue are expected, one "
                f"for each person of the video from left to right ({', '.join(PERSONS)}, or none)."
            )
    return tuple(numbers)


def partners(
    moving: Places, pictured: Places | None, labels: Sequence[int], who: Sequence[int] = ()
) -> tuple[tuple[int, ...], tuple[Event, ...]]:
    """The label of each person of the video, in order; `NOBODY` for none, and why.

    Both `Places` are in order; `labels` are those of the picture's persons. `who` overrides. Fewer
    persons in the picture: each takes the place of the nearest, the others get no colour. Raises
    `BadRequest` for fewer in the video, or a `who` that does not fit.
    """
    count = len(moving.frames)
    if who:
        return _told(count, None if pictured is None else labels, who), ()
    if pictured is None:
        return tuple(range(1, count + 1)), ()
    shown = len(pictured.frames)
    if shown == count:
        return tuple(labels), ()
    if shown > count:
        raise BadRequest(
            f"The video shows {_persons(count)} and the picture {_persons(shown)}: each of the "
            "picture needs one to follow. Say who of them dance with who, or give another picture."
        )
    off = _shares(moving)[:, None] - _shares(pictured)[None]  # [P, R, 2]
    found = dict(pairs((off**2).sum(-1), [_NEVER] * count))
    given = tuple(labels[found[place]] if place in found else NOBODY for place in range(count))
    without = " and ".join(str(place + 1) for place, label in enumerate(given) if not label)
    said = (
        f"The video shows {_persons(count)} and the picture {_persons(shown)}: person {without} "
        "gets no colour. Say who is meant with who if it is somebody else."
    )
    return given, (Event("who", said),)


def _told(count: int, labels: Sequence[int] | None, who: Sequence[int]) -> tuple[int, ...]:
    known = range(1, LIMITS.max_identities + 1) if labels is None else labels
    if len(who) != count:
        raise BadRequest(
            f"Who names {_persons(len(who))}, and the video shows {_persons(count)}: one for each "
            "is expected, from left to right as they appear."
        )
    if any(number not in (NOBODY, *known) for number in who):
        raise BadRequest(
            f"Who is {_list(who)}; of {_list(known)}, the persons of the picture, each is expected "
            "once."
        )
    used = [number for number in who if number != NOBODY]
    if len(set(used)) < len(used) or not used:
        raise BadRequest(f"Who is {_list(who)}; each person can be followed by one alone.")
    return tuple(who)


def _shares(places: Places) -> Doubles:
    height, width = places.size
    return np.asarray(places.centres, np.float64).reshape(-1, 2) / (width, height)


def _persons(count: int) -> str:
    return "1 person" if count == 1 else f"{count} persons"


def _list(who: Sequence[int]) -> str:
    return ",".join(map(str, who))
