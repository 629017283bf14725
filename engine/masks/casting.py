"""Boxes of every frame -> shots, the persons of each, and what they are shown by.

All of it is settled before the network sees a frame, so that a clip which does not fit its picture
is refused in seconds. Rules: docs/reference/masks.md 7.5 and 7.6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.config import LIMITS
from engine.errors import BadRequest, NobodyFound
from engine.flow import Mode
from engine.masks.candidates import (
    Last,
    candidates,
    left_to_right,
    matched,
    nearest_to,
    prompts_of,
)
from engine.masks.corrections import Correction
from engine.masks.cuts import all_new
from engine.masks.events import Event
from engine.masks.rectangles import centre, height
from engine.masks.stream import Prompt
from engine.masks.tracklets import Chain, joined, tracklets
from engine.media.framing import Size
from engine.pose.arrays import Doubles


@dataclass(frozen=True, slots=True)
class Shot:
    """Frames between two film cuts, and who is in them."""

    frames: range
    chains: dict[int, Chain]  # by person from 0, the same in all shots
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Cast:
    """The persons of a clip."""

    shots: tuple[Shot, ...]
    persons: int
    events: tuple[Event, ...]


def cast(
    boxes: Sequence[Doubles],
    cuts: Sequence[int],
    size: Size,
    fps: float,
    wanted: int | None,
    alone: Doubles | None = None,
    corrections: Sequence[Correction] = (),
) -> Cast:
    """Settles who is who in a clip, from boxes [n, 5] of each frame and the `cuts` that were seen.

    `wanted` persons, the largest; None: all. `alone` is the box [4] of the one person of a
    picture, stretched to the frame, whose place is taken by whom it covers best. Raises
    `NobodyFound`, and `BadRequest` for fewer persons than wanted, or more than there are colours.
    """
    found, events = _shots(boxes, cuts, size, fps)
    most = max((len(chains) for _, chains in found), default=0)
    _check_count(wanted, most, len(boxes))
    count = most if wanted is None else wanted
    known: dict[int, Last] = {}
    shots = []
    for frames, chains in found:
        chosen, notes = _chosen(chains, count, size, alone if not known else None)
        persons = matched(known, chosen, count, size)
        prompts, unsure = prompts_of(persons, frames.start, fps)
        known |= _last(persons, size)
        shots.append(Shot(frames, persons, _corrected(prompts, corrections, frames)))
        events += notes
        events += [_unsure(number) for number in unsure]
    told = {number for shot in shots for number in [one.person for one in shot.prompts]}
    if wanted is not None and len(told) < wanted:
        raise BadRequest(
            f"{_persons(wanted)} {'is' if wanted == 1 else 'are'} wanted, as many as the picture "
            f"shows or as were asked for, and {len(told)} of them can be followed in the video. "
            "Ask for fewer, or give another video."
        )
    return Cast(tuple(shots), max(told, default=-1) + 1, tuple(events))


def stretched(box: Doubles, picture: Size, size: Size) -> Doubles:
    """The box [4] of a picture in pixels of a frame of `size`."""
    y, x = size[0] / picture[0], size[1] / picture[1]
    return box * [x, y, x, y]


def is_alone(mode: Mode, pictured: int | None, wanted: int | None) -> bool:
    """True if one person of a picture replaces one of a video, who has to be chosen."""
    return mode == "replacement" and pictured == 1 and wanted in (None, 1)


def _shots(
    boxes: Sequence[Doubles], cuts: Sequence[int], size: Size, fps: float
) -> tuple[list[tuple[range, list[Chain]]], list[Event]]:
    """The shots, who could be a person in each, and the cuts between them."""
    shots, events = [], []
    borders = [0, *cuts, len(boxes)]
    for start, stop in pairwise(borders):
        pieces = tracklets(boxes[start:stop], fps, start)
        inner = [start, *all_new(pieces), stop]
        for first, last in pairwise(inner):
            if first > 0:
                events.append(_cut(first))
            held = [piece for piece in pieces if first <= piece.frames[0] < last]
            shots.append((range(first, last), candidates(joined(held, fps), size)))
    return shots, events


def check_persons(wanted: int | None) -> None:
    """Raises `BadRequest` for a number of persons that nobody can be told apart by."""
    colours = LIMITS.max_identities
    if wanted is not None and not 0 < wanted <= colours:
        raise BadRequest(f"{wanted} persons are wanted; 1 to {colours} have colours.")


def _check_count(wanted: int | None, most: int, frames: int) -> None:
    colours = LIMITS.max_identities
    check_persons(wanted)
    if not most:
        raise NobodyFound(
            f"Nobody was found in {frames} frames of the video who fills a hundredth of it. Use a "
            "video in which the dancer is in view, or give a file of masks."
        )
    if wanted is None and most > colours:
        raise BadRequest(
            f"The video shows {most} persons; at most {colours} have colours. Say how many are "
            "meant: the largest are taken."
        )
    if wanted is not None and most < wanted:
        raise BadRequest(
            f"The video shows {_persons(most)} and {wanted} are wanted, as many as the "
            "picture shows or as were asked for. Ask for fewer, or give another video."
        )


def _chosen(
    chains: list[Chain], count: int, size: Size, alone: Doubles | None
) -> tuple[list[Chain], list[Event]]:
    if len(chains) <= count:
        return chains, []
    if alone is not None and count == 1:
        one, why = nearest_to(alone, left_to_right(chains), size)
        x = round(centre(one.boxes[0])[0])
        said = (
            f"Of {len(chains)} persons in the video, the one at x = {x} of frame {one.frames[0]} "
            f"is replaced, who {why}. Say who is meant with a mask if it is somebody else."
        )
        return [one], [Event("who", said)]
    said = f"The video shows {len(chains)} persons: the largest {count} are followed."
    return chains[:count], [Event("who", said)]


def _last(persons: dict[int, Chain], size: Size) -> dict[int, Last]:
    from_left = sorted(persons, key=lambda number: centre(persons[number].boxes[-1])[0])
    return {
        number: Last(rank, height(persons[number].boxes[-1]) / size[0])
        for rank, number in enumerate(from_left)
    }


def _corrected(
    prompts: Sequence[Prompt], corrections: Sequence[Correction], frames: range
) -> tuple[Prompt, ...]:
    """The prompts with those that were said; of two for a person and a frame, the last is meant."""
    said = [one.prompt for one in corrections if one.prompt.frame in frames]
    return tuple({(one.person, one.frame): one for one in [*prompts, *said]}.values())


def _cut(frame: int) -> Event:
    said = (
        f"The picture changes at frame {frame} (a film cut): persons were matched by their order "
        "from left to right and their height. Look at the preview."
    )
    return Event("cut", said, (), frame)


def _unsure(number: int) -> Event:
    return Event("unsure", "{0} is nowhere seen surely and alone: look at the preview.", (number,))


def _persons(count: int) -> str:
    return "1 person" if count == 1 else f"{count} persons"
