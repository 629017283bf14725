"""Long clips of SCAIL-2: segments are denoised one after the other, each begun by finished frames.

A segment sees the driving video from its first frame on; its own first frames are history, which
the model is shown clean and whose results are thrown away (docs/reference/scail2.md 6, 7). A plan
says where segments lie. Frames here are pixel frames of the clip, 0 .. frames - 1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from engine.config import TRAINED_FRAMES, VAE_STRIDE
from engine.denoise.windows import latent_frames
from engine.errors import BadRequest
from engine.flow import SegmentPlan

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

    @property
    def history_latents(self) -> int:
        """Counts the latent frames that its history becomes."""
        return latent_frames(self.history_frames) if self.history_frames else 0

    @property
    def driving(self) -> list[int]:
        """Lists the frames of the driving video and its mask that it sees; the last one repeats."""
        return [min(frame, self.end - 1) for frame in range(self.start, self.start + self.frames)]


@dataclass(frozen=True, slots=True)
class _Lengths:
    length: int  # frames of a full segment
    overlap: int  # frames of history

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
    if length % 4 != 1 or overlap % 4 != 1 or not 0 < overlap < length:
        raise BadRequest(
            f"Segments of {length} frames with a history of {overlap} cannot be made: both must be "
            "multiples of 4 plus 1, and the history the shorter one."
        )
    if length - 1 < 3 * (overlap - 1):  # else history would be made of history
        raise BadRequest(
            f"Segments of {length} frames are too short for a history of {overlap}; at least "
            f"{3 * (overlap - 1) + 1} are expected."
        )
    return PLANS[name](frames, _Lengths(length, overlap))


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
        return _whole(frames, cut)
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
        return _whole(frames, cut)
    count = 1 + math.ceil((padded - cut.length) / cut.stride)
    needed = _padded(math.ceil((padded + cut.overlap * (count - 1)) / count))
    length = max(needed, _shortest(cut))
    starts = [round(i * (padded - length) / (count - 1)) for i in range(count)]
    return [
        Segment(start, min(start + length, frames), length, cut.overlap if start else 0)
        for start in starts
    ]


def _whole(frames: int, cut: _Lengths) -> list[Segment]:
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


_Plan: TypeAlias = Callable[[int, _Lengths], list[Segment]]
PLANS: Mapping[str, _Plan] = {  # by `flow.SegmentPlan`
    "even": _even,
    "cover": _cover,
    "official": _official,
    "sat": _sat,
    "windows": _whole,
}
