"""Corrections of masks: what a person says of a frame, replayed whenever masks are made again.

A JSON list of objects with frame (from 0), person (from 1, as found), and one of
box    x1, y1, x2, y2
points a list of x, y, inside (true or false)
mask   a list of rows of a picture of 0 and 1, or a path of a picture beside the list
Lengths are pixels of the frames that masks are made of. Source: docs/reference/masks.md 7.8.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.config import LIMITS
from engine.errors import BadRequest
from engine.masks.stored import load_flat
from engine.masks.stream import Prompt
from engine.media.framing import Size

_MOST = 1000
_MOST_BYTES = 64 * 2**20
_FORM = 'a list of {"frame": 12, "person": 1, "box": [x1, y1, x2, y2]}, or with points or mask'
_HALF = 128
_FARTHEST = 1e9  # pixels: farther is no place of a frame


@dataclass(frozen=True, slots=True)
class Correction:
    """What was said of a person in a frame."""

    prompt: Prompt  # its person from 0

    def key(self) -> list[object]:
        """Tells it from other corrections."""
        one = self.prompt
        return [
            one.person, one.frame, None if one.box is None else one.box.tolist(),
            one.points, None if one.mask is None else [one.mask.shape, one.mask.tobytes().hex()],
        ]  # fmt: skip


def read_corrections(path: Path) -> tuple[Correction, ...]:
    """Reads a file of corrections. Raises `BadRequest` for what is none, `BadMedia` for a mask."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise BadRequest(f"{path.name} is too large for corrections; {_FORM} is expected.")
        said = json.loads(path.read_bytes())
    except OSError as error:
        raise BadRequest(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{path.name} is no JSON; {_FORM} is expected.") from error
    return parse_corrections(said, path.parent)


def parse_corrections(said: object, folder: Path | None = None) -> tuple[Correction, ...]:
    """Checks corrections; paths of masks lie in `folder`, and are refused without one.

    Raises `BadRequest`, and `BadMedia` for a mask that cannot be read.
    """
    if not isinstance(said, list) or len(said) > _MOST:
        raise BadRequest(f"Corrections are no list of at most {_MOST}; {_FORM} is expected.")
    return tuple(_parsed(one, place, folder) for place, one in enumerate(said))


def check_corrections(corrections: Sequence[Correction], frames: int, size: Size) -> None:
    """Raises `BadRequest` for a frame, a place, or a size of a mask, that the clip has not."""
    for one in corrections:
        prompt = one.prompt
        if prompt.frame >= frames:
            raise BadRequest(
                f"A correction is of frame {prompt.frame}; the clip has 0 to {frames - 1}."
            )
        if prompt.mask is not None and prompt.mask.shape != size:
            rows, columns = prompt.mask.shape
            raise BadRequest(
                f"The mask of frame {prompt.frame} is {columns}x{rows}; {size[1]}x{size[0]}, the "
                "size of the frames, is expected."
            )
        if not _is_within(prompt, size):
            raise BadRequest(
                f"A box or point of frame {prompt.frame} lies outside of the frames, which are "
                f"{size[1]}x{size[0]}."
            )


def _is_within(prompt: Prompt, size: Size) -> bool:
    """Tells whether a box is in the frame, be it in part, and each point wholly."""
    height, width = size
    if prompt.box is not None:
        x1, y1, x2, y2 = prompt.box
        return bool(x1 < width and y1 < height and x2 > 0 and y2 > 0)
    return all(0 <= x <= width and 0 <= y <= height for x, y, _ in prompt.points)


def _parsed(one: object, place: int, folder: Path | None) -> Correction:
    named = f"Correction {place + 1}"
    if not isinstance(one, dict) or len(forms := {"box", "points", "mask"} & one.keys()) != 1:
        raise BadRequest(f"{named} has not one of box, points, mask; {_FORM} is expected.")
    if more := one.keys() - {"frame", "person", *forms}:
        raise BadRequest(f"{named} has {str(min(more, key=str))[:40]!r}; {_FORM} is expected.")
    frame, person = (one.get(key) for key in ("frame", "person"))
    if type(frame) is not int or not 0 <= frame < LIMITS.max_frames:
        raise BadRequest(f"{named}: frame is {frame!r:.40}; a whole number from 0 is expected.")
    if type(person) is not int or not 1 <= person <= LIMITS.max_identities:
        raise BadRequest(
            f"{named}: person is {person!r:.40}; 1 to {LIMITS.max_identities} is expected."
        )
    if "box" in forms:
        sides = _numbers(one["box"], 4, named, "box")
        if sides[2] <= sides[0] or sides[3] <= sides[1]:
            raise BadRequest(f"{named}: box is x1, y1, x2, y2 with x1 < x2 and y1 < y2.")
        return Correction(Prompt(person - 1, frame, box=np.array(sides)))
    if "points" in forms:
        return Correction(Prompt(person - 1, frame, points=_points(one["points"], named)))
    return Correction(Prompt(person - 1, frame, mask=_mask(one["mask"], named, folder)))


def _numbers(held: object, count: int, named: str, what: str) -> list[float]:
    if not isinstance(held, list) or len(held) != count:
        raise BadRequest(f"{named}: {what} is no list of {count} numbers.")
    usual = [type(one) in (int, float) and -_FARTHEST <= one <= _FARTHEST for one in held]
    if not all(usual):  # NaN is not either
        raise BadRequest(f"{named}: {what} has something else than numbers in it.")
    return [float(one) for one in held]


def _points(held: object, named: str) -> tuple[tuple[float, float, bool], ...]:
    if not isinstance(held, list) or not 0 < len(held) <= _MOST:
        raise BadRequest(f"{named}: points is no list of [x, y, true or false].")
    found = []
    for one in held:
        if not isinstance(one, list) or len(one) != 3 or type(one[2]) is not bool:
            raise BadRequest(f"{named}: points is no list of [x, y, true or false].")
        x, y = _numbers(one[:2], 2, named, "a point")
        found.append((x, y, one[2]))
    if not any(inside for *_, inside in found):
        raise BadRequest(f"{named}: none of its points is inside the person (true).")
    return tuple(found)


def _mask(held: object, named: str, folder: Path | None) -> np.ndarray:
    if isinstance(held, str):
        name = Path(held).name
        if folder is None or name != held:
            raise BadRequest(f"{named}: mask is no name of a picture beside the corrections.")
        return (load_flat(folder / name).numpy().max(-1) >= _HALF).astype(bool)
    try:
        mask = np.array(held, np.float64)
    except OverflowError as error:
        raise BadRequest(f"{named}: mask is no picture of 0 and 1.") from error
    except (ValueError, TypeError) as error:
        raise BadRequest(f"{named}: mask has rows of different lengths.") from error
    if mask.ndim != 2 or not mask.size or not np.isin(mask, (0, 1)).all():
        raise BadRequest(f"{named}: mask is no picture of 0 and 1.")
    return mask.astype(bool)
