"""Everybody of a shot followed from where they were shown, to its end and back to its beginning.

What the network says is compared with the boxes of a person's own chain: who is astray while their
box is free is shown again there, who is where somebody else should be is reported. Rules:
docs/reference/masks.md 7.5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from engine.flow import Check, go_on
from engine.masks.candidates import prompt_at
from engine.masks.events import Event
from engine.masks.rectangles import box_of, overlap
from engine.masks.segmenter import Segmenter
from engine.masks.stream import REWOUND, Prompt, Seen, Stream
from engine.masks.tracklets import Chain
from engine.pose.arrays import Doubles

LEAST_SHARE = 0.0005  # of the frame: a smaller mask is none
MOST_RETOLD = 5  # times that persons of a clip are shown again
_ASTRAY, _SWAPPED = 0.3, 0.5  # IoU of a mask's box with the own box; with somebody else's
_FREE, _SURE = 0.3, 0.6  # IoU of the own box with other masks; score of a box to be shown by
_NOTHING = -32.0  # logit of nobody's being there, as FP16 holds it

Frames = NDArray[np.uint8]  # [T, H, W, 3]
Progress = Callable[[int], None]  # is told how many frames were done since the last call


@dataclass(slots=True)
class Followed:
    """What the network said of a whole clip. Filled shot by shot."""

    frames: int  # T
    persons: int = 0  # P
    logits: NDArray[np.float16] = field(
        default_factory=lambda: np.zeros((0, 0, 0, 0), np.float16)
    )  # [T, P, h, w] of the whole frame
    scores: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros((0, 0), np.float32)
    )  # [T, P] logits; above 0 a person is there
    events: list[Event] = field(default_factory=list)
    retold: int = 0

    def keep(self, frame: int, person: int, seen: Seen) -> None:
        """Keeps what was seen; later sight of the same frame replaces it."""
        self._make_room(person, *seen.logits.shape)
        held = seen.logits.clamp(_NOTHING, -_NOTHING).to(torch.float16)
        self.logits[frame, person] = held.numpy()
        self.scores[frame, person] = seen.score

    def is_there(self, frame: int, person: int) -> bool:
        """True if the person is seen in the frame, in more than a few pixels."""
        if person >= self.scores.shape[1] or self.scores[frame, person] <= 0:
            return False
        return float((self.logits[frame, person] > 0).mean()) >= LEAST_SHARE

    def _make_room(self, person: int, height: int, width: int) -> None:
        more = person + 1 - self.logits.shape[1]
        if more <= 0:
            return
        room = np.full((self.frames, more, height, width), _NOTHING, np.float16)
        self.logits = np.concatenate([self.logits, room], 1) if self.logits.size else room
        nobody = np.full((self.frames, more), _NOTHING, np.float32)
        self.scores = np.concatenate([self.scores, nobody], 1) if self.scores.size else nobody
        self.persons = person + 1


def follow(
    segmenter: Segmenter,
    frames: Frames,
    shot: range,
    chains: dict[int, Chain],
    prompts: Sequence[Prompt],
    into: Followed,
    check: Check = go_on,
    progress: Progress | None = None,
) -> None:
    """Follows persons through the frames of a `shot`, both ways from their prompts.

    `chains` are the boxes of those whom the detector saw. Nobody is looked for before the first
    frame that shows them, going either way. `check` is asked before each frame.
    """
    for is_back, (told, order) in zip((False, True), ways(shot, prompts)):
        _Way(segmenter, frames, chains, told, into, is_back).run(order, check, progress)


def ways(shot: range, prompts: Sequence[Prompt]) -> tuple[tuple[list[Prompt], range], ...]:
    """The prompts and the frames of the way to the end of a shot, and of that to its beginning.

    On the way back each person is shown once, where they are shown first.
    """
    if not prompts:
        return ()
    first = {one.person: one for one in sorted(prompts, key=lambda one: -one.frame)}
    begins, turns = (pick(one.frame for one in first.values()) for pick in (min, max))
    return (
        (list(prompts), range(begins, shot.stop)),
        (list(first.values()), range(turns, shot.start - 1, -1)),
    )


@dataclass(slots=True)
class _Way:
    """One way through a shot."""

    segmenter: Segmenter
    frames: Frames
    chains: dict[int, Chain]
    prompts: list[Prompt]
    into: Followed
    is_back: bool
    astray: dict[int, list[int]] = field(default_factory=dict)  # frames in a row, by person
    swapped: set[frozenset[int]] = field(default_factory=set)
    boxes: dict[int, dict[int, Doubles]] = field(default_factory=dict)  # of masks, by frame

    def run(self, order: Sequence[int], check: Check, progress: Progress | None) -> None:
        _, height, width, _ = self.frames.shape
        stream = Stream(self.segmenter, height, width, self.is_back)
        for now in order:
            check()
            told = [one for one in self.prompts if one.frame == now]
            self._keep(now, stream.show(self.frames[now], now, told))
            self._watch(stream, now)
            self.boxes.pop(now + (1 if self.is_back else -1) * (REWOUND + 1), None)
            if progress is not None:
                progress(1)

    def _keep(self, now: int, found: dict[int, Seen]) -> None:
        boxes = self.boxes.setdefault(now, {})
        for person, seen in found.items():
            self.into.keep(now, person, seen)
            boxes[person] = self._box(now, person)

    def _box(self, now: int, person: int) -> Doubles:
        """The box [4] of a mask in pixels of the frame; NaN if the person is not there."""
        if not self.into.is_there(now, person):
            return np.full(4, np.nan)
        mask = self.into.logits[now, person] > 0
        (height, width), (rows, columns) = self.frames.shape[1:3], mask.shape
        return box_of(mask) * np.array([width / columns, height / rows] * 2)

    def _watch(self, stream: Stream, now: int) -> None:
        boxes = self.boxes[now]
        for person, chain in self.chains.items():
            own = chain.at(now)
            if own is None or person not in boxes or overlap(boxes[person], own) >= _ASTRAY:
                self.astray[person] = []
                self.swapped = {pair for pair in self.swapped if person not in pair}
                continue
            self.astray.setdefault(person, []).append(now)
            if len(self.astray[person]) < REWOUND:
                continue
            other = self._whose(person, now)
            if other is not None:
                self._report_swap(person, other)
            elif (back := self._free(person)) is not None:
                self._tell_again(stream, person, back, now)

    def _whose(self, person: int, now: int) -> int | None:
        """Who should be where the mask of a person is."""
        mask = self.boxes[now][person]
        for other, chain in self.chains.items():
            box = chain.at(now)
            if other != person and box is not None and overlap(mask, box) >= _SWAPPED:
                return other
        return None

    def _report_swap(self, person: int, other: int) -> None:
        pair = frozenset((person, other))
        if pair in self.swapped:
            return
        self.swapped.add(pair)
        first = min(self.astray[person])
        said = (
            f"{{0}} and {{1}} may be swapped at frame {first}: look at the preview, and show them "
            "again by a correction if they are."
        )
        self.into.events.append(Event("swap", said, tuple(sorted(pair)), first))

    def _free(self, person: int) -> int | None:
        """The first of the last frames where the own box is sure and nobody else's mask is."""
        if self.into.retold >= MOST_RETOLD:
            return None
        for frame in self.astray[person][-REWOUND:]:
            own = self.chains[person].at(frame)
            others = [box for other, box in self.boxes[frame].items() if other != person]
            if (
                own is not None
                and self.chains[person].score(frame) > _SURE
                and all(overlap(own, box) < _FREE for box in others)
            ):
                return frame
        return None

    def _tell_again(self, stream: Stream, person: int, back: int, now: int) -> None:
        """Shows a person by their own box in the frame `back`, and follows again from there."""
        self.into.retold += 1
        self.astray[person] = []
        stream.rewind(person, back)
        step = -1 if self.is_back else 1
        for frame in range(back, now + step, step):
            told = [one for one in self.prompts if one.person == person and one.frame == frame]
            if frame == back:
                told = [prompt_at(person, self.chains[person], back)]
            self._keep(frame, stream.show(self.frames[frame], frame, told, only={person}))
        said = f"{{0}} was lost, and was shown by a box again at frame {back}."
        self.into.events.append(Event("lost", said, (person,), back))
