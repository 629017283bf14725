"""Who becomes whom, where the masks of a video say it in another order than the picture.

One word for each person of the video, in the order of the colours (`colours.PERSONS`): whose looks
it takes. Rules: docs/reference/masks.md 6.5.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadRequest
from engine.flow import Warned
from engine.masks.colours import CLASSES, PERSONS
from engine.masks.tracks import Tracks, box_of

NOBODY = 0  # whose looks a person takes who gets no colour


def parse_who(text: str) -> tuple[int, ...]:
    """Reads `2,1`, or names of colours: whose looks the first, second, .. person takes.

    0 or `none` is nobody's. Raises `BadRequest` for what is no list of persons.
    """
    known = {name: place for place, name in enumerate(PERSONS, start=1)}
    known |= {str(place): place for place in known.values()} | {"0": NOBODY, "none": NOBODY}
    words = [word.strip().lower() for word in text.split(",")]
    if not set(words) <= set(known) or len(words) > LIMITS.max_identities:
        raise BadRequest(
            f"Who is {text[:80]!r}; numbers as 2,1 or colours as red,blue are expected, one for "
            f"each person of the video ({', '.join(PERSONS)}, or none)."
        )
    who = tuple(known[word] for word in words)
    used = [one for one in who if one != NOBODY]
    if len(set(used)) < len(used) or not used:
        raise BadRequest(f"Who is {text[:80]!r}; each person can be followed by one alone.")
    return who


def check_who(who: Sequence[int], persons: Sequence[str], name: str) -> None:
    """Raises `BadRequest` unless `who` says of each person of the mask `name` whom it becomes."""
    if len(who) != len(persons):
        held = ", ".join(persons) or "nobody"
        raise BadRequest(
            f"Who names {len(who)} and {name} shows {len(persons)} ({held}): one for each is "
            "expected, in this order."
        )


def other_sides(tracks: Tracks, numbers: Tensor) -> tuple[Warned, ...]:
    """Warns if persons stand in another order in the picture than when the video begins.

    It is no mistake in itself; but masks that were sorted by size look so. `numbers` [h, w] u8 are
    the colours of the picture's mask.
    """
    found: list[tuple[str, float, float]] = []
    for person, colour in enumerate(tracks.persons):
        is_person = (numbers == CLASSES[colour]).numpy()
        if (
            is_person.any()
            and not is_person.all()
            and len(tracks.boxes)
            and tracks.is_seen[0, person]
        ):
            there, here = tracks.boxes[0, person], box_of(is_person)
            found.append((colour, float(np.add(*there[[0, 2]])), float(np.add(*here[[0, 2]]))))
    for one, other in combinations(found, 2):
        if (one[1] - other[1]) * (one[2] - other[2]) >= 0:
            continue
        swap = {one[0]: other[0], other[0]: one[0]}
        who = ",".join(str(PERSONS.index(swap.get(name, name)) + 1) for name in tracks.persons)
        said = (
            f"The persons in {one[0]} and {other[0]} stand in another order in the picture than in "
            f"frame 0 of the video. If they are not to change sides, give who as {who}."
        )
        return (Warned("who", said, 0),)
    return ()
