"""Persons followed frame by frame, in either direction, in memory that does not grow.

A session for each person: prompts of one then change nothing of another, and what the encoder made
of a frame is shared. Of earlier frames only what the network looks back at is kept, which gives
the same masks. Source: docs/reference/masks.md 7.3.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.masks.segmenter import Segmenter, Session
from engine.pose.arrays import Bools, Doubles, Frame

REWOUND = 3  # frames that a person may be taken back by
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CORNERS = (2, 3)  # labels of the corners of a box, upper left and lower right
_ONLY = 0  # the number of the one person of a session


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a person is told by in one frame: a box, points or a mask. Pixels of the frame."""

    person: int  # from 0
    frame: int
    box: Doubles | None = None  # [4] x1, y1, x2, y2
    points: tuple[tuple[float, float, bool], ...] = ()  # x, y, and whether it is of the person
    mask: Bools | None = None  # [H, W]


@dataclass(frozen=True, slots=True)
class Seen:
    """One person in one frame."""

    logits: Tensor  # [h, w] fp32 of the whole frame, above 0 where the person is
    score: float  # logit of the person's being there


@dataclass(slots=True)
class Stream:
    """One way through a clip. Owns the network's memory of it."""

    segmenter: Segmenter
    height: int
    width: int
    reverse: bool = False
    _sessions: dict[int, Session] = field(default_factory=dict)
    _pixels: tuple[int, Tensor] | None = None  # of the newest frame, for each who is looked for

    def show(
        self, frame: Frame, now: int, prompts: Sequence[Prompt] = (), only: Collection[int] = ()
    ) -> dict[int, Seen]:
        """Looks at the next frame [H, W, 3] u8 for everybody who was told so far, or for `only`.

        Whoever is told by one of `prompts` is known from this frame on.
        """
        for prompt in prompts:
            self._tell(prompt, now)
        persons = [one for one in self._sessions if not only or one in only]
        return {person: self._look(self._sessions[person], frame, now) for person in persons}

    def rewind(self, person: int, first: int) -> None:
        """Forgets what was found of a person from the frame `first` on, as this stream runs.

        `first` is at most `REWOUND` frames back.
        """
        session = self._sessions[person]
        outputs = session.output_dict_per_obj[_ONLY].values()
        for held in (*outputs, session.frames_tracked_per_obj[_ONLY]):
            for frame in [frame for frame in held if self._age(frame, first) <= 0]:
                del held[frame]

    def _age(self, frame: int, now: int) -> int:
        """How many frames before `now` it was shown."""
        return frame - now if self.reverse else now - frame

    def _tell(self, prompt: Prompt, now: int) -> None:
        session = self._sessions.get(prompt.person)
        if session is None:
            session = self._opened()
            self._sessions[prompt.person] = session
        one = session.obj_id_to_idx(_ONLY)
        if prompt.mask is not None:
            session.remove_point_inputs(one, now)
            session.add_mask_inputs(one, now, self._stretched(prompt.mask))
        else:
            session.remove_mask_inputs(one, now)
            session.add_point_inputs(one, now, self._points(prompt))
        session.obj_with_new_inputs = [_ONLY]

    def _opened(self) -> Session:
        session = self.segmenter.opened(self.height, self.width)
        for other in self._sessions.values():
            session.cache = other.cache
            break
        if session.processed_frames is None:
            session.processed_frames = {}
        return session

    def _look(self, session: Session, frame: Frame, now: int) -> Seen:
        if self._pixels is None or self._pixels[0] != now:
            self._pixels = now, to_input(frame, self.segmenter)
        answer = self.segmenter.network(
            session, frame=self._pixels[1], frame_idx=now, reverse=self.reverse
        )
        self._prune(session, now)
        logits = answer.pred_masks.reshape(-1, *answer.pred_masks.shape[-2:])[0]
        return Seen(logits.float().cpu(), float(answer.object_score_logits.reshape(-1)[0]))

    def _prune(self, session: Session, now: int) -> None:
        """Lets go of what no later frame looks back at: pixels, large masks, old outputs."""
        cast(dict[int, Tensor], session.processed_frames).clear()
        outputs = session.output_dict_per_obj[_ONLY]
        for held in outputs.values():
            for output in held.values():
                output.pop("high_res_masks", None)
        recent = outputs["non_cond_frame_outputs"]
        for frame in [one for one in recent if self._age(one, now) > self.segmenter.kept + REWOUND]:
            del recent[frame]

    def _points(self, prompt: Prompt) -> dict[str, Tensor]:
        scale = torch.tensor([self.segmenter.side / self.width, self.segmenter.side / self.height])
        points = [(x, y) for x, y, _ in prompt.points]
        labels = [int(is_inside) for *_, is_inside in prompt.points]
        if prompt.box is not None:  # the network takes corners before points
            most = (self.width, self.height) * 2
            x1, y1, x2, y2 = (float(min(max(s, 0), m)) for s, m in zip(prompt.box, most))
            points, labels = [(x1, y1), (x2, y2), *points], [*_CORNERS, *labels]
        return {
            "point_coords": (torch.tensor(points) * scale)[None, None],
            "point_labels": torch.tensor(labels, dtype=torch.int32)[None, None],
        }

    def _stretched(self, mask: Bools) -> Tensor:
        side = self.segmenter.side
        shares = torch.from_numpy(mask).float()[None, None]
        return (F.interpolate(shares, (side, side), mode="bilinear", antialias=True) >= 0.5).float()


def to_input(frame: Frame, segmenter: Segmenter) -> Tensor:
    """[H, W, 3] u8 -> the network's [3, side, side], stretched whatever its shape."""
    pixels = torch.from_numpy(frame).to(segmenter.device).permute(2, 0, 1)[None].float() / 255
    side = segmenter.side
    square = F.interpolate(
        pixels, (side, side), mode="bilinear", align_corners=False, antialias=True
    )[0]
    mean, std = (square.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return ((square - mean) / std).to(segmenter.dtype)
