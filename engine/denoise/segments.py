"""Long clips of SCAIL-2: segments are denoised one after the other, each begun by finished frames.

A segment sees the driving video from its first frame on; its own first frames are history, which
the model is shown clean and whose results are thrown away (docs/reference/scail2.md 6, 7). A plan
says where segments lie. Frames here are pixel frames of the clip, 0 .. frames - 1.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from engine.config import TRAINED_FRAMES, VAE_STRIDE
from engine.errors import BadRequest
from engine.flow import SegmentPlan, Settings

HISTORY_FRAMES = 5  # two latent frames, as in training
SHORTEST = 4, 5  # of the latents of a full segment: `even` makes none below this share


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the clip that is denoised at once."""

    start: int  # the first frame that it sees
    end: int  # the frame after the last of the clip that it makes
    frames: int  # how many it is denoised with, 4k + 1; those past `end` are cut off again
    history_frames: int  # how many finished frames begin it; their results are thrown away

    @property
    def history(self) -> slice:
        """The frames of the finished clip that begin it; none for the first segment."""
        return slice(self.start, self.start + self.history_frames)

    def stretch(self, clip: Tensor) -> Tensor:
        """Takes the frames that it sees of a driving video, or of its mask, [T, ...].

        The last one is repeated where the clip ends before the segment.
        """
        held = clip[self.start : min(self.end, self.start + self.frames)]
        missing = self.frames - len(held)
        if not missing:
            return held
        return torch.cat([held, held[-1:].expand(missing, *held.shape[1:])])


@dataclass(frozen=True, slots=True)
class _Lengths:
    length: int  # frames of a full segment
    overlap: int  # frames of history

    def __post_init__(self) -> None:
        length, overlap = self.length, self.overlap
        if length % 4 != 1 or overlap % 4 != 1 or not 0 < overlap < length:
            raise BadRequest(
                f"Segments of {length} frames with a history of {overlap} cannot be made: both "
                "must be multiples of 4 plus 1, and the history the shorter one."
            )
        if length - 1 < 3 * (overlap - 1):  # else history would be made of history
            raise BadRequest(
                f"Segments of {length} frames are too short for a history of {overlap}; at least "
                f"{3 * (overlap - 1) + 1} are expected."
            )

    @property
    def stride(self) -> int:
        return self.length - self.overlap


def plan(
    name: SegmentPlan,
    frames: int,
    length: int = TRAINED_FRAMES,
    overlap: int = HISTORY_FRAMES,
) -> list[Segment]:
    """Plans the segments of a clip of so many frames (docs/reference/scail2.md 6).

    `length` is the longest that the model was trained on, `overlap` its history. The last `end` is
    the length of the clip: `official` and `sat` drop frames at its end. Raises `BadRequest` for a
    name that is none, and for figures that no segments can be cut by.
    """
    if name not in PLANS:
        known = ", ".join(PLANS)
        raise BadRequest(f"There are no segments called {name!r}. Choose one of: {known}.")
    if frames < 1:
        raise BadRequest(f"A clip of {frames} frames cannot be made; at least 1 is expected.")
    return PLANS[name](frames, length, overlap)


def segments_of(settings: Settings, frames: int) -> list[Segment]:
    """Plans the segments of a job with so many frames: as long as its recipe's window."""
    return plan(settings.segments, frames, settings.recipe.window_frames)


def kept(segments: Sequence[Segment]) -> list[slice]:
    """Finds the frames of each segment's result that go into the clip.

    The history of a segment decides how far the one before it counts: frames of that one behind
    the history are thrown away, so the last of its kept frames are the history.
    """
    ends = [after.history.stop for after in segments[1:]]
    return [
        slice(segment.history_frames, end - segment.start)
        for segment, end in zip(segments, [*ends, segments[-1].end], strict=True)
    ]


def within_clip(chunks: Generator[Tensor], part: slice) -> Iterator[Tensor]:
    """Hands on those of a segment's frames, in chunks [n, H, W, 3], that go into the clip.

    What lies behind them is not made.
    """
    passed = 0
    with closing(chunks):
        for chunk in chunks:
            first, last = max(part.start - passed, 0), part.stop - passed
            passed += len(chunk)
            if first < min(last, len(chunk)):
                yield chunk[first:last]
            if passed >= part.stop:
                return


def ending(chunks: Iterator[Tensor], count: int) -> Generator[Tensor, None, Tensor | None]:
    """Hands on chunks [n, H, W, 3], and returns their last `count` frames, None if there are 0."""
    held: Tensor | None = None
    for chunk in chunks:
        yield chunk
        if count:
            held = (chunk if held is None else torch.cat([held, chunk]))[-count:]
    return held


def _official(frames: int, cut: _Lengths) -> list[Segment]:
    """Cuts full segments and drops what fills none."""
    if frames <= cut.length:
        whole = frames - (frames - 1) % VAE_STRIDE[0]
        return [Segment(0, whole, whole, 0)]
    return _full_segments((frames - cut.overlap) // cut.stride, cut)


def _sat(frames: int, cut: _Lengths) -> list[Segment]:
    """Cuts as `_official`, and drops a last segment that ends with the clip."""
    planned = _official(frames, cut)
    if frames > cut.length and planned[-1].end == frames:
        planned.pop()
    return planned


def _cover(frames: int, cut: _Lengths) -> list[Segment]:
    """Cuts full segments and a last one, however short, of the frames that are left."""
    if frames <= cut.length:
        return _whole(frames)
    planned = _official(frames, cut)
    start = planned[-1].end - cut.overlap
    if planned[-1].end < frames:
        planned.append(Segment(start, frames, _padded(frames - start), cut.overlap))
    return planned


def _even(frames: int, cut: _Lengths) -> list[Segment]:
    """Cuts segments of one length, as few as can be and none of them short.

    Starts are rounded to whole frames, halves to even ones.
    """
    padded = _padded(frames)
    if padded <= cut.length:
        return _whole(frames)
    count = 1 + math.ceil((padded - cut.length) / cut.stride)
    needed = _padded(math.ceil((padded + cut.overlap * (count - 1)) / count))
    length = max(needed, _shortest(cut))
    starts = [round(i * (padded - length) / (count - 1)) for i in range(count)]
    return [
        Segment(start, min(start + length, frames), length, cut.overlap if start else 0)
        for start in starts
    ]


def _whole(frames: int) -> list[Segment]:
    """Takes the clip as one: it fits, or context windows move over it and there is no history."""
    return [Segment(0, frames, _padded(frames), 0)]


def _full_segments(count: int, cut: _Lengths) -> list[Segment]:
    starts = [i * cut.stride for i in range(count)]
    return [
        Segment(start, start + cut.length, cut.length, cut.overlap if start else 0)
        for start in starts
    ]


def _padded(frames: int) -> int:
    """Rounds up to 4k + 1 frames, which the VAE takes."""
    return VAE_STRIDE[0] * math.ceil((frames - 1) / VAE_STRIDE[0]) + 1


def _shortest(cut: _Lengths) -> int:
    """Finds the length below which `even` makes no segment: 65 of 81.

    Where segments are short it leaves room for the second to begin behind the first one's history.
    """
    share, of = SHORTEST
    full = (cut.length - 1) // VAE_STRIDE[0]
    return min(VAE_STRIDE[0] * math.ceil(full * share / of) + 1, cut.stride + 1)


def _cut(by: Callable[[int, _Lengths], list[Segment]]) -> "_Plan":
    return lambda frames, length, overlap: by(frames, _Lengths(length, overlap))


_Plan: TypeAlias = Callable[[int, int, int], list[Segment]]  # frames, length, overlap
PLANS: Mapping[str, _Plan] = {  # by `flow.SegmentPlan`
    "even": _cut(_even),
    "cover": _cut(_cover),
    "official": _cut(_official),
    "sat": _cut(_sat),
    "windows": lambda frames, length, overlap: _whole(frames),
}
