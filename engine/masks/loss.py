"""What the crop to the shape of the clip cuts off the persons of a driving mask.

Some frames are looked at as they are stored, before they are cropped and cleaned: the figure is a
share of a person, and a blurred edge is no matter.
"""

import torch
from torch import Tensor

from engine.flow import Warned
from engine.masks.colours import CLASSES, PERSONS, WHITE, numbers_of
from engine.media.framing import Size, covering_size, crop_nearest

_FRAMES = 16  # that are looked at
_MOST = 0.02  # of a person


class Loss:
    """Owns the counts of persons inside and outside of the crop."""

    def __init__(self, shape: Size, size: Size, count: int) -> None:
        """Begins for `count` frames of a video of `shape` that is cropped to `size`."""
        self.shape, self.size = shape, size
        self._covered = covering_size(*shape, size)
        self._every = max(1, -(-count // _FRAMES))
        self._most: dict[int, tuple[float, int]] = {}  # colour -> share lost, frame

    def look(self, number: int, frame: Tensor) -> None:
        """Counts in a frame: colours [h, w, 3] u8 or labels [h, w] u8, uncropped."""
        if number % self._every or self._covered == self.size:
            return
        whole = crop_nearest(frame[None], self.shape, self._covered)[0]
        inside = crop_nearest(frame[None], self.shape, self.size)[0]
        counts = [
            torch.bincount(self._numbers(one).flatten(), minlength=8) for one in (whole, inside)
        ]
        for colour in range(1, 8):
            if total := int(counts[0][colour]):
                share = 1 - int(counts[1][colour]) / total
                if share > self._most.get(colour, (0.0, 0))[0]:
                    self._most[colour] = share, number

    def warnings(self, persons: tuple[str, ...]) -> tuple[Warned, ...]:
        """Warns of the persons, of those that the file shows, whom the crop cuts."""
        found: list[Warned] = []
        for person in persons:
            share, frame = self._most.get(CLASSES[person], (0.0, 0))
            if persons == PERSONS[:1]:  # a matte has it in white
                share, frame = max((share, frame), self._most.get(WHITE, (0.0, 0)))
            if share > _MOST:
                found.append(Warned("crop", _said(person, share, frame), frame))
        return tuple(found)

    def _numbers(self, frame: Tensor) -> Tensor:
        if frame.ndim == 3:
            return numbers_of(frame)
        return torch.tensor([0, *(CLASSES[name] for name in PERSONS)])[frame.int()]


def _said(person: str, share: float, frame: int) -> str:
    return (
        f"{share:.0%} of the person in {person} is cut off by the crop in frame {frame} of the "
        "video: ask for a size of the video's shape, or cut the video closer."
    )
