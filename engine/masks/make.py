"""A driving video and a picture -> masks of both: the files of this wing meet here.

    cast     boxes of every frame, film cuts, who is who, what each is shown by
    follow   the network follows everybody of each shot, both ways
    paint    logits become labels at the size of the frames
    colour   persons in order take the labels of their partners in the picture

All but the last takes minutes and depends on files alone; it is kept (`engine.masks.kept`).
Source: docs/reference/masks.md 7.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import BadRequest, NobodyFound
from engine.flow import Check, Mode, go_on
from engine.masks.casting import cast, check_persons, is_alone, stretched
from engine.masks.colours import PERSONS
from engine.masks.corrections import Correction, check_corrections
from engine.masks.cuts import is_cut
from engine.masks.events import Event, told
from engine.masks.follow import Followed, Frames, follow, ways
from engine.masks.made import MadeMasks
from engine.masks.order import Found, by_appearance, match
from engine.masks.person_boxes import BoxFinder
from engine.masks.rectangles import box_of, overlap
from engine.masks.segmenter import Segmenter
from engine.masks.still import Picture, Pictured, look_at_picture
from engine.masks.tidy import paint_all
from engine.pose.arrays import Bools, Doubles

Progress = Callable[[str, int, int], None]  # what is done, how much of it, out of how much

NOBODY = 0  # of the video, in the order of a label that nobody has

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Driving:
    """The video whose persons are followed, whole frames at the size of the labels."""

    frames: Frames  # [T, H, W, 3] u8
    fps: float
    sha256: str  # of its file


@dataclass(frozen=True, slots=True)
class Wish:
    """What masks are asked for."""

    mode: Mode
    persons: int | None = None  # the largest so many; None: as many as the picture shows
    who: tuple[int, ...] = ()  # of the video, who are person 1, 2, .. of the picture
    grow: int = 0  # pixels at a short side of 512
    corrections: tuple[Correction, ...] = ()


@dataclass(frozen=True, slots=True)
class Looked:
    """Everybody of a clip, numbered as found. P persons, none of them in a colour yet."""

    labels: NDArray[np.uint8]  # [T, H, W] 0 background, else the person from 1
    there: Bools  # [T, P]
    scores: NDArray[np.float32]  # [T, P] 0 to 1
    pictured: Pictured | None
    events: tuple[Event, ...]
    model: str


def look(
    driving: Driving,
    picture: Picture | None,
    segmenter: Segmenter,
    finder: BoxFinder,
    wish: Wish,
    check: Check = go_on,
    progress: Progress | None = None,
) -> Looked:
    """Finds everybody of a clip; `who` has no part in it. `check` is asked before each frame.

    Raises `NobodyFound`, `BadRequest` for persons that do not fit, and what `check` raises.
    """
    count, height, width, _ = driving.frames.shape
    size = height, width
    check_corrections(wish.corrections, count, size)
    check_persons(wish.persons)
    tell = progress or (lambda *_: None)
    pictured = None
    if picture is not None:
        pictured = look_at_picture(picture, segmenter, finder, wish.persons, wish.grow)
    boxes = []
    for done, frame in enumerate(driving.frames, 1):
        check()
        boxes.append(finder(frame))
        tell("boxes", done, count)
    shown = None if pictured is None else len(pictured.numbers)
    alone = None
    if pictured is not None and is_alone(wish.mode, shown, wish.persons):
        alone = stretched(pictured.boxes[0], pictured.size, size)
    wanted = shown if wish.persons is None else wish.persons
    players = cast(boxes, _cuts(driving.frames), size, driving.fps, wanted, alone, wish.corrections)
    followed = Followed(count, events=list(players.events))
    total = sum(len(way) for shot in players.shots for _, way in ways(shot.frames, shot.prompts))
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        tell("masks", done, total)

    for shot in players.shots:
        follow(
            segmenter, driving.frames, shot.frames, shot.chains, shot.prompts, followed, check,
            advance,
        )  # fmt: skip
    labels, there = paint_all(followed, size, wish.grow, check)
    scores = (1 / (1 + np.exp(-followed.scores.clip(-60, 60)))).astype(np.float32)
    return Looked(labels, there, scores, pictured, tuple(followed.events), segmenter.name)


def colour(looked: Looked, driving: Driving, picture: Picture | None, wish: Wish) -> MadeMasks:
    """Gives everybody the label of their partner in the picture. Raises as `look`."""
    boxes = _boxes(looked)
    clip, persons = _in_order(looked, boxes)
    who, notes = _who(clip, looked.pictured, wish)
    numbers = range(1, len(who) + 1) if looked.pictured is None else looked.pictured.numbers
    labels = {persons[one - 1]: number for one, number in zip(who, numbers)}  # by person as found
    table = np.zeros(looked.there.shape[1] + 1, np.uint8)
    most = max(labels.values())
    order = [NOBODY] * most
    columns = np.full((len(boxes), most, 4), np.nan, np.float32)
    scores = np.full((len(boxes), most), np.nan, np.float32)
    for person, label in labels.items():
        table[person + 1], order[label - 1] = label, person + 1
        columns[:, label - 1] = boxes[:, person]
        scores[:, label - 1] = np.where(looked.there[:, person], looked.scores[:, person], np.nan)
    names = {person: _name(n, labels.get(person)) for n, person in enumerate(persons, 1)}
    unseen = [n for n in range(looked.there.shape[1]) if n not in persons]
    events = [*looked.events, *notes, *(_never(n) for n in unseen)]
    return MadeMasks(
        labels=torch.from_numpy(table[looked.labels]),
        reference=None if looked.pictured is None else looked.pictured.labels,
        boxes=torch.from_numpy(columns),
        scores=torch.from_numpy(scores),
        fps=driving.fps,
        source_sha256=driving.sha256,
        order=tuple(order),
        model=looked.model,
        image_sha256="" if picture is None else picture.sha256,
        warned=tuple(told(event, names) for event in events),
    )


def _who(clip: Found, pictured: Pictured | None, wish: Wish) -> tuple[tuple[int, ...], list[Event]]:
    """Which persons of the clip, from 1 in order of appearance, take the picture's labels."""
    many = len(clip.boxes)
    if wish.who:
        few = many if pictured is None else len(pictured.numbers)
        if len(wish.who) > few or max(wish.who) > many:
            raise BadRequest(
                f"who is {','.join(map(str, wish.who))}; {many} persons of the video were followed "
                f"and {few} of them can be named. Follow more with persons, or name others."
            )
        return wish.who, []
    if pictured is None:
        return tuple(range(1, many + 1)), []
    overlaps = None
    if len(pictured.numbers) == 1:
        shown = stretched(pictured.boxes[0], pictured.size, clip.size)
        overlaps = np.array([overlap(box, shown) for box in clip.boxes])
    who, note = match(clip, pictured.found, wish.mode, overlaps)
    return who, [] if note is None else [Event("who", note)]


def _cuts(frames: Frames) -> list[int]:
    return [t for t, (a, b) in enumerate(pairwise(frames), 1) if is_cut(a, b)]


def _boxes(looked: Looked) -> Doubles:
    """Boxes [T, P, 4] of what is painted; NaN where nobody is."""
    count = looked.there.shape[1]
    boxes = np.full((len(looked.labels), count, 4), np.nan)
    for frame, labels in enumerate(looked.labels):
        for person in np.unique(labels):
            if person:
                boxes[frame, person - 1] = box_of(labels == person)
    return boxes


def _in_order(looked: Looked, boxes: Doubles) -> tuple[Found, list[int]]:
    """The persons who are seen, in order of appearance, and their numbers as found."""
    _, height, width = looked.labels.shape
    is_seen = np.isfinite(boxes[..., 0])
    seen = [person for person in range(boxes.shape[1]) if is_seen[:, person].any()]
    if not seen:
        raise NobodyFound(
            "Persons were found in the video, and none of them could be cut out. Give a file of "
            "masks, or show them by corrections."
        )
    first = [int(is_seen[:, person].argmax()) for person in seen]
    there = np.stack([boxes[t, person] for t, person in zip(first, seen)])
    order = by_appearance(Found(there, first, (height, width)))
    clip = Found(there[order], [first[n] for n in order], (height, width))
    return clip, [seen[n] for n in order]


def _name(place: int, label: int | None) -> str:
    colour = "in no colour" if label is None else PERSONS[label - 1]
    return f"person {place} ({colour})"


def _never(person: int) -> Event:
    return Event("unseen", "{0} has a box and could not be cut out.", (person,))
