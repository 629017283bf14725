"""Masks that were made for a clip: labels of persons, where each was found, and what to look at.

Labels are stored for the whole frame of the video at the size at which it covers the clip, so that
cropping them as the video is cropped gives those of the clip, pixel by pixel.
Source: docs/reference/masks.md 6.
"""

from dataclasses import dataclass

from torch import Tensor

from engine.flow import Warned

VERSION = 1  # of the record and of its file; a reader knows only its own


@dataclass(frozen=True, slots=True)
class MadeMasks:
    """The masks of a driving video and of its reference.

    Label n is person n, in the colour `colours.PERSONS[n - 1]`; 0 is background. A person who is
    not seen in a frame has NaN there.
    """

    labels: Tensor  # [T, H, W] u8, the whole frame at `framing.covering_size`
    reference: Tensor | None  # [h, w] u8 of the picture at its own size; None: it has none
    boxes: Tensor  # [T, P, 4] fp32: x1, y1, x2, y2 in pixels of the labels
    scores: Tensor  # [T, P] fp32, 0 to 1: how sure the segmenter was
    fps: float  # of the labels
    source_sha256: str  # of the video file
    order: tuple[int, ...]  # which person as found, from 1, has label 1, 2, ..
    model: str  # that made them, with its hash; "" if they were drawn or read
    image_sha256: str = ""  # of the picture's file; "": it has no mask here
    warned: tuple[Warned, ...] = ()
    version: int = VERSION

    @property
    def persons(self) -> int:  # P
        return self.boxes.shape[1]
